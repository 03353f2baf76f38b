"""Scores of masks: MONAI's, with what they leave out counted, and intervals over patients."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from monai.metrics import compute_dice
from PIL import Image

from medsd.errors import DatasetError
from medsd.evaluate.mask_scores import joined_scores, rows_of, score_unit, summarise_masks
from medsd.evaluate.mask_sheet import FOUND, TRUE, SheetItem, draw_mask_sheet

CLASSES = ("background", "a", "b")


def blocks(*places: tuple[int, int, int, int, int], side: int = 16) -> torch.Tensor:
    """Rectangles (class, top, left, bottom, right)."""
    mask = torch.zeros(side, side, dtype=torch.uint8)
    for number, top, left, bottom, right in places:
        mask[top:bottom, left:right] = number
    return mask


def test_dice_is_monai_s_and_distances_are_in_the_spacing() -> None:
    draws = torch.Generator().manual_seed(0)
    mask, found = (torch.randint(3, (6, 9, 9), generator=draws, dtype=torch.uint8) for _ in range(2))
    for one, other in zip(found, mask, strict=True):
        pair = [F.one_hot(values.long(), 3).movedim(-1, 0)[None].float() for values in (one, other)]
        np.testing.assert_allclose(score_unit(one, other, 3).dice, compute_dice(*pair, include_background=False)[0])
    mask, found = blocks((1, 4, 4, 12, 12)), blocks((1, 4, 4, 12, 15))
    near = score_unit(found, mask, 3, spacing=(1.0, 0.5), tolerance=1.4)
    assert near.hausdorff95[0] == pytest.approx(1.5) and math.isnan(near.hausdorff95[1])
    assert 0.5 < near.surface_dice[0] < 1 and math.isnan(near.surface_dice[1])
    assert score_unit(found, mask, 3, spacing=(1.0, 0.5), tolerance=1.6).surface_dice[0] == 1
    assert math.isnan(score_unit(found, mask, 3).hausdorff95[0])


def test_a_volume_is_scored_as_one_and_a_slide_by_its_tiles() -> None:
    mask, found = torch.zeros(8, 8, 8, dtype=torch.uint8), torch.zeros(8, 8, 8, dtype=torch.uint8)
    mask[2:6, 2:6, 2:6], found[2:4, 2:6, 2:6] = 1, 1
    scores = score_unit(found, mask, 2, spacing=(3.0, 1.0, 1.0))
    assert scores.dice.tolist() == [pytest.approx(2 / 3)] and scores.hausdorff95.tolist() == [6.0]
    joined = joined_scores(score_unit(one, other, 2, "slide", "p") for one, other in zip(found, mask, strict=True))
    assert joined.dice.tolist() == scores.dice.tolist() and math.isnan(joined.hausdorff95[0])
    assert (joined.unit, joined.patient) == ("slide", "p")


def test_what_dice_does_not_see_is_counted_and_intervals_are_over_patients() -> None:
    full, half, none = blocks((1, 0, 0, 8, 8)), blocks((1, 0, 0, 4, 8)), blocks()
    pairs = [(full, full, "p1"), (half, full, "p1"), (none, full, "p2"), (full, none, "p2"), (none, none, "p3")]
    units = [
        score_unit(found, mask, 3, str(number), patient, (1.0, 1.0))
        for number, (found, mask, patient) in enumerate(pairs)
    ]
    scores = summarise_masks(units, CLASSES)
    assert list(scores) == ["mean", "a", "b"]
    a = scores["a"]
    assert (a.units, a.patients, a.missed, a.false) == (3, 2, 1, 1)
    assert a.dice.value == pytest.approx((1 + 2 / 3 + 0) / 3)
    assert a.pooled_dice.value == pytest.approx(2 * (64 + 32) / (64 * 3 + 64 + 32 + 64))
    assert a.hausdorff95.value == pytest.approx(2.0)  # of the two units where both are
    assert a.surface_dice.value < 0.6
    assert (a.dice.low, a.dice.high) == (0.0, pytest.approx(5 / 6))  # one patient alone, or the other
    assert math.isnan(scores["b"].dice.value) and scores["b"].units == 0
    assert scores["mean"].dice == a.dice
    rows = list(rows_of(units, CLASSES))
    assert len(rows) == 10 and rows[2]["class"] == "a" and rows[2]["both_px"] == 32
    assert list(summarise_masks(units, ("background", "a", "b"))) and list(
        summarise_masks([score_unit(full, full, 2)], ("background", "a"))
    ) == ["a"]


def test_in_the_mean_every_class_counts_alike() -> None:
    full, part, none = blocks((1, 0, 0, 8, 8)), blocks((1, 0, 0, 4, 8)), blocks()
    both, missed = (blocks((1, 0, 0, 8, 8), (2, 8, 0, bottom, 8)) for bottom in (16, 9))
    pairs = [(full, full)] * 8 + [(part, full), (missed, both), (none, both)]
    units = [score_unit(found, mask, 3, str(n), f"p{n}", (1.0, 1.0)) for n, (found, mask) in enumerate(pairs)]
    scores = summarise_masks(units, CLASSES)
    for name in ("dice", "pooled_dice", "hausdorff95", "surface_dice"):
        mean, a, b = (getattr(scores[key], name) for key in ("mean", "a", "b"))
        assert mean.value == pytest.approx((a.value + b.value) / 2)
        assert mean.low < mean.value < mean.high
    assert scores["mean"].dice.value < 0.6 < scores["a"].dice.value
    assert (scores["mean"].units, scores["mean"].missed) == (11, 1)  # one unit, though of both classes


def test_what_cannot_be_scored_is_told() -> None:
    mask = blocks((2, 0, 0, 4, 4))
    with pytest.raises(DatasetError, match="x: class 2 in the mask; there are 2"):
        score_unit(blocks(), mask, 2, "x")
    with pytest.raises(DatasetError, match=r"prediction \(8, 8\) beside a mask \(16, 16\)"):
        score_unit(blocks(side=8), mask, 3)
    with pytest.raises(DatasetError, match="no images with masks"):
        summarise_masks([], CLASSES)


def test_the_sheet_shows_the_worst_first_and_both_outlines(tmp_path: Path) -> None:
    pixels = np.full((64, 64, 3), 200, np.uint8)
    mask, nothing = np.zeros((64, 64), np.uint8), np.zeros((64, 64), np.uint8)
    mask[16:48, 16:48] = 1
    items = [SheetItem(pixels, mask, found, ("name", "Dice"), dice) for found, dice in ((mask, 1.0), (nothing, 0.0))]
    draw_mask_sheet(tmp_path / "sheet.png", items, CLASSES, "title", ["a note"])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    places = sheet[112:, :568], sheet[112:, 568:]  # below the key, side by side
    blue, orange = ([int((place == colour).all(axis=2).sum()) for place in places] for colour in (TRUE, FOUND))
    assert blue[0] > 1000 and orange[0] == 0  # nothing found: Dice 0 comes first
    assert orange[1] > 500 and blue[1] > 300  # where they agree both are seen
