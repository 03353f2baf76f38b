"""Grids over slides, and whether a map has seams where blocks meet."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from medsd.heatmap.grid import MapGrid, seam_score


def blocks_of(seed: int, cells: int) -> np.ndarray:
    """An owner for each cell of a square grid: rows and columns cut at random places."""
    rng = np.random.default_rng(seed)
    cut = [np.cumsum(np.isin(np.arange(cells), rng.choice(np.arange(1, cells), 9, replace=False))) for _ in range(2)]
    return (cut[0][:, None] * 10 + cut[1]).astype(np.int32)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 1000), side=st.sampled_from([1, 2, 4]))
def test_a_map_without_seams_has_a_score_of_one(seed, side):
    owner = blocks_of(seed, 400 // side)
    rng = np.random.default_rng(seed)
    smooth = gaussian_filter(rng.normal(size=(400, 400)), 2).astype(np.float32)
    score = seam_score(smooth, owner)
    assert 0.8 < score < 1.2
    fine = owner.repeat(side, 0).repeat(side, 1)
    offsets = rng.normal(0, 10 * smooth.std(), owner.max() + 1).astype(np.float32)
    assert seam_score(smooth + offsets[fine], owner) > 5
    hidden = np.where(rng.random(smooth.shape) < 0.5, np.nan, smooth)
    assert 0.7 < seam_score(hidden, owner) < 1.3


def test_without_borders_there_is_no_seam():
    smooth = gaussian_filter(np.random.default_rng(0).normal(size=(60, 60)), 2).astype(np.float32)
    assert seam_score(smooth, np.zeros((30, 30), np.int32)) is None
    islands = np.full((30, 30), -1, np.int32)
    islands[:9], islands[20:] = 0, 1
    assert seam_score(smooth, islands) is None
    assert seam_score(np.full((60, 60), np.nan, np.float32), blocks_of(0, 30)) is None


@pytest.mark.parametrize(
    ("slide_mpp", "mpp", "dimensions", "shape"),
    [
        (0.25, 0.5, (1000, 641), (11, 16)),
        (0.25, 0.5, (64, 128), (2, 1)),
        (0.1, 0.3, (288, 192), (2, 3)),  # 0.3 / 0.1 is a little less than 3
    ],
)
def test_a_grid_covers_the_slide_and_no_more(slide_mpp, mpp, dimensions, shape):
    grid = MapGrid.over(SimpleNamespace(mpp=slide_mpp, dimensions=dimensions), mpp, 32)
    assert grid.shape == shape and grid.level0_px == pytest.approx(32 * mpp / slide_mpp)
