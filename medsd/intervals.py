"""Values with 95 % bootstrap intervals over items, or over groups of items such as the tiles of a slide.

Over few groups such intervals are too narrow: of an AUC over 4 slides they hold the truth in about three of four drawn
cohorts, over 20 slides in nine of ten, not in 95 % (`tests/evaluate/test_scores.py`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medsd.checks import check_number
from medsd.errors import DatasetError

Floats = npt.NDArray[np.float64]

LEVEL = 0.95
_DRAWN_AT_ONCE = 2**18


@dataclass(frozen=True)
class Interval:
    """A value with its confidence interval.

    Attributes:
        value: the score of all items.
        low, high: bounds of the interval; nan where there is none: of one item or group, or where every resample has
            the same score, as an AUC of 1 has, which does not mean that it is known to the last digit.
        level: its coverage, 0 to 1.
        resamples: resamples that the bounds rest on (those without both classes have no AUC and are left out); 0 where
            that is not known.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    level: float = LEVEL
    resamples: int = 0

    def __format__(self, digits: str) -> str:
        """`f"{found:.3f}"`: the value with its bounds, "0.814 (0.700 to 0.902)", or alone where there are none."""
        if math.isnan(self.low + self.high):
            return format(self.value, digits)
        return f"{self.value:{digits}} ({self.low:{digits}} to {self.high:{digits}})"


def bootstrap_groups(
    statistic: Callable[[Floats], float], groups: npt.ArrayLike, resamples: int = 2000, seed: int = 0
) -> Interval:
    """Any statistic with a 95 % percentile bootstrap interval (Efron 1979) over groups of items.

    Two statistics of the same groups with the same seed are resampled alike, so that a difference of two is paired.

    Args:
        statistic: of the items' weights (n,), whole numbers that say how often each is there; nan where undefined.
        groups: numbers or names that items of one slide (or patient) share, shape (n,).
        resamples, seed: as in `bootstrap_auc`.

    Raises:
        ConfigError: `resamples` below 1.

    Example:
        >>> correct, slides = np.array([1, 1, 0, 1]), ["a", "a", "b", "b"]
        >>> found = bootstrap_groups(lambda weight: float(weight @ correct / weight.sum()), slides)
        >>> found.value, found.low, found.high
        (0.75, 0.5, 1.0)
    """
    check_number("resamples", resamples, "[1, inf)", whole=True)
    names, group = np.unique(np.asarray(groups), return_inverse=True)
    value = statistic(np.ones(len(group)))
    if math.isnan(value):
        return _interval(math.nan, np.empty(0))
    random, count = np.random.default_rng(seed), len(names)
    drawn = np.empty(resamples)
    for index in range(resamples):
        times = np.bincount(random.integers(count, size=count), minlength=count)
        drawn[index] = statistic(times[group].astype(np.float64))
    return _interval(value, drawn[~np.isnan(drawn)])


def bootstrap_mean(
    values: npt.ArrayLike, resamples: int = 2000, seed: int = 0, groups: npt.ArrayLike | None = None
) -> Interval:
    """Mean of values (n,) with a 95 % percentile bootstrap interval (Efron 1979) over items or groups; nan of nothing.

    Two runs on the same items, given in the same order and with the same seed, are resampled alike.
    Other arguments as in `bootstrap_auc`.

    Raises:
        DatasetError: values that are not finite, or not of shape (n,).
        ConfigError: `resamples` below 1.
    """
    check_number("resamples", resamples, "[1, inf)", whole=True)
    items = np.asarray(values, np.float64)
    if items.ndim != 1 or not np.isfinite(items).all():
        raise DatasetError(f"mean of {items.shape} values: give (n,) finite ones, leave undefined items out")
    if not len(items):
        return _interval(math.nan, np.empty(0))
    if groups is not None:
        if np.shape(groups) != items.shape:
            raise DatasetError(f"mean of {items.shape} values: {np.shape(groups)} groups; give one group an item")
        return bootstrap_groups(lambda weight: float(weight @ items / weight.sum()), groups, resamples, seed)
    random = np.random.default_rng(seed)
    rows = max(1, _DRAWN_AT_ONCE // len(items))
    drawn = [
        items[random.integers(len(items), size=(min(rows, resamples - start), len(items)))].mean(axis=1)
        for start in range(0, resamples, rows)
    ]
    return _interval(float(items.mean()), np.concatenate(drawn))


def _interval(value: float, drawn: Floats) -> Interval:
    """From the scores of resamples; nan where there are none, or all are alike (but for rounding)."""
    if not len(drawn) or np.ptp(drawn) <= 1e-12 * abs(value):
        return Interval(value, resamples=len(drawn))
    low, high = np.quantile(drawn, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high), LEVEL, len(drawn))
