"""The resampling weights against what they promise: sums, places, and no pixel that is not needed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from medsd.slides.resample import plan_axis, resample

starts = st.floats(-1e5, 1e5)
scales = st.one_of(st.floats(0.05, 40), st.sampled_from([1.0, 1.5, 2.0, 3.0, 4.0, 1 + 1e-8]))


@settings(deadline=None)
@given(start=starts, scale=scales, count=st.integers(1, 50))
def test_a_linear_gradient_stays_where_it_is(start: float, scale: float, count: int) -> None:
    axis = plan_axis(start, scale, count)
    source = axis.first + 0.5 + np.arange(axis.length)
    got = source if axis.weights is None else axis.weights.astype(np.float64) @ source
    expected = start + (np.arange(count) + 0.5) * scale
    # Positions are rounded to 1/1024 of a pixel and weights are single precision.
    assert np.abs(got - expected).max() <= 0.5 / 1024 + 2e-4 + 1e-7 * np.abs(source).max()


@settings(deadline=None)
@given(start=starts, scale=scales, count=st.integers(1, 50))
def test_weights_are_a_mean(start: float, scale: float, count: int) -> None:
    axis = plan_axis(start, scale, count)
    if axis.weights is not None:
        weights = axis.weights.toarray()
        assert weights.min() >= 0 and np.abs(weights.sum(1) - 1).max() < 1e-5
        assert weights[0, 0] > 0 and weights[-1, -1] > 0  # nothing is read for nothing


@pytest.mark.parametrize(
    ("start", "scale", "expected"),
    [
        (5, 1, None),
        (5.25, 1, [0.75, 0.25]),
        (4, 2, [0.5, 0.5]),
        (4, 3, [0.25, 0.5, 0.25]),
        (4, 4, [1 / 6, 1 / 3, 1 / 3, 1 / 6]),
    ],
)
def test_known_weights(start: float, scale: float, expected: list[float] | None) -> None:
    axis = plan_axis(start, float(scale), 1)
    assert axis.first == int(start)
    assert (axis.weights is None) == (expected is None)
    if axis.weights is not None:
        assert axis.weights.toarray()[0] == pytest.approx(expected, abs=1e-6)


def test_rows_and_columns_are_not_confused() -> None:
    source = np.random.default_rng(0).integers(0, 256, (4, 6, 3), np.uint8)
    halved = resample(source, plan_axis(0, 2.0, 2), plan_axis(0, 2.0, 3))
    assert np.array_equal(halved, np.rint(source.reshape(2, 2, 3, 2, 3).mean((1, 3))))
    assert np.array_equal(resample(source, plan_axis(0, 1.0, 4), plan_axis(0, 1.0, 6)), source)
    rows_only = resample(source, plan_axis(0, 2.0, 2), plan_axis(0, 1.0, 6))
    assert np.array_equal(rows_only, np.rint(source.reshape(2, 2, 6, 3).mean(1)))


@settings(deadline=None)
@given(start=st.one_of(starts, st.integers(0, 4096).map(lambda n: n / 2048)), scale=scales)
def test_positions_reached_by_other_sums_get_the_same_weights(start: float, scale: float) -> None:
    one, other = (plan_axis(start + noise, scale, 300) for noise in (-5e-11, 5e-11))
    assert (one.first, one.length) == (other.first, other.length)
    assert (one.weights is None) == (other.weights is None)
    if one.weights is not None:
        assert np.array_equal(one.weights.toarray(), other.weights.toarray())
