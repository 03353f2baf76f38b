"""Temperature and bias fitted on validation data, and how far off probabilities are.

Training draws classes evenly, and a temperature does not undo that; the offset does (`medsd.networks.calibrated`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import special

from medsd.checks import check_number
from medsd.errors import DatasetError
from medsd.evaluate.scores import Floats, check_scores
from medsd.networks.calibrated import calibrated, logit_adjustment

LOWEST, HIGHEST = 0.05, 20.0
_TIGHT = {"ftol": 1e-15, "gtol": 1e-9, "maxiter": 1000}


@dataclass(frozen=True)
class CalibrationScores:
    """How far a classifier's probabilities of the target are off on test data.

    Attributes:
        ece: expected calibration error of the calibrated probabilities, see `calibration_error`.
        ece_before: that of softmax(logits).
        ece_by_chance: what true probabilities of these sizes would show, see `calibration_error_by_chance`.
        brier: Brier score of the calibrated probabilities, see `brier_score`.
        temperature: that divides the logits, fitted on validation data.
        threshold: probability from which a tile counts as the target, from validation data.
    """

    ece: float
    ece_before: float
    ece_by_chance: float
    brier: float
    temperature: float
    threshold: float


def score_calibration(
    logits: npt.ArrayLike,
    labels: npt.ArrayLike,
    temperature: float,
    threshold: float,
    offset: Sequence[float] = (),
    target: int = 1,
) -> CalibrationScores:
    """Calibration on test data, before and after temperature and offset.

    Args:
        logits: (n, K).
        labels: (n,) class numbers.
        temperature, threshold, offset: from validation data, see `medsd.networks.calibrated`.
        target: the class that is judged against the others.

    Raises:
        DatasetError: as `fit_temperature`.
        ConfigError: a temperature that is not above 0.
    """
    check_number("temperature", temperature, "(0, inf)")
    truth, values = _checked(logits, labels)
    has = truth == target
    before = softmax(values)[:, target]
    after = softmax(calibrated(torch.from_numpy(values), temperature, offset).numpy())[:, target]
    return CalibrationScores(
        ece=calibration_error(has, after),
        ece_before=calibration_error(has, before),
        ece_by_chance=calibration_error_by_chance(after),
        brier=brier_score(has, after),
        temperature=temperature,
        threshold=threshold,
    )


def fit_temperature(logits: npt.ArrayLike, labels: npt.ArrayLike, offset: Sequence[float] = ()) -> float:
    """The temperature T whose softmax(logits / T + offset) has the least negative log-likelihood (Guo et al. 2017).

    The likelihood is concave in 1 / T, so the root of its slope is the optimum. T is kept within 0.05 to 20 (our
    choice): of logits that are worse than chance it would go to infinity. Where the data say nothing of T it is 1: of
    logits that are all equal, or that are highest at every item's class, so that every lower T would do.
    Without an offset the predicted class never changes.

    Args:
        logits, labels: (n, K) of validation items, and (n,) class numbers.
        offset: one number a class, see `medsd.networks.calibrated`; none for 0.

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
    added = np.asarray(offset or np.zeros(values.shape[1]), np.float64)

    def slope(log_temperature: float) -> float:
        """Rises with T."""
        expected = (softmax(values * math.exp(-log_temperature) + added) * values).sum(axis=1)
        return float((of_truth - expected).mean())

    low, high = math.log(LOWEST), math.log(HIGHEST)
    if slope(0.0) == 0 or not of_truth.any():
        return 1.0  # all equal, or separated without fault
    if slope(low) >= 0:
        return LOWEST
    return HIGHEST if slope(high) <= 0 else math.exp(float(brentq(slope, low, high, xtol=1e-10)))


def fit_scaling(
    logits: npt.ArrayLike, labels: npt.ArrayLike, drawn: Sequence[float]
) -> tuple[float, tuple[float, ...]]:
    """Temperature T and bias b for which softmax(logits / T + log(shares / drawn) + b) has the greatest likelihood.

    The shares are those of the labels at hand, so the bias is what the logits lack beside their adjustment, and holds
    for tissue of other shares. With it the mean probabilities are the labels' shares. The likelihood is concave in
    1 / T and b. Where a bias separates the classes without fault, so that every lower T would do, T is 1 beside it.

    Args:
        logits, labels: as of `fit_temperature`; every class has an item.
        drawn: the classes' shares of the draws of the training.

    Raises:
        DatasetError: as `fit_temperature`, or a class without an item.

    Example:
        >>> temperature, bias = fit_scaling([[0, 1], [0, 3], [0, 2], [0, 4]], [0, 0, 1, 1], (0.5, 0.5))
        >>> round(temperature, 2), [round(value, 2) for value in bias]
        (1.1, [1.14, -1.14])
    """
    from scipy.optimize import minimize

    truth, values = _checked(logits, labels)
    shares = np.bincount(truth, minlength=values.shape[1]) / len(truth)
    if not shares.all():
        raise DatasetError("calibration: a class has no item; give validation data of every class")
    adjustment = logit_adjustment(drawn, shares.tolist())
    start = fit_temperature(logits, labels, adjustment)
    values = (values - values.max(axis=1, keepdims=True)) / start
    wanted = np.eye(len(shares))[truth]

    def loss(parameters: Floats) -> tuple[float, Floats]:
        """Negative log-likelihood and its slope in the inverse temperature, relative to the start's, and the bias."""
        scaled = values * parameters[0] + adjustment + parameters[1:]
        missed = softmax(scaled) - wanted
        slope = np.concatenate([[(missed * values).sum(axis=1).mean()], missed.mean(axis=0)])
        return float((special.logsumexp(scaled, axis=1) - scaled[wanted == 1]).mean()), slope

    bounds = [(start / HIGHEST, start / LOWEST), *[(None, None)] * len(shares)]
    first = np.concatenate([[1.0], np.zeros(len(shares))])
    found = minimize(loss, first, jac=True, method="L-BFGS-B", bounds=bounds, options=_TIGHT).x
    if loss(found)[0] * len(truth) < math.log(2.0):  # no item is on the wrong side: nothing bounds 1 / T
        first[0] = start
        bounds[0] = start, start
        found = minimize(loss, first, jac=True, method="L-BFGS-B", bounds=bounds, options=_TIGHT).x
    bias = found[1:] - found[1:].mean()
    return float(start / found[0]), tuple(bias.tolist())


def calibration_error(labels: npt.ArrayLike, probabilities: npt.ArrayLike, bins: int = 15) -> float:
    """Expected calibration error of a class's probabilities, 0 to 1: mean |share of it - mean probability| of bins.

    Bins are of equal width, (low, high], and weigh as many items as they hold (Naeini et al. 2015, Guo et al. 2017).
    It is the class's probability that is judged, over 0 to 1, since it is drawn and thresholded; that of the
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
    gaps = np.bincount(_bins(values, bins), truth - values, minlength=bins)
    return float(np.abs(gaps).sum() / len(values))


def calibration_error_by_chance(probabilities: npt.ArrayLike, bins: int = 15, draws: int = 200, seed: int = 0) -> float:
    """The calibration error that chance leaves to probabilities that are true: a mean over labels drawn from them.

    A bin of few items is off by chance, and the error adds up what bins are off by whichever the sign. So an error is
    read against this one, not against 0 (consistency resampling, Bröcker and Smith 2007).

    Args:
        probabilities, bins: as of `calibration_error`.
        draws: of all labels.
        seed: of the draws.

    Raises:
        DatasetError, ConfigError: as `calibration_error`; no draws.

    Example:
        >>> round(calibration_error_by_chance([0.5] * 100), 2), round(calibration_error_by_chance([0.5] * 10000), 3)
        (0.04, 0.004)
    """
    check_number("bins", bins, "[1, inf)", whole=True)
    check_number("draws", draws, "[1, inf)", whole=True)
    values = _in_range(np.asarray(probabilities, np.float64))
    random, number = np.random.default_rng(seed), _bins(values, bins)
    drawn = (np.bincount(number, (random.random(len(values)) < values) - values, bins) for _ in range(draws))
    return float(np.mean([np.abs(gaps).sum() for gaps in drawn]) / len(values))


def _bins(probabilities: Floats, count: int) -> npt.NDArray[np.intp]:
    return np.searchsorted(np.linspace(0.0, 1.0, count + 1)[1:-1], probabilities, side="left")


def brier_score(labels: npt.ArrayLike, probabilities: npt.ArrayLike) -> float:
    """Mean (probability - label)^2 of a class's probabilities, 0 to 1 (Brier 1950, of two classes the half).

    Arguments and errors as in `calibration_error`.
    """
    truth, values = _probabilities(labels, probabilities)
    return float(np.mean((values - truth) ** 2))


def softmax(logits: npt.NDArray[np.floating]) -> Floats:
    """Probabilities (n, K) of logits (n, K), in float64."""
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
    return truth.astype(np.float64), _in_range(values)


def _in_range(probabilities: Floats) -> Floats:
    if not probabilities.size or not ((probabilities >= 0) & (probabilities <= 1)).all():
        raise DatasetError("scores: no probabilities, or outside 0 to 1; give those of one class")
    return probabilities
