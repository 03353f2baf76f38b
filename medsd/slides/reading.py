"""Many tiles of one slide, read ahead by threads in an order that decodes each of the file's own tiles about once."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from copy import deepcopy
from itertools import islice
from queue import SimpleQueue
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from medsd.slides.readers.base import RGB, Bools
from medsd.slides.slide import Area, Slide

Job = TypeVar("Job")
Result = TypeVar("Result")

# Tiles are read in strips of this many columns: neighbouring rows of a strip fit the reader's cache of decoded tiles,
# rows across a whole slide would not. (Reading a strip's cell as one area and cutting it up was tried: slower.)
_STRIP_TILES = 16
# Handing over single tiles costs more than it spares.
_AT_ONCE = 8
# Beside a GPU, which computes faster than one thread decodes; a CPU's own cores are computing.
_BESIDE_A_GPU = 4


class ReadTile(NamedTuple):
    """A tile of a slide.

    Attributes:
        row: its number among the tiles asked for.
        pixels: (tile_px, tile_px, 3) uint8 RGB.
        seen: (tile_px, tile_px) bool, False where it could not be decoded; None where all of it was.
    """

    row: int
    pixels: RGB
    seen: Bools | None


def read_tiles(
    slide: Slide,
    x: npt.NDArray[np.integer],
    y: npt.NDArray[np.integer],
    tile_px: int,
    mpp: float | None = None,
    threads: int = 1,
) -> Iterator[ReadTile]:
    """Every tile once, in an order that suits the file: place results by `ReadTile.row`.

    Args:
        slide: an open slide.
        x, y: (n,) top left corners in level-0 pixels.
        tile_px: side of a tile in pixels at `mpp`.
        mpp: micrometres per pixel of the tiles; None for level 0.
        threads: how many read at once, ahead of the caller by at most 8 tiles each and 8 more.

    Example:
        >>> from medsd.slides.slide import open_slide
        >>> with open_slide("slide.tif") as slide:
        ...     tiles = read_tiles(slide, x=np.array([0, 500]), y=np.array([0, 500]), tile_px=64, mpp=1.0, threads=2)
        ...     {tile.row: tile.pixels.shape for tile in tiles}
        {0: (64, 64, 3), 1: (64, 64, 3)}
    """
    side_px = tile_px * (1.0 if mpp is None else mpp / slide.mpp)
    order = np.lexsort((x, y, x // (_STRIP_TILES * side_px)))
    places = list(zip(order.tolist(), x[order].tolist(), y[order].tolist(), strict=True))
    parts = [places[start : start + _AT_ONCE] for start in range(0, len(places), _AT_ONCE)]

    def read(part: list[tuple[int, int, int]]) -> list[ReadTile]:
        return [ReadTile(row, *slide.read_seen(left, top, tile_px, tile_px, mpp)) for row, left, top in part]

    for tiles in read_ahead(read, parts, threads, threads + 1):
        while tiles:
            yield tiles.pop(0)  # let go here: memory that the caller has done with is used again


class SharedSlide(Slide):
    """A slide opened several times, so that as many threads read at once where one opening lets them wait.

    Args:
        slide: may be pickled; neither read nor closed by this one.
        times: how often it is opened.
    """

    def __init__(self, slide: Slide, times: int) -> None:
        self.path, self.dimensions, self.bounds = slide.path, slide.dimensions, slide.bounds
        self.mpp, self.mpp_source, self.reader = slide.mpp, slide.mpp_source, slide.reader
        self.mpp_doubt = slide.mpp_doubt
        self._opened = [deepcopy(slide) for _ in range(times)]
        self._free: SimpleQueue[Slide] = SimpleQueue()
        for one in self._opened:
            self._free.put(one)

    def close(self) -> None:
        for one in self._opened:
            one.close()

    def _read(self, area: Area, strict: bool) -> tuple[RGB, Bools | None]:
        one = self._free.get()
        try:
            return (one.read(*area), None) if strict else one.read_seen(*area)
        finally:
            self._free.put(one)


@contextmanager
def opened_times(slide: Slide, times: int) -> Iterator[Slide]:
    """The slide, opened `times` times to the end of the block, see `SharedSlide`; itself where that is once."""
    if times < 2:
        yield slide
        return
    with SharedSlide(slide, times) as shared:
        yield shared


def reading_threads(workers: int | None, on_gpu: bool) -> int:
    """How many threads read a slide ahead of who computes: as many as asked for; None for one, beside a GPU four."""
    return workers or (_BESIDE_A_GPU if on_gpu else 1)


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
