"""Many tiles of one slide, read ahead by threads in an order that decodes each of the file's own tiles about once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from medsd.slides.readers.base import RGB, Bools
from medsd.slides.slide import Slide

Job = TypeVar("Job")
Result = TypeVar("Result")

# Tiles are read in strips of this many columns: neighbouring rows of a strip fit the reader's cache of decoded tiles,
# rows across a whole slide would not. (Reading a strip's cell as one area and cutting it up was tried: slower.)
_STRIP_TILES = 16


@dataclass(frozen=True)
class TileBatch:
    """Some tiles of a slide.

    Attributes:
        rows: (n,) numbers of the tiles among those asked for.
        pixels: (n, tile_px, tile_px, 3) uint8 RGB.
        seen: (n,) False where a part of the tile could not be decoded.
    """

    rows: npt.NDArray[np.intp]
    pixels: RGB
    seen: Bools


def read_tiles(
    slide: Slide,
    x: npt.NDArray[np.integer],
    y: npt.NDArray[np.integer],
    tile_px: int,
    mpp: float | None = None,
    threads: int = 1,
    batch: int = 32,
) -> Iterator[TileBatch]:
    """Every tile once, in an order that suits the file: place results by `TileBatch.rows`.

    Args:
        slide: an open slide.
        x, y: (n,) top left corners in level-0 pixels.
        tile_px: side of a tile in pixels at `mpp`.
        mpp: micrometres per pixel of the tiles; None for level 0.
        threads: how many read at once; `threads` + 1 batches are held in memory besides the caller's.
        batch: tiles a batch.
    """
    side_px = tile_px * (1.0 if mpp is None else mpp / slide.mpp)
    order = np.lexsort((x, y, x // (_STRIP_TILES * side_px)))
    parts = [order[start : start + batch] for start in range(0, len(order), batch)]

    def read(rows: npt.NDArray[np.intp]) -> TileBatch:
        pixels = np.empty((len(rows), tile_px, tile_px, 3), np.uint8)
        seen = np.ones(len(rows), np.bool_)
        for number, row in enumerate(rows):
            pixels[number], mask = slide.read_seen(int(x[row]), int(y[row]), tile_px, tile_px, mpp)
            seen[number] = mask is None or bool(mask.all())
        return TileBatch(rows, pixels, seen)

    return read_ahead(read, parts, threads, threads + 1)


def read_ahead(work: Callable[[Job], Result], jobs: Iterable[Job], threads: int, ahead: int) -> Iterator[Result]:
    """`work` of each job, in their order, by threads that are at most `ahead` results ahead of the caller.

    An error of a job is raised when its turn comes; the jobs behind it are dropped.
    """
    with ThreadPoolExecutor(threads) as pool:
        waiting = iter(jobs)
        queue: deque[Future[Result]] = deque(pool.submit(work, job) for job in islice(waiting, ahead))
        try:
            while queue:
                result = queue.popleft().result()
                queue.extend(pool.submit(work, job) for job in islice(waiting, 1))
                yield result
        finally:
            for future in queue:
                future.cancel()
