"""A temperature fitted on validation data, and how far off probabilities are.

Training draws classes evenly, and a temperature does not undo that: a probability is that of a tile from as many tumour
as normal tiles. Where tumour is rarer, as on slides, it is too high, and the calibration error says by how much.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medsd.checks import check_number
from medsd.errors import DatasetError
from medsd.evaluate.scores import Floats, check_scores

LOWEST, HIGHEST = 0.05, 20.0


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
    logits: npt.ArrayLike, labels: npt.ArrayLike, temperature: float, threshold: float
) -> CalibrationScores:
    """Calibration on test data, before and after the temperature.

    Args:
        logits: (n, K).
        labels: (n,) class numbers, 1 tumour.
        temperature, threshold: from validation data.

    Raises:
        DatasetError: as `fit_temperature`.
        ConfigError: a temperature that is not above 0.
    """
    check_number("temperature", temperature, "(0, inf)")
    truth, values = _checked(logits, labels)
    tumour = truth == 1
    before, after = (softmax(values / divisor)[:, 1] for divisor in (1.0, temperature))
    errors = calibration_error(tumour, after), calibration_error(tumour, before), brier_score(tumour, after)
    return CalibrationScores(*errors, temperature, threshold)


def fit_temperature(logits: npt.ArrayLike, labels: npt.ArrayLike) -> float:
    """The temperature T whose softmax(logits / T) has the least negative log-likelihood (Guo et al. 2017).

    The likelihood is concave in 1 / T, so the root of its slope is the optimum. T is kept within 0.05 to 20 (our
    choice): of logits that are worse than chance it would go to infinity. Where the data say nothing of T it is 1: of
    logits that are all equal, or that separate the classes so well that the best T lies below the bound.
    The predicted class never changes.

    Args:
        logits, labels: (n, K) of validation items, and (n,) class numbers.

    Raises:
        DatasetError: unequal lengths, labels that are no class, no items, or logits that are not finite.

    Example:
        >>> fit_temperature([[0, 4], [4, 0], [0, 4], [0, 4]], [1, 0, 1, 0])  # three of four right, sure as of 98 %
        3.64095...
    """
    from scipy.optimize import brentq

    truth, values = _checked(logits, labels)
    # Softmax ignores what all logits of an item share; without it large ones keep their digits.
    values = values - values.max(axis=1, keepdims=True)
    of_truth = values[np.arange(len(truth)), truth]

    def slope(log_temperature: float) -> float:
        """Rises with T."""
        expected = (softmax(values * math.exp(-log_temperature)) * values).sum(axis=1)
        return float((of_truth - expected).mean())

    low, high = math.log(LOWEST), math.log(HIGHEST)
    if slope(0.0) == 0 or slope(low) >= 0:
        return 1.0  # all equal, or separated without fault: the data say that every T or every lower one would do
    return HIGHEST if slope(high) <= 0 else math.exp(float(brentq(slope, low, high, xtol=1e-10)))


def calibration_error(labels: npt.ArrayLike, probabilities: npt.ArrayLike, bins: int = 15) -> float:
    """Expected calibration error of tumour probabilities, 0 to 1: mean |share of tumour - mean probability| of bins.

    Bins are of equal width, (low, high], and weigh as many items as they hold (Naeini et al. 2015, Guo et al. 2017).
    It is the tumour's probability that is judged, over 0 to 1, since it is drawn and thresholded; that of the
    predicted class, as often printed, would fold the bins below 0.5 onto those above.

    Args:
        labels, probabilities: (n,) 0 or 1, and in 0 to 1.
        bins: how many.

    Raises:
        DatasetError: unequal lengths, no items, labels other than 0 and 1, or probabilities outside 0 to 1.
        ConfigError: `bins` below 1.
    """
    check_number("bins", bins, "[1, inf)", whole=True)
    truth, values = _probabilities(labels, probabilities)
    number = np.searchsorted(np.linspace(0.0, 1.0, bins + 1)[1:-1], values, side="left")
    gaps = np.bincount(number, truth - values, minlength=bins)
    return float(np.abs(gaps).sum() / len(values))


def brier_score(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Mean (probability - label)^2 of tumour probabilities, 0 to 1 (Brier 1950, of two classes the half).

    Arguments and errors as in `calibration_error`.
    """
    truth, values = _probabilities(labels, probabilities)
    return float(np.mean((values - truth) ** 2))


def softmax(logits: npt.NDArray[np.floating]) -> Floats:
    """Probabilities (n, K) of logits (n, K), in float64."""
    from scipy import special

    return special.softmax(logits.astype(np.float64), axis=1)  # type: ignore[no-any-return]


def _checked(logits: npt.ArrayLike, labels: npt.ArrayLike) -> tuple[npt.NDArray[np.int64], Floats]:
    truth, values = np.asarray(labels), np.asarray(logits, np.float64)
    if values.ndim != 2 or truth.shape != values.shape[:1] or not len(truth):
        raise DatasetError(f"calibration: {truth.shape} labels, {values.shape} logits; give (n,) and (n, K), n >= 1")
    known = np.isin(truth, np.arange(values.shape[1]))
    if not known.all():
        raise DatasetError(f"calibration: label {truth[~known][0]!r}; give class numbers below {values.shape[1]}")
    if not np.isfinite(values).all():
        raise DatasetError("calibration: not all logits are finite; check the weights")
    return truth.astype(np.int64), values


def _probabilities(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> tuple[Floats, Floats]:
    truth, values = check_scores(labels, probabilities)
    if not len(values) or not ((values >= 0) & (values <= 1)).all():
        raise DatasetError("scores: no probabilities, or outside 0 to 1; give those of the tumour class")
    return truth.astype(np.float64), values
