"""Which reader opens a file: decided once, by what is in the file, never by its name alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import tifffile

from medsd.errors import ConfigError, SlideError, nearest
from medsd.slides.readers.base import LevelReader, check_file, damaged
from medsd.slides.readers.cache import TileCache
from medsd.slides.readers.codecs import DAMAGED
from medsd.slides.readers.cucim_slide import CucimSlide
from medsd.slides.readers.picture import Picture, is_picture
from medsd.slides.readers.tiatoolbox_slide import TiatoolboxSlide, is_jp2, is_ome_pyramid
from medsd.slides.readers.tiff import TiledTiff
from medsd.slides.readers.tiff_layout import is_tiff, levels_of_sizes, ome_levels
from medsd.slides.readers.vendor import UnknownFormatError, VendorSlide
from medsd.slides.readers.zarr_levels import NgffSlide, is_zarr

READERS = {
    "tifffile": "tiled TIFF, Aperio, Philips, OME-TIFF: the file's own tiles",
    "openslide": "every vendor format of OpenSlide",
    "tiatoolbox": "JPEG 2000, and OME-TIFF with planes of colours or rarer compressions",
    "zarr": "OME-NGFF folders",
    "pillow": "PNG, JPEG and TIFF as one level; they need the scale from the caller",
    "cucim": "tiled TIFF and Aperio with cuCIM; never chosen by itself",
}
"""Readers by name, with what they read."""

# OpenSlide vendors whose levels are nothing but TIFF tiles (no overlaps, gaps or separate regions), and whether
# OpenSlide, too, shows an absent tile as white.
_PLAIN_VENDORS = {"generic-tiff": True, "philips": True, "aperio": False}


def open_reader(path: Path, name: str | None = None, cache: TileCache | None = None) -> LevelReader:
    """The reader of a file.

    Args:
        path: the slide's file, or the folder of an OME-NGFF image.
        name: one of `READERS`, or None to choose by the file.
        cache: where decoded tiles are kept, for readers that decode tiles themselves.

    Raises:
        ConfigError: no reader of that name.
        SlideError: no such file, not a slide, or damaged.
    """
    if name is not None and name not in READERS:
        raise ConfigError(f"reader '{name}' is unknown{nearest(name, READERS)}; choose one of {', '.join(READERS)}")
    if is_zarr(path):
        if name not in (None, "zarr"):
            raise SlideError(f"{path}: a zarr folder, which {name} does not read; leave out reader={name}")
        return NgffSlide(path)
    check_file(path)
    reader = _choose(path, cache) if name is None else _named(path, name, cache)
    if is_tiff(path):
        _check_upright(path, reader)
    return reader


def _choose(path: Path, cache: TileCache | None) -> LevelReader:
    """The reader that shows the most of the file: its own tiles, its vendor's library, others."""
    if is_jp2(path):
        return TiatoolboxSlide(path)
    if is_tiff(path):
        if _has_other_pages(path):
            return TiatoolboxSlide(path)
        tiled = _tiled_tiff(path, cache)
        if tiled is not None:
            return tiled
    try:
        return VendorSlide(path)
    except UnknownFormatError:
        if is_picture(path):
            return Picture(path)
        raise


def _has_other_pages(path: Path) -> bool:
    """Whether a TIFF's first page, which OpenSlide takes for the slide, may be one colour of three."""
    return is_ome_pyramid(path) and ome_levels(path) is None


def _named(path: Path, name: str, cache: TileCache | None) -> LevelReader:
    if name in ("tifffile", "cucim"):
        tiled = _tiled_tiff(path, cache) if is_tiff(path) and not _has_other_pages(path) else None
        if tiled is None:
            raise SlideError(f"{path}: not a plain tiled TIFF, so {name} cannot read it; leave out reader={name}")
        return tiled if name == "tifffile" else CucimSlide(tiled)
    if name == "openslide":
        return VendorSlide(path)
    if name == "pillow" and is_picture(path):
        return Picture(path)
    if name == "tiatoolbox" and (is_jp2(path) or (is_tiff(path) and is_ome_pyramid(path))):
        return TiatoolboxSlide(path)
    raise SlideError(f"{path}: no file for {name} ({READERS[name]}); leave out reader={name}")


def _check_upright(path: Path, reader: LevelReader) -> None:
    """Raise SlideError for a turned TIFF: half of all viewers turn it upright, OpenSlide and the others do not.

    Vendors' own formats are as OpenSlide shows them, whatever the tag says.
    """
    if reader.properties.get("openslide.vendor", "generic-tiff") != "generic-tiff":
        return
    try:
        with tifffile.TiffFile(path) as file:
            turn = file.pages[0].aspage().tags.valueof("Orientation", 1)
    except DAMAGED as error:
        raise damaged(path, error) from error
    if turn != 1:
        raise SlideError(f"{path}: stored turned (Orientation {turn}), which viewers show differently; save it upright")


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
