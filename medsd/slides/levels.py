"""Whole pixels of one pyramid level: by tifffile where the file is a plain tiled TIFF, else by OpenSlide.

OpenSlide is asked for places in level-0 pixels and divides by a mean downsample. Where a level's size was rounded the
quotient is rarely whole, and OpenSlide then interpolates: pixels are blurred and up to half a level-0 pixel off.
Decoding the file's tiles gives the pixels themselves, and several times faster.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import openslide
import tifffile
from PIL import Image

from medsd.errors import SlideError

RGB = npt.NDArray[np.uint8]

# OpenSlide vendors whose levels are nothing but TIFF tiles: no overlaps, no gaps, no separate regions.
_PLAIN_VENDORS = ("generic-tiff", "aperio")
_COMPRESSION, _PHOTOMETRIC = tifffile.COMPRESSION, tifffile.PHOTOMETRIC
_PLAIN_COMPRESSIONS = (
    _COMPRESSION.NONE,
    _COMPRESSION.LZW,
    _COMPRESSION.DEFLATE,
    _COMPRESSION.ADOBE_DEFLATE,
    _COMPRESSION.JPEG,
    _COMPRESSION.ZSTD,
)
# What tifffile and imagecodecs raise for damaged bytes (codec errors are RuntimeErrors).
_DAMAGED = (OSError, ValueError, RuntimeError, ArithmeticError, LookupError, TypeError, struct.error)


class LevelReader(Protocol):
    """Reads whole pixels of one level of one file; for one thread."""

    def read(self, level: int, column: int, row: int, columns: int, rows: int) -> RGB:
        """Pixels (rows, columns, 3) of a rectangle that lies inside the level, transparency on white.

        Raises:
            SlideError: the rectangle cannot be decoded.
        """
        ...


class OpenSlideLevels:
    """Levels as OpenSlide reads them, of any vendor."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.slide = open_with_openslide(path)

    def read(self, level: int, column: int, row: int, columns: int, rows: int) -> RGB:
        """See `LevelReader.read`."""
        # OpenSlide divides level-0 places by its own mean downsample, so multiply by just that.
        downsample = self.slide.level_downsamples[level]
        place = (round(column * downsample), round(row * downsample))
        try:
            region = self.slide.read_region(place, level, (columns, rows))
        except openslide.OpenSlideError as error:
            raise _undecodable(self._path, level, column, row, error) from error
        white = Image.new("RGBA", region.size, (255, 255, 255, 255))
        return np.array(Image.alpha_composite(white, region).convert("RGB"))


class TiledTiffLevels:
    """Levels of a plain tiled TIFF, decoded tile by tile."""

    def __init__(self, path: Path, pages: tuple[int, ...]) -> None:
        self._path = path
        try:
            self._file = tifffile.TiffFile(path)
            self._pages = [self._file.pages[number].aspage() for number in pages]
        except _DAMAGED as error:
            raise SlideError(f"{path}: damaged slide ({error}); copy it again from its source") from error

    def read(self, level: int, column: int, row: int, columns: int, rows: int) -> RGB:
        """See `LevelReader.read`."""
        page = self._pages[level]
        across = -(-page.imagewidth // page.tilewidth)
        pixels = np.empty((rows, columns, 3), np.uint8)
        for tile_row in range(row // page.tilelength, -(-(row + rows) // page.tilelength)):
            for tile_column in range(column // page.tilewidth, -(-(column + columns) // page.tilewidth)):
                try:
                    tile = self._tile(page, tile_row * across + tile_column)
                except _DAMAGED as error:
                    raise _undecodable(self._path, level, column, row, error) from error
                _paste(pixels, tile, tile_column * page.tilewidth - column, tile_row * page.tilelength - row)
        return pixels

    def _tile(self, page: tifffile.TiffPage, number: int) -> RGB:
        handle = self._file.filehandle
        handle.seek(page.dataoffsets[number])
        data = handle.read(page.databytecounts[number])
        decoded = page.decode(data, number, jpegtables=page.jpegtables)[0]
        if decoded is None or decoded.shape != (1, page.tilelength, page.tilewidth, 3):
            raise ValueError(f"tile {number} is incomplete")
        return np.asarray(decoded[0], np.uint8)


def open_with_openslide(path: Path) -> openslide.OpenSlide:
    """An OpenSlide handle.

    Raises:
        SlideError: no such file, not a slide, or damaged.
    """
    if not os.path.exists(path):
        raise SlideError(f"{path}: no such file; check the path")
    if not os.path.isfile(path):
        raise SlideError(f"{path}: is a folder, not a slide; name a slide file in it")
    try:
        return openslide.OpenSlide(path)
    except openslide.OpenSlideUnsupportedFormatError as error:
        raise SlideError(
            f"{path}: not a slide that OpenSlide can read; convert it to a tiled pyramidal TIFF"
        ) from error
    except openslide.OpenSlideError as error:
        raise SlideError(f"{path}: damaged slide ({error}); copy it again from its source") from error


def plain_pages(path: Path, slide: openslide.OpenSlide) -> tuple[int, ...] | None:
    """The TIFF page of each of OpenSlide's levels, or None where tifffile must not stand in for OpenSlide."""
    if slide.properties.get("openslide.vendor") not in _PLAIN_VENDORS:
        return None
    try:
        with tifffile.TiffFile(path) as file:
            numbers: dict[tuple[int, int], int] = {}
            for number, frame in enumerate(file.pages):
                page = frame.aspage()
                if _is_plain(page):
                    numbers.setdefault((page.imagewidth, page.imagelength), number)
    except _DAMAGED:
        return None  # OpenSlide has opened it, so OpenSlide reads it
    pages = tuple(numbers.get(size, -1) for size in slide.level_dimensions)
    return None if -1 in pages else pages


def _is_plain(page: tifffile.TiffPage) -> bool:
    """Whether a page holds complete tiles of interleaved 8-bit RGB, in a coding that both libraries decode alike."""
    coding, colour = page.compression, page.photometric
    return (
        page.is_tiled
        and page.dtype == np.uint8
        and page.bitspersample == 8
        and page.samplesperpixel == 3
        and page.planarconfig == tifffile.PLANARCONFIG.CONTIG
        and coding in _PLAIN_COMPRESSIONS
        and (colour == _PHOTOMETRIC.RGB or (colour == _PHOTOMETRIC.YCBCR and coding == _COMPRESSION.JPEG))
        and all(page.databytecounts)
    )


def _paste(target: RGB, tile: RGB, column: int, row: int) -> None:
    """Copy the part of `tile` that falls on `target` when its corner is at (column, row) of it."""
    height, width = target.shape[:2]
    top, left = max(row, 0), max(column, 0)
    bottom, right = min(row + tile.shape[0], height), min(column + tile.shape[1], width)
    target[top:bottom, left:right] = tile[top - row : bottom - row, left - column : right - column]


def _undecodable(path: Path, level: int, column: int, row: int, error: Exception) -> SlideError:
    place = f"level {level}, near its pixel ({column}, {row})"
    return SlideError(f"{path}: cannot be decoded at {place} ({error}); copy it again from its source")
