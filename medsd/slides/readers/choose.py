"""Which reader opens a file: decided once, by what is in the file, never by its name alone."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import BinaryIO

import numpy as np
import tifffile
from openslide import OpenSlide
from PIL.TiffImagePlugin import COMPRESSION_INFO

from medsd.errors import ConfigError, SlideError, nearest
from medsd.slides.readers.base import RGB, LevelReader, check_file
from medsd.slides.readers.cache import TileCache
from medsd.slides.readers.codecs import what_is_unusual
from medsd.slides.readers.damage import damage_named
from medsd.slides.readers.picture import Picture, is_picture
from medsd.slides.readers.tiatoolbox_slide import TiatoolboxSlide, is_jp2
from medsd.slides.readers.tiff import TiledTiff
from medsd.slides.readers.tiff_layout import (
    is_ome_pyramid,
    is_tiff,
    levels_of_generic,
    levels_of_sizes,
    ome_levels,
    ome_scale,
    pages_of,
    tiled_pages,
)
from medsd.slides.readers.vendor import VendorSlide, is_unknown
from medsd.slides.readers.zarr_levels import NgffSlide, is_zarr, unfit

logger = logging.getLogger(__name__)

READERS = {
    "tifffile": "tiled TIFF, Aperio, Philips, OME-TIFF: the file's own tiles",
    "openslide": "every vendor format of OpenSlide",
    "tiatoolbox": "JPEG 2000, and OME-TIFF with planes of colours or rarer compressions",
    "zarr": "OME-NGFF folders",
    "pillow": "PNG, JPEG and TIFF as one level; they need the scale from the caller",
}
"""Readers by name, with what they read."""

# Tiles that are looked at, the fullest first, where those before are damaged.
_MOST_LOOKED_AT = 8
# Grey levels; a wrong colour space moves the mean by tens, half a pixel by one or two.
_MOST_APART = 8.0

_GREYS = (tifffile.PHOTOMETRIC.MINISBLACK, tifffile.PHOTOMETRIC.MINISWHITE)
_TRANSPARENT = ((tifffile.EXTRASAMPLE.ASSOCALPHA,), (tifffile.EXTRASAMPLE.UNASSALPHA,))

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
    with damage_named(path), open(path, "rb") as handle:
        start = handle.read(12)
        handle.seek(0)
        tiff = tifffile.TiffFile(handle) if is_tiff(start) else None
        if name == "openslide":
            reader: LevelReader = VendorSlide(path)
        elif name == "pillow" and is_picture(start):
            reader = Picture(path)
        elif name == "tiatoolbox" and (is_jp2(start) or (tiff is not None and is_ome_pyramid(tiff))):
            reader = TiatoolboxSlide(path)
        elif name in (None, "tifffile") and tiff is not None:
            reader = _of_tiff(path, tiff, handle, cache)
        elif name is None:
            reader = _of_others(path, start)
        else:
            raise _unfit(path, name)
        if name not in (None, reader.name):
            raise _unfit(path, str(name))
        if tiff is not None and tiff.is_ome:  # whoever reads its pixels
            reader.properties = {**reader.properties, **ome_scale(tiff.pages[0].aspage().description)}
        if tiff is not None and reader.properties.get("openslide.vendor", "generic-tiff") == "generic-tiff":
            _check_generic(path, tiff)
    return reader


def _unfit(path: Path, name: str) -> SlideError:
    return SlideError(f"{path}: no file for {name} ({READERS[name]}); leave out reader={name}")


def _of_others(path: Path, start: bytes) -> LevelReader:
    """The reader of a file that is no TIFF: of those who know its format, the one that shows the most of it."""
    if is_jp2(start):
        return TiatoolboxSlide(path)
    try:
        return VendorSlide(path)
    except SlideError as error:
        if is_unknown(error) and is_picture(start):
            return Picture(path)
        raise


def _of_tiff(path: Path, tiff: tifffile.TiffFile, handle: BinaryIO, cache: TileCache | None) -> LevelReader:
    """The reader of a TIFF: its own tiles where they are plain; OpenSlide is then only asked what the file is."""
    ome = ome_levels(path, tiff)
    if ome is not None:
        return TiledTiff(path, *ome, cache, handle)
    if is_ome_pyramid(tiff):  # OpenSlide takes its first page, which may be one colour of three, for the slide
        if tiff.series[0].dtype != np.uint8:
            raise unfit(path, f"channels of {tiff.series[0].dtype}")
        return TiatoolboxSlide(path)
    try:
        vendor = VendorSlide(path)
    except SlideError as error:
        return _unknown_to_openslide(path, tiff, handle, cache, error)
    kind = vendor.properties.get("openslide.vendor", "")
    if kind not in _PLAIN_VENDORS:
        return vendor
    _check_tables(path, tiff)
    bits = tiff.pages[0].aspage().bitspersample
    if kind == "generic-tiff" and bits > 16:  # OpenSlide opens it and reads nothing
        raise _unread(path, f"{bits} bits a colour")
    levels = levels_of_sizes(tiff, vendor.sizes, absent=_PLAIN_VENDORS[kind], reduced=kind == "generic-tiff")
    if levels is None:
        _check_shown(path, tiff)
        return vendor
    tiled = TiledTiff(path, levels, vendor.properties, cache, handle)
    if all(_agree(tiled, vendor, number) for number in range(len(levels))):
        return tiled
    logger.warning("%s: its tiles decoded directly are not what OpenSlide shows; OpenSlide reads it (slower)", path)
    return vendor


def _unknown_to_openslide(
    path: Path, tiff: tifffile.TiffFile, handle: BinaryIO, cache: TileCache | None, error: SlideError
) -> LevelReader:
    """A TIFF that OpenSlide does not open: whole pictures, and tiles of compressions that it lacks.

    Raises:
        SlideError: `error`, if nothing about the pixels is unusual; else what is.
    """
    page = tiff.pages[0].aspage()
    unusual = what_is_unusual(page)
    if is_unknown(error):
        if page.is_tiled:  # OpenSlide 4.0.1 does not know classic TIFFs whose bytes are in Motorola's order
            _check_tables(path, tiff)
            levels = levels_of_generic(tiff)
            if levels is not None:
                return TiledTiff(path, *levels, cache, handle)
            if unusual and len(tiff.pages) > 1:
                raise _unread(path, unusual) from error
        if page.compression not in COMPRESSION_INFO:
            raise _unread(path, f"compression {tifffile.COMPRESSION(page.compression).name} in strips") from error
        if page.bitspersample > 8:
            raise _unread(path, unusual) from error
        return Picture(path)
    if page.is_tiled and unusual:
        raise _unread(path, unusual) from error
    if "Unsupported TIFF compression" in str(error):
        generic = OpenSlide.detect_format(path) == "generic-tiff"
        levels = levels_of_generic(tiff) if generic else None
        if levels is None:
            raise _unread(path, "a compression that OpenSlide lacks in some page") from error
        return TiledTiff(path, *levels, cache, handle)
    raise error


def _unread(path: Path, what: str) -> SlideError:
    return SlideError(f"{path}: TIFF with {what} is not read; save it as 8-bit RGB with JPEG, LZW or deflate tiles")


def _check_tables(path: Path, tiff: tifffile.TiffFile) -> None:
    """Raise SlideError where a page has not as many tiles as its size asks for: OpenSlide would read others' places."""
    for page in pages_of(tiff):
        wanted, found = math.prod(page.chunked), len(page.dataoffsets)
        if page.is_tiled and wanted != found:
            raise SlideError(
                f"{path}: a page of {page.imagewidth} x {page.imagelength} px has {found} tiles instead of {wanted}; "
                "its header is damaged, copy it again"
            )


def _check_shown(path: Path, tiff: tifffile.TiffFile) -> None:
    """Raise SlideError for tiles that OpenSlide shows otherwise than they are, without a word."""
    for page in tiled_pages(tiff, reduced=True):
        samples, extra = page.samplesperpixel, page.extrasamples[:1]
        # Its lines are sheared in tiles that reach beyond the picture.
        wrong = page.imagewidth % page.tilewidth > 0 or extra == (tifffile.EXTRASAMPLE.UNASSALPHA,)
        if wrong and page.photometric in _GREYS and (page.bitspersample > 8 or samples > 1):
            raise _unread(path, f"grey of {samples} channels" if samples > 1 else f"grey of {page.bitspersample} bits")
        # A fourth channel is taken for transparency, whatever it is.
        if page.photometric == tifffile.PHOTOMETRIC.RGB and samples > 3 and extra not in _TRANSPARENT:
            raise _unread(path, f"{samples} channels, of which the fourth is not called transparency,")


def _check_generic(path: Path, tiff: tifffile.TiffFile) -> None:
    """Raise SlideError for a TIFF that viewers show differently: turned, or with the slide behind another picture.

    Vendors' own formats are as OpenSlide shows them, whatever the tags say.
    """
    pages = pages_of(tiff)
    turn = pages[0].tags.valueof("Orientation", 1)
    if turn != 1:
        raise SlideError(f"{path}: stored turned (Orientation {turn}), which viewers show differently; save it upright")
    first, *others = [(page.imagewidth, page.imagelength) for page in pages if page is pages[0] or page.is_tiled]
    larger = next((size for size in others if size[0] * size[1] > first[0] * first[1]), None)
    if larger is not None:
        raise SlideError(
            f"{path}: its first page ({first[0]} x {first[1]} px) is smaller than a later one ({larger[0]} x "
            f"{larger[1]} px), so an overview or label; save the slide's largest page first"
        )


def _agree(tiled: TiledTiff, vendor: VendorSlide, number: int) -> bool:
    """Whether a level's fullest tile is as OpenSlide shows it: TIFFs can contradict themselves about colours and pages.

    Level 0 to the last bit; others nearly, for OpenSlide interpolates levels of rounded sizes. A tile that is damaged
    tells nothing (OpenSlide shows some of those, wrong), and the next one is looked at. Where all are, level 0 is left
    to OpenSlide if that reads one: it may know better.
    """
    level = tiled.levels[number]
    tiles = np.flatnonzero(level.counts)
    column, row = tiles % level.across * level.codec.width, tiles // level.across * level.codec.height
    inside = (column < level.width) & (row < level.height)
    if not inside.any():
        return number > 0
    # A tile of many bytes is no blank one.
    fullest = np.flatnonzero(inside)[np.argsort(-level.counts[tiles[inside]], kind="stable")][:_MOST_LOOKED_AT]
    read_by_openslide = False
    for left, top in zip(column[fullest].tolist(), row[fullest].tolist(), strict=True):
        size = min(level.codec.width, level.width - left), min(level.codec.height, level.height - top)
        shown, own = _read_or_none(vendor, number, left, top, *size), _read_or_none(tiled, number, left, top, *size)
        if shown is not None and own is not None:
            return _alike(own, shown, number)
        read_by_openslide |= shown is not None
    return number > 0 or not read_by_openslide


def _read_or_none(reader: LevelReader, *area: int) -> RGB | None:
    try:
        return reader.read(*area)
    except SlideError:
        return None


def _alike(own: RGB, shown: RGB, number: int) -> bool:
    if number == 0:
        return np.array_equal(own, shown)
    # A colour's mean over the tile hardly feels half a pixel, and tells another page or colour space.
    return bool(np.abs(own.mean((0, 1)) - shown.mean((0, 1))).max() < _MOST_APART)
