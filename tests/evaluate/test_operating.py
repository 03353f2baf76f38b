"""Operating points: what they promise, on scores and maps drawn by hand."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsd.errors import DatasetError
from medsd.evaluate.operating import JudgedMap, lesion_threshold, slide_cut_off
from medsd.heatmap.regions import find_regions
from medsd.heatmap.value_map import ValueMap

scores = st.sampled_from([0.0, 0.1, 0.2, 0.4, 0.6, 0.8, 1.0])
scored = st.lists(st.tuples(st.booleans(), scores), min_size=1, max_size=50)


@given(scored)
@settings(max_examples=60, deadline=None)
def test_no_higher_cut_off_finds_enough(slides: list[tuple[bool, float]]) -> None:
    labels, scores = (np.array(values) for values in zip(*slides, strict=True))
    found = slide_cut_off(labels.astype(int), scores)
    if found is None:
        assert not labels.any()
        return
    assert found.found == np.sum(labels & (scores >= found.score)) >= 0.95 * found.having
    assert found.raised == np.sum(~labels & (scores >= found.score))
    assert (found.having, found.without) == (labels.sum(), (~labels).sum())
    assert found.found == found.having or found.having >= 20
    above = scores[scores >= found.score].min()
    assert np.sum(labels & (scores > above)) < 0.95 * found.having


def test_intervals_are_exact() -> None:
    """By hand: 0.025 ** (1 / n) is the lower bound of n of n."""
    found = slide_cut_off([1] * 10 + [0] * 9, [0.9] * 10 + [0.95] + [0.5] * 8)
    assert found is not None and found.score == pytest.approx(0.7)
    assert found.sensitivity == pytest.approx((1, 0.025**0.1, 1))
    assert found.specificity == pytest.approx((8 / 9, 0.5175, 0.9972), abs=1e-4)
    few = slide_cut_off([1] * 5 + [0] * 35, [0.4, 0.6, 0.7, 0.8, 0.9, *[0.1] * 35])
    assert few is not None and few.found == 5  # slides without the target leave none to miss
    alone = slide_cut_off([1, 1], [0.3, 0.2])
    assert alone is not None and (alone.score, alone.specificity) == (0.2, None)
    next_to = np.nextafter(0.5, 1)
    close = slide_cut_off([1, 0], [next_to, 0.5])  # no number lies between
    assert close is not None and close.score == next_to and close.raised == 0


def judged(values: np.ndarray, tumour: np.ndarray | None = None, exhaustive: bool = True) -> JudgedMap:
    probability = ValueMap(values.astype(np.float32), 64.0, 32.0, "probability", "tumour", "drawn", "")
    known = np.zeros(values.shape, bool) if tumour is None else tumour
    return JudgedMap(probability, known, exhaustive, 0.5, (64 * values.shape[1], 64 * values.shape[0]))


def square(value: float, top: int, left: int, side: int = 6, under: float = 0.01) -> np.ndarray:
    values = np.full((40, 60), under)
    values[top : top + side, left : left + side] = value
    return values


LESION = square(1, 4, 4, under=0) + square(1, 25, 40, under=0) > 0
SMALLEST_UM2 = 64.0**2


def tumour_slide(second: float) -> JudgedMap:
    """A sure lesion, and one of that probability."""
    return judged(np.maximum(square(0.95, 4, 4), square(second, 25, 40)), LESION)


def test_a_false_region_that_the_budget_forbids_is_below_the_threshold() -> None:
    maps = [tumour_slide(0.8), judged(square(0.5, 10, 10)), judged(square(0.02, 10, 10))]
    threshold, point = lesion_threshold(maps, 0.2, SMALLEST_UM2)
    assert 0.5 <= threshold < 0.8
    assert (point.slides, point.false_regions, point.lesions, point.found) == (3, 0, 2, 2)
    lenient, point = lesion_threshold([tumour_slide(0.3), *maps[1:]], 0.4, SMALLEST_UM2)
    assert lenient < 0.3 and (point.false_regions, point.found) == (1, 2)  # 1 of 3 slides, for a lesion more
    strict, point = lesion_threshold([tumour_slide(0.3), *maps[1:]], 0.3, SMALLEST_UM2)
    assert 0.5 <= strict < 0.95 and (point.false_regions, point.found) == (0, 1)


def test_a_lower_threshold_that_finds_nothing_more_is_not_taken() -> None:
    """Round the lesion the map fades slowly; the threshold keeps to the outline."""
    rows, columns = np.mgrid[:40, :60]
    away = np.hypot(rows - 15, columns - 20)
    values = np.clip(0.99 - 0.05 * away, 0.001, 1)
    maps = [judged(values, away < 8), judged(np.full((40, 60), 0.0005))]
    threshold, point = lesion_threshold(maps, 0.5, SMALLEST_UM2)
    assert threshold == pytest.approx(0.99 - 0.05 * 8, abs=0.06) and point.found == 1


def test_where_nothing_keeps_the_budget_there_are_no_regions_and_the_counts_say_so() -> None:
    threshold, point = lesion_threshold([tumour_slide(0.8), judged(square(1.0, 10, 10))], 0.0, SMALLEST_UM2)
    assert threshold == 1.0 and (point.false_regions, point.found, point.lesions) == (0, 0, 2)
    partly = judged(square(0.9, 10, 10), square(1, 10, 10, 3, under=0) > 0, exhaustive=False)
    assert lesion_threshold([tumour_slide(0.8), partly], 0.0, SMALLEST_UM2)[1].slides == 1
    with pytest.raises(DatasetError, match="outlined in full"):
        lesion_threshold([partly], 0.5, SMALLEST_UM2)


def test_touching_is_told_from_beside() -> None:
    one = tumour_slide(0.8)
    regions = find_regions(one.probability, 0.5, 0.5, one.dimensions)
    assert one.lesions == 2 and one.judge(regions) == (0, 2) and one.judge([]) == (0, 0)
    assert judged(square(0.9, 10, 10)).judge(regions) == (2, 0)
