"""Decoded tiles are kept within a bound, shared, and never those of another file."""

from __future__ import annotations

import os
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from medsd.slides.readers.cache import TileCache
from medsd.slides.readers.codecs import TileCodec
from medsd.slides.readers.tiff import TiledTiff
from medsd.slides.slide import open_slide
from tests.slides.readers.tiffs import levels, picture, write


def test_cache_drops_the_least_recently_used() -> None:
    cache = TileCache(3 * 12)
    tiles = [np.full((2, 2, 3), number, np.uint8) for number in range(4)]
    for number in range(3):
        cache.put(("a", 0, number), tiles[number])
    assert cache.get(("a", 0, 0)) is tiles[0]
    cache.put(("a", 0, 3), tiles[3])
    assert cache.get(("a", 0, 1)) is None and cache.get(("a", 0, 0)) is tiles[0]
    cache.put(("a", 0, 0), tiles[1])  # replaced, not counted twice
    assert cache.used_bytes == 36
    cache.put(("a", 0, 9), np.zeros((5, 5, 3), np.uint8))
    assert cache.get(("a", 0, 9)) is None and cache.used_bytes == 36
    assert pickle.loads(pickle.dumps(cache)).max_bytes == 36


def test_a_neighbours_read_finds_the_tile_decoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "slide.tif", [picture(512, 512)], compression="deflate")
    reader = TiledTiff(path, *levels(path))
    decoded = []
    inner = TileCodec.decode
    monkeypatch.setattr(TileCodec, "decode", lambda self, *tile: decoded.append(1) or inner(self, *tile))
    for y in range(0, 480, 48):
        for x in range(0, 480, 48):
            reader.read(0, x, y, 48, 48)
    assert len(decoded) == 64  # each of the 8 x 8 tiles once, though most lie under four reads


def test_threads_share_a_small_cache(tmp_path: Path) -> None:
    base = picture(900, 800)
    path = write(tmp_path / "slide.tif", [base], compression="deflate")
    cache = TileCache(5 * 64 * 64 * 3)
    reader = TiledTiff(path, *levels(path), cache)
    generator = np.random.default_rng(0)
    places = [(int(x), int(y)) for x, y in generator.integers(0, 700, (300, 2))]
    with ThreadPoolExecutor(8) as pool:
        got = list(pool.map(lambda place: reader.read(0, *place, 97, 83), places))
    assert all(np.array_equal(part, base[y : y + 83, x : x + 97]) for part, (x, y) in zip(got, places, strict=True))
    assert 0 < cache.used_bytes <= cache.max_bytes


def test_a_shared_cache_forgets_a_file_that_was_rewritten(tmp_path: Path) -> None:
    cache = TileCache()
    path = tmp_path / "slide.tif"
    for seed in (1, 2):
        base = picture(seed=seed)
        write(path, [base], compression="deflate")
        os.utime(path, ns=(seed, seed))
        with open_slide(path, mpp=0.5, cache=cache) as slide:
            assert np.array_equal(slide.read(3, 3, 30, 30), base[3:33, 3:33])
