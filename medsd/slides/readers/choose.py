"""Which reader opens a file: decided once, by what is in the file, never by its name alone."""

from __future__ import annotations

import logging
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

logger = logging.getLogger(__name__)

READERS = {
    "tifffile": "tiled TIFF, Aperio, Philips, OME-TIFF: the file's own tiles",
    "openslide": "every vendor format of OpenSlide",
    "tiatoolbox": "JPEG 2000, and OME-TIFF with planes of colours or rarer compressions",
    "zarr": "OME-NGFF folders",
    "pillow": "PNG, JPEG and TIFF as one level; they need the scale from the caller",
    "cucim": "tiled TIFF and Aperio with cuCIM; never chosen by itself",
}
"""Readers by name, with what they read."""

# Grey levels; a wrong colour space moves the mean by tens, half a pixel by one or two.
_MOST_APART = 8.0

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
        if _is_ome_but_not_plain(path):
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


def _is_ome_but_not_plain(path: Path) -> bool:
    """Whether a TIFF's first page, which OpenSlide takes for the slide, may be one colour of three."""
    return is_ome_pyramid(path) and ome_levels(path) is None


def _named(path: Path, name: str, cache: TileCache | None) -> LevelReader:
    if name in ("tifffile", "cucim"):
        tiled = _tiled_tiff(path, cache) if is_tiff(path) and not _is_ome_but_not_plain(path) else None
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
    if kind not in _PLAIN_VENDORS:
        return None
    levels = levels_of_sizes(path, vendor.sizes, absent=_PLAIN_VENDORS[kind], reduced=kind == "generic-tiff")
    if levels is None:
        return None
    tiled = TiledTiff(path, levels, vendor.properties, cache)
    if all(_agree(tiled, vendor, number) for number in range(len(levels))):
        return tiled
    logger.warning("%s: its tiles decoded directly are not what OpenSlide shows; OpenSlide reads it (slower)", path)
    return None


def _agree(tiled: TiledTiff, vendor: VendorSlide, number: int) -> bool:
    """Whether a level's fullest tile is as OpenSlide shows it: TIFFs can contradict themselves about colours and pages.

    Level 0 to the last bit; others nearly, for OpenSlide interpolates levels of rounded sizes.
    """
    level = tiled.levels[number]
    tiles = np.flatnonzero(level.counts)
    column, row = tiles % level.across * level.codec.width, tiles // level.across * level.codec.height
    inside = (column < level.width) & (row < level.height)
    if not inside.any():
        return number > 0
    # A tile of many bytes is no blank one.
    chosen = np.flatnonzero(inside)[np.argmax(level.counts[tiles[inside]])]
    left, top = int(column[chosen]), int(row[chosen])
    size = min(level.codec.width, level.width - left), min(level.codec.height, level.height - top)
    try:
        shown = vendor.read(number, left, top, *size)
    except SlideError:
        return True  # damaged for OpenSlide, too; other tiles may be whole
    try:
        own = tiled.read(number, left, top, *size)
    except SlideError:
        return False
    if number == 0:
        return np.array_equal(own, shown)
    # A colour's mean over the tile hardly feels half a pixel, and tells another page or colour space.
    return bool(np.abs(own.mean((0, 1)) - shown.mean((0, 1))).max() < _MOST_APART)
