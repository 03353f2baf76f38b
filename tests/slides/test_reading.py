"""Tiles read ahead: each once, with its own pixels, in an order that spares decoding, and errors in their turn."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import numpy as np
import pytest
import tifffile

from medsd.errors import SlideError
from medsd.slides.isolate.slide import IsolatedSlide
from medsd.slides.reading import SharedSlide, opened_times, read_ahead, read_tiles, reading_threads
from medsd.slides.slide import open_slide


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("reading") / "wide.tif"
    pixels = np.random.default_rng(0).integers(0, 256, (300, 1900, 3)).astype(np.uint8)
    tifffile.imwrite(path, pixels, tile=(32, 32), photometric="rgb", compression="deflate")
    return path


def grid(width: int, height: int, step: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    x, y = np.meshgrid(np.arange(5, width - side, step), np.arange(3, height - side, step))
    return x.ravel(), y.ravel()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("mpp", [None, 0.7])
def test_every_tile_once_with_its_own_pixels(wide: Path, threads: int, mpp: float | None) -> None:
    with open_slide(wide, mpp=0.5) as slide:
        x, y = grid(1900, 300, 41, 40)
        shuffled = np.random.default_rng(1).permutation(len(x))
        x, y = x[shuffled], y[shuffled]
        found = {}
        for tile in read_tiles(slide, x, y, 28, mpp, threads):
            assert tile.row not in found and tile.seen is None
            found[tile.row] = tile.pixels
        assert sorted(found) == list(range(len(x)))
        assert all(np.array_equal(found[row], slide.read(int(x[row]), int(y[row]), 28, 28, mpp)) for row in found)


def test_strips_need_little_cache(wide: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row by row a cache of 120 of the file's tiles (60 a row) would be too small; in strips it is not."""
    from medsd.slides.readers.cache import TileCache
    from medsd.slides.readers.codecs import TileCodec

    decoded = []
    inner = TileCodec.decode
    monkeypatch.setattr(TileCodec, "decode", lambda self, *given: decoded.append(1) or inner(self, *given))
    cache = TileCache(58 * 32 * 32 * 3)
    with open_slide(wide, mpp=0.5, cache=cache) as slide:
        x, y = grid(1900, 300, 24, 24)
        decoded.clear()
        for _ in read_tiles(slide, x, y, 24):
            pass
        in_strips = len(decoded)
        decoded.clear()
        for left, top in zip(x.tolist(), y.tolist(), strict=True):
            slide.read(left, top, 24, 24)
    assert in_strips < 1.15 * 60 * 10 and len(decoded) > 1.6 * 60 * 10


def test_damage_is_told_by_tile(wide: Path, tmp_path: Path) -> None:
    with tifffile.TiffFile(wide) as file:
        start, count = file.pages[0].dataoffsets[61], file.pages[0].databytecounts[61]
    data = bytearray(wide.read_bytes())
    data[start : start + count] = bytes(count)
    (tmp_path / "hurt.tif").write_bytes(data)
    with open_slide(tmp_path / "hurt.tif", mpp=0.5) as slide:
        x, y = np.arange(0, 256, 32), np.full(8, 32)
        hurt = {tile.row for tile in read_tiles(slide, x, y, 32) if tile.seen is not None}
    assert hurt == {1}


def test_reading_ahead_keeps_the_order_and_its_bound() -> None:
    begun: list[int] = []

    def work(job: int) -> int:
        begun.append(job)
        time.sleep(0.002 * (job % 3))
        return job * job

    results = read_ahead(work, range(40), threads=3, ahead=4)
    for number, result in enumerate(results):
        assert result == number * number
        assert len(begun) <= number + 1 + 4 + 1


def test_an_error_comes_in_its_turn_and_ends_the_threads() -> None:
    def work(job: int) -> int:
        if job == 3:
            raise SlideError("a.tif: bad")
        return job

    before = threading.active_count()
    results = read_ahead(work, range(10), 2, 4)
    assert [next(results) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(SlideError, match="bad"):
        next(results)
    stopped = read_ahead(work, range(3), 2, 2)
    assert next(stopped) == 0
    stopped.close()
    assert threading.active_count() == before


def test_a_shared_slide_reads_through_children_of_its_own(wide: Path) -> None:
    with IsolatedSlide(wide, 0.5) as slide, opened_times(slide, 2) as shared:
        assert isinstance(shared, SharedSlide) and (shared.dimensions, shared.mpp) == (slide.dimensions, 0.5)
        x, y = grid(1900, 300, 90, 80)
        tiles = list(read_tiles(shared, x, y, 40, 1.0, threads=2))
        assert sorted(tile.row for tile in tiles) == list(range(len(x)))
        for tile in tiles[::7]:
            assert np.array_equal(tile.pixels, slide.read(int(x[tile.row]), int(y[tile.row]), 40, 40, 1.0))
    with pytest.raises(SlideError, match="was closed"):
        shared.read(0, 0, 8, 8)
    with open_slide(wide, 0.5) as slide, opened_times(slide, 1) as shared:
        assert shared is slide


def test_a_gpu_has_several_threads_that_read_unless_somebody_says_how_many() -> None:
    asked = [(None, False), (None, True), (2, False), (2, True)]
    assert [reading_threads(*each) for each in asked] == [1, 4, 2, 2]
