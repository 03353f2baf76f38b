"""The dense engine: probability and hidden-layer saliency of a whole slide from one pass over its tissue.

A classifier that is linear after average pooling gives the logits of every tile position at once: the head is
applied to each feature cell and averaged over the tile's window. The gradient of the sum of all windows is the
average of what overlapping tiles on the feature grid would give, at the price of one forward and one backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.errors import NetworkError
from medsd.heatmap.maps import Engine, Floats, MapGrid, SlideMaps, as_array, finish_maps
from medsd.networks.classifier import TileClassifier
from medsd.networks.geometry import Geometry, ReceptiveField, measure_geometry
from medsd.networks.modes import recorded
from medsd.progress import Progress, no_progress
from medsd.slides.readers.base import RGB, Bools
from medsd.slides.reading import read_ahead
from medsd.slides.slide import Slide
from medsd.slides.tissue import TissueMask

_READ_AHEAD = 2


@dataclass(frozen=True)
class _Block:
    """Feature cells of the canvas: columns left to right and rows top to bottom (ends excluded)."""

    left: int
    top: int
    right: int
    bottom: int


@dataclass(frozen=True)
class _Read:
    """A block, its crop (the block and its halo, clipped to the canvas), and the crop's pixels as `Slide.read_seen`."""

    block: _Block
    crop: _Block
    pixels: RGB
    seen: Bools | None


@dataclass(eq=False, repr=False)
class DenseEngine(Engine):
    """Maps slides without tiles; arguments and errors as `Engine`.

    Raises:
        NetworkError: the network has global operations, too.
    """

    classifier: TileClassifier

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.settings.attribution == "mask":
            raise NetworkError("attribution 'mask': needs a classifier with masks, mapped tile by tile (way 'auto')")
        self.geometry = measure_geometry(self.classifier, self.settings.layer)
        stride = self.geometry.features.stride
        if self.tile_px % stride:
            raise NetworkError(f"tile_px={self.tile_px}: must be a multiple of the network's stride, {stride}")
        self.window = self.tile_px // stride
        self._windows = _Windows(self.classifier, self.window)
        self._method = self.method(self._windows, "cells.classifier.")
        # In cells: the saliency's halo, or what the tile window around a cell sees, whichever reaches further.
        windowed = self.geometry.features.size / 2 / stride + self.window / 2
        self._halo = max(self.geometry.halo_px // stride, math.ceil(windowed) + 1)
        self.origin_px = _canvas_origin(self.geometry)
        # Map pixel of the canvas's first cell, for either map.
        self._shifts = [_shift(field, self.origin_px) for field in (self.geometry.features, self.geometry.hidden)]

    def map(self, slide: Slide, tissue: TissueMask, progress: Progress = no_progress) -> SlideMaps:
        ratio = self.mpp / slide.mpp
        features, hidden = self.geometry.features, self.geometry.hidden
        grids = MapGrid.over(slide, self.mpp, features.stride), MapGrid.over(slide, self.mpp, hidden.stride)
        probability, saliency = (grid.values for grid in grids)
        scale = features.stride // hidden.stride
        canvas = [
            max(cells - self._shifts[0], math.ceil((finer - self._shifts[1]) / scale))
            for cells, finer in zip(probability.shape[::-1], saliency.shape[::-1], strict=True)
        ]
        blocks = self._blocks(canvas, tissue, ratio)
        pixels = 0
        for read in progress(self._read(slide, blocks, canvas, ratio), len(blocks), "block"):
            pixels += read.pixels.shape[0] * read.pixels.shape[1]
            tensor = torch.from_numpy(read.pixels).permute(2, 0, 1)[None].to(self.classifier.device)
            block_probability, block_saliency = self.run(tensor)
            _place(probability, block_probability[0], read.block, read.crop, 1, self._shifts[0])
            _place(saliency, block_saliency[0], read.block, read.crop, scale, self._shifts[1])
            if read.seen is not None:
                left, top = (cell * features.stride + self.origin_px for cell in (read.crop.left, read.crop.top))
                for grid in grids:
                    grid.mark_lost(read.seen, left, top)
        tiles = f"dense, mean over tiles of {self.tile_px} px at {self.mpp:g} um/px"
        return finish_maps(
            grids, tissue, self.settings, self.classifier.classes[self.target], tiles, len(blocks), pixels
        )

    def run(self, images: Tensor) -> tuple[Floats, Floats]:
        """Maps of whole images (B, 3, H, W) uint8, sides multiples of the stride, without any placing.

        Returns:
            probability (B, H / stride, W / stride) of the tile around each cell, and saliency
            (B, H / hidden stride, W / hidden stride): of a tile's logit of the target above the mean of the others
            (for two classes the log-odds), averaged over the tiles that hold the place.
        """
        with recorded(self._windows, "cells") as cells:
            explanation = self.explain(self._method, images)
        logits = _window_mean(cells[0].detach(), self.window) + self.classifier.head.bias.detach()[:, None, None]
        return self.probability(logits), as_array(explanation.maps)

    def _blocks(self, canvas: list[int], tissue: TissueMask, ratio: float) -> list[_Block]:
        """Blocks of about `block_px` over the tissue, each shrunk to the cells that hold tissue."""
        stride = self.geometry.features.stride
        columns, rows = np.meshgrid(np.arange(canvas[0]), np.arange(canvas[1]))
        x, y = ((cells.ravel() * stride + self.origin_px) * ratio for cells in (columns, rows))
        wanted = tissue.share(x, y, stride * ratio).reshape(rows.shape) > 0
        # A map pixel and the tile's window around it may lie a cell away from the tissue.
        wanted = F.max_pool2d(torch.from_numpy(wanted).float()[None], 3, 1, 1)[0].numpy() > 0
        if not wanted.any():
            return []
        size = max(1, self.settings.block_px // stride)
        blocks = []
        for top, bottom in _even_parts(np.flatnonzero(wanted.any(axis=1)), size):
            for left, right in _even_parts(np.flatnonzero(wanted.any(axis=0)), size):
                part = wanted[top:bottom, left:right]
                if part.any():
                    down, across = np.flatnonzero(part.any(axis=1)), np.flatnonzero(part.any(axis=0))
                    blocks.append(_Block(left + across[0], top + down[0], left + across[-1] + 1, top + down[-1] + 1))
        return blocks

    def _read(self, slide: Slide, blocks: list[_Block], canvas: list[int], ratio: float) -> Iterator[_Read]:
        """Each block with its crop and pixels, read ahead."""
        stride = self.geometry.features.stride
        halo = self._halo

        def read(block: _Block) -> _Read:
            crop = _Block(
                max(0, block.left - halo),
                max(0, block.top - halo),
                min(canvas[0], block.right + halo),
                min(canvas[1], block.bottom + halo),
            )
            x, y = ((cell * stride + self.origin_px) * ratio for cell in (crop.left, crop.top))
            size = (crop.right - crop.left) * stride, (crop.bottom - crop.top) * stride
            return _Read(block, crop, *slide.read_seen(x, y, *size, mpp=self.mpp))

        return read_ahead(read, blocks, threads=1, ahead=_READ_AHEAD)


class _Cells(nn.Module):
    """Logits (B, K, h, w) of each feature cell, without the bias."""

    def __init__(self, classifier: TileClassifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(self.classifier.feature_map(x), self.classifier.head.weight[:, :, None, None])


class _Windows(nn.Module):
    """Logits (B, K) whose gradient is that of a tile's, averaged over the tiles that hold a place.

    Every window holds window^2 cells at weight 1 / window^2 and as many windows hold a cell, so the sum over windows
    weighs a cell by 1, and the average over the tiles that hold a place by 1 / window^2.
    """

    def __init__(self, classifier: TileClassifier, window: int) -> None:
        super().__init__()
        self.cells, self.window = _Cells(classifier), window

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.cells(x).sum(dim=(2, 3)) / self.window**2
        return logits


def _canvas_origin(geometry: Geometry) -> float:
    """Where the canvas starts, in pixels at the model's mpp from the slide's origin (0 or negative).

    A cell of a ResNet looks at the top left of its own square, not at its middle. The canvas is shifted so that
    what a hidden cell looks at is centred on a map pixel exactly, and what a feature cell looks at as nearly as the
    hidden grid allows.
    """
    hidden, features = geometry.hidden, geometry.features
    exact = hidden.stride / 2 - hidden.centre
    wish = features.stride / 2 - features.centre - features.stride
    origin = exact + hidden.stride * round((wish - exact) / hidden.stride)
    while origin > 0:
        origin -= features.stride
    return origin


def _shift(field: ReceptiveField, origin_px: float) -> int:
    return round((field.centre + origin_px) / field.stride - 0.5)


def _place(
    target: Floats,
    values: Floats,
    block: _Block,
    crop: _Block,
    scale: int,
    shift: int,
) -> None:
    """Write the block's part of the crop's values into the map; `scale` map pixels make a feature cell."""
    inner = values[
        (block.top - crop.top) * scale : (block.bottom - crop.top) * scale,
        (block.left - crop.left) * scale : (block.right - crop.left) * scale,
    ]
    top, left = block.top * scale + shift, block.left * scale + shift
    inner = inner[max(0, -top) :, max(0, -left) :]
    window = target[max(0, top) :, max(0, left) :][: inner.shape[0], : inner.shape[1]]
    window[...] = inner[: window.shape[0], : window.shape[1]]


def _window_mean(logits: Tensor, window: int) -> Tensor:
    """Mean over the square of `window` cells around each cell (B, K, h, w), over the cells that exist.

    A window of even size has no middle cell: its four placements around the cell are averaged.
    """
    taps = torch.ones(window + 1 - window % 2, device=logits.device, dtype=logits.dtype)
    if window % 2 == 0:
        taps[0] = taps[-1] = 0.5
    kernel = (taps[:, None] * taps[None, :])[None, None]
    stacked = torch.cat([logits.flatten(0, 1)[:, None], torch.ones_like(logits[:1, :1])])
    sums = F.conv2d(stacked, kernel, padding=len(taps) // 2)
    return (sums[:-1] / sums[-1:]).view_as(logits)


def _even_parts(cells: npt.NDArray[np.intp], size: int) -> list[tuple[int, int]]:
    """The range from the first to the last cell in about equal parts of about `size` cells."""
    first, last = int(cells[0]), int(cells[-1]) + 1
    count = max(1, math.ceil((last - first) / size - 0.1))  # a tenth over does not pay for another halo
    edges = [first + (last - first) * part // count for part in range(count + 1)]
    return list(pairwise(edges))
