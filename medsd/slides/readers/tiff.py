"""Tiled TIFF families, decoded tile by tile: generic TIFF, Aperio, Philips (CAMELYON), OME-TIFF.

OpenSlide is asked for places in level-0 pixels and divides by a mean downsample. Where a level's size was rounded the
quotient is rarely whole, and OpenSlide then interpolates: pixels are blurred and up to half a level-0 pixel off.
Decoding the file's own tiles gives the pixels themselves, and several times faster.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt

from medsd.errors import SlideError
from medsd.slides.readers.absent import LOST, is_lost
from medsd.slides.readers.base import RGB, Bools, Handles, LevelReader, Size
from medsd.slides.readers.cache import TileCache
from medsd.slides.readers.codecs import TileCodec
from medsd.slides.readers.damage import DAMAGED, damage


@dataclass(frozen=True, eq=False)
class TiledLevel:
    """One level of a tiled TIFF.

    Attributes:
        width, height: size in pixels; what tiles hold beyond is padding.
        across: tiles in a row of tiles.
        offsets, counts: (n,) where each tile lies in the file, and its bytes; 0 bytes mean an absent tile, which is
            white, or lost where another level shows something.
        codec: how tiles are coded.
    """

    width: int
    height: int
    across: int
    offsets: npt.NDArray[np.int64]
    counts: npt.NDArray[np.int64]
    codec: TileCodec


class TiledTiff(LevelReader):
    """A tiled TIFF; one file descriptor a process, read at given offsets by any thread.

    Args:
        path: the file.
        levels: where its tiles lie.
        properties: what it says of itself.
        cache: where decoded tiles are kept; None for one of its own.
        handle: the open file, so that it is not opened again.
    """

    name = "tifffile"

    def __init__(
        self,
        path: Path,
        levels: tuple[TiledLevel, ...],
        properties: Mapping[str, str],
        cache: TileCache | None = None,
        handle: BinaryIO | None = None,
    ) -> None:
        self.path = path
        self.levels = levels
        self.sizes: tuple[Size, ...] = tuple((level.width, level.height) for level in levels)
        self.properties = properties
        self._cache = TileCache() if cache is None else cache
        self._lost: dict[tuple[int, int], bool] = {}
        # Of this very file: a shared cache may hold tiles of what lay here before.
        self._key = f"{path} {path.stat().st_mtime_ns}"
        first = None if handle is None else _Descriptor(os.dup(handle.fileno()))
        self._handles = Handles(partial(_open, path), first=first)

    def read(self, level: int, column: int, row: int, columns: int, rows: int) -> RGB:
        return self._read(level, column, row, columns, rows, strict=True)[0]

    def _read_as_stored(self, level: int, column: int, row: int, columns: int, rows: int) -> RGB:
        """`read` with every absent tile white."""
        return self._read(level, column, row, columns, rows, strict=True, doubt=False)[0]

    def read_seen(self, level: int, column: int, row: int, columns: int, rows: int) -> tuple[RGB, Bools | None]:
        """See `LevelReader.read_seen`; damage is fenced in by the file's own tiles."""
        pixels, unseen = self._read(level, column, row, columns, rows, strict=False)
        if not unseen:
            return pixels, None
        seen = np.ones((rows, columns), np.bool_)
        for place in unseen:
            seen[place] = False
        return pixels, seen

    def _read(
        self, number: int, column: int, row: int, columns: int, rows: int, strict: bool, doubt: bool = True
    ) -> tuple[RGB, list[tuple[slice, slice]]]:
        """The rectangle, and the parts of it that could not be decoded (white)."""
        level = self.levels[number]
        pixels = np.empty((rows, columns, 3), np.uint8)
        unseen = []
        for tile, left, top in _tiles_under(level, column, row, columns, rows):
            place, part = _overlap(level.codec, left - column, top - row, columns, rows)
            try:
                if doubt and level.counts[tile] == 0 and self._is_lost(number, tile, left, top):
                    raise ValueError(LOST)
                self._paste(pixels, place, part, number, tile)
            except DAMAGED as error:
                if strict:
                    raise damage(self.path, error, (number, left, top)) from error
                pixels[place] = 255
                unseen.append(place)
        return pixels, unseen

    def _is_lost(self, number: int, tile: int, left: int, top: int) -> bool:
        known = self._lost.get((number, tile))
        if known is None:
            level = self.levels[number]
            size = min(level.codec.width, level.width - left), min(level.codec.height, level.height - top)
            known = min(size) > 0 and is_lost(self._read_as_stored, self.sizes, number, (left, top, *size))
            self._lost[number, tile] = known
        return known

    def _paste(
        self, pixels: RGB, place: tuple[slice, slice], part: tuple[slice, slice] | None, number: int, tile: int
    ) -> None:
        """Write a tile's part to its place in `pixels`; `part` is None where the tile falls inside as a whole."""
        level = self.levels[number]
        count = int(level.counts[tile])
        if count == 0:
            pixels[place] = 255
            return
        key = (self._key, number, tile)
        decoded = self._cache.get(key)
        if decoded is not None:
            pixels[place] = decoded if part is None else decoded[part]
            return
        descriptor = self._handles.here()  # kept open until this read has ended, whoever closes the slide
        data = os.pread(descriptor.number, count, int(level.offsets[tile]))
        if len(data) != count:
            raise ValueError("the file ends before this tile does")
        if part is None:  # whole tiles are not asked for again by the neighbours' reads, and are not kept
            target = pixels[place]
            direct = target if target.flags.c_contiguous else None
            decoded = level.codec.decode(data, direct)
            if not (direct is not None and np.shares_memory(decoded, direct)):
                target[...] = decoded
            return
        decoded = level.codec.decode(data)
        pixels[place] = decoded[part]
        self._cache.put(key, decoded)


class _Descriptor:
    """An open file that is closed when nobody uses it any more."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __del__(self) -> None:
        os.close(self.number)


def _open(path: Path) -> _Descriptor:
    try:
        return _Descriptor(os.open(path, os.O_RDONLY))
    except OSError as error:  # no damage: nothing of it is a tile that cannot be decoded
        raise SlideError(f"{path}: cannot be opened any more ({error.strerror}); check the path") from error


def _tiles_under(level: TiledLevel, column: int, row: int, columns: int, rows: int) -> Iterator[tuple[int, int, int]]:
    """Number and top left corner (level pixels) of each tile that the rectangle touches."""
    width, height = level.codec.width, level.codec.height
    for down in range(row // height, (row + rows - 1) // height + 1):
        for right in range(column // width, (column + columns - 1) // width + 1):
            yield down * level.across + right, right * width, down * height


def _overlap(
    codec: TileCodec, left: int, top: int, columns: int, rows: int
) -> tuple[tuple[slice, slice], tuple[slice, slice] | None]:
    """Where a tile at (left, top) of a picture of (columns, rows) shows, and which part of it; None for all of it."""
    x0, x1 = max(left, 0), min(left + codec.width, columns)
    y0, y1 = max(top, 0), min(top + codec.height, rows)
    place = slice(y0, y1), slice(x0, x1)
    if (x1 - x0, y1 - y0) == (codec.width, codec.height):
        return place, None
    return place, (slice(y0 - top, y1 - top), slice(x0 - left, x1 - left))
