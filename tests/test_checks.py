"""Numbers that users give."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsd.checks import check_choice, check_number
from medsd.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "interval", "whole"),
    [(0, "[0, 1)", False), (0.999, "[0, 1)", False), (1, "(0, 1]", True), (10**9, "[2, inf)", True)],
)
def test_numbers_of_the_interval_pass(value: float, interval: str, whole: bool) -> None:
    check_number("key", value, interval, whole)


@pytest.mark.parametrize("value", [1, -0.001, math.nan, math.inf, True, "0.5", None, (0, 5), [0.5]])
def test_everything_else_is_refused_with_its_name(value: object) -> None:
    with pytest.raises(ConfigError, match=r"^key=.*: must be a number from 0 to 1, 1 excluded; mend it$"):
        check_number("key", value, "[0, 1)", hint="mend it")


@pytest.mark.parametrize("value", [64.5, 64.0, "64"])
def test_fractions_are_not_whole(value: object) -> None:
    with pytest.raises(ConfigError, match="must be a whole number from 1 on"):
        check_number("tile_px", value, "[1, inf)", whole=True)


@given(st.floats(allow_nan=False), st.floats(-5, 5), st.floats(0, 5))
def test_agrees_with_comparing_by_hand(value: float, low: float, width: float) -> None:
    high = low + width
    inside = low < value <= high
    try:
        check_number("key", value, f"({low}, {high}]")
    except ConfigError:
        assert not inside
    else:
        assert inside


@pytest.mark.parametrize("value", ["cova", None, 3, ["cov"]])
def test_what_is_no_choice_is_refused(value: object) -> None:
    check_choice("mode", "cov", ("cov", "zca"))
    with pytest.raises(ConfigError, match=r"^mode=.*: use one of cov, zca"):
        check_choice("mode", value, ("cov", "zca"))
