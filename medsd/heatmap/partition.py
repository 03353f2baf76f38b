"""Rectangles that cover what is wanted of a grid at the least cost, each to be computed with its halo."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy import ndimage

from medsd.slides.readers.base import Bools

# Steps in which the borders of bands are tried, of the side of the largest rectangle.
_STEPS = 16


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


def partition(wanted: Bools, halo: int, largest: int) -> list[Rect]:
    """Rectangles that cover the wanted cells, none twice.

    The grid is cut into bands so that the rectangles around what each band holds cost least, halos included; each band
    is cut the other way in the same manner, and so on while that pays (our choice). Rows or columns go first, whichever
    ends with fewer cells.

    Args:
        wanted: (height, width) bool.
        halo: cells computed beside a rectangle on each side.
        largest: most cells of a rectangle with its halo, where that leaves one cell without.
    """
    choices = [_cut(wanted, halo, largest, first=True), [_turned(r) for r in _cut(wanted.T, halo, largest, first=True)]]
    return min(choices, key=lambda rects: sum((rect.height + 2 * halo) * (rect.width + 2 * halo) for rect in rects))


def _cut(wanted: Bools, halo: int, largest: int, first: bool = False, whole: bool = False) -> list[Rect]:
    """Bands of rows, each cut into columns and so on.

    Args:
        first: bands may hold more than the largest, since they are cut again.
        whole: nothing was gained by cutting into columns; if rows gain nothing either, it stays as it is.
    """
    rows, columns = (np.flatnonzero(wanted.any(axis=axis)) for axis in (1, 0))
    if not rows.size:
        return []
    left, top = int(columns[0]), int(rows[0])
    box = wanted[top : int(rows[-1]) + 1, left : int(columns[-1]) + 1]
    edges = _bands(box, halo, largest, first)
    if whole and len(edges) == 2:
        return [Rect(0, 0, box.shape[1], box.shape[0]).moved(left, top)]
    return [
        _turned(rect).moved(left, top + start)
        for start, end in pairwise(edges)
        for rect in _cut(box[start:end].T, halo, largest, whole=not first and len(edges) == 2)
    ]


def _bands(box: Bools, halo: int, largest: int, first: bool) -> list[int]:
    """Borders of the bands of rows that cost least together, by dynamic programming over their last rows."""
    height, width = box.shape
    side = max(1, math.isqrt(largest) - 2 * halo)
    highest = max(1, largest // ((1 if first else width) + 2 * halo) - 2 * halo)
    step = max(1, min(height, side, highest) // _STEPS)
    borders = np.unique([*range(0, height, step), height])
    if len(borders) == 2:
        return [0, height]
    ends = np.arange(1, len(borders))
    starts = np.minimum(ends - 1, np.searchsorted(borders, borders[1:] - highest))
    most = int((ends - starts).max())
    # Bands by their last strip (rows) and their first (columns), -1 where there is none: the boxes of what they hold.
    begin = np.maximum(ends[:, None] - most + np.arange(most), -1)
    lefts, rights, tops, bottoms = _boxes(box, borders)
    left, top = (_gathered(np.minimum, values, begin, none) for values, none in ((lefts, width), (tops, height)))
    right, bottom = (_gathered(np.maximum, values, begin, -1) + 1 for values in (rights, bottoms))
    high, wide = np.maximum(0, bottom - top) + 2 * halo, np.maximum(0, right - left)
    parts = np.ceil(wide / np.maximum(1, largest // np.maximum(1, high) - 2 * halo))
    own = np.where(begin < starts[:, None], np.inf, high * (wide + 2 * halo * parts))
    costs, before = np.zeros(most + len(borders)), np.zeros(len(borders), int)
    for end in ends.tolist():
        found = costs[end : most + end] + own[end - 1]
        best = int(found.argmin())
        costs[most + end], before[end] = found[best], end - most + best
    edges = [len(borders) - 1]
    while edges[-1]:
        edges.append(int(before[edges[-1]]))
    return [int(borders[edge]) for edge in reversed(edges)]


def _boxes(box: Bools, borders: npt.NDArray[np.int64]) -> tuple[npt.NDArray[np.int64], ...]:
    """First and last columns, first and last rows of what each strip of rows holds; of none the sides, and -1."""
    height, width = box.shape
    held = np.logical_or.reduceat(box, borders[:-1], axis=0)
    rows = np.flatnonzero(box.any(axis=1))
    first, past = np.searchsorted(rows, borders[:-1]), np.searchsorted(rows, borders[1:])
    some = past > first
    return (
        np.where(some, held.argmax(axis=1), width),
        np.where(some, width - 1 - held[:, ::-1].argmax(axis=1), -1),
        np.where(some, rows[np.minimum(first, len(rows) - 1)], height),
        np.where(some, rows[past - 1], -1),
    )


def _gathered(
    extreme: np.ufunc, values: npt.NDArray[np.int64], begin: npt.NDArray[np.int64], none: int
) -> npt.NDArray[np.int64]:
    """The extreme of the strips' values from each of `begin` (n, m) to the last of its row; of no strip, `none`."""
    each = np.append(values, none)[begin]
    found: npt.NDArray[np.int64] = extreme.accumulate(each[:, ::-1], axis=1)[:, ::-1]
    return found


def _turned(rect: Rect) -> Rect:
    """Rows and columns exchanged."""
    return Rect(rect.top, rect.left, rect.bottom, rect.right)
