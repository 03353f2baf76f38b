"""Checks of values that a user gives: one wording, one place for what counts as a number."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from medsd.errors import ConfigError, nearest

WORKERS = "[1, 1024]"
"""How many may work at once: each opens its slide anew, and takes memory."""
_INTERVAL = re.compile(r"([\[(])\s*(\S+)\s*,\s*(\S+)\s*([\])])")


def check_number(name: str, value: object, interval: str, whole: bool = False, hint: str = "") -> None:
    """Refuse what is no number of an interval.

    Args:
        name: the key, as the user wrote it.
        value: what is checked; bool, text and NaN are no numbers.
        interval: in brackets, round ones excluding the end: "[0, 1)", "(0, inf)".
        whole: refuse fractions, also 64.0.
        hint: ends the message, such as "null trains to the end".

    Raises:
        ConfigError: the value is no such number.

    Example:
        >>> check_number("masked_share", 30, "[0, 1)")
        Traceback (most recent call last):
        medsd.errors.ConfigError: masked_share=30: must be a number from 0 to 1, 1 excluded
    """
    kinds = int if whole else int | float
    found = _INTERVAL.fullmatch(interval)
    if found is None:
        raise ValueError(f"interval '{interval}': write it as '[0, 1)'")
    left, low, high, right = found.groups()
    # isinstance before the comparison: text does not compare; NaN fails both.
    if isinstance(value, kinds) and not isinstance(value, bool):
        above = value > float(low) if left == "(" else value >= float(low)
        below = value < float(high) if right == ")" else value <= float(high)
        if above and below:
            return
    words = _in_words(low, left == "(", high, right == ")")
    noun = "a whole number" if whole else "a number"
    raise ConfigError(f"{name}={value!r}: must be {noun} {words}{'; ' if hint else ''}{hint}")


def whole_number(share: float, of: int) -> int:
    """floor(share * of), or the whole number that it nearly gives: 0.29 * 100 is a little less than 29."""
    return int(share * of + 1e-6)


def check_flag(name: str, value: object) -> None:
    """Raises ConfigError: the value is neither True nor False; "no" would count as true."""
    if not isinstance(value, bool):
        raise ConfigError(f"{name}={value!r}: must be true or false")


def check_choice(name: str, value: object, choices: Iterable[str]) -> None:
    """Refuse what is none of the choices, such as `get_args` of a Literal; the message names the nearest.

    Raises:
        ConfigError: the value is none of them.

    Example:
        >>> check_choice("mode", "cova", ("cov", "zca"))
        Traceback (most recent call last):
        medsd.errors.ConfigError: mode='cova': use one of cov, zca; did you mean 'cov'?
    """
    known = list(choices)
    if value not in known:
        raise ConfigError(f"{name}={value!r}: use one of {', '.join(known)}{nearest(str(value), known)}")


def check_options(name: str, options: Mapping[str, Any], known: set[str]) -> None:
    """Raises ConfigError: an option that a method does not have."""
    for key in options:
        if key not in known:
            hint = nearest(key, known) or f"; it has {', '.join(sorted(known)) or 'none'}"
            raise ConfigError(f"method '{name}': no option '{key}'{hint}")


def _in_words(low: str, above: bool, high: str, below: bool) -> str:
    if math.isinf(float(high)):
        return f"above {low}" if above else f"from {low} on"
    excluded = [end for end, left_out in ((low, above), (high, below)) if left_out]
    return f"from {low} to {high}" + (f", {' and '.join(excluded)} excluded" if excluded else "")
