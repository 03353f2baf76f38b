"""TIFF files of tiles, written by tifffile, and their tables of tiles, to be spoilt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from medsd.slides.readers.tiff_layout import levels_of_sizes


def picture(height: int = 437, width: int = 371, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise: JPEG keeps them roughly, nothing is constant."""
    rows, columns = np.mgrid[:height, :width]
    smooth = np.stack([120 + 90 * np.sin(rows / 17), 120 + 90 * np.cos(columns / 23), 80 + (rows + columns) / 9], -1)
    return (smooth + np.random.default_rng(seed).normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)


def write(path: Path, levels: list[np.ndarray], tile: int = 64, **kinds: Any) -> Path:
    kinds = {"photometric": "rgb" if levels[0].ndim == 3 else "minisblack", "metadata": None, **kinds}
    with tifffile.TiffWriter(path, bigtiff=True) as writer:
        for number, level in enumerate(levels):
            writer.write(level, tile=(tile, tile), subfiletype=1 if number else 0, **kinds)
    return path


def levels(path: Path) -> tuple[Any, dict[str, str]]:
    """What `TiledTiff` takes: a level a page, no properties."""
    with tifffile.TiffFile(path) as file:
        sizes = [(page.imagewidth, page.imagelength) for page in file.pages]
        found = levels_of_sizes(file, sizes, absent=True)
    assert found is not None
    return found, {}


def tile_bytes(path: Path, number: int, page: int = 0) -> tuple[int, int]:
    """Where the bytes of a tile begin, and how many they are."""
    with tifffile.TiffFile(path) as file:
        found = file.pages[page]
        return found.dataoffsets[number], found.databytecounts[number]


def place_tile(path: Path, page: int, number: int, start: int, count: int) -> None:
    """Say in the tables that a tile's bytes lie elsewhere."""
    with tifffile.TiffFile(path) as file:
        tags = [file.pages[page].tags[name] for name in ("TileOffsets", "TileByteCounts")]
    with open(path, "r+b") as handle:
        for tag, value in zip(tags, (start, count), strict=True):
            size = {3: 2, 4: 4, 16: 8}[int(tag.dtype)]
            handle.seek(tag.valueoffset + size * number)
            handle.write(value.to_bytes(size, "little"))


def forget_tiles(path: Path, page: int, numbers: list[int]) -> None:
    """Make tiles absent as scanners do: no offset, no bytes."""
    for number in numbers:
        place_tile(path, page, number, 0, 0)
