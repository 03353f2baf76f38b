"""Which levels a tiled TIFF has, where their tiles lie, and whether they are plain enough to be decoded here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from xml.etree.ElementTree import Element, ParseError

import numpy as np
import tifffile
from defusedxml.common import DefusedXmlException
from defusedxml.ElementTree import fromstring

from medsd.errors import SlideError
from medsd.slides.mpp import UM_PER_UNIT
from medsd.slides.readers.base import Size
from medsd.slides.readers.codecs import codec_of
from medsd.slides.readers.damage import DAMAGED
from medsd.slides.readers.tiff import TiledLevel

_MOST_PAGES = 10_000
_WHITE = -1


def is_tiff(start: bytes) -> bool:
    """Whether a file that starts so is a TIFF or BigTIFF."""
    return start.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"))


def pages_of(file: tifffile.TiffFile) -> list[tifffile.TiffPage]:
    """The pages up to the first damaged one, without their SubIFDs."""
    pages: list[tifffile.TiffPage] = []
    with suppress(*DAMAGED):  # there is no such page, too
        pages.extend(file.pages[number].aspage() for number in range(_MOST_PAGES))
    return pages


def has_too_many_pages(file: tifffile.TiffFile) -> bool:
    """Whether bytes that are no list of pages look like one, which tifffile would walk through for minutes."""
    try:
        _ = file.pages[_MOST_PAGES]
    except IndexError:
        return False
    except DAMAGED:
        pass  # it is there
    return True


def levels_of_sizes(
    file: tifffile.TiffFile, sizes: Sequence[Size], absent: bool, reduced: bool = False
) -> tuple[TiledLevel, ...] | None:
    """The TIFF's levels of those sizes, or None where one is missing or not plain. No page is two levels.

    Args:
        file: a TIFF.
        sizes: (width, height) of the levels wanted. A page may be padded by less than a tile beyond them.
        absent: whether tiles may be absent (0 bytes; white).
        reduced: whether pages but the first must be marked as reduced, as OpenSlide asks of generic TIFF.
    """
    levels = []
    with suppress(*DAMAGED):
        free = tiled_pages(file, reduced)
        for size in sizes:
            page = _page_of_size(free, size)
            level = None if page is None else level_of_page(page, size)
            if page is None or level is None or not (absent or level.counts.all()):
                return None
            free.remove(page)
            levels.append(level)
        return tuple(levels)
    return None


def levels_of_generic(file: tifffile.TiffFile) -> tuple[tuple[TiledLevel, ...], Mapping[str, str]] | None:
    """Levels and scale of a generic TIFF without OpenSlide's help: its first page and what is marked as reduced."""
    pages = tiled_pages(file, reduced=True)
    sizes = sorted(((page.imagewidth, page.imagelength) for page in pages), reverse=True)
    levels = levels_of_sizes(file, sizes, absent=True, reduced=True) if sizes else None
    if levels is None:
        return None
    return levels, {"openslide.vendor": "generic-tiff", **resolution(pages[0])}


def resolution(page: tifffile.TiffPage) -> dict[str, str]:
    """The resolution tags of a page under OpenSlide's names."""
    found = {"tiff.ResolutionUnit": {2: "inch", 3: "centimeter"}.get(page.tags.valueof("ResolutionUnit", 2), "none")}
    for name in ("XResolution", "YResolution"):
        with suppress(TypeError, ValueError):  # no ratio
            above, below = page.tags.valueof(name, (0, 1))
            found[f"tiff.{name}"] = str(above / below if below else 0)
    return found


def is_ome_pyramid(file: tifffile.TiffFile) -> bool:
    """Whether it is an OME-TIFF whose image takes several pages: levels, or planes of colours."""
    if not file.is_ome or not file.series:
        return False
    levels = file.series[0].levels
    return len(levels) > 1 or len(levels[0].pages) > 1


def ome_levels(path: Path, file: tifffile.TiffFile) -> tuple[tuple[TiledLevel, ...], Mapping[str, str]] | None:
    """Levels (in SubIFDs) and resolution tags of an OME-TIFF; None where the file is none, or not plain.

    Raises:
        SlideError: one of several files of an image, or its first image is not the slide.
    """
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
    found = [level_of_page(page, (page.imagewidth, page.imagelength), believe_jfif=True) for page in pages]
    levels = tuple(level for level in found if level is not None)
    return (levels, resolution(file.pages[0].aspage())) if len(levels) == len(found) else None


def ome_scale(description: str) -> dict[str, str]:
    """The size of a pixel in um from an OME-XML description: `ome.mpp-x` and `ome.mpp-y`, where it is stated."""
    pixels = _ome_pixels(description)
    if pixels is None:
        return {}
    scale = {}
    for axis in "XY":
        unit = UM_PER_UNIT.get(pixels.get(f"PhysicalSize{axis}Unit", "µm"))
        try:
            size = float(pixels.get(f"PhysicalSize{axis}", ""))
        except ValueError:
            return {}
        if unit is None:
            return {}
        scale[f"ome.mpp-{axis.lower()}"] = str(size * unit)
    return scale


def ome_colours(description: str) -> list[str]:
    """The colours (RRGGBB) of the channels of an OME-XML description; "" where it is white, the default."""
    pixels = _ome_pixels(description)
    channels = [] if pixels is None else [each for each in pixels if each.tag.endswith("}Channel")]
    with suppress(ValueError):
        colours = [int(each.get("Color", _WHITE)) for each in channels]  # signed, of red, green, blue and alpha
        return ["" if colour == _WHITE else f"{colour >> 8 & 0xFFFFFF:06X}" for colour in colours]
    return []


def _ome_pixels(description: str) -> Element | None:
    """The first Pixels of an OME-XML description."""
    try:
        root = fromstring(description.encode())
    except (ParseError, DefusedXmlException, ValueError, LookupError):
        return None
    return next((element for element in root.iter() if element.tag.endswith("}Pixels")), None)


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


def tiled_pages(file: tifffile.TiffFile, reduced: bool) -> list[tifffile.TiffPage]:
    """The tiled ones of the pages, with `reduced` only the first and those marked so."""
    pages = pages_of(file)
    return [page for page in pages if page.is_tiled and (page is pages[0] or page.is_reduced or not reduced)]


def _page_of_size(pages: Sequence[tifffile.TiffPage], size: Size) -> tifffile.TiffPage | None:
    """The first of tiled pages of that size, or of that size padded to whole tiles, as Philips pads its levels."""
    for padded in (False, True):
        for page in pages:
            tile = (page.tilewidth, page.tilelength) if padded else (1, 1)
            wanted = tuple(math.ceil(side / step) * step for side, step in zip(size, tile, strict=True))
            if (page.imagewidth, page.imagelength) == wanted:
                return page
    return None
