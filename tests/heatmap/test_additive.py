"""Maps that keep their squares' sums, smoothly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsd.heatmap.additive import conserve


def square_sums(values: np.ndarray, side: int) -> np.ndarray:
    """Of the seen pixels; NaN where a square has none."""
    shape = [-(-length // side) for length in values.shape]
    sums = np.full(shape, np.nan)
    for row, column in np.ndindex(*shape):
        square = values[row * side : (row + 1) * side, column * side : (column + 1) * side]
        if np.isfinite(square).any():
            sums[row, column] = np.nansum(square, dtype=np.float64)
    return sums


sizes = {"height": st.integers(1, 30), "width": st.integers(1, 30), "side": st.sampled_from([1, 2, 3, 4, 8])}


@settings(max_examples=80, deadline=None)
@given(**sizes, seed=st.integers(0, 10_000), holes=st.sampled_from([0, 0.1, 0.9]), unknown=st.sampled_from([0, 0.2]))
def test_every_square_sums_to_what_is_asked(height, width, side, seed, holes, unknown):
    rng = np.random.default_rng(seed)
    detail = rng.normal(size=(height, width)).astype(np.float32)
    detail[rng.random(detail.shape) < holes] = np.nan
    sums = rng.normal(3, 5, size=(-(-height // side), -(-width // side))).astype(np.float32)
    sums[rng.random(sums.shape) < unknown] = np.nan
    given = detail.copy(), sums.copy()
    found = conserve(detail, sums, side)
    np.testing.assert_array_equal(detail, given[0])
    np.testing.assert_array_equal(sums, given[1])
    nobody_knows = np.kron(np.isnan(sums), np.ones((side, side), bool))[:height, :width].astype(bool)
    np.testing.assert_array_equal(np.isnan(found), np.isnan(detail) | nobody_knows)
    reached = square_sums(found, side)
    known = np.isfinite(reached)
    scale = max(1.0, float(np.nansum(np.abs(found))))
    assert np.abs(reached - sums)[known].max(initial=0) <= 1e-5 * scale


@settings(max_examples=40, deadline=None)
@given(**sizes, seed=st.integers(0, 10_000))
def test_a_map_that_sums_right_stays(height, width, side, seed):
    detail = np.random.default_rng(seed).normal(size=(height, width)).astype(np.float32)
    found = conserve(detail, square_sums(detail, side).astype(np.float32), side)
    np.testing.assert_allclose(found, detail, rtol=0, atol=3e-6 * max(1, side))


@settings(max_examples=40, deadline=None)
@given(**sizes, seed=st.integers(0, 10_000), holes=st.sampled_from([0, 0.5]))
def test_a_constant_stays_a_constant(height, width, side, seed, holes):
    """Also beside what is not seen, and in last squares that reach beyond the map."""
    detail = np.zeros((height, width), np.float32)
    detail[np.random.default_rng(seed).random(detail.shape) < holes] = np.nan
    sums = np.nan_to_num(square_sums(detail + 0.7, side)).astype(np.float32)
    found = conserve(detail, sums, side)
    np.testing.assert_allclose(found[np.isfinite(found)], 0.7, rtol=1e-5)


@pytest.mark.parametrize("side", [2, 4, 8])
def test_a_ramp_has_no_steps_at_the_borders_of_squares(side):
    cells = 24
    rows, columns = np.indices((cells * side, cells * side)) / side
    ramp = 2 * rows - 3 * columns
    found = conserve(np.zeros(ramp.shape, np.float32), square_sums(ramp, side).astype(np.float32), side)
    # The outermost squares have no neighbour to lean on; what that does fades from square to square.
    inner = slice(9 * side, -9 * side)
    np.testing.assert_allclose(found[inner, inner], ramp[inner, inner], rtol=0, atol=0.01 * 3 / side)
    even = square_sums(ramp, side).repeat(side, 0).repeat(side, 1) / side**2  # what evenly spread squares look like
    assert np.abs(np.diff(even)).max() == pytest.approx(3)
