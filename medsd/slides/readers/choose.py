"""Which reader opens a file: decided once, by what is in the file, never by its name alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from medsd.errors import ConfigError, SlideError, nearest
from medsd.slides.readers.base import LevelReader, check_file
from medsd.slides.readers.cache import TileCache
from medsd.slides.readers.tiff import TiledTiff
from medsd.slides.readers.tiff_layout import is_tiff, levels_of_sizes, ome_levels
from medsd.slides.readers.vendor import UnknownFormatError, VendorSlide

READERS = {
    "tifffile": "tiled TIFF, Aperio, Philips, OME-TIFF: the file's own tiles",
    "openslide": "every vendor format of OpenSlide",
}
"""Readers by name, with what they read."""

# OpenSlide vendors whose levels are nothing but TIFF tiles (no overlaps, gaps or separate regions), and whether
# OpenSlide, too, shows an absent tile as white.
_PLAIN_VENDORS = {"generic-tiff": True, "philips": True, "aperio": False}


def open_reader(path: Path, name: str | None = None, cache: TileCache | None = None) -> LevelReader:
    """The reader of a file.

    Args:
        path: the slide's file.
        name: one of `READERS`, or None to choose by the file.
        cache: where decoded tiles are kept, for readers that decode tiles themselves.

    Raises:
        ConfigError: no reader of that name.
        SlideError: no such file, not a slide, or damaged.
    """
    if name is not None and name not in READERS:
        raise ConfigError(f"reader '{name}' is unknown{nearest(name, READERS)}; choose one of {', '.join(READERS)}")
    check_file(path)
    if name == "openslide":
        return VendorSlide(path)
    tiled = _tiled_tiff(path, cache) if is_tiff(path) else None
    if tiled is not None:
        return tiled
    if name == "tifffile":
        raise SlideError(f"{path}: not a plain tiled TIFF, so tifffile cannot read it; leave out reader=tifffile")
    return VendorSlide(path)


def _tiled_tiff(path: Path, cache: TileCache | None) -> TiledTiff | None:
    """The file's own tiles, where it is a plain tiled TIFF; then OpenSlide is only asked what it is."""
    ome = ome_levels(path)
    if ome is not None:
        return TiledTiff(path, *ome, cache)
    try:
        vendor = VendorSlide(path)
    except UnknownFormatError:
        return None
    kind = vendor.properties.get("openslide.vendor", "")
    levels = levels_of_sizes(path, vendor.sizes, _PLAIN_VENDORS[kind]) if kind in _PLAIN_VENDORS else None
    if levels is None:
        return None
    tiled = TiledTiff(path, levels, vendor.properties, cache)
    return tiled if _agree(tiled, vendor) else None


def _agree(tiled: TiledTiff, vendor: VendorSlide) -> bool:
    """Whether a tile looks as OpenSlide shows it: TIFFs can contradict themselves about colours."""
    level = tiled.levels[0]
    stored = np.flatnonzero(level.counts)
    if not len(stored):
        return False
    # A tile of many bytes is no blank one.
    number = int(stored[np.argmax(level.counts[stored])])
    column, row = number % level.across * level.codec.width, number // level.across * level.codec.height
    size = min(level.codec.width, level.width - column), min(level.codec.height, level.height - row)
    try:
        shown = vendor.read(0, column, row, *size)
    except SlideError:
        return True  # damaged for OpenSlide, too; other tiles may be whole
    try:
        return np.array_equal(tiled.read(0, column, row, *size), shown)
    except SlideError:
        return False
