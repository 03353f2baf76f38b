"""Temperature and calibration errors against brute force, scikit-learn, and laws they must obey."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom

from medsd.errors import ConfigError, DatasetError, MedsdError
from medsd.evaluate.temperature import (
    HIGHEST,
    LOWEST,
    brier_score,
    calibration_error,
    calibration_error_by_chance,
    fit_scaling,
    fit_temperature,
    score_calibration,
    softmax,
)
from medsd.networks.calibrated import class_offset, logit_adjustment


def draw(seed: int, items: int = 400, classes: int = 3, scale: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(items, classes)) * scale
    chances = np.exp(logits / 2.5)
    chances /= chances.sum(axis=1, keepdims=True)
    return logits, np.array([rng.choice(classes, p=chance) for chance in chances])


def likelihood_loss(logits: np.ndarray, labels: np.ndarray, temperature: float) -> float:
    scaled = logits / temperature
    return float(np.mean(np.log(np.exp(scaled).sum(axis=1)) - scaled[np.arange(len(labels)), labels]))


@pytest.mark.parametrize("classes", [2, 3])
def test_no_temperature_of_a_fine_grid_is_better(classes):
    logits, labels = draw(0, classes=classes)
    found = fit_temperature(logits, labels)
    best = min(np.geomspace(LOWEST, HIGHEST, 4001), key=lambda t: likelihood_loss(logits, labels, t))
    assert found == pytest.approx(best, rel=2e-3)
    assert likelihood_loss(logits, labels, found) <= likelihood_loss(logits, labels, best) + 1e-12


def test_finds_the_temperature_that_labels_were_drawn_with():
    logits, labels = draw(1, items=6000)
    assert fit_temperature(logits, labels) == pytest.approx(2.5, rel=0.06)


def test_the_prevalence_is_no_matter_of_the_temperature():
    """Labels of rare tumour, logits of a training that drew it as often: beside the offset the old one is found."""
    rng, offset = np.random.default_rng(4), logit_adjustment((0.5, 0.5), (0.95, 0.05))
    labels = (rng.random(20_000) < 0.05).astype(int)
    # Of exponential densities of the rates 3 and 1, the log-odds where either class is as frequent.
    evidence = np.log(1 / 3) + 2 * rng.exponential(np.where(labels, 1.0, 1 / 3))
    logits = np.stack([np.zeros(20_000), 2.5 * evidence], axis=1)
    assert fit_temperature(logits, labels, offset) == pytest.approx(2.5, rel=0.05)
    right = score_calibration(logits, labels, 2.5, 0.5, offset)
    assert right.ece < 0.01 < 0.1 < score_calibration(logits, labels, 2.5, 0.5).ece
    assert abs(fit_temperature(logits, labels) - 2.5) > 0.5  # which would make up for the prevalence


@given(st.integers(0, 50), st.floats(-3, 1).map(lambda power: 10**power), st.floats(-50, 50))
@settings(max_examples=25, deadline=None)
def test_scales_with_the_logits_and_ignores_what_they_share(seed, factor, shift):
    logits, labels = draw(seed, items=60)
    found = fit_temperature(logits, labels)
    again = fit_temperature(logits * factor + shift, labels)
    assert again == pytest.approx(np.clip(found * factor, LOWEST, HIGHEST), rel=1e-5)


def test_bounds():
    labels = np.array([0, 1, 1, 0])
    sure = np.eye(2)[labels] * 4
    assert fit_temperature(sure, labels) == 1.0
    assert fit_temperature(sure, 1 - labels) == HIGHEST
    assert fit_temperature(np.zeros((4, 2)), labels) == 1
    assert fit_temperature(sure * 1e6, labels) == 1  # certain and right: nothing to gain
    assert fit_temperature(sure * 1e300, 1 - labels) == HIGHEST


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        ([[0, 1]], [0, 1], "labels"),
        ([0.1, 0.2], [0, 1], "logits"),
        (np.zeros((0, 2)), [], "n >= 1"),
        ([[0, 1]], [2], "class numbers below 2"),
        ([[0, 1]], [-1], "class numbers below 2"),
        ([[0, math.nan]], [1], "finite"),
    ],
)
def test_bad_logits_are_named(logits, labels, words):
    with pytest.raises(DatasetError, match=words):
        fit_temperature(logits, labels)


@pytest.mark.parametrize(("items", "p"), [(1, 0.5), (4, 0.3), (50, 0.9)])
def test_error_by_chance_of_one_bin_is_the_mean_deviation_of_a_binomial(items, p):
    counts = np.arange(items + 1)
    expected = np.abs(counts / items - p) @ binom.pmf(counts, items, p)
    assert calibration_error_by_chance([p] * items, draws=40_000) == pytest.approx(expected, abs=0.005)


def test_error_by_chance_is_what_true_probabilities_show():
    random = np.random.default_rng(0)
    p = random.beta(0.5, 0.8, 400)
    errors = [calibration_error(random.random(400) < p, p) for _ in range(200)]
    found = calibration_error_by_chance(p)
    assert found == pytest.approx(np.mean(errors), abs=0.003)
    assert found > 0.03 > 2 * calibration_error_by_chance(np.tile(p, 25))


@pytest.mark.parametrize(
    ("probabilities", "draws", "words"), [([], 1, "no"), ([1.5], 1, "outside"), ([0.5], 0, "draws")]
)
def test_bad_probabilities_by_chance_are_named(probabilities, draws, words):
    with pytest.raises(MedsdError, match=words):
        calibration_error_by_chance(probabilities, draws=draws)


def error_by_loops(labels: list[int], probabilities: list[float], bins: int) -> float:
    total = 0.0
    for number in range(bins):
        low, high = number / bins, (number + 1) / bins
        inside = [
            (label, p)
            for label, p in zip(labels, probabilities, strict=True)
            if low < p <= high or (number == 0 and p == 0)
        ]
        if inside:
            gap = sum(label for label, _ in inside) / len(inside) - sum(p for _, p in inside) / len(inside)
            total += abs(gap) * len(inside) / len(labels)
    return total


@given(
    st.lists(st.tuples(st.integers(0, 1), st.floats(0, 1, width=32)), min_size=1, max_size=60),
    st.sampled_from([1, 4, 16]),
)
@settings(deadline=None)
def test_calibration_error_by_loops(items, bins):
    labels, probabilities = zip(*items, strict=True)
    found = calibration_error(labels, probabilities, bins)
    assert found == pytest.approx(error_by_loops(labels, probabilities, bins), abs=1e-9)


def test_calibration_error_by_hand():
    assert calibration_error([1, 0], [1.0, 0.0]) == 0
    assert calibration_error([0, 1], [1.0, 0.0]) == 1
    assert calibration_error([1, 0, 1, 1], [0.75] * 4) == pytest.approx(0)
    # Bins end with their upper edge: 0.5 is in the first of two, 0.6 in the second.
    assert calibration_error([1, 0], [0.5, 0.6], bins=2) == pytest.approx((0.5 + 0.6) / 2)
    # Two of the bins: |1 - 0.8| for one item, |0.5 - 0.1| for two.
    assert calibration_error([1, 1, 0], [0.8, 0.1, 0.1]) == pytest.approx((0.2 + 2 * 0.4) / 3)


def test_calibration_error_equals_torchmetrics():
    classification = pytest.importorskip("torchmetrics.classification")
    import torch

    rng = np.random.default_rng(0)
    probabilities, labels = rng.random(500), rng.integers(0, 2, 500)
    metric = classification.BinaryCalibrationError(n_bins=15, norm="l1")
    known = float(metric(torch.from_numpy(probabilities), torch.from_numpy(labels)))
    assert calibration_error(labels, probabilities) == pytest.approx(known, abs=1e-6)


def test_brier_equals_scikit_learn():
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(1)
    probabilities, labels = rng.random(300), rng.integers(0, 2, 300)
    assert brier_score(labels, probabilities) == pytest.approx(metrics.brier_score_loss(labels, probabilities))


def test_scores_before_and_after():
    logits, labels = draw(2, items=4000, classes=2)
    temperature = fit_temperature(logits, labels)
    scores = score_calibration(logits, labels, temperature, 0.4)
    tumour = 1 / (1 + np.exp((logits[:, 0] - logits[:, 1]) / temperature))
    assert scores.brier == pytest.approx(np.mean((tumour - labels) ** 2))
    assert scores.ece == pytest.approx(calibration_error(labels, tumour))
    assert scores.ece < 0.03 < scores.ece_before
    assert (scores.temperature, scores.threshold) == (temperature, 0.4)
    with pytest.raises(ConfigError, match="temperature=0"):
        score_calibration(logits, labels, 0, 0.4)


@pytest.mark.parametrize(
    ("labels", "probabilities"),
    [([0, 1], [0.5]), ([], []), ([0, 2], [0.1, 0.2]), ([0, 1], [0.1, 1.2]), ([0, 1], [0.1, math.nan])],
)
def test_bad_probabilities_are_named(labels, probabilities):
    for function in (calibration_error, brier_score):
        with pytest.raises(DatasetError, match="scores"):
            function(labels, probabilities)
    with pytest.raises(ConfigError, match="bins=0"):
        calibration_error([0], [0.5], bins=0)


@pytest.mark.parametrize("classes", [2, 3])
def test_the_bias_undoes_what_logits_lean_and_keeps_the_prevalence_apart(classes):
    """Logits that are 1.7 times too sure and lean to a class; drawn as often, and labels of other shares."""
    rng, shares = np.random.default_rng(5), np.array([0.9, 0.06, 0.04])[:classes]
    shares = shares / shares.sum()
    drawn = [1 / classes] * classes
    labels = rng.choice(classes, 20_000, p=shares)
    right = rng.normal(size=(20_000, classes)) + 1.0 * np.eye(classes)[labels]  # log-densities of the classes
    lean = np.array([1.5, -1.5, 0.0])[:classes]
    temperature, bias = fit_scaling(1.7 * (right + lean), labels, drawn)
    assert temperature == pytest.approx(1.7, rel=0.06)
    assert np.subtract(bias, bias[0]) == pytest.approx(lean[0] - lean, abs=0.15)
    found = np.bincount(labels) / len(labels)
    calibrated = softmax(1.7 * (right + lean) / temperature + np.array(class_offset(drawn, found.tolist(), bias)))
    assert calibrated.mean(axis=0) == pytest.approx(found, abs=1e-6)
    # Half of the normal ones are left out: another prevalence, the same network.
    kept = (labels > 0) | (rng.random(20_000) < 0.5)
    again = fit_scaling(1.7 * (right + lean)[kept], labels[kept], drawn)
    assert again[0] == pytest.approx(temperature, rel=0.05) and again[1] == pytest.approx(bias, abs=0.1)


def test_scaling_where_the_data_say_little():
    labels = np.array([0, 1, 1, 0])
    sure = np.eye(2)[labels] * 4
    assert fit_scaling(sure, labels, (0.5, 0.5))[0] == pytest.approx(1.0)
    leaning = sure + np.array([0, 9])  # separated by a bias alone
    temperature, bias = fit_scaling(leaning, labels, (0.5, 0.5))
    assert temperature == pytest.approx(1.0) and bias[1] - bias[0] == pytest.approx(-9, abs=0.01)
    temperature, bias = fit_scaling(np.zeros((4, 2)), [0, 1, 1, 1], (0.5, 0.5))
    assert temperature == pytest.approx(1.0) and bias == pytest.approx((0, 0), abs=1e-6)
    with pytest.raises(DatasetError, match="a class has no item"):
        fit_scaling(np.zeros((4, 2)), [1, 1, 1, 1], (0.5, 0.5))
