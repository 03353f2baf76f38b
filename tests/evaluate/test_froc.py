"""FROC: known answers, MONAI's functions where they are right, and what is drawn by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.apps.pathology.utils import PathologyProbNMS
from monai.metrics import compute_fp_tp_probs, compute_froc_curve_data, compute_froc_score

from medsd.errors import ConfigError, DatasetError
from medsd.evaluate.froc import (
    RATES,
    Candidates,
    SlideHits,
    froc_curve,
    judge_candidates,
    map_candidates,
    region_candidates,
    weighted_froc,
    write_candidates,
)
from medsd.heatmap.regions import find_regions
from medsd.heatmap.value_map import ValueMap


def hits(false_positives: list[float], lesions: list[float]) -> SlideHits:
    return SlideHits(np.array(false_positives, float), np.array(lesions, float))


def drawn(values: np.ndarray, level0_px: float = 4.0, mpp: float = 1.0) -> ValueMap:
    return ValueMap(values.astype(np.float32), level0_px, mpp, "probability", "tumour", "drawn", "")


@pytest.mark.parametrize("factor", [1.0, 2.5, 4.0])
def test_known_hits(shared_data: Path, factor: float) -> None:
    """MONAI's own cases; the pyramid's factor on top of theirs may be any."""
    cases = json.loads((shared_data / "froc_known_answers" / "cases.json").read_text())["compute_fp_tp_probs"]
    for case in cases:
        x, y = (np.array(case[axis], float) * factor for axis in ("x", "y"))
        labels, left_out = np.array(case["evaluation_mask"], np.int32), case["labels_to_exclude"]
        candidates = Candidates(np.array(case["probs"], float), x, y)
        found = judge_candidates(candidates, labels, left_out, 2 ** case["resolution_level"] * factor)
        assert found.false_positives.tolist() == case["expect"]["fp_probs"]
        assert len(found.lesions) == case["expect"]["num_targets"]
        of_all = [best for number, best in enumerate(case["expect"]["tp_probs"], 1) if number not in left_out]
        assert found.lesions.tolist() == pytest.approx(of_all)
        if factor == 2.5:
            outside = Candidates(np.array([0.5]), np.array([1e4]), np.array([0.0]))
            with pytest.raises(DatasetError, match="off the slide"):
                judge_candidates(outside, labels, [], 1.0)


def test_known_scores(shared_data: Path) -> None:
    for case in json.loads((shared_data / "froc_known_answers" / "cases.json").read_text())["froc_score"]:
        best = sorted(case["tp_probs"], reverse=True)[: case["num_targets"]]  # zeros of excluded lesions
        slides = [hits(case["fp_probs"], best), *[hits([], [])] * (case["num_images"] - 1)]
        assert froc_curve(slides).at(case["fp_rates"]).mean() == pytest.approx(case["expect"])


several = st.lists(st.sampled_from([0.1, 0.2, 0.2, 0.5, 0.7, 0.9, 1.0]), max_size=9)


@given(st.lists(st.tuples(several, several), min_size=1, max_size=6), st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_equal_to_monai_where_a_lesion_was_missed(slides: list[tuple[list[float], list[float]]], seed: int) -> None:
    slides.append(([], [0.0]))
    found = froc_curve([hits(*one) for one in slides])
    false_positives, lesions = (np.concatenate([one[at] for one in slides]) for at in (0, 1))
    wanted = compute_froc_curve_data(false_positives, lesions, len(lesions), len(slides))
    np.testing.assert_allclose(found.false_per_slide, wanted[0][::-1])
    np.testing.assert_allclose(found.sensitivity, wanted[1][::-1])
    assert found.at().mean() == pytest.approx(compute_froc_score(*wanted, RATES))
    # A slide of weight 2 is two slides.
    weight = np.random.default_rng(seed).integers(0, 3, len(slides)).astype(float)
    weight[-1] += 1
    again = [hits(*one) for one, times in zip(slides, weight, strict=True) for _ in range(int(times))]
    statistic = weighted_froc([hits(*one) for one in slides])
    assert statistic(weight) == pytest.approx(froc_curve(again).at().mean())
    assert np.isnan(statistic(np.array([float(not one[1]) for one in slides])))


def test_the_last_candidate_counts_where_no_lesion_was_missed() -> None:
    """The challenge's code and MONAI's leave the lowest value out, which is a lesion's here."""
    slides = [hits([0.8], [0.9, 0.3])]
    curve = froc_curve(slides)
    assert curve.sensitivity.tolist() == [0, 0.5, 0.5, 1.0] and curve.false_per_slide.tolist() == [0, 0, 1, 1]
    assert curve.thresholds.tolist() == [np.inf, 0.9, 0.8, 0.3]
    assert max(compute_froc_curve_data(np.array([0.8]), np.array([0.9, 0.3]), 2, 1)[1]) == 0.5
    with pytest.raises(DatasetError, match="no lesions"):
        froc_curve([hits([0.5], [])])


def test_maxima_are_monais(tmp_path: Path) -> None:
    values = np.random.default_rng(0).random((40, 50)).astype(np.float32)
    found = map_candidates(drawn(values), distance_um=3.0)
    wanted = np.array(PathologyProbNMS(prob_threshold=0.0, box_size=7)(values.copy(), resolution_level=2))
    np.testing.assert_array_equal(np.stack([found.confidence, found.y, found.x], axis=1), wanted)
    assert found.confidence[0] == values.max() and 20 < len(found.x) < values.size / 16
    write_candidates(tmp_path / "slide.csv", found)
    # As the challenge's reader takes them: probability, x and y of each line, whole pixels.
    lines = [line.split(",") for line in (tmp_path / "slide.csv").read_text().splitlines()]
    assert [[int(x), int(y)] for _, x, y in lines] == np.stack([found.x, found.y], axis=1).astype(int).tolist()
    np.testing.assert_allclose([float(line[0]) for line in lines], found.confidence, rtol=1e-5)
    assert not len(map_candidates(drawn(np.full((3, 3), np.nan))).x)
    with pytest.raises(ConfigError, match="distance_um=0"):
        map_candidates(drawn(values), 0)


def test_candidates_of_regions_are_their_peaks() -> None:
    values = np.zeros((20, 30))
    values[3:8, 4:9], values[5, 6], values[12:16, 20:25], values[13, 24] = 0.6, 0.9, 0.7, 0.8
    found = region_candidates(find_regions(drawn(values), 0.5, 0.25, (120, 80)))
    assert sorted(zip(found.confidence.round(3), found.x, found.y, strict=True)) == [(0.8, 98, 54), (0.9, 26, 22)]
    judged = judge_candidates(found, np.where(values > 0.65, 1, 0).astype(np.int32), [], 4.0)
    assert judged.false_positives.size == 0 and judged.lesions.round(3).tolist() == [0.9]
    assert not len(region_candidates([]).x)


def test_monai_agrees_on_candidates_of_a_map() -> None:
    rng = np.random.default_rng(3)
    labels = np.kron(np.array([[0, 1], [2, 0]]), np.ones((20, 20), int)).astype(np.int32)
    found = map_candidates(drawn(rng.random((40, 40))), 4.0)
    mine = judge_candidates(found, labels, [2], 4.0)
    false_positives, lesions, targets = compute_fp_tp_probs(found.confidence, found.y, found.x, labels, [2], 2)
    np.testing.assert_array_equal(mine.false_positives, false_positives)
    assert mine.lesions.tolist() == pytest.approx([lesions[0]]) and targets == 1
