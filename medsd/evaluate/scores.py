"""Scores of a classifier (AUC, ROC, threshold) with bootstrap intervals, and of a saliency map (pointing share)."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medsd.errors import DatasetError
from medsd.intervals import Floats as Floats
from medsd.intervals import Interval as Interval
from medsd.intervals import bootstrap_groups as bootstrap_groups
from medsd.intervals import bootstrap_mean as bootstrap_mean

Bools = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class PointingShare:
    """How much of a saliency map points at a class, over the tissue that was seen.

    Attributes:
        positive_inside: share of the positive saliency that lies in it, 0 to 1; nan without positive saliency.
        area_share: share of the seen tissue that is the class, 0 to 1: what a constant map would score.
        ratio: `positive_inside / area_share`; 1 is chance, nan where none of it is seen.
    """

    positive_inside: float
    area_share: float
    ratio: float


def auc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """The area under the ROC curve: the chance that a positive scores above a negative, ties counting half.

    The rank statistic of Mann and Whitney (1947), 0 to 1; nan where only one class (or nothing) is given.

    Args:
        labels: 0 or 1, shape (n,).
        scores: higher means more likely positive, shape (n,).

    Raises:
        DatasetError: labels other than 0 and 1, scores that are not finite, or unequal lengths.

    Example:
        >>> auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        0.75
    """
    return weighted_auc(labels, scores)(np.ones(len(np.atleast_1d(scores))))


def bootstrap_auc(
    labels: npt.ArrayLike,
    scores: npt.ArrayLike,
    groups: npt.ArrayLike | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """AUC with a 95 % percentile bootstrap interval (Efron 1979); nan where only one class is given.

    Tiles of a slide are not independent: give the slide of each item as `groups`, and whole slides are resampled.

    Args:
        labels, scores: as in `auc`.
        groups: numbers or names that items of one slide (or patient) share, shape (n,); without it items are resampled.
        resamples: number of resamples.
        seed: of the random numbers; the same seed gives the same interval.

    Raises:
        DatasetError: as `auc`, or `groups` of another length.
        ConfigError: `resamples` below 1.
    """
    statistic = weighted_auc(labels, scores)
    shape = np.shape(scores)
    group = np.arange(*shape) if groups is None else np.asarray(groups)
    if group.shape != shape:
        raise DatasetError(f"scores: {group.shape} groups and {shape} scores; give one group an item")
    return bootstrap_groups(statistic, group, resamples, seed)


def weighted_auc(labels: npt.ArrayLike, scores: npt.ArrayLike) -> Callable[[Floats], float]:
    """The AUC as a function of the items' weights (n,), for `bootstrap_groups`; nan where a class has no weight.

    Arguments and errors as in `auc`.

    Example:
        >>> one, other = (weighted_auc([0, 0, 1], scores) for scores in ([0.1, 0.5, 0.4], [0.1, 0.2, 0.4]))
        >>> bootstrap_groups(lambda weight: other(weight) - one(weight), ["a", "b", "c"]).value
        0.5
    """
    positive, values = check_scores(labels, scores)
    tie = np.unique(values, return_inverse=True)[1]  # ranked once: the AUC of a resample is linear in the items
    return lambda weight: _auc_of_ties(positive, tie, weight)


def roc_curve(labels: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[Floats, Floats, Floats]:
    """The ROC curve: false-positive rate, sensitivity and falling thresholds, each of shape (distinct scores + 1,).

    One point a distinct score, from (0, 0), whose threshold is infinite, to (1, 1). Arguments as in `auc`.

    Raises:
        DatasetError: as `auc`, or only one class.

    Example:
        >>> false_positive_rate, sensitivity, thresholds = roc_curve([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8])
        >>> sensitivity.tolist(), thresholds.tolist()
        ([0.0, 0.5, 0.5, 1.0, 1.0], [inf, 0.8, 0.4, 0.35, 0.1])
    """
    positive, values = check_scores(labels, scores)
    if positive.all() or not positive.any():
        raise DatasetError(
            f"scores: all {len(values)} items have one class; a ROC curve needs items with and without it"
        )
    distinct, tie = np.unique(values, return_inverse=True)
    counts = (np.bincount(tie[chosen], minlength=len(distinct))[::-1] for chosen in (~positive, positive))
    rates = (np.concatenate([[0.0], np.cumsum(count) / count.sum()]) for count in counts)
    return *rates, np.concatenate([[math.inf], distinct[::-1]])  # type: ignore[return-value]


def youden_threshold(labels: npt.ArrayLike, scores: npt.ArrayLike) -> float:
    """The threshold with the largest sensitivity + specificity - 1 (Youden 1950); `score >= threshold` is positive.

    It lies midway between neighbouring scores. Of equal ones the lowest is taken, since a missed lesion costs more than
    a false alarm (our choice). Where none beats chance it is the lowest score: everything is called positive.
    Arguments as in `auc`.

    Raises:
        DatasetError: as `auc`, or only one class.

    Example:
        >>> youden_threshold([0, 0, 1, 1], [0.0, 0.2, 0.6, 0.9])
        0.4
    """
    false_positive_rate, sensitivity, falling = roc_curve(labels, scores)
    youden = (sensitivity - false_positive_rate)[1:]
    # Equal values differ by rounding of the rates, hence the tolerance.
    best = 1 + int(np.flatnonzero(youden >= youden.max() - 1e-12)[-1])
    if best == len(falling) - 1:
        return float(falling[-1])
    upper, lower = float(falling[best]), float(falling[best + 1])
    middle = lower / 2 + upper / 2
    return middle if lower < middle <= upper else upper


def dice(found: Bools, truth: Bools) -> float:
    """Overlap of two areas, twice what they share over the sum of both (Dice 1945), 0 to 1; nan without any truth.

    Args:
        found, truth: of one shape.

    Example:
        >>> dice(np.array([True, True, False]), np.array([True, False, False]))
        0.666...
    """
    size = int(np.count_nonzero(truth))
    return 2 * int(np.count_nonzero(found & truth)) / (int(np.count_nonzero(found)) + size) if size else math.nan


def inside_share(saliency: npt.NDArray[np.floating], inside: Bools, tissue: Bools) -> PointingShare:
    """Energy pointing: the share of the positive saliency that lies in a class, against its share of the area.

    After the energy-based pointing game (Wang et al. 2020, Score-CAM), counted over seen tissue only (our choice).

    Args:
        saliency: signed map, shape (h, w); NaN is not seen.
        inside, tissue: shape (h, w).

    Raises:
        DatasetError: shapes differ, or the saliency is infinite somewhere.
    """
    if not saliency.shape == inside.shape == tissue.shape:
        raise DatasetError(
            f"pointing share: saliency {saliency.shape}, inside {inside.shape} and tissue {tissue.shape} differ; "
            "put all three on one grid"
        )
    if np.isinf(saliency).any():
        raise DatasetError("pointing share: the saliency is infinite somewhere; compute it in float32, not float16")
    seen = np.asarray(tissue, np.bool_) & ~np.isnan(saliency)
    within = seen & np.asarray(inside, np.bool_)
    positive = np.maximum(saliency, 0.0, dtype=np.float64)
    positive_inside = _ratio(float(positive[within].sum()), float(positive[seen].sum()))
    area_share = _ratio(float(np.count_nonzero(within)), float(np.count_nonzero(seen)))
    return PointingShare(positive_inside, area_share, _ratio(positive_inside, area_share))


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole > 0 else math.nan


def check_scores(labels: npt.ArrayLike, scores: npt.ArrayLike) -> tuple[Bools, Floats]:
    """Labels as booleans and scores as float64, both of shape (n,).

    Raises:
        DatasetError: labels other than 0 and 1, scores that are not finite, or unequal lengths.
    """
    truth = np.asarray(labels)
    try:
        values = np.asarray(scores, np.float64)
    except (TypeError, ValueError) as error:
        raise DatasetError("scores: not all are numbers; give one number an item") from error
    if truth.shape != values.shape or truth.ndim != 1:
        raise DatasetError(f"scores: {truth.shape} labels, {values.shape} scores; give one label and one score an item")
    known = np.isin(truth, (0, 1))
    if not known.all():
        raise DatasetError(f"scores: label {truth[~known][0]!r} is neither 0 nor 1; give 1 for the class, 0 for others")
    if not np.isfinite(values).all():
        wrong = np.flatnonzero(~np.isfinite(values))
        raise DatasetError(
            f"scores: {len(wrong)} of {len(values)} are not finite (first: item {wrong[0]}); leave failed items out"
        )
    return truth.astype(np.bool_), values


def _auc_of_ties(positive: Bools, tie: npt.NDArray[np.intp], weight: Floats) -> float:
    """AUC of weighted items; `tie` numbers the distinct scores, rising. nan where a class has no weight."""
    positives = np.bincount(tie, weight * positive)
    negatives = np.bincount(tie, weight * ~positive)
    pairs = positives.sum() * negatives.sum()
    if pairs == 0:
        return math.nan
    below = np.cumsum(negatives) - negatives / 2
    return float(positives @ below / pairs)
