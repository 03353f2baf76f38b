"""Scores against their definitions by brute force, against scikit-learn, and by what must not change them."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsd.errors import ConfigError, DatasetError
from medsd.evaluate.scores import (
    Interval,
    PointingShare,
    auc,
    bootstrap_auc,
    bootstrap_groups,
    bootstrap_mean,
    inside_share,
    roc_curve,
    weighted_auc,
    youden_threshold,
)

# Few distinct scores, so that ties are common.
ITEMS = st.lists(st.tuples(st.integers(0, 1), st.integers(-4, 4)), min_size=2, max_size=30).filter(
    lambda items: len({label for label, _ in items}) == 2
)


def split(items: list[tuple[int, int]]) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    labels, scores = np.array(items).T
    return labels, scores / 3


def auc_by_pairs(labels: np.ndarray[Any, Any], scores: np.ndarray[Any, Any]) -> float:
    pairs = itertools.product(scores[labels == 1], scores[labels == 0])
    return float(np.mean([(p > n) + (p == n) / 2 for p, n in pairs]))


def youden(labels: np.ndarray[Any, Any], scores: np.ndarray[Any, Any], threshold: float) -> float:
    called = scores >= threshold
    return float(called[labels == 1].mean() + (~called[labels == 0]).mean() - 1)


# ---- AUC


def test_auc_by_hand() -> None:
    assert auc([0, 0, 1, 1], [0.1, 0.4, 0.35, 0.8]) == 0.75
    assert auc([0, 1], [1, 1]) == 0.5
    assert auc([True, False], [1, 0]) == 1.0


@given(ITEMS)
def test_auc_is_the_share_of_pairs_in_order(items: list[tuple[int, int]]) -> None:
    labels, scores = split(items)
    assert auc(labels, scores) == pytest.approx(auc_by_pairs(labels, scores), abs=1e-12)


@given(ITEMS)
def test_auc_keeps_under_rising_maps_and_turns_with_the_labels(items: list[tuple[int, int]]) -> None:
    labels, scores = split(items)
    value = auc(labels, scores)
    assert auc(labels, np.exp(scores) * 7 + 3) == pytest.approx(value, abs=1e-12)
    assert auc(labels, -scores) == pytest.approx(1 - value, abs=1e-12)
    assert auc(1 - labels, scores) == pytest.approx(1 - value, abs=1e-12)


def test_auc_and_roc_equal_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics")
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 2, 500)
    scores = np.round(rng.normal(labels, 1.5), 1)
    assert auc(labels, scores) == pytest.approx(metrics.roc_auc_score(labels, scores), abs=1e-12)
    expected = metrics.roc_curve(labels, scores, drop_intermediate=False)
    for found, known in zip(roc_curve(labels, scores), expected, strict=True):
        np.testing.assert_allclose(found, known, atol=1e-12)


@pytest.mark.parametrize("labels", [[1, 1], [0, 0, 0], []])
def test_auc_of_one_class_is_nan(labels: list[int]) -> None:
    assert math.isnan(auc(labels, [0.5] * len(labels)))
    interval = bootstrap_auc(labels, [0.5] * len(labels))
    assert math.isnan(interval.value) and math.isnan(interval.low) and interval.resamples == 0


# ---- ROC and threshold


@given(ITEMS)
def test_roc_rises_from_corner_to_corner_and_encloses_the_auc(items: list[tuple[int, int]]) -> None:
    labels, scores = split(items)
    false_positive_rate, sensitivity, _ = roc_curve(labels, scores)
    assert (false_positive_rate[0], sensitivity[0], false_positive_rate[-1], sensitivity[-1]) == (0, 0, 1, 1)
    assert (np.diff(false_positive_rate) >= 0).all() and (np.diff(sensitivity) >= 0).all()
    assert np.trapezoid(sensitivity, false_positive_rate) == pytest.approx(auc(labels, scores), abs=1e-12)


@given(ITEMS)
def test_no_threshold_beats_youdens(items: list[tuple[int, int]]) -> None:
    labels, scores = split(items)
    found = youden_threshold(labels, scores)
    best = max(youden(labels, scores, t) for t in np.concatenate([np.unique(scores), [99.0]]))
    assert youden(labels, scores, found) == pytest.approx(best, abs=1e-12)
    # Of equal ones the lowest: every lower score is worse.
    lower = np.unique(scores[scores < found])
    assert all(youden(labels, scores, t) < best - 1e-9 for t in lower)


def test_threshold_by_hand() -> None:
    assert youden_threshold([0, 0, 1, 1], [0.0, 0.2, 0.6, 0.9]) == pytest.approx(0.4)
    assert youden_threshold([1, 1, 0, 0], [0.0, 0.2, 0.6, 0.9]) == 0.0  # worse than chance: all positive
    assert youden_threshold([0, 1], [0.3, 0.3]) == 0.3
    above = np.nextafter(1.0, 2.0)
    assert youden_threshold([0, 1], [1.0, above]) == above  # no number lies between
    assert youden_threshold([0, 1], [-1.5e308, 1.5e308]) == 0.0  # no overflow


@pytest.mark.parametrize("labels", [[1, 1], [0, 0], []])
def test_threshold_and_curve_need_both_classes(labels: list[int]) -> None:
    for function in (youden_threshold, roc_curve):
        with pytest.raises(DatasetError, match="one class"):
            function(labels, [0.5] * len(labels))


# ---- bad input


@pytest.mark.parametrize(
    ("labels", "scores", "words"),
    [
        ([0, 2], [0.1, 0.2], "label .*2"),
        ([0, -1], [0.1, 0.2], "label .*-1"),
        ([0, float("nan")], [0.1, 0.2], "label .*nan"),
        (["tumour", "normal"], [0.1, 0.2], "label .*tumour"),
        ([0, 1], [0.1, float("nan")], "1 of 2 are not finite .*item 1"),
        ([0, 1], [float("inf"), 0.1], "1 of 2 are not finite .*item 0"),
        ([0, 1], ["high", "low"], "not all are numbers"),
        ([0, 1, 1], [0.1, 0.2], r"\(3,\) labels, \(2,\) scores"),
        ([[0, 1]], [[0.1, 0.2]], "one label and one score an item"),
    ],
)
def test_bad_items_are_named_in_one_line(labels: list[Any], scores: list[Any], words: str) -> None:
    for function in (auc, bootstrap_auc, youden_threshold, roc_curve):
        with pytest.raises(DatasetError, match=words) as caught:
            function(labels, scores)
        assert "\n" not in str(caught.value)


def test_bad_choices_of_the_bootstrap() -> None:
    with pytest.raises(DatasetError, match="groups"):
        bootstrap_auc([0, 1], [0.1, 0.2], groups=["a"])
    with pytest.raises(ConfigError, match="resamples=0"):
        bootstrap_auc([0, 1], [0.1, 0.2], resamples=0)


# ---- bootstrap


def items(count: int, seed: int = 0) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, count)
    return labels, np.round(rng.normal(labels, 1.2), 1)


def test_bootstrap_equals_resampling_by_hand() -> None:
    labels, scores = items(60)
    groups = np.arange(60) // 4
    rng = np.random.default_rng(7)
    values = []
    for _ in range(200):
        drawn = np.concatenate([np.flatnonzero(groups == g) for g in rng.integers(15, size=15)])
        values.append(auc_by_pairs(labels[drawn], scores[drawn]))
    low, high = np.quantile(values, [0.025, 0.975])
    found = bootstrap_auc(labels, scores, [f"slide {g:02d}" for g in groups], resamples=200, seed=7)
    assert found == Interval(
        pytest.approx(auc_by_pairs(labels, scores)), pytest.approx(low), pytest.approx(high), 0.95, 200
    )


def test_bootstrap_repeats_with_its_seed_only() -> None:
    labels, scores = items(80)
    assert bootstrap_auc(labels, scores, resamples=100) == bootstrap_auc(labels, scores, resamples=100)
    assert bootstrap_auc(labels, scores, resamples=100) != bootstrap_auc(labels, scores, resamples=100, seed=1)


def test_copies_of_items_do_not_narrow_the_interval_of_groups() -> None:
    labels, scores = items(60)
    once = bootstrap_auc(labels, scores, resamples=1000)
    copied = bootstrap_auc(labels.repeat(20), scores.repeat(20), np.arange(60).repeat(20), resamples=1000)
    assert (copied.low, copied.high) == (pytest.approx(once.low), pytest.approx(once.high))
    naive = bootstrap_auc(labels.repeat(20), scores.repeat(20), resamples=1000)
    assert naive.high - naive.low < (once.high - once.low) / 2


def test_interval_covers_the_true_auc() -> None:
    """Normal scores one apart: AUC = Phi(1 / sqrt 2) = 0.760; a 95 % interval must hold it about 19 times of 20."""
    held = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        labels = np.arange(120) % 2
        found = bootstrap_auc(labels, rng.normal(labels, 1), resamples=200, seed=seed)
        held += found.low <= 0.7602 <= found.high
    assert 88 <= held <= 99


def test_resamples_of_one_class_are_left_out_and_not_counted() -> None:
    found = bootstrap_auc([0, 1], [0.1, 0.9], resamples=1000)
    assert 400 < found.resamples < 600
    assert found.value == 1 and math.isnan(found.low) and math.isnan(found.high)
    nothing = bootstrap_auc([1, 0, 0], [0.9, 0.1, 0.2], groups=[0, 1, 1], resamples=1)
    assert nothing.resamples in (0, 1) and math.isnan(nothing.low)


def test_what_every_resample_agrees_on_has_no_interval() -> None:
    labels, scores = items(50)
    one_slide = bootstrap_auc(labels, scores, groups=["a"] * 50)
    same, single = bootstrap_mean([0.1 + 0.2] * 3), bootstrap_mean([0.5])
    for found in (one_slide, same, single):
        assert math.isnan(found.low) and math.isnan(found.high) and not math.isnan(found.value)
    assert f"{single:.2f}" == "0.50" and f"{Interval(0.5, 0.25, 1.0):.2f}" == "0.50 (0.25 to 1.00)"


def test_intervals_over_few_groups_are_too_narrow() -> None:
    """As their docstring says; half of the slides have tumour tiles, and each slide's scores have an offset."""
    truth, rng, held = statistics.NormalDist().cdf(1.5 / math.sqrt(2 * (1 + 0.7**2))), np.random.default_rng(0), {}
    for slides in (4, 20):
        of, held[slides] = np.repeat(np.arange(slides), 30), 0
        for _ in range(100):
            labels = (rng.random(len(of)) < 0.3) & (of % 2 == 1)
            scores = 1.5 * labels + 0.7 * rng.normal(size=slides)[of] + rng.normal(size=len(of))
            found = bootstrap_auc(labels.astype(int), scores, of, resamples=200)
            held[slides] += found.low <= truth <= found.high
    assert 60 <= held[4] <= 85 and 82 <= held[20] <= 97


def test_the_interval_of_10_000_items_is_narrow() -> None:
    labels, scores = items(10_000)
    found = bootstrap_auc(labels, scores)
    assert found.low < found.value < found.high < found.low + 0.05


# ---- pointing


def test_pointing_by_hand() -> None:
    saliency = np.array([[3.0, 1.0, -5.0, np.nan], [1.0, 0.0, 7.0, 2.0]], np.float32)
    tumour = np.array([[True, False, False, True], [True, False, True, False]])
    tissue = np.array([[True, True, True, True], [True, True, False, True]])
    # Seen tissue: six pixels, two of them tumour; positive saliency 3 + 1 inside of 3 + 1 + 1 + 2.
    found = inside_share(saliency, tumour, tissue)
    assert found == PointingShare(pytest.approx(4 / 7), pytest.approx(2 / 6), pytest.approx(12 / 7))


def test_constant_and_scaled_maps() -> None:
    rng = np.random.default_rng(0)
    tumour, tissue = rng.random((2, 30, 40)) < 0.5
    assert inside_share(np.full((30, 40), 0.7), tumour, tissue).ratio == pytest.approx(1)
    saliency = rng.normal(size=(30, 40))
    once, scaled = inside_share(saliency, tumour, tissue), inside_share(saliency * 50, tumour, tissue)
    assert scaled.positive_inside == pytest.approx(once.positive_inside)
    perfect = inside_share(tumour * 1.0, tumour, tissue)
    assert perfect.positive_inside == 1 and perfect.ratio == pytest.approx(1 / perfect.area_share)


def test_float16_maps_do_not_overflow() -> None:
    saliency = np.full((500, 500), 10, np.float16)  # sums to 2.5 million, float16 ends at 65,504
    tumour = np.zeros((500, 500), bool)
    tumour[:250] = True
    assert inside_share(saliency, tumour, np.ones_like(tumour)).positive_inside == 0.5


def test_pointing_of_nothing_is_nan() -> None:
    yes, no = np.ones((2, 2), bool), np.zeros((2, 2), bool)
    unseen = inside_share(np.full((2, 2), np.nan), yes, yes)
    assert all(math.isnan(v) for v in (unseen.positive_inside, unseen.area_share, unseen.ratio))
    negative = inside_share(-np.ones((2, 2)), yes, yes)
    assert math.isnan(negative.positive_inside) and negative.area_share == 1
    without_tumour = inside_share(np.ones((2, 2)), no, yes)
    assert (without_tumour.positive_inside, without_tumour.area_share) == (0, 0)
    assert math.isnan(without_tumour.ratio)


def test_pointing_refuses_other_shapes_and_infinity() -> None:
    yes = np.ones((2, 2), bool)
    with pytest.raises(DatasetError, match="grid"):
        inside_share(np.ones((2, 3)), yes, yes)
    with pytest.raises(DatasetError, match="infinite"):
        inside_share(np.array([[1, np.inf], [0, 0]]), yes, yes)


def test_groups_are_resampled_whole_whatever_the_statistic() -> None:
    rng = np.random.default_rng(0)
    labels, groups = np.arange(60) % 2, np.arange(60) // 6
    scores = rng.normal(labels, 1)
    by_hand = bootstrap_groups(weighted_auc(labels, scores), groups, resamples=300, seed=4)
    assert by_hand == bootstrap_auc(labels, scores, groups, resamples=300, seed=4)
    values = rng.normal(size=10)[groups]
    found = bootstrap_mean(values, groups=groups, resamples=500)
    assert found.value == pytest.approx(values.mean())
    assert found.high - found.low > 2 * (bootstrap_mean(values).high - bootstrap_mean(values).low)
    weights: list[np.ndarray] = []
    bootstrap_groups(lambda weight: float(weights.append(weight) or 0), groups, resamples=5)
    assert all((weight.reshape(10, 6) == weight[::6, None]).all() and weight.sum() == 60 for weight in weights)
    with pytest.raises(DatasetError, match="groups; give one group an item"):
        bootstrap_mean([1.0, 2.0], groups=["a"])
