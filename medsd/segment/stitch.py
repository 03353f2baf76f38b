"""A slide's tissue segmented tile by tile: overlapping tiles as in training, blended by weights that sum to one.

Zero padding reaches most of a tile in networks as deep as these, so that they answer otherwise on large blocks than on
the tiles that they were trained on (see `medsd.heatmap.engine.engine_for_slides`): every pixel is therefore looked at
by whole tiles of the training's size, and nothing else. Windows as of `medsd.heatmap.tiled.blend_window`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import zarr
from torch import Tensor

from medsd.checks import WORKERS, check_number
from medsd.heatmap.grid import MapGrid
from medsd.heatmap.store import BlockStore
from medsd.heatmap.tiled import blend_window
from medsd.networks.modes import evaluating, is_out_of_memory
from medsd.progress import Pixels, Progress, no_progress
from medsd.segment.network import SegmentationNetwork
from medsd.slides.readers.base import RGB, Bools
from medsd.slides.reading import opened_times, read_ahead
from medsd.slides.slide import Slide
from medsd.slides.tissue import TissueMask

logger = logging.getLogger(__name__)

CHUNK_PX = 512
OVERLAP_HINT = "a share of a tile's side"
_BLOCK_PX = 2048
Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SlideLabels:
    """The classes of a slide's pixels, on disk, on a grid from the slide's origin.

    Attributes:
        numbers: Zarr array (height, width) uint8: 0 where nothing was judged, else the class number and 1.
        probabilities: Zarr array (K, height, width) uint8, 255 for 1; 0 where nothing was judged. None if not kept.
        classes: names, the background's first.
        level0_px: side of a pixel in level-0 pixels.
        mpp: side of a pixel in micrometres.
        pixels: (K,) how many pixels each class has.
        unseen: share of the tissue (0 to 1) that could not be decoded; it has no class.
        tiles: how many the network looked at.
        method: how they were made, in words.
    """

    numbers: Any
    probabilities: Any
    classes: tuple[str, ...]
    level0_px: float
    mpp: float
    pixels: tuple[int, ...]
    unseen: float
    tiles: int
    method: str

    @property
    def areas_mm2(self) -> dict[str, float]:
        """The area of each class, the background's first, which is that of tissue alone."""
        return {name: count * self.mpp**2 / 1e6 for name, count in zip(self.classes, self.pixels, strict=True)}


class _Block(NamedTuple):
    """A square of the plane, and the tiles that start in it, by their places in it."""

    row: int
    column: int
    left: Places
    top: Places


class _Seen(NamedTuple):
    """Pixels (side, side, 3) from a block's corner on, white where no tile looks, and which were decoded."""

    pixels: RGB
    seen: Bools


@dataclass(eq=False, repr=False)
class SlideSegmenter:
    """Segments slides with one network.

    The probability of a pixel is the mean of the softmax of all tiles that hold it, weighed by their windows; its class
    is the likeliest. The outermost tiles end with the slide. Each tile is computed once.

    Args:
        network: put into eval mode while it runs.
        tile_px: side of the images that it was trained on.
        mpp: micrometres per pixel of these.
        overlap: of neighbouring tiles, a share of their side, 0 to 0.5. At half, the usual choice (nnU-Net's), no pixel
            rests on a tile's border alone; below, it costs less.
        probabilities: keep them, too.
        batch: tiles at once; fewer where memory runs out, from then on.
        workers: processes that read a slide at once, where slides are isolated; None for one.

    Raises:
        ConfigError: a value out of its range.
    """

    network: SegmentationNetwork
    tile_px: int
    mpp: float
    overlap: float = 0.5
    probabilities: bool = False
    batch: int = 16
    workers: int | None = None

    def __post_init__(self) -> None:
        check_number("overlap", self.overlap, "[0, 0.5]", hint=OVERLAP_HINT)
        check_number("batch", self.batch, "[1, inf)", whole=True)
        if self.workers is not None:
            check_number("workers", self.workers, WORKERS, whole=True)
        self.step_px = self.tile_px - math.floor(self.overlap * self.tile_px)
        # What reaches over a block's border must not reach over the next one's.
        self.block_px = CHUNK_PX * math.ceil(max(_BLOCK_PX, self.tile_px) / CHUNK_PX)
        self._window = blend_window(np.arange(self.tile_px) + 0.5, self.tile_px, self.step_px)

    @property
    def method(self) -> str:
        """In words."""
        return f"tiles of {self.tile_px} px, {self.step_px} px apart, at {self.mpp:g} µm/px, blended"

    def segment(self, slide: Slide, tissue: TissueMask, store: Path, progress: Progress = no_progress) -> SlideLabels:
        """The classes of the slide's tissue; memory holds a few blocks of 2,048 px, whatever the slide's size.

        Args:
            slide: read at the network's mpp.
            tissue: what holds none is not read.
            store: folder that keeps the result, and finished blocks: those in there, which the caller knows to be of
                this very slide, network and settings, are not made again. The caller removes it.
            progress: shows the tiles as they are done.
        """
        grid = MapGrid.over(slide, self.mpp, 1)
        plane = _Plane(self, grid, tissue, store)
        blocks = plane.blocks()
        todo = [block for block in blocks if not plane.kept.has(_name(block.row, block.column))]

        def work(shared: Slide) -> Iterator[Pixels]:
            threads = self.workers or 1
            seen = read_ahead(lambda block: plane.read(shared, block), todo, threads, threads + 1)
            for block in todo:
                yield from self._made(plane, block, next(seen))

        with opened_times(slide, self.workers or 1) as shared, evaluating(self.network), torch.inference_mode():
            for _ in progress(work(shared), sum(len(block.left) for block in todo), "tile"):
                pass
        counts = sum((plane.kept.read(_name(b.row, b.column))["counts"] for b in blocks), np.zeros(1, np.int64))
        counts = np.broadcast_to(counts, len(self.network.classes) + 1)
        *pixels, lost = counts.tolist()
        return SlideLabels(
            plane.numbers,
            plane.probabilities,
            self.network.classes,
            grid.level0_px,
            self.mpp,
            tuple(pixels),
            lost / max(1, lost + sum(pixels)),
            sum(len(block.left) for block in blocks),
            self.method,
        )

    def _made(self, plane: _Plane, block: _Block, seen: _Seen) -> Generator[Pixels, None, None]:
        """Compute and keep a block; yields after each tile."""
        pixels = torch.from_numpy(seen.pixels)
        while True:
            try:
                sums = yield from self._summed(pixels, block)
                break
            except RuntimeError as error:  # torch has a class of its own for devices only
                if not is_out_of_memory(error) or self.batch == 1:
                    raise
            self.batch //= 2
            logger.warning("out of memory: goes on with %d tile(s) at once", self.batch)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
        plane.finish(block, sums, seen.seen)

    def _summed(self, pixels: Tensor, block: _Block) -> Generator[Pixels, None, Tensor]:
        """Weighted sums (K, side, side) of the probabilities of a block's tiles, from its corner on.

        Pixels are (side, side, 3): NHWC is the faster for convolutions, on CPUs too.
        """
        device, side = self.network.device, self.tile_px
        pixels = pixels.to(device)
        window = torch.from_numpy(np.outer(self._window, self._window)).float().to(device)
        sums = torch.zeros(len(self.network.classes), *pixels.shape[:2], device=device)
        places = [
            (slice(y, y + side), slice(x, x + side))
            for y, x in zip(block.top.tolist(), block.left.tolist(), strict=True)
        ]
        for start in range(0, len(places), self.batch):
            now = places[start : start + self.batch]
            images = torch.stack([pixels[place] for place in now]).permute(0, 3, 1, 2)
            found = self.network(images).float().softmax(dim=1) * window
            for number, (rows, columns) in enumerate(now):
                sums[:, rows, columns] += found[number]
            yield from (Pixels(side**2) for _ in now)
        return sums


class _Plane:
    """A slide's pixels at the network's scale, cut into blocks: which tiles they take, and what is kept of them.

    A tile belongs to the block that it starts in. What it adds beyond that block's right and lower border is kept with
    the block, and taken up by those behind it: blocks are made in rows, so they come later.
    """

    def __init__(self, segmenter: SlideSegmenter, grid: MapGrid, tissue: TissueMask, store: Path) -> None:
        self._of, self._grid, self._tissue = segmenter, grid, tissue
        self.kept = BlockStore(store / "blocks")
        self.numbers = _array(store / "numbers.zarr", grid.shape)
        self.probabilities = None
        if segmenter.probabilities:
            self.probabilities = _array(store / "probabilities.zarr", (len(segmenter.network.classes), *grid.shape))
        self._starts = [tile_starts(length, segmenter.tile_px, segmenter.step_px) for length in grid.shape]
        self._weights = [
            _weights(length, starts, segmenter._window) for length, starts in zip(grid.shape, self._starts, strict=True)
        ]

    def blocks(self) -> list[_Block]:
        """Those that hold tissue, or tiles of which somewhat is tissue; in rows."""
        side, tile, ratio = self._of.block_px, self._of.tile_px, self._grid.ratio
        top, left = (places.ravel() for places in np.meshgrid(*self._starts, indexing="ij"))
        wanted = self._tissue.share(left * ratio, top * ratio, tile * ratio) > 0
        top, left = top[wanted], left[wanted]
        corners = [np.arange(0, length, side) for length in self._grid.shape]
        rows, columns = (places.ravel() for places in np.meshgrid(*corners, indexing="ij"))
        holding = self._tissue.share(columns * ratio, rows * ratio, side * ratio) > 0
        found = {(row // side, column // side) for row, column in zip(rows[holding], columns[holding], strict=True)}
        found |= set(zip((top // side).tolist(), (left // side).tolist(), strict=True))
        blocks = []
        for row, column in sorted((int(row), int(column)) for row, column in found):
            here = (top // side == row) & (left // side == column)
            blocks.append(_Block(row, column, left[here] - column * side, top[here] - row * side))
        return blocks

    def read(self, slide: Slide, block: _Block) -> _Seen:
        """The pixels that the block's tiles take, and its own tissue's, which tiles before it may take alone."""
        side, tile = self._of.block_px + self._of.tile_px, self._of.tile_px
        pixels, seen = np.full((side, side, 3), 255, np.uint8), np.ones((side, side), bool)
        cells = np.zeros(2 * [-(-side // CHUNK_PX)], bool)
        own, ratio = np.indices(2 * [self._of.block_px // CHUNK_PX]) * CHUNK_PX, self._grid.ratio
        y, x = ((at + number * self._of.block_px) * ratio for at, number in zip(own, block[:2], strict=True))
        cells[: own.shape[1], : own.shape[2]] = self._tissue.share(x, y, CHUNK_PX * ratio) > 0
        for top, left in zip(block.top.tolist(), block.left.tolist(), strict=True):
            rows, columns = (slice(at // CHUNK_PX, (at + tile - 1) // CHUNK_PX + 1) for at in (top, left))
            cells[rows, columns] = True
        for row, column in np.argwhere(cells) * CHUNK_PX:
            place = slice(row, min(row + CHUNK_PX, side)), slice(column, min(column + CHUNK_PX, side))
            y, x = (
                (at + number * self._of.block_px) * ratio for at, number in ((row, block.row), (column, block.column))
            )
            height, width = seen[place].shape
            pixels[place], decoded = slide.read_seen(x, y, width, height, self._of.mpp)
            if decoded is not None:
                seen[place] = decoded
        return _Seen(pixels, seen)

    def finish(self, block: _Block, sums: Tensor, seen: Bools) -> None:
        """Keep the classes of a block's pixels, and, last, what its tiles add to those behind it."""
        side, tile = self._of.block_px, self._of.tile_px
        margins = {"below": as_floats(sums[:, side:]), "right": as_floats(sums[:, :side, side:])}
        for (row, column), name, taken, to in (
            ((block.row - 1, block.column), "below", (slice(None), slice(side)), (slice(tile), slice(side))),
            ((block.row, block.column - 1), "right", (slice(None), slice(None)), (slice(side), slice(tile))),
            ((block.row - 1, block.column - 1), "below", (slice(None), slice(side, None)), (slice(tile), slice(tile))),
        ):
            if self.kept.has(_name(row, column)):
                other = self.kept.read(_name(row, column))[name][(slice(None), *taken)]
                sums[(slice(None), *to)] += torch.from_numpy(other).to(sums.device)
        starts = block.row * side, block.column * side
        rows, columns = (
            slice(start, min(start + side, length)) for start, length in zip(starts, self._grid.shape, strict=True)
        )
        height, width = rows.stop - rows.start, columns.stop - columns.start
        down, across = (torch.from_numpy(one[part]) for one, part in zip(self._weights, (rows, columns), strict=True))
        found = sums[:, :height, :width] / torch.outer(down, across).float().to(sums.device)
        wanted = self._is_tissue(rows, columns) & found.any(dim=0).cpu().numpy()
        judged = wanted & seen[:height, :width]
        # argmax over the first dimension takes ten times as long on a CPU.
        numbers = np.where(judged, found.max(dim=0).indices.cpu().numpy() + 1, 0).astype(np.uint8)
        self.numbers[rows, columns] = numbers
        if self.probabilities is not None:
            bytes_ = (255 * found).round().clamp(0, 255).to("cpu", torch.uint8).numpy()
            self.probabilities[:, rows, columns] = np.where(judged, bytes_, 0)
        counts = np.bincount(numbers.ravel(), minlength=len(sums) + 1)[1:]
        lost = np.count_nonzero(wanted & ~judged)
        self.kept.write(_name(block.row, block.column), counts=np.append(counts, lost).astype(np.int64), **margins)

    def _is_tissue(self, rows: slice, columns: slice) -> Bools:
        """Whether the middles of a block's pixels are tissue."""
        scale, mask = self._grid.ratio / self._tissue.level0_px, self._tissue.mask
        row, column = (
            (np.floor((np.arange(part.start, part.stop) + 0.5) * scale).astype(np.int64).clip(max=length - 1))
            for part, length in zip((rows, columns), mask.shape, strict=True)
        )
        tissue: Bools = mask[np.ix_(row, column)]
        return tissue


def as_floats(values: Tensor) -> npt.NDArray[np.float32]:
    """A tensor of any device as an array of its own."""
    array: npt.NDArray[np.float32] = values.cpu().numpy().copy()
    return array


def _name(row: int, column: int) -> str:
    return f"block-{row}-{column}"


def _array(path: Path, shape: Sequence[int]) -> Any:
    """A Zarr array of bytes, opened or made, whose missing chunks are 0."""
    if path.is_dir():
        return zarr.open_array(path, mode="r+")
    chunks = (*(1 for _ in shape[2:]), *(min(CHUNK_PX, length) for length in shape[-2:]))
    return zarr.create_array(path, shape=tuple(shape), chunks=chunks, dtype=np.uint8, fill_value=0)


def tile_starts(length: int, tile_px: int, step_px: int) -> Places:
    """Where tiles start along an axis, the last one so that it ends with the slide."""
    return np.append(np.arange(0, max(0, length - tile_px), step_px), max(0, length - tile_px)).astype(np.int64)


def _weights(length: int, starts: Places, window: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """What the windows of all tiles sum to at each pixel of an axis."""
    total = np.zeros(max(length, int(starts[-1]) + len(window)))
    for start in starts.tolist():
        total[start : start + len(window)] += window
    return total[:length]
