"""Tiles drawn from a mapped slide, on which its map and its looks are judged."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medsd.heatmap.maps import Engine
from medsd.heatmap.value_map import ValueMap
from medsd.slides.readers.base import Bools
from medsd.slides.slide import Slide

MOST_TILES, LEAST_TILES = 64, 16
# Costs a ninth of the time of a map: hiding takes four passes forward, and tiles are read once more. Of half as many
# tiles, brightest places are often not told apart from random ones.
_ONE_IN = 16
_SEED = 0


@dataclass(frozen=True)
class TileSample:
    """Some of a slide's tiles that are tissue throughout.

    Attributes:
        images: (B, 3, tile_px, tile_px) uint8, as the network saw them.
        maps: (B, h, w), the slide's saliency on them.
    """

    images: Tensor
    maps: Tensor


def sample_tiles(engine: Engine, slide: Slide, saliency: ValueMap, most: int = MOST_TILES) -> TileSample:
    """Tiles at random, the same ones every time: one in 16, no fewer than 16 where there are so many.

    Args:
        engine: that made the map.
        slide: as the network saw it.
        saliency: the map.
        most: tiles at most. Those that cannot be decoded in full are left out.
    """
    side = engine.tile_px // engine.strides[1]
    corners = _whole_tiles(saliency.seen, side)
    random = np.random.default_rng(_SEED)
    wanted = min(most, max(LEAST_TILES, len(corners) // _ONE_IN), len(corners))
    images = [torch.empty(0, 3, engine.tile_px, engine.tile_px, dtype=torch.uint8)]
    maps = [torch.empty(0, side, side)]
    for row, column in corners[np.sort(random.choice(len(corners), wanted, replace=False))]:
        place = column * saliency.level0_px, row * saliency.level0_px
        pixels, seen = slide.read_seen(*place, engine.tile_px, engine.tile_px, engine.mpp)
        if seen is None:
            images.append(torch.from_numpy(pixels).permute(2, 0, 1)[None])
            maps.append(torch.from_numpy(saliency.values[row : row + side, column : column + side])[None])
    return TileSample(torch.cat(images), torch.cat(maps))


def _whole_tiles(seen: Bools, side: int) -> npt.NDArray[np.int64]:
    """Rows and columns (n, 2) of the first map pixel of each tile, laid side by side, that is seen throughout."""
    rows, columns = (length // side for length in seen.shape)
    blocks = seen[: rows * side, : columns * side].reshape(rows, side, columns, side)
    return np.argwhere(blocks.all(axis=(1, 3))) * side
