from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.interpolate import RegularGridInterpolator

from medsd.drawing import pale
from medsd.heatmap.picture import interpolated, tinted
from medsd.heatmap.scale import probability_scale
from medsd.heatmap.value_map import ValueMap


def as_map(values: np.ndarray, side: float = 10.0) -> ValueMap:
    return ValueMap(values.astype(np.float32), side, side / 4, "probability", "tumour", "drawn", "")


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 1000), st.floats(0.3, 40), st.tuples(st.integers(2, 8), st.integers(2, 8)))
def test_a_map_seen_all_over_is_interpolated_as_scipy_does(seed: int, side: float, shape: tuple[int, int]) -> None:
    rng = np.random.default_rng(seed)
    values = rng.normal(size=shape)
    x, y = (rng.uniform(0, size * side * 0.999, 20) for size in reversed(shape))
    centres = [(np.arange(size) + 0.5) * side for size in shape]
    field = RegularGridInterpolator(centres, values.astype(np.float32).astype(float))
    clamped = [places.clip(axis[0], axis[-1]) for places, axis in zip((y, x), centres, strict=True)]
    expected = field(np.stack(np.meshgrid(*clamped, indexing="ij"), axis=-1))
    np.testing.assert_allclose(interpolated(as_map(values, side), x, y), expected, atol=1e-5)


def test_a_centre_has_its_own_value_and_what_is_not_seen_lends_none() -> None:
    values = np.array([[1.0, np.nan], [3.0, 5.0]])
    found = interpolated(as_map(values), np.array([5.0, 9.0, 11.0, 15.0]), np.array([5.0, 9.0, 15.0]))
    assert found[0, 0] == 1 and found[2, 0] == 3 and found[2, 3] == 5
    # Its neighbour unseen, the rest of a map pixel keeps to those that are seen.
    assert found[0, 1] == 1 and np.isnan(found[0, 2:]).all()
    assert found[1, 1] == pytest.approx((0.36 * 1 + 0.24 * 3 + 0.16 * 5) / 0.76)


def test_places_off_the_map_are_not_seen() -> None:
    found = interpolated(as_map(np.ones((2, 2))), np.array([-1.0, 1.0, 19.9, 20.0, 99.0]), np.array([10.0]))
    assert np.isnan(found[0]).tolist() == [True, False, False, True, True]


def test_where_nothing_is_seen_the_slide_is_grey_and_faded() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    values = np.array([[0.0, np.nan], [1.0, 1.0]])
    places = np.array([2.0, 3.0, 12.0, 13.0])
    shown, grey = tinted(pixels, as_map(values), probability_scale(), places, places, 0.6), pale(pixels)
    assert np.abs(shown[:2, 2:] - (0.6 * 255 + 0.4 * grey[:2, 2:])).max() <= 0.5
    # A probability of 0 is not.
    assert (shown[0, 0] == grey[0, 0]).all()
    assert (np.ptp(shown[3], axis=1) > 20).all()
