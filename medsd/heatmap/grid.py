"""The grids of a slide's maps, and what is asked of values on them."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from scipy import ndimage
from torch import Tensor

from medsd.heatmap.value_map import Floats
from medsd.networks.effective_field import EffectiveField
from medsd.slides.readers.base import Bools
from medsd.slides.slide import Slide
from medsd.slides.tissue import TissueMask

_LEAST_JUMPS = 1000


@dataclass(frozen=True)
class MapGrid:
    """The grid of one of a slide's maps: square map pixels from the slide's origin.

    Attributes:
        stride: side of a map pixel in pixels at `mpp`.
        mpp: micrometres per pixel that the classifier expects.
        ratio: level-0 pixels per pixel at `mpp`.
        shape: (height, width) in map pixels.
    """

    stride: int
    mpp: float
    ratio: float
    shape: tuple[int, int]

    @classmethod
    def over(cls, slide: Slide, mpp: float, stride: int) -> MapGrid:
        """The grid over the whole slide."""
        ratio = mpp / slide.mpp
        width, height = (math.ceil(length / ratio / stride - 1e-9) for length in slide.dimensions)
        return cls(stride, mpp, ratio, (height, width))

    @property
    def level0_px(self) -> float:
        """Side of a map pixel in level-0 pixels."""
        return self.stride * self.ratio

    def tissue(self, tissue: TissueMask) -> Bools:
        """(height, width) bool: the map pixels that are seen, of which most is tissue."""
        height, width = self.shape
        seen: Bools = tissue.at(width, height, self.level0_px) >= 0.5
        return seen

    def holding(self, unseen: Bools, left_px: float, top_px: float) -> npt.NDArray[np.int32]:
        """Rows and columns (n, 2) of the map pixels in which something could not be decoded, each once.

        Args:
            unseen: (h, w) pixels at `mpp`, True where nothing could be decoded.
            left_px, top_px: where they start, in pixels at `mpp` from the slide's origin.
        """
        places = np.argwhere(unseen) + 0.5 + (top_px, left_px)
        cells = np.unique(np.floor(places / self.stride).astype(np.int32), axis=0)
        inside = (cells >= 0).all(axis=1) & (cells < self.shape).all(axis=1)
        found: npt.NDArray[np.int32] = cells[inside]
        return found

    def placed(self, values: Floats, shift: int) -> Floats:
        """Values on a grid of this stride, whose first is map pixel (`shift`, `shift`); NaN where there are none."""
        rows = columns = shift
        placed = np.full(self.shape, np.nan, np.float32)
        inner = values[max(0, -rows) :, max(0, -columns) :]
        place = placed[max(0, rows) :, max(0, columns) :][: inner.shape[0], : inner.shape[1]]
        place[...] = inner[: place.shape[0], : place.shape[1]]
        return placed


def canvas_origin(features: EffectiveField, hidden: EffectiveField) -> int:
    """Where the canvas of feature cells starts, in pixels at the model's mpp from the slide's origin (0 or negative).

    A cell of a ResNet looks at the top left of its own square, not at its middle, one of a ResNet-D between the two.
    The canvas is shifted so that what a hidden cell looks at is centred on a map pixel, to half a pixel, and what a
    feature cell looks at as nearly as the hidden grid allows (`place_of` has the rest).
    """
    exact = hidden.stride / 2 - hidden.centre
    wish = features.stride / 2 - features.centre - features.stride
    origin = exact + hidden.stride * round((wish - exact) / hidden.stride)
    while origin > 0:
        origin -= features.stride
    # Between pixels every block would be read blurred.
    return round(origin)


def place_of(features: EffectiveField, origin_px: float) -> tuple[int, float]:
    """Where the canvas of feature cells lies among map pixels, as (shift, share).

    Map pixel p is centred between the cells p - shift - 1, which counts by `share`, and p - shift, along either axis.
    Both grids of a plain ResNet cannot lie on map pixels at once: at `layer3` the share is a quarter (8 of 32 px). In
    eighths (our choice): what is off by less than a sixteenth of a cell is not worth a blur, and the share is 0.
    """
    shift, eighths = divmod(round(8 * ((features.centre + origin_px) / features.stride - 0.5)), 8)
    return shift, eighths / 8


def between(values: Tensor, share: float) -> Tensor:
    """Values (..., h, w) interpolated bilinearly between each cell and the one before it, which counts by `share`.

    NaN where a cell that counts is NaN, or lies before the first.
    """
    for axis in (-2, -1) if share else ():
        before = torch.full_like(values.narrow(axis, 0, 1), torch.nan)
        before = torch.cat([before, values.narrow(axis, 0, values.shape[axis] - 1)], axis)
        values = share * before + (1 - share) * values
    return values


def block_any(values: Bools, side: int, shape: tuple[int, int]) -> Bools:
    """(height, width) `shape` bool: the squares of `side` pixels with any."""
    padded = np.zeros((shape[0] * side, shape[1] * side), bool)
    padded[: values.shape[0], : values.shape[1]] = values
    found: Bools = padded.reshape(shape[0], side, shape[1], side).max(axis=(1, 3))
    return found


def seam_score(values: Floats, owner: npt.NDArray[np.int32]) -> float | None:
    """Mean jump of a map across the borders of blocks, over that one feature cell beside them.

    None without borders, and where fewer than 1,000 jumps would make its noise larger than 5 % (our choice).

    Args:
        values: (h, w), NaN where nothing is seen.
        owner: (rows, columns) block of each square of map pixels, -1 for none.
    """
    at: list[Floats] = []
    beside: list[Floats] = []
    side = math.ceil(values.shape[0] / owner.shape[0])
    for map_values, blocks in ((values, owner), (values.T, owner.T)):
        edges = np.arange(1, min(blocks.shape[0], (map_values.shape[0] - 1) // side + 1))
        jumps = np.abs(map_values[edges * side] - map_values[edges * side - 1])
        both = (blocks[edges] >= 0) & (blocks[edges - 1] >= 0)
        border = both & (blocks[edges] != blocks[edges - 1])
        near = ndimage.binary_dilation(border, np.ones((3, 1), bool)) & both & ~border
        for mask, found in ((border, at), (near, beside)):
            fine = np.repeat(mask, side, axis=1)[:, : jumps.shape[1]]
            found.append(jumps[:, : fine.shape[1]][fine])
    jump, usual = (np.concatenate(found) for found in (at, beside))
    jump, usual = jump[np.isfinite(jump)], usual[np.isfinite(usual)]
    return float(jump.mean() / usual.mean()) if min(jump.size, usual.size) >= _LEAST_JUMPS and usual.any() else None
