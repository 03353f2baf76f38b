"""Rectangles over a grid: all that is wanted, nothing twice, none too large."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from medsd.heatmap.partition import Rect, grown, partition

masks = array_shapes(min_dims=2, max_dims=2, max_side=24).flatmap(lambda shape: arrays(bool, shape))


@settings(max_examples=60, deadline=None)
@given(wanted=masks, halo=st.integers(0, 4), largest=st.integers(1, 400))
def test_every_wanted_cell_is_in_one_rectangle(wanted, halo, largest):
    count = np.zeros(wanted.shape, int)
    for rect in partition(wanted, halo, largest):
        assert 0 <= rect.left < rect.right <= wanted.shape[1] and 0 <= rect.top < rect.bottom <= wanted.shape[0]
        inside = rect.within(Rect(0, 0, *wanted.shape[::-1]))
        count[inside] += 1
        # None is larger than it has to be.
        held = wanted[inside]
        assert held[0].any() and held[-1].any() and held[:, 0].any() and held[:, -1].any()
        if math.isqrt(largest) > 2 * halo:
            assert (rect.width + 2 * halo) * (rect.height + 2 * halo) <= largest
    assert count.max(initial=0) <= 1 and (count[wanted] == 1).all()


def test_nothing_is_wanted_of_an_empty_grid():
    assert partition(np.zeros((5, 7), bool), 2, 100) == []
    assert partition(np.zeros((0, 7), bool), 2, 100) == []


@pytest.mark.parametrize("turned", [False, True])
def test_far_islands_are_not_joined(turned):
    wanted = np.zeros((10, 60), bool)
    wanted[2:6, 3:9] = wanted[1:8, 50:58] = True
    found = partition(wanted.T if turned else wanted, 2, 10_000)
    expected = {Rect(3, 2, 9, 6), Rect(50, 1, 58, 8)}
    assert {Rect(*rect[1::-1], *rect[:1:-1]) if turned else rect for rect in found} == expected


@settings(max_examples=40, deadline=None)
@given(cells=masks, by=st.integers(0, 5))
def test_grown_is_what_lies_near(cells, by):
    expected = np.zeros_like(cells)
    for row, column in np.argwhere(cells):
        expected[max(0, row - by) : row + by + 1, max(0, column - by) : column + by + 1] = True
    np.testing.assert_array_equal(grown(cells, by), expected)


def test_rectangles_move_grow_and_meet():
    rect = Rect(2, 3, 5, 9)
    assert (rect.width, rect.height, rect.area) == (3, 6, 18)
    assert rect.grown(4, (8, 10)) == Rect(0, 0, 8, 10)
    assert rect.moved(1, -2).times(2) == Rect(6, 2, 12, 14)
    assert rect.meets(Rect(4, 0, 9, 4)) == Rect(4, 3, 5, 4)
    assert rect.meets(Rect(5, 3, 6, 9)) is None
