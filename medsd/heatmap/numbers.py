"""Probabilities and shares as a reader sees them, the same on every output."""

from __future__ import annotations

import math
from decimal import ROUND_HALF_UP, Decimal

_LEAST_PLACES, _MOST_PLACES = 3, 9


def probability_text(value: float, least_places: int = _LEAST_PLACES) -> str:
    """A probability, or a score made of some: 0.29, 0.0004, 0.9996; near 0 and near 1 two digits that say how near.

    Never 0 or 1 for what is neither, down to 9 places. `probabilityText` of the report's script is the same.

    Example:
        >>> [probability_text(value) for value in (0.2887, 0.0004, 0.9996, 1.0)]
        ['0.289', '0.0004', '0.9996', '1']
    """
    rest = min(value, 1 - value)
    telling = 1 - math.floor(math.log10(rest)) if rest > 0 else 0
    places = Decimal(1).scaleb(-max(least_places, min(telling, _MOST_PLACES)))
    # Half up, as the script rounds; Python's own is half to even.
    return f"{Decimal(value).quantize(places, ROUND_HALF_UP):f}".rstrip("0").rstrip(".")


def percent(share: float, places: int = 0) -> str:
    """A share in hundredths, with the blank that SI has there: 0.95 is "95 %"."""
    return f"{100 * share:.{places}f} %"


def score_texts(score: float, cut_off: float | None) -> tuple[str, str]:
    """A slide score and its cut-off, with as many digits as tell them apart; "" for no cut-off.

    Example:
        >>> score_texts(0.0743, 0.0744), score_texts(0.29, 0.5)
        (('0.0743', '0.0744'), ('0.29', '0.5'))
    """
    if cut_off is None:
        return probability_text(score), ""
    places = _LEAST_PLACES
    while score != cut_off and probability_text(score, places) == probability_text(cut_off, places):
        places += 1
    return probability_text(score, places), probability_text(cut_off, places)
