"""Rectangles that cover what is wanted of a grid at the least cost, each to be computed with its halo."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np
from scipy import ndimage

from medsd.slides.readers.base import Bools

# Bands that are tried beyond the fewest; more find little.
_MORE_BANDS = 6


class Rect(NamedTuple):
    """Cells of a grid: columns left to right and rows top to bottom (ends excluded)."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def area(self) -> int:
        return self.width * self.height

    def grown(self, cells: int, within: tuple[int, int]) -> Rect:
        """With so many cells more on each side, as far as a grid of (width, height) goes."""
        left, top, right, bottom = self
        width, height = within
        return Rect(max(0, left - cells), max(0, top - cells), min(width, right + cells), min(height, bottom + cells))

    def moved(self, right: int, down: int) -> Rect:
        """So many cells to the right and down."""
        return Rect(self.left + right, self.top + down, self.right + right, self.bottom + down)

    def times(self, factor: int) -> Rect:
        """The same place on a grid that is so many times finer."""
        return Rect(*(side * factor for side in self))

    def meets(self, other: Rect) -> Rect | None:
        """The cells of both; None where there are none."""
        left, top = max(self.left, other.left), max(self.top, other.top)
        right, bottom = min(self.right, other.right), min(self.bottom, other.bottom)
        return Rect(left, top, right, bottom) if left < right and top < bottom else None

    def within(self, outer: Rect) -> tuple[slice, slice]:
        """Rows and columns of an array that holds `outer`."""
        return (
            slice(self.top - outer.top, self.bottom - outer.top),
            slice(self.left - outer.left, self.right - outer.left),
        )


def grown(cells: Bools, by: int) -> Bools:
    """(height, width) bool: the cells at most so many columns and rows away from one of `cells`."""
    wide: Bools = np.asarray(ndimage.maximum_filter(cells, 2 * by + 1, mode="constant"))
    return wide


def _any(cells: Bools, axis: int) -> Bools:
    held: Bools = np.asarray(cells.any(axis=axis))
    return held


def partition(wanted: Bools, halo: int, largest: int) -> list[Rect]:
    """Rectangles that cover the wanted cells, none twice, from top to bottom or from left to right.

    Bands of even height, each cut into even pieces where it holds wanted cells, each piece shrunk to what it holds; or
    bands of columns. Of several numbers of bands in both directions the one with the fewest cells, halos included, is
    taken (our choice).

    Args:
        wanted: (height, width) bool.
        halo: cells computed beside a rectangle on each side.
        largest: most cells of a rectangle with its halo, where that leaves one cell without.
    """
    side = max(1, math.isqrt(largest) - 2 * halo)
    choices = []
    for across in (False, True):
        turned: Bools = wanted.T if across else wanted
        held = np.flatnonzero(_any(turned, 1))
        if not held.size:
            return []
        bands = math.ceil((held[-1] + 1 - held[0]) / side)
        for count in range(bands, bands + _MORE_BANDS):
            rects = [
                rect
                for top, bottom in _runs(_any(turned, 1), halo, count=count)
                for rect in _pieces(turned, top, bottom, halo, largest)
            ]
            choices.append([Rect(*rect[1::-1], *rect[:1:-1]) for rect in rects] if across else rects)
    return min(choices, key=lambda rects: sum(_cost(rect, halo) for rect in rects))


def _pieces(wanted: Bools, top: int, bottom: int, halo: int, largest: int) -> Iterator[Rect]:
    """A band in pieces, each shrunk to the wanted cells it holds."""
    longest = max(1, largest // (bottom - top + 2 * halo) - 2 * halo)
    for left, right in _runs(_any(wanted[top:bottom], 0), halo, longest=longest):
        rows = np.flatnonzero(wanted[top:bottom, left:right].any(axis=1)) + top
        if rows.size:  # a part may lie in a gap
            yield Rect(left, int(rows[0]), right, int(rows[-1]) + 1)


def _runs(held: Bools, halo: int, longest: int | None = None, count: int | None = None) -> Iterator[tuple[int, int]]:
    """Runs of the cells of a line that are held, without the gaps that are wider than two halos.

    They are cut into equal parts: as few as make none longer than `longest`, or so that there are about `count` in all.
    """
    cells = np.flatnonzero(held)
    if not cells.size:
        return
    starts = np.flatnonzero(np.diff(cells, prepend=cells[0] - 2 * halo - 2) > 2 * halo + 1)
    for group in np.split(cells, starts[1:]):
        first, last = int(group[0]), int(group[-1]) + 1
        longest_here = longest or math.ceil((cells[-1] + 1 - cells[0]) / (count or 1))
        parts = math.ceil((last - first) / longest_here)
        edges = [first + (last - first) * part // parts for part in range(parts + 1)]
        yield from pairwise(edges)


def _cost(rect: Rect, halo: int) -> int:
    return (rect.height + 2 * halo) * (rect.width + 2 * halo)
