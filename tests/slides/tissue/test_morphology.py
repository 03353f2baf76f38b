"""Shapes in masks against scikit-image and scipy, which do the same over every pixel."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_fill_holes, gaussian_filter, maximum_filter
from skimage.morphology import closing, opening, remove_small_objects

from medsd.slides.tissue.morphology import drop_small, fill_small_holes, grow_square, smooth

Bools = np.ndarray[Any, np.dtype[np.bool_]]


def blobs(seed: int, height: int, width: int, grain: float, share: float) -> Bools:
    noise = gaussian_filter(np.random.default_rng(seed).normal(size=(height, width)), grain)
    return np.asarray(noise > np.quantile(noise, 1 - share))


def disk(radius: int) -> Bools:
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return np.asarray(x**2 + y**2 <= radius**2)


masks = st.builds(
    blobs,
    seed=st.integers(0, 10**6),
    height=st.integers(1, 96),
    width=st.integers(1, 70),
    grain=st.sampled_from([0.0, 0.7, 2.0, 5.0]),
    share=st.sampled_from([0.0, 0.1, 0.5, 0.9, 1.0]),
)


@settings(max_examples=60, deadline=None)
@given(mask=masks, close_radius=st.integers(0, 4), open_radius=st.integers(0, 4))
def test_smooth_is_closing_then_opening(mask: Bools, close_radius: int, open_radius: int) -> None:
    closed = closing(mask, disk(close_radius), mode="ignore")
    expected = opening(closed, disk(open_radius), mode="ignore")
    assert (smooth(mask, close_radius, open_radius) == expected).all()


@settings(max_examples=60, deadline=None)
@given(mask=masks, radius=st.integers(0, 60))
def test_grow_square_is_a_maximum_filter(mask: Bools, radius: int) -> None:
    assert (grow_square(mask, radius) == maximum_filter(mask, size=2 * radius + 1)).all()


@settings(max_examples=120, deadline=None)
@given(mask=masks, most_px=st.integers(0, 60), corners=st.booleans())
def test_drop_small_is_remove_small_objects(mask: Bools, most_px: int, corners: bool) -> None:
    expected = remove_small_objects(mask, max_size=most_px, connectivity=2 if corners else 1)
    assert (drop_small(mask, most_px, corners) == expected).all()


@settings(max_examples=120, deadline=None)
@given(mask=masks, most_px=st.integers(0, 60))
def test_fill_small_holes(mask: Bools, most_px: int) -> None:
    holes = binary_fill_holes(mask) & ~mask
    expected = mask | (holes & ~remove_small_objects(holes, max_size=most_px))
    assert (fill_small_holes(mask, most_px) == expected).all()


@pytest.mark.parametrize("radius", range(30))
def test_grow_square_leaves_no_gap_beside_the_edge(radius: int) -> None:
    mask = np.zeros((80, 60), np.bool_)
    mask[0, 0] = mask[-1, 30] = True
    assert (grow_square(mask, radius) == maximum_filter(mask, size=2 * radius + 1)).all()


@pytest.mark.parametrize("value", [False, True])
def test_even_masks_stay(value: bool) -> None:
    mask = np.full((5, 7), value)
    for changed in (smooth(mask, 2, 1), grow_square(mask, 3), drop_small(mask, 34), fill_small_holes(mask, 35)):
        assert (changed == value).all()


def test_a_mask_is_not_changed_in_place() -> None:
    mask = blobs(1, 90, 40, 1.0, 0.4)
    before = mask.copy()
    smooth(mask, 2, 1), grow_square(mask, 2), drop_small(mask, 20), fill_small_holes(mask, 20)
    assert (mask == before).all()
