"""The tiled engine: overlapping tiles, each seen on its own as in training, blended by windows that sum to one.

For networks of which every cell depends on the whole tile (squeeze-excite, attention, AIM's masks), so that no halo
makes a block exact. The raised-cosine window along each axis is the usual one of overlap-add; our choice of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medsd.errors import NetworkError
from medsd.heatmap.maps import Engine, Floats, MapGrid, SlideMaps, as_array, finish_maps
from medsd.networks.aim import AimClassifier, stage_layer
from medsd.networks.classifier import Classifier
from medsd.networks.effective_field import measure_effective_field
from medsd.networks.modes import evaluating
from medsd.progress import Progress, no_progress
from medsd.slides.reading import read_tiles
from medsd.slides.slide import Slide
from medsd.slides.tissue import TissueMask

_PROBE_PX = 256


@dataclass(eq=False, repr=False)
class TiledEngine(Engine):
    """Maps slides with one classifier, tile by tile.

    Tiles lie half a tile apart (rounded up to whole cells of the saliency's layer), so that hidden cells look at the
    middle of map pixels, to a pixel. The probability is that of each tile, one value a stride cell, and its centre is
    the tile's. The saliency of a place is the weighted mean over the tiles that hold it of the gradient of a tile's
    logit of the target above the mean of the others: the values of `DenseEngine`, which takes the plain mean over all
    tiles on the stride grid. They differ where zero padding at a tile's border reaches, which the windows weigh least,
    and where the dense engine also counts tiles that end just before the place.

    Arguments and errors as `Engine`.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self.stride = _total_stride(self.classifier)
        if self.tile_px % self.stride:
            raise NetworkError(f"tile_px={self.tile_px}: must be a multiple of the network's stride, {self.stride}")
        masked = self.settings.attribution == "mask"
        self.hidden = measure_effective_field(
            self.classifier, _finest_stage(self.classifier) if masked else self.settings.layer
        )
        self._method = None if masked else self.method(self.classifier)
        cells = self.tile_px // self.hidden.stride
        self.step_px = math.ceil(cells / 2) * self.hidden.stride
        # Where a tile starts whose first cell looks at the middle of the first map pixel; whole pixels, or every tile
        # would be read between pixels.
        self._aligned_px = round(self.hidden.stride / 2 - self.hidden.centre)
        # The first tile starts at the slide's edge or just before it.
        self.origin_px = min(self._aligned_px, -(-self._aligned_px % self.hidden.stride))

    def map(self, slide: Slide, tissue: TissueMask, progress: Progress = no_progress) -> SlideMaps:
        grids = MapGrid.over(slide, self.mpp, self.stride), MapGrid.over(slide, self.mpp, self.hidden.stride)
        weights = [np.zeros_like(grid.values) for grid in grids]
        for grid in grids:
            grid.values[...] = 0
        left, top = self._places(grids, tissue)
        ratio = self.mpp / slide.mpp
        x, y = (np.rint(place * ratio).astype(np.int64) for place in (left, top))
        tiles = iter(progress(read_tiles(slide, x, y, self.tile_px, self.mpp), len(left), "tile"))
        while batch := list(islice(tiles, self.settings.batch)):
            images = torch.from_numpy(np.stack([tile.pixels for tile in batch])).permute(0, 3, 1, 2)
            probability, saliency = self.run(images.to(self.classifier.device))
            for number, tile in enumerate(batch):
                across, down = int(left[tile.row]), int(top[tile.row])
                self._add_probability(grids[0], weights[0], probability[number], across, down)
                self._add_saliency(grids[1], weights[1], saliency[number], across, down)
                if tile.seen is not None:
                    for grid in grids:
                        grid.mark_lost(tile.seen, across, down)
        for grid, weight in zip(grids, weights, strict=True):
            grid.values[weight == 0] = np.nan
            np.divide(grid.values, weight, out=grid.values, where=weight > 0)
        words = f"tiled, blended tiles of {self.tile_px} px, {self.step_px} px apart, at {self.mpp:g} um/px"
        target = self.classifier.classes[self.target]
        return finish_maps(grids, tissue, self.settings, target, words, len(left), len(left) * self.tile_px**2)

    def run(self, images: Tensor) -> tuple[Floats, Floats]:
        """Tiles (B, 3, tile_px, tile_px) uint8, each on its own.

        Returns:
            probability (B,), and saliency (B, tile_px / hidden stride, tile_px / hidden stride): of the logit of the
            target above the mean of the others (for two classes the log-odds); or the share of masks open, 0 to 1.
        """
        if self._method is not None:
            explanation = self.explain(self._method, images)
            return self.probability(explanation.logits), as_array(explanation.maps)
        assert isinstance(self.classifier, AimClassifier)
        with evaluating(self.classifier), torch.no_grad():
            output = self.classifier.masked(images)
        return self.probability(output.logits), as_array(output.mean_mask())

    def _places(
        self, grids: tuple[MapGrid, MapGrid], tissue: TissueMask
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Left and top of every tile that holds a map pixel with tissue, in pixels at the model's mpp."""
        starts = []
        for pixels, cells in zip(grids[0].values.shape[::-1], grids[1].values.shape[::-1], strict=True):
            # To the middle of the last pixel of the probability, and to the last cell of the saliency.
            end_px = max((pixels - 0.5) * self.stride + 1, cells * self.hidden.stride + self._aligned_px)
            steps = math.ceil((end_px - self.origin_px - self.tile_px) / self.step_px)
            starts.append(self.origin_px + self.step_px * np.arange(max(0, steps) + 1))
        left, top = (places.ravel() for places in np.meshgrid(*starts))
        # A map pixel whose centre the tile holds may have its tissue outside the tile, by half a stride cell.
        margin = self.stride / 2
        ratio = grids[0].ratio
        side_level0_px = (self.tile_px + self.stride) * ratio
        wanted = tissue.share((left - margin) * ratio, (top - margin) * ratio, side_level0_px) > 0
        return left[wanted], top[wanted]

    def _add_probability(self, grid: MapGrid, weights: Floats, value: float, left: int, top: int) -> None:
        """Blend in the probability of the tile at left, top: at every map pixel whose centre it holds."""
        firsts, windows = [], []
        for start in (top, left):
            first = math.ceil(start / self.stride - 0.5)
            last = math.ceil((start + self.tile_px) / self.stride - 0.5)
            firsts.append(first)
            offsets = (np.arange(first, last) + 0.5) * self.stride - start
            windows.append(blend_window(offsets, self.tile_px, self.step_px))
        _add(grid.values, weights, np.outer(*windows), value, firsts[0], firsts[1])

    def _add_saliency(self, grid: MapGrid, weights: Floats, values: Floats, left: int, top: int) -> None:
        stride = self.hidden.stride
        row, column = ((start - self._aligned_px) // stride for start in (top, left))
        window = blend_window((np.arange(len(values)) + 0.5) * stride, self.tile_px, self.step_px)
        _add(grid.values, weights, np.outer(window, window), values, row, column)


def blend_window(offsets_px: npt.NDArray[np.floating], tile_px: int, step_px: int) -> npt.NDArray[np.float64]:
    """Weight of places along one axis of a tile; over tiles a step apart the weights sum to 1.

    A raised cosine over the overlap with either neighbour and 1 between: a Hann window where tiles overlap by half.

    Args:
        offsets_px: (n,) places from the tile's start, 0 to `tile_px`.
        tile_px: side of the tiles.
        step_px: from one tile to the next, at least half a tile and at most one.
    """
    overlap = tile_px - step_px
    if overlap == 0:
        return np.ones(len(offsets_px))
    edge = np.minimum(offsets_px, tile_px - offsets_px)
    weights: npt.NDArray[np.float64] = np.sin(np.pi / 2 * np.clip(edge / overlap, 0, 1)) ** 2
    return weights


def _add(
    sums: Floats, weights: Floats, window: npt.NDArray[np.float64], values: Floats | float, top: int, left: int
) -> None:
    """Add values under a window to the map at row `top` and column `left`, as far as they lie on it."""
    rows, columns = (
        slice(max(0, -start), max(0, min(count, length - start)))
        for start, count, length in zip((top, left), window.shape, sums.shape, strict=True)
    )
    inner = window[rows, columns]
    place = np.s_[max(0, top) : max(0, top) + inner.shape[0], max(0, left) : max(0, left) + inner.shape[1]]
    sums[place] += (window * values)[rows, columns]
    weights[place] += inner


def _total_stride(classifier: Classifier) -> int:
    with evaluating(classifier), torch.no_grad():
        x = torch.zeros(1, 3, _PROBE_PX, _PROBE_PX, device=classifier.device)
        return _PROBE_PX // int(classifier.encoder(x).shape[-1])


def _finest_stage(classifier: Classifier) -> str:
    """Name of the encoder's layer that gives the finest stage with a mask."""
    if not isinstance(classifier, AimClassifier):
        raise NetworkError("attribution 'mask': this classifier has no masks; use 'gradient_x_activation'")
    return stage_layer(classifier.encoder, classifier.stages[-1])
