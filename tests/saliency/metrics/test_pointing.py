"""Pointing games: the answers that the specification lists, and brute force."""

from __future__ import annotations

import math

import pytest
import torch

from medsd.errors import DatasetError
from medsd.evaluate.scores import inside_share
from medsd.saliency.metrics.pointing import area_share, energy_pointing, pointing_game


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
    for function in (energy_pointing, pointing_game):
        with pytest.raises(DatasetError, match="give a bool region"):
            function(torch.rand(1, 6, 7), region)
        with pytest.raises(DatasetError, match=r"float32; give a bool region"):
            function(torch.rand(1, 6, 8), region.float())
        with pytest.raises(DatasetError, match="finite"):
            function(torch.full((1, 6, 8), math.inf), region)
