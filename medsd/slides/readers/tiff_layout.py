"""Which levels a tiled TIFF has, where their tiles lie, and whether they are plain enough to be decoded here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from xml.etree.ElementTree import ParseError

import numpy as np
import tifffile
from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from medsd.errors import SlideError
from medsd.slides.readers.base import Size, damaged
from medsd.slides.readers.codecs import DAMAGED, codec_of
from medsd.slides.readers.tiff import TiledLevel

_UM_PER_UNIT = {"µm": 1.0, "um": 1.0, "μm": 1.0, "nm": 1e-3, "mm": 1e3, "cm": 1e4, "m": 1e6, "inch": 25_400.0}
_MOST_PAGES = 10_000


def is_tiff(path: Path) -> bool:
    """Whether the file starts like a TIFF or BigTIFF."""
    with open(path, "rb") as handle:
        return handle.read(4) in (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


def levels_of_sizes(
    path: Path, sizes: Sequence[Size], absent: bool, reduced: bool = False
) -> tuple[TiledLevel, ...] | None:
    """The TIFF's levels of those sizes, or None where one is missing or not plain. No page is two levels.

    Args:
        path: a TIFF.
        sizes: (width, height) of the levels wanted. A page may be padded by less than a tile beyond them.
        absent: whether tiles may be absent (0 bytes; white).
        reduced: whether pages but the first must be marked as reduced, as OpenSlide asks of generic TIFF.
    """
    try:
        with tifffile.TiffFile(path) as file:
            pages = [file.pages[number].aspage() for number in range(min(len(file.pages), _MOST_PAGES))]
            free = [page for page in pages if page.is_tiled and (page is pages[0] or page.is_reduced or not reduced)]
            levels = []
            for size in sizes:
                page = _page_of_size(free, size)
                if page is None:
                    return None
                free.remove(page)
                levels.append(level_of_page(page, size))
    except DAMAGED:
        return None
    if any(level is None or (not absent and not level.counts.all()) for level in levels):
        return None
    return tuple(level for level in levels if level is not None)


def ome_levels(path: Path) -> tuple[tuple[TiledLevel, ...], Mapping[str, str]] | None:
    """Levels (in SubIFDs) and scale of an OME-TIFF; None where the file is none, or not plain.

    Raises:
        SlideError: the TIFF is damaged, one of several files of an image, or its first image is not the slide.
    """
    try:
        with tifffile.TiffFile(path) as file:
            if not file.is_ome or not file.series:
                return None
            series = file.series[0]
            if series.keyframe.parent is not file:
                raise SlideError(f"{path}: its first image lies in another file of the OME-TIFF; export it as one file")
            if series.size < max(other.size for other in file.series):
                raise SlideError(f"{path}: its first image is not its largest, maybe a label; export the slide alone")
            if any(len(level.pages) != 1 for level in series.levels):
                return None
            pages = [level.keyframe for level in series.levels]
            levels = [level_of_page(page, (page.imagewidth, page.imagelength), believe_jfif=True) for page in pages]
            description = file.pages[0].aspage().description
    except DAMAGED as error:
        raise damaged(path, error) from error
    if any(level is None for level in levels):
        return None
    return tuple(level for level in levels if level is not None), ome_scale(description)


def ome_scale(description: str) -> dict[str, str]:
    """The size of a pixel in um from an OME-XML description: `ome.mpp-x` and `ome.mpp-y`, where it is stated."""
    try:
        root = fromstring(description.encode())
    except (ParseError, DefusedXmlException, ValueError, LookupError):
        return {}
    for pixels in root.iter():
        if not pixels.tag.endswith("}Pixels"):
            continue
        scale = {}
        for axis in "XY":
            size, unit = pixels.get(f"PhysicalSize{axis}"), pixels.get(f"PhysicalSize{axis}Unit", "µm")
            if size is None or unit not in _UM_PER_UNIT:
                return {}
            try:
                scale[f"ome.mpp-{axis.lower()}"] = str(float(size) * _UM_PER_UNIT[unit])
            except ValueError:
                return {}
        return scale
    return {}


def level_of_page(page: tifffile.TiffPage, size: Size, believe_jfif: bool = False) -> TiledLevel | None:
    """A page as a level of that size; None where its tiles are not plain. `believe_jfif` as for `codec_of`."""
    codec = codec_of(page, believe_jfif)
    if codec is None:
        return None
    across = math.ceil(page.imagewidth / codec.width)
    down = math.ceil(page.imagelength / codec.height)
    if across * down != len(page.dataoffsets) or across * down != len(page.databytecounts):
        return None
    offsets, counts = np.array(page.dataoffsets, np.int64), np.array(page.databytecounts, np.int64)
    return TiledLevel(*size, across, offsets, counts, codec)


def _page_of_size(pages: Sequence[tifffile.TiffPage], size: Size) -> tifffile.TiffPage | None:
    """The first of tiled pages of that size, or of that size padded to whole tiles, as Philips pads its levels."""
    for page in pages:
        if (page.imagewidth, page.imagelength) == size:
            return page
    for page in pages:
        padded = (
            math.ceil(size[0] / page.tilewidth) * page.tilewidth,
            math.ceil(size[1] / page.tilelength) * page.tilelength,
        )
        if (page.imagewidth, page.imagelength) == padded:
            return page
    return None
