"""Resampling in one place: every pixel depends on its own position only, so neighbouring reads join without a seam.

An output pixel is the mean of the linearly interpolated source over a window one source pixel narrower than the output
pixel (our choice). Up to the source's own scale that is linear interpolation; at 2:1 on the grid it is the mean of
2 x 2 pixels, as pyramids are made; and at any scale and phase a linear gradient stays where it was.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from medsd.slides.readers.base import RGB

if TYPE_CHECKING:
    from scipy.sparse import csr_array

Floats = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]

# Positions are rounded to this part of a source pixel: reads that reach the same position by different sums then get
# the same weights to the last bit.
_PHASES = 1024
# Moves the rounding's own ties away from positions that are used (halves, quarters).
_TIE = 1e-4
# Values of the source that are mixed at once: what fits the second cache; all at once takes up to four times as long.
_STRIP_VALUES = 2**16


@dataclass(frozen=True)
class Axis:
    """Which source pixels an axis of the output needs, and how they are mixed.

    Attributes:
        first: first source pixel needed.
        length: number of source pixels needed.
        weights: (count, length) float32, rows sum to 1; None where the output is the source pixels themselves.
        plan: start in [0, 1), scale and count that the weights follow from.
    """

    first: int
    length: int
    weights: csr_array | None
    plan: tuple[float, float, int]


def plan_axis(start: float, scale: float, count: int) -> Axis:
    """The weights of one axis.

    Args:
        start: near edge of the first output pixel in source pixels (pixel k reaches from k to k + 1).
        scale: source pixels per output pixel.
        count: number of output pixels.
    """
    base = math.floor(start)
    if scale == 1.0 and start == base:
        return Axis(base, count, None, (0.0, scale, count))
    axis = _plan(start - base, scale, count)
    return Axis(base + axis.first, axis.length, axis.weights, axis.plan)


@lru_cache(maxsize=64)
def _plan(start: float, scale: float, count: int) -> Axis:
    """The axis for a start in [0, 1); tiles of one grid have few different ones."""
    from scipy.sparse import csr_array  # half of the time that reading slides at their own scale takes to import

    plan = (start, scale, count)
    centre = start - 0.5 + (np.arange(count) + 0.5) * scale
    centre = np.floor(centre * _PHASES + 0.5 + _TIE) / _PHASES
    whole = np.floor(centre)
    if scale == 1.0 and centre[0] == whole[0]:
        return Axis(int(whole[0]), count, None, plan)
    half = max(scale - 1.0, 0.0) / 2
    reach = math.ceil(half) + 1
    taps = np.arange(-reach, reach + 1)
    mix = _window(taps - (centre - whole)[:, None], half)
    mix /= mix.sum(axis=1, keepdims=True)
    pixel = whole.astype(np.int64)[:, None] + taps
    first, last = int(pixel[mix > 0].min()), int(pixel[mix > 0].max())
    length = last + 1 - first
    column = np.clip(pixel - first, 0, length - 1)  # what is clipped has weight 0
    ends = np.arange(count + 1) * len(taps)
    weights = csr_array((mix.astype(np.float32).ravel(), column.ravel(), ends), shape=(count, length))
    weights.eliminate_zeros()
    return Axis(first, length, weights, plan)


@lru_cache(maxsize=64)
def _strips(start: float, scale: float, count: int, height: int) -> tuple[tuple[int, int, csr_array | None], ...]:
    """The axis in strips of `height` output pixels: first source pixel from the axis's first, length, weights."""
    weights = _plan(start, scale, count).weights
    strips = []
    for top in range(0, count, height):
        bottom = min(top + height, count)
        if weights is None:
            strips.append((top, bottom - top, None))
            continue
        part = weights[top:bottom]
        first, last = int(part.indices.min()), int(part.indices.max())
        strips.append((first, last + 1 - first, part[:, first : last + 1]))
    return tuple(strips)


def resample(source: RGB, rows: Axis, columns: Axis) -> RGB:
    """Mix `source` (rows.length, columns.length, 3) into the output pixels of both axes.

    Rounded to the nearest grey, halves to even, so that the mean grey stays.
    """
    if rows.weights is None and columns.weights is None:
        return source
    count, width = rows.plan[2], columns.plan[2]
    mixed = np.empty((count, width, 3), np.uint8)
    height = max(16, _STRIP_VALUES // (3 * columns.length))
    for number, (first, length, weights) in enumerate(_strips(*rows.plan, height)):
        strip = source[first : first + length].reshape(length, -1).astype(np.float32)
        mixed[number * height : (number + 1) * height] = _mix_columns(_mix(weights, strip), columns)
    return mixed


def _mix_columns(table: Singles, columns: Axis) -> RGB:
    """Mix a strip's columns (rows, 3 * columns.length), and round."""
    # Turned as tables of two axes: with colour as an axis of three the copy takes longer than all the rest.
    turned = np.ascontiguousarray(table.T).reshape(columns.length, 3 * len(table))
    mixed = _mix(columns.weights, turned).reshape(-1, len(table))
    return np.rint(mixed).astype(np.uint8).T.reshape(len(table), -1, 3)


def _mix(weights: csr_array | None, table: Singles) -> Singles:
    return table if weights is None else weights @ table


def _window(distance: Floats, half: float) -> Floats:
    """Mean of the unit triangle over [distance - half, distance + half]."""
    if half < 1e-6:
        return np.maximum(0.0, 1.0 - np.abs(distance))
    return np.maximum(0.0, (_triangle_area(distance + half) - _triangle_area(distance - half)) / (2 * half))


def _triangle_area(to: Floats) -> Floats:
    """Area under the unit triangle left of `to`."""
    inside = np.clip(to, -1.0, 1.0)
    return 0.5 + inside - np.sign(inside) * inside**2 / 2
