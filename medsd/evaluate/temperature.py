"""A temperature fitted on validation data, and how far off probabilities are.

Training draws classes evenly, and a temperature does not undo that: a probability is that of a tile from as many tumour
as normal tiles. Where tumour is rarer, as on slides, it is too high, and the calibration error says by how much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medsd.errors import ConfigError, DatasetError

LOWEST, HIGHEST = 0.05, 20.0

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


@dataclass(frozen=True)
class CalibrationScores:
    """How far a classifier's tumour probabilities are off on test data.

    Attributes:
        ece: expected calibration error of softmax(logits / temperature), see `calibration_error`.
        ece_before: that of softmax(logits).
        brier: Brier score of softmax(logits / temperature), see `brier_score`.
        temperature: that divides the logits, fitted on validation data.
        threshold: probability from which a tile counts as tumour, from validation data.
    """

    ece: float
    ece_before: float
    brier: float
    temperature: float
    threshold: float


def score_calibration(
    logits: npt.ArrayLike, labels: npt.ArrayLike, temperature: float, threshold: float, target: int = 1
) -> CalibrationScores:
    """Calibration on test data, before and after the temperature.

    Args:
        logits: (n, K).
        labels: (n,) class numbers.
        temperature: from `fit_temperature` on validation data.
        threshold: kept beside it.
        target: the tumour's class.

    Raises:
        DatasetError: as `fit_temperature`.
        ConfigError: a temperature that is not above 0.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature}: must be above 0")
    truth, values = _checked(logits, labels)
    tumour = truth == target
    before, after = (softmax(values / divisor)[:, target] for divisor in (1.0, temperature))
    return CalibrationScores(
        ece=calibration_error(tumour, after),
        ece_before=calibration_error(tumour, before),
        brier=brier_score(tumour, after),
        temperature=temperature,
        threshold=threshold,
    )


def fit_temperature(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """The temperature T whose softmax(logits / T) has the least negative log-likelihood (Guo et al. 2017).

    The likelihood is concave in 1 / T, so the root of its slope is the optimum. T is kept within 0.05 to 20 (our
    choice): of logits that are worse than chance it would go to infinity. Where the data say nothing of T it is 1: of
    logits that are all equal, or that separate the classes so well that the best T lies below the bound.
    The predicted class never changes.

    Args:
        logits: (n, K) of validation items.
        labels: (n,) class numbers.

    Raises:
        DatasetError: unequal lengths, labels that are no class, no items, or logits that are not finite.
    """
    from scipy.optimize import brentq

    truth, values = _checked(logits, labels)
    # Softmax ignores what all logits of an item share; without it large ones keep their digits.
    values = values - values.max(axis=1, keepdims=True)
    of_truth = values[np.arange(len(truth)), truth]

    def slope(log_temperature: float) -> float:
        expected = (softmax(values * math.exp(-log_temperature)) * values).sum(axis=1)
        return float((of_truth - expected).mean())

    low, high = math.log(LOWEST), math.log(HIGHEST)
    if slope(0.0) == 0:
        return 1.0
    # The slope falls as 1 / T grows, that is, it rises with T.
    if slope(low) >= 0:
        return 1.0  # separated without fault: the data only say that a lower T would do, and every lower one
    if slope(high) <= 0:
        return HIGHEST
    return math.exp(float(brentq(slope, low, high, xtol=1e-10)))


def calibration_error(labels: npt.ArrayLike, probabilities: npt.ArrayLike, bins: int = 15) -> float:
    """Expected calibration error of tumour probabilities, 0 to 1: mean |share of tumour - mean probability| of bins.

    Bins are of equal width, (low, high], and weigh as many items as they hold (Naeini et al. 2015, Guo et al. 2017).
    It is the tumour's probability that is judged, over 0 to 1, since it is drawn and thresholded; that of the
    predicted class, as often printed, would fold the bins below 0.5 onto those above.

    Args:
        labels: (n,) 0 or 1.
        probabilities: (n,) in 0 to 1.
        bins: how many.

    Raises:
        DatasetError: unequal lengths, no items, labels other than 0 and 1, or probabilities outside 0 to 1.
        ConfigError: `bins` below 1.
    """
    if bins < 1:
        raise ConfigError(f"bins={bins}: must be 1 or more")
    truth, values = _checked_probabilities(labels, probabilities)
    edges = np.linspace(0.0, 1.0, bins + 1)[1:-1]
    number = np.searchsorted(edges, values, side="left")
    gaps = np.bincount(number, truth - values, minlength=bins)
    return float(np.abs(gaps).sum() / len(values))


def brier_score(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Mean (probability - label)^2 of tumour probabilities, 0 to 1 (Brier 1950, of two classes the half).

    Args:
        labels: (n,) 0 or 1.
        probabilities: (n,) in 0 to 1.

    Raises:
        DatasetError: as `calibration_error`.
    """
    truth, values = _checked_probabilities(labels, probabilities)
    return float(np.mean((values - truth) ** 2))


def softmax(logits: npt.NDArray[np.floating[Any]]) -> Floats:
    """Probabilities (n, K) of logits (n, K), in float64."""
    logits = logits.astype(np.float64)
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    shares: Floats = powers / powers.sum(axis=1, keepdims=True)
    return shares


def _checked(logits: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[Integers, Floats]:
    truth, values = np.asarray(labels), np.asarray(logits, np.float64)
    if values.ndim != 2 or truth.shape != values.shape[:1] or not len(truth):
        raise DatasetError(f"calibration: {truth.shape} labels, {values.shape} logits; give (n,) and (n, K), n >= 1")
    known = np.isin(truth, np.arange(values.shape[1]))
    if not known.all():
        raise DatasetError(f"calibration: label {truth[~known][0]!r}; give class numbers below {values.shape[1]}")
    if not np.isfinite(values).all():
        raise DatasetError("calibration: not all logits are finite; check the weights")
    return truth.astype(np.int64), values


def _checked_probabilities(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> tuple[Floats, Floats]:
    truth, values = np.asarray(labels), np.asarray(probabilities, np.float64)
    if truth.ndim != 1 or truth.shape != values.shape or not len(truth):
        raise DatasetError(f"calibration: {truth.shape} labels, {values.shape} probabilities; give (n,) each, n >= 1")
    if not np.isin(truth, (0, 1)).all():
        raise DatasetError("calibration: labels other than 0 and 1; give 1 for tumour and 0 for normal")
    if not ((values >= 0) & (values <= 1)).all():
        raise DatasetError("calibration: probabilities outside 0 to 1; give those of the tumour class")
    return truth.astype(np.float64), values
