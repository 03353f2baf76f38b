"""Opening slides and reading them at any scale."""

from __future__ import annotations

import math
import os
import threading
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import numpy.typing as npt

from medsd.errors import SlideError
from medsd.slides.levels import LevelReader, OpenSlideLevels, TiledTiffLevels, open_with_openslide, plain_pages
from medsd.slides.mpp import resolve_mpp
from medsd.slides.resample import plan_axis, resample

RGB = npt.NDArray[np.uint8]

# Most level pixels that are resampled at once: about 250 MB at work.
_MOST_LEVEL_PX = 2**24


class Slide(Protocol):
    """An open slide: pixels with a place.

    Attributes:
        path: the slide's file.
        dimensions: (width, height) of level 0 in pixels.
        mpp: micrometres per level-0 pixel.
        mpp_source: where the mpp comes from.
        reader: name of the library that reads the file.
    """

    @property
    def path(self) -> Path: ...
    @property
    def dimensions(self) -> tuple[int, int]: ...
    @property
    def mpp(self) -> float: ...
    @property
    def mpp_source(self) -> str: ...
    @property
    def reader(self) -> str: ...

    def read(self, x: float, y: float, width: int, height: int, mpp: float | None = None) -> RGB:
        """Pixels of a rectangle, resampled from the nearest finer level.

        Args:
            x, y: top left corner in level-0 pixels. Fractions are honoured, so that a grid laid out at
                another scale keeps its phase; stored places are integers.
            width, height: size of the result in pixels at `mpp`.
            mpp: micrometres per pixel of the result; None for level 0.

        Returns:
            (height, width, 3) uint8 RGB; what lies outside the slide, and what is transparent, is white.

        Raises:
            SlideError: the area cannot be decoded.
        """
        ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Level:
    """A pyramid level: its size in pixels and the level-0 pixels per pixel along x and y."""

    width: int
    height: int
    downsample_x: float
    downsample_y: float


def open_slide(path: str | Path, mpp: float | None = None) -> FileSlide:
    """Open a slide of any format that OpenSlide reads.

    Args:
        path: the slide's file.
        mpp: micrometres per level-0 pixel where the file does not know it, or knows it wrong.

    Raises:
        SlideError: no such file, not a slide, or damaged.
        MissingMppError: the scale is unknown and not given.
    """
    return FileSlide(Path(path), mpp)


class FileSlide:
    """A `Slide` in a file: OpenSlide says what it is, and tifffile reads the pixels where it can (see `levels`).

    Safe to share between threads, to fork and to pickle: each process and thread opens a handle of its own
    when it first reads.
    """

    def __init__(self, path: Path, mpp: float | None = None) -> None:
        self.path = path
        self._readers: dict[tuple[int, int], LevelReader] = {}
        self._closed = False
        with open_with_openslide(path) as slide:
            resolved = resolve_mpp(path, slide.properties, mpp)
            self.mpp, self.mpp_source = resolved.value, resolved.source
            self.dimensions: tuple[int, int] = slide.dimensions
            self.levels = tuple(_level(self.dimensions, size) for size in slide.level_dimensions)
            self._pages = plain_pages(path, slide)
        self.reader = "openslide" if self._pages is None else "tifffile"

    def read(self, x: float, y: float, width: int, height: int, mpp: float | None = None) -> RGB:
        """See `Slide.read`."""
        if width < 1 or height < 1:
            raise ValueError(f"width and height must be at least 1, got {width} x {height}")
        if mpp is not None and not (math.isfinite(mpp) and mpp > 0):
            raise ValueError(f"mpp must be a positive number, got {mpp}")
        ratio = 1.0 if mpp is None else mpp / self.mpp
        index = self._level_for(ratio)
        level = self.levels[index]
        columns = plan_axis(x / level.downsample_x, _snap(ratio / level.downsample_x), width)
        rows = plan_axis(y / level.downsample_y, _snap(ratio / level.downsample_y), height)
        whole = rows.weights is None and columns.weights is None
        if not whole and rows.length * columns.length > _MOST_LEVEL_PX and width * height > 1:
            return self._read_halves(x, y, width, height, ratio)
        return resample(self._read_level(index, columns.first, rows.first, columns.length, rows.length), rows, columns)

    def close(self) -> None:
        """Let go of every handle of this process; reading afterwards raises SlideError."""
        self._closed = True
        for key in list(self._readers):
            # A handle that another thread is reading with lives until that read ends; those of a parent process are
            # not ours to close.
            if key[0] == os.getpid():
                self._readers.pop(key, None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_readers": {}}

    def _level_for(self, ratio: float) -> int:
        """The coarsest level that is not coarser than `ratio` level-0 pixels per pixel."""
        fitting = [i for i, level in enumerate(self.levels) if level.downsample_x <= ratio * (1 + 1e-6)]
        return max(fitting, key=lambda i: self.levels[i].downsample_x, default=0)

    def _read_halves(self, x: float, y: float, width: int, height: int, ratio: float) -> RGB:
        """The same pixels by two smaller reads, so that a coarse view of a slide without a pyramid fits in memory."""
        mpp = ratio * self.mpp
        if width > height:
            left = width // 2
            parts = [self.read(x, y, left, height, mpp), self.read(x + left * ratio, y, width - left, height, mpp)]
            return np.concatenate(parts, axis=1)
        top = height // 2
        parts = [self.read(x, y, width, top, mpp), self.read(x, y + top * ratio, width, height - top, mpp)]
        return np.concatenate(parts, axis=0)

    def _read_level(self, index: int, column: int, row: int, columns: int, rows: int) -> RGB:
        """Whole pixels of one level, white outside the slide."""
        reader, level = self._reader(), self.levels[index]
        left, right = max(column, 0), min(column + columns, level.width)
        top, bottom = max(row, 0), min(row + rows, level.height)
        inside = left < right and top < bottom
        if inside and (right - left, bottom - top) == (columns, rows):
            return self._decode(reader, index, column, row, columns, rows)
        pixels = np.full((rows, columns, 3), 255, np.uint8)
        if inside:
            part = self._decode(reader, index, left, top, right - left, bottom - top)
            pixels[top - row : bottom - row, left - column : right - column] = part
        return pixels

    def _decode(self, reader: LevelReader, index: int, column: int, row: int, columns: int, rows: int) -> RGB:
        try:
            return reader.read(index, column, row, columns, rows)
        except SlideError:
            # OpenSlide refuses everything after its first error; the next read starts with a new handle.
            self._readers.pop((os.getpid(), threading.get_ident()), None)
            raise

    def _reader(self) -> LevelReader:
        if self._closed:
            raise SlideError(f"{self.path}: the slide was closed; open it again")
        key = (os.getpid(), threading.get_ident())
        reader = self._readers.get(key)
        if reader is None:
            pages = self._pages
            reader = OpenSlideLevels(self.path) if pages is None else TiledTiffLevels(self.path, pages)
            self._readers[key] = reader
        return reader


def thumbnail(slide: Slide, longest_px: int) -> tuple[RGB, float]:
    """The whole slide as one picture of at most `longest_px` a side, and its level-0 pixels per pixel."""
    width, height = slide.dimensions
    level0_px = max(1.0, max(width, height) / longest_px)
    size = max(1, round(width / level0_px)), max(1, round(height / level0_px))
    return slide.read(0, 0, *size, mpp=slide.mpp * level0_px), level0_px


def _level(base: tuple[int, int], size: tuple[int, int]) -> Level:
    """The scale of a level of that size.

    Writers round odd sizes up or down, so base / size is not the scale: 2,967 px over 741 px is a factor of 4, not
    4.004, which would drift by most of a pixel over the slide. The longer side tells the factor best.
    """
    longer = 0 if base[0] >= base[1] else 1
    factor = round(base[longer] / size[longer])
    if all(part in (whole // factor, math.ceil(whole / factor)) for whole, part in zip(base, size, strict=True)):
        return Level(*size, float(factor), float(factor))
    return Level(*size, base[0] / size[0], base[1] / size[1])


def _snap(scale: float) -> float:
    """A scale that differs from 1 by rounding error alone becomes 1: level pixels are then given as they are."""
    return 1.0 if abs(scale - 1.0) < 1e-9 else scale
