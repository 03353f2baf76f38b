"""What OpenSlide cannot open and tiatoolbox can: JPEG 2000 (JP2), and OME-TIFF that is not plain tiles of RGB.

tiatoolbox opens the file; level pixels are then taken from the handle beneath its reader (glymur, zarr), since what the
reader itself returns is resampled (OME-TIFF levels of odd sizes) or lacks the last row and column (JP2 levels of odd
sizes). Neither format has checksums: a JPEG 2000 byte that was changed is a changed pixel.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import tifffile

from medsd.errors import SlideError
from medsd.slides.readers.absent import LOST, is_lost
from medsd.slides.readers.base import RGB, Bools, Handles, LevelReader, Size
from medsd.slides.readers.damage import damage_named
from medsd.slides.readers.tiff_layout import ome_colours, resolution
from medsd.slides.readers.zarr_levels import ArrayLevel, as_rgb, check_colours, unfit
from medsd.slides.tiatoolbox_import import logging_untouched

_JP2 = b"\0\0\0\x0cjP  \r\n\x87\n"
_OPENJPEG = "2.4.0"
# Enumerated colour spaces of JP2 that are taken as they are: sRGB and grey; none is named where there is a profile.
_COLOUR_SPACES = (16, 17, None)
_OME_AXES = ("YXS", "SYX", "CYX")
_MOST_HALVINGS = 32
_CACHE_BYTES = 2**24


def is_jp2(start: bytes) -> bool:
    """Whether a file that starts so is a JP2."""
    return start.startswith(_JP2)


class TiatoolboxSlide(LevelReader):
    """A reader over tiatoolbox: one handle a thread and process.

    Opening the first takes seconds, in which tiatoolbox is imported.

    Args:
        path: a JP2 or an OME-TIFF.

    Raises:
        SlideError: damaged, not 8-bit grey or RGB, or a library is missing.
    """

    name = "tiatoolbox"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handles: Handles[_OmeLevels | _Jp2Levels] = Handles(partial(_open, path), by_thread=True)
        levels = self._handles.here()
        self.sizes: tuple[Size, ...] = levels.sizes
        self.properties: Mapping[str, str] = levels.properties

    def read(self, level: int, column: int, row: int, columns: int, rows: int) -> RGB:
        with damage_named(self.path, (level, column, row)):
            return self._handles.here().read(level, column, row, columns, rows)


def _open(path: Path) -> _OmeLevels | _Jp2Levels:
    try:
        with logging_untouched():
            from tiatoolbox.wsicore.wsireader import JP2WSIReader, TIFFWSIReader
    except ImportError as error:
        raise SlideError(f"{path}: only tiatoolbox reads it, which is missing ({error}); install tiatoolbox") from error
    with damage_named(path):
        with open(path, "rb") as handle:
            jp2 = is_jp2(handle.read(len(_JP2)))
        if jp2:
            _check_openjpeg(path)
            return _Jp2Levels(path, JP2WSIReader(path))
        with tifffile.TiffFile(path) as file:
            series, page = file.series[0], file.pages[0].aspage()
            if series.axes not in _OME_AXES:
                raise unfit(path, f"axes {series.axes}")
            check_colours(path, ome_colours(page.description))
            tables = [
                _Stored.of([page.aspage() for page in level.pages if page is not None]) for level in series.levels
            ]
        reader = TIFFWSIReader(path, cache_size=_CACHE_BYTES, post_proc=None)
        return _OmeLevels(path, reader, tables, resolution(page))


def _check_openjpeg(path: Path) -> None:
    import glymur

    if glymur.version.openjpeg_version < _OPENJPEG:
        raise SlideError(
            f"{path}: JPEG 2000 needs the OpenJPEG library; install it (apt install libopenjp2-7, conda: openjpeg)"
        )


@dataclass(frozen=True, eq=False)
class _Stored:
    """What a TIFF says of the tiles or strips of a level, colours that lie apart together.

    Attributes:
        width, height: of one in pixels.
        absent: (down, across) bool, those that are not in the file.
        broken: those that cannot be whole, though the array beneath tiatoolbox would show them, black.
    """

    width: int
    height: int
    absent: Bools
    broken: Bools

    @staticmethod
    def of(pages: Sequence[tifffile.TiffPage]) -> _Stored:
        """That of a level's pages; ValueError where a table is not as long as the level has tiles."""
        absent, broken = [], []
        for page in pages:
            y, x = page.axes.index("Y"), page.axes.index("X")
            offsets, counts = (
                np.array(table, np.int64).reshape(page.chunked) for table in (page.dataoffsets, page.databytecounts)
            )
            hurt = offsets + counts > page.parent.filehandle.size
            if page.is_tiled and page.compression == tifffile.COMPRESSION.NONE:
                hurt |= (counts > 0) & (counts != math.prod(page.chunks) * page.bitspersample // 8)
            others = tuple(axis for axis in range(counts.ndim) if axis not in (x, y))
            absent.append((counts == 0).any(axis=others))
            broken.append(hurt.any(axis=others))
        return _Stored(pages[0].chunks[x], pages[0].chunks[y], np.any(absent, axis=0), np.any(broken, axis=0))

    def under(self, column: int, row: int, columns: int, rows: int) -> tuple[slice, slice]:
        """The tiles that a rectangle touches."""
        return (
            slice(row // self.height, -(-(row + rows) // self.height)),
            slice(column // self.width, -(-(column + columns) // self.width)),
        )


class _OmeLevels:
    """The arrays of tiatoolbox's TIFF reader, largest first; what is not in the file is white, or lost."""

    def __init__(self, path: Path, reader: Any, tables: Sequence[_Stored], properties: Mapping[str, str]) -> None:
        views = reader.level_arrays.values()
        self._levels = tuple(ArrayLevel(view.array, str(view.axes).lower()) for view in views)
        for level in self._levels:
            level.check(path, coded_by_store=True)
        self._tables = tables
        self.sizes = tuple(level.size for level in self._levels)
        self.properties = properties

    def read(self, level: int, column: int, row: int, columns: int, rows: int) -> RGB:
        table = self._tables[level]
        if table.broken[table.under(column, row, columns, rows)].any():
            raise ValueError("a tile is not as long as it says, or ends behind the file")
        for area in self._absent(level, column, row, columns, rows):
            if is_lost(self._as_stored, self.sizes, level, area):
                raise ValueError(LOST)
        return self._as_stored(level, column, row, columns, rows)

    def _as_stored(self, level: int, column: int, row: int, columns: int, rows: int) -> RGB:
        """With every absent tile white."""
        pixels = self._levels[level].read(column, row, columns, rows)
        for left, top, width, height in self._absent(level, column, row, columns, rows):
            pixels[max(top - row, 0) : top + height - row, max(left - column, 0) : left + width - column] = 255
        return pixels

    def _absent(
        self, level: int, column: int, row: int, columns: int, rows: int
    ) -> Iterator[tuple[int, int, int, int]]:
        """(column, row, columns, rows) of each absent tile that the rectangle touches, inside the level."""
        table, (across, high) = self._tables[level], self.sizes[level]
        down, right = table.under(column, row, columns, rows)
        for i, j in np.argwhere(table.absent[down, right]).tolist():
            left, top = (right.start + j) * table.width, (down.start + i) * table.height
            yield left, top, min(table.width, across - left), min(table.height, high - top)


class _Jp2Levels:
    """The resolutions of a JP2: each half the one before, rounded up (ISO 15444-1, B.5).

    A wavelet's pixel is centred on the first of the pixels that it stands for, not on their middle: what is read from a
    level lies right and down of its place by just under half a pixel of that level.
    """

    def __init__(self, path: Path, reader: Any) -> None:
        self._jp2 = reader.glymur_jp2
        segments = self._jp2.codestream.segment
        size = segments[1]
        if {*size.xrsiz, *size.yrsiz} != {1} or (size.xosiz, size.yosiz) != (0, 0):
            raise unfit(path, "its colours differ in size, or it is a part of a larger picture")
        if set(size.bitdepth) != {8} or any(size.signed):
            raise unfit(path, f"{max(size.bitdepth)} bits a colour")
        space = _box(self._jp2.box, "jp2h", "colr")
        if space is not None and space.colorspace not in _COLOUR_SPACES:
            raise unfit(path, f"colour space {space.colorspace}")
        if self._jp2.shape[2:] not in ((), (1,), (3,)):
            raise unfit(path, f"{self._jp2.shape[2]} channels")
        self._size = self._jp2.shape[1], self._jp2.shape[0]
        halvings = next((segment.num_res for segment in segments if segment.marker_id == "COD"), 0)
        self.sizes = tuple(
            (math.ceil(self._size[0] / 2**level), math.ceil(self._size[1] / 2**level))
            for level in range(min(halvings, _MOST_HALVINGS) + 1)
        )
        self.properties = _jp2_scale(self._jp2.box)

    def read(self, level: int, column: int, row: int, columns: int, rows: int) -> RGB:
        step = 2**level
        bottom, right = min((row + rows) * step, self._size[1]), min((column + columns) * step, self._size[0])
        pixels = np.asarray(self._jp2[row * step : bottom : step, column * step : right : step])
        return as_rgb(pixels.reshape(rows, columns, -1))


def _box(boxes: list[Any], *names: str) -> Any:
    """The first JP2 box on that way through boxes in boxes, or None."""
    found = next((box for box in boxes if box.box_id == names[0]), None)
    return found if found is None or len(names) == 1 else _box(found.box, *names[1:])


def _jp2_scale(boxes: list[Any]) -> dict[str, str]:
    """The scale that the scanner wrote (XML of Aperio and Omnyx), and that of the capture resolution box.

    Not tiatoolbox's own, which is guessed from the magnification where the file does not state it.
    """
    found: dict[str, str] = {}
    text = _box(boxes, "xml ")
    description = None if text is None or text.xml is None else text.xml.findtext("description")
    stated = re.search(r"MPP\s*=\s*(\d*\.?\d+)", description or "", re.IGNORECASE)
    if stated is not None:
        found |= {"openslide.mpp-x": stated[1], "openslide.mpp-y": stated[1]}
    capture = _box(boxes, "jp2h", "res ", "resc")
    if capture is not None and capture.horizontal_resolution > 0 and capture.vertical_resolution > 0:
        found["jp2.mpp-x"] = str(1e6 / float(capture.horizontal_resolution))
        found["jp2.mpp-y"] = str(1e6 / float(capture.vertical_resolution))
    return found
