"""Pointing games and best IoU: the answers that the specification lists, and brute force."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsd.errors import DatasetError
from medsd.evaluate.scores import inside_share
from medsd.saliency.metrics.pointing import area_share, best_iou, energy_pointing, pointing_game

VALUES = st.lists(st.integers(-3, 3), min_size=12, max_size=12)
INSIDE = st.lists(st.booleans(), min_size=12, max_size=12)


@pytest.fixture
def region() -> torch.Tensor:
    inside = torch.zeros(1, 6, 8, dtype=torch.bool)
    inside[0, 1:4, 2:6] = True
    return inside


def test_a_constant_map_scores_the_area(region):
    maps = torch.full((1, 6, 8), 0.3)
    assert float(energy_pointing(maps, region)) == pytest.approx(12 / 48)
    assert float(pointing_game(maps, region)) == pytest.approx(12 / 48)
    assert float(area_share(region)) == pytest.approx(12 / 48)


def test_all_inside_all_outside_and_negative(region):
    inside = torch.where(region, 2.0, -5.0)
    outside = -inside
    maps, regions = torch.cat([inside, outside, -inside.abs()]), region.expand(3, -1, -1)
    assert energy_pointing(maps, regions).nan_to_num(-1).tolist() == [1, 0, -1]
    assert pointing_game(maps, regions).nan_to_num(-1).tolist() == [1, 0, -1]


def test_nothing_to_point_with_is_undefined_and_scale_does_not_count(region):
    maps = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))
    assert float(energy_pointing(maps * 100, region)) == pytest.approx(float(energy_pointing(maps, region)))
    assert math.isnan(float(energy_pointing(maps * 1e-9, region)))
    assert math.isnan(float(energy_pointing(torch.zeros(1, 6, 8), region)))


def test_equals_the_measure_of_slides_where_all_is_tissue(region):
    maps = torch.randn(5, 6, 8, generator=torch.Generator().manual_seed(1))
    regions = torch.rand(5, 6, 8, generator=torch.Generator().manual_seed(2)) < 0.4
    everywhere = torch.ones(6, 8, dtype=torch.bool).numpy()
    for values, inside, energy, share in zip(
        maps, regions, energy_pointing(maps, regions), area_share(regions), strict=True
    ):
        known = inside_share(values.numpy(), inside.numpy(), everywhere)
        assert (float(energy), float(share)) == pytest.approx((known.positive_inside, known.area_share), abs=1e-6)


def test_the_greatest_value_counts_and_ties_share(region):
    maps = torch.zeros(1, 6, 8)
    maps[0, 2, 3], maps[0, 5, 7] = 4, 3
    assert float(pointing_game(maps, region)) == 1
    maps[0, 5, 7] = 5
    assert float(pointing_game(maps, region)) == 0
    maps[0, 2, 3] = maps[0, 0, 0] = 5
    assert float(pointing_game(maps, region)) == pytest.approx(1 / 3)


def test_bad_input_is_named(region):
    for function in (energy_pointing, pointing_game, best_iou):
        with pytest.raises(DatasetError, match="give a bool region"):
            function(torch.rand(1, 6, 7), region)
        with pytest.raises(DatasetError, match=r"float32; give a bool region"):
            function(torch.rand(1, 6, 8), region.float())
        with pytest.raises(DatasetError, match="finite"):
            function(torch.full((1, 6, 8), math.inf), region)


@given(VALUES, INSIDE.filter(any))
@settings(max_examples=150, deadline=None)
def test_best_iou_equals_trying_every_threshold(values, inside):
    maps = torch.tensor(values, dtype=torch.float64).view(1, 3, 4)
    region = torch.tensor(inside).view(1, 3, 4)
    tried = {}
    for threshold in sorted(set(values), reverse=True):
        cut = maps >= threshold
        tried[threshold] = float((cut & region).sum() / (cut | region).sum())
    best = max(tried.values())
    assert float(best_iou(maps, region)) == pytest.approx(best, abs=1e-6)
    assert best >= float(area_share(region)) - 1e-6


def test_best_iou_of_known_maps():
    region = torch.zeros(4, 6, 8, dtype=torch.bool)
    region[:3, 1:4, 2:6] = True
    maps = torch.stack([region[0] * 2.0 - 5, torch.ones(6, 8), -region[0].float(), torch.rand(6, 8)])
    scores = best_iou(maps, region)
    assert scores[:3].tolist() == pytest.approx([1, 12 / 48, 12 / 48])  # the inverted map is best taken whole
    assert math.isnan(scores[3])


def test_best_iou_does_not_see_scale():
    generator = torch.Generator().manual_seed(1)
    maps, region = torch.randn(3, 7, 7, generator=generator), torch.rand(3, 7, 7, generator=generator) < 0.4
    assert torch.equal(best_iou(maps, region), best_iou(maps * 8 + 2, region))
    assert torch.equal(best_iou(maps, region)[1:2], best_iou(maps[1:2], region[1:2]))
