"""The Gaussian over finished maps: sums stay, and what it changes of a tile's sum is told."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import ndimage

from medsd.heatmap.additive import blurred, change_of_sums


def test_the_sum_stays_also_at_the_edge_of_the_tissue():
    values = np.random.default_rng(0).normal(size=(30, 40)).astype(np.float32)
    values[:7, 5:] = np.nan
    smooth = blurred(values, 1.5)
    assert np.array_equal(np.isnan(smooth), np.isnan(values))
    assert np.nansum(smooth, dtype=np.float64) == pytest.approx(np.nansum(values, dtype=np.float64), abs=1e-4)


def test_in_the_interior_it_is_scipys_gaussian():
    values = np.random.default_rng(0).normal(size=(60, 60)).astype(np.float32)
    expected = ndimage.gaussian_filter(values, 1.5)
    np.testing.assert_allclose(blurred(values, 1.5)[15:-15, 15:-15], expected[15:-15, 15:-15], atol=1e-5)


def test_nothing_is_changed_by_none():
    values = np.random.default_rng(0).normal(size=(8, 8)).astype(np.float32)
    assert blurred(values, 0.0) is values
    assert change_of_sums(values, values, 4) == 0


def test_the_change_of_sums_by_hand():
    exact = np.array([[1, 1, -1, 0], [1, 1, -1, 0]], np.float32)
    changed = np.array([[1, 0.5, -0.5, 0], [1, 0.5, -0.5, 0]], np.float32)
    assert change_of_sums(exact, changed, 2) == pytest.approx((1 + 1) / (4 + 2))
    assert change_of_sums(np.full((4, 4), np.nan, np.float32), np.full((4, 4), np.nan, np.float32), 2) is None
