"""Concentration against definitions by brute force, closed forms, and what must not change it."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsd.errors import DatasetError
from medsd.saliency.metrics.concentration import gini_index, normalised_entropy, total_variation

MEASURES = (gini_index, normalised_entropy, total_variation)
MAPS = st.lists(st.floats(-10, 10, width=16), min_size=12, max_size=12).filter(
    lambda values: max(map(abs, values)) > 1e-2
)


def as_map(values: list[float]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(1, 3, 4)


@given(MAPS)
@settings(max_examples=80, deadline=None)
def test_gini_is_half_the_mean_difference_over_the_mean(values):
    magnitude = np.abs(np.float32(values)).astype(float)
    expected = np.abs(magnitude[:, None] - magnitude[None]).mean() / magnitude.mean() / 2
    assert float(gini_index(as_map(values))) == pytest.approx(expected, abs=1e-9)


@given(MAPS)
@settings(max_examples=80, deadline=None)
def test_entropy_is_scipys(values):
    stats = pytest.importorskip("scipy.stats")
    expected = stats.entropy(np.abs(np.float32(values)).astype(float)) / math.log(12)
    assert float(normalised_entropy(as_map(values))) == pytest.approx(expected, abs=1e-9)


@given(MAPS)
@settings(max_examples=80, deadline=None)
def test_variation_by_loops(values):
    grid = np.float64(np.float32(values)).reshape(3, 4)
    steps = [abs(grid[r, c] - grid[r, c + 1]) for r in range(3) for c in range(3)]
    steps += [abs(grid[r, c] - grid[r + 1, c]) for r in range(2) for c in range(4)]
    expected = np.mean(steps) / np.abs(grid).mean()
    assert float(total_variation(as_map(values))) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(MAPS, st.sampled_from([1e-30, 1e-6, 7.0, 1e30]))
@settings(max_examples=40, deadline=None)
def test_scale_does_not_count(values, scale):
    maps = as_map(values).double()
    for measure in MEASURES:
        assert float(measure(maps * scale)) == pytest.approx(float(measure(maps)), rel=1e-6, abs=1e-9)
        assert float(measure(-maps)) == pytest.approx(float(measure(maps)), abs=1e-9)


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-38, 3e38])
def test_constant_maps_and_maps_of_nothing(value):
    maps = torch.full((2, 5, 3), value)
    assert gini_index(maps).tolist() == pytest.approx([0, 0], abs=1e-9)
    assert normalised_entropy(maps).tolist() == pytest.approx([1, 1])
    assert normalised_entropy(torch.ones(1, 32, 32)) <= 1  # rounding left 1 + 2e-16
    assert total_variation(maps).tolist() == [0, 0]


def test_everything_in_one_pixel_or_in_half_of_them():
    one = torch.zeros(1, 4, 5)
    one[0, 2, 2] = 3
    assert float(gini_index(one)) == pytest.approx(19 / 20)
    assert float(normalised_entropy(one)) == 0
    assert float(total_variation(one)) == pytest.approx(4 / 31 * 20)  # 4 of 31 edges; the mean is a twentieth
    half = torch.zeros(1, 4, 4)
    half[0, :2] = 0.2
    assert float(gini_index(half)) == pytest.approx(0.5)
    assert float(normalised_entropy(half)) == pytest.approx(math.log(8) / math.log(16))
    assert float(total_variation(half)) == pytest.approx(4 / 24 * 2)


def test_single_pixels_are_constant():
    maps = torch.tensor([[[2.0]], [[0.0]]])
    assert [measure(maps).tolist() for measure in MEASURES] == [[0, 0], [1, 1], [0, 0]]


def test_images_of_a_batch_are_apart():
    maps = torch.randn(6, 7, 5, generator=torch.Generator().manual_seed(0))
    for measure in MEASURES:
        alone = torch.cat([measure(image[None]) for image in maps])
        torch.testing.assert_close(measure(maps), alone)


@pytest.mark.parametrize("maps", [torch.rand(3, 3), torch.rand(1, 0, 3), torch.full((1, 2, 2), math.nan)])
def test_bad_maps_are_named(maps):
    for measure in MEASURES:
        with pytest.raises(DatasetError, match="saliency"):
            measure(maps)
