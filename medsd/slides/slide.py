"""Opening slides and reading them at any scale."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from medsd.errors import AreaError, SlideError
from medsd.slides.mpp import resolve_mpp
from medsd.slides.readers.base import RGB, Bools, read_halves
from medsd.slides.readers.cache import TileCache
from medsd.slides.readers.choose import open_reader
from medsd.slides.resample import Axis, plan_axis, resample

# Most level pixels that are resampled at once: about 250 MB at work.
_MOST_LEVEL_PX = 2**24
# A glass slide of 75 x 50 mm at 0.05 um per pixel is 1,500,000 px long; scanners write up to 2^37 px in all.
_LONGEST_SIDE_PX = 2**21
_LARGEST_AREA_PX = 2**37
_STRIPE_PX, _STRIPE_GREYS = 12, (110, 190)
_BLOCK_PX = 256


class Area(NamedTuple):
    """The arguments of `Slide.read`."""

    x: float
    y: float
    width: int
    height: int
    mpp: float | None = None


class Slide(ABC):
    """An open slide: pixels with a place; `with` closes it.

    Attributes:
        path: the slide's file.
        dimensions: (width, height) of level 0 in pixels.
        mpp: micrometres per level-0 pixel.
        mpp_source: where the mpp comes from.
        mpp_doubt: where the caller's mpp is far from the file's, a sentence for a reader; else empty.
        reader: name of the library that reads the file.
        bounds: (x, y, width, height) of the scanned area in level-0 pixels, where the file says that the rest of its
            canvas is empty (MIRAX, Leica); else the whole slide. QuPath shows this area alone and counts from its
            corner.
    """

    path: Path
    dimensions: tuple[int, int]
    mpp: float
    mpp_source: str
    mpp_doubt: str = ""
    reader: str
    bounds: tuple[int, int, int, int]

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
            AreaError: no width or height, or a place or scale that is no number.
        """
        return self._read(_checked(Area(x, y, width, height, mpp)), strict=True)[0]

    def read_seen(
        self, x: float, y: float, width: int, height: int, mpp: float | None = None
    ) -> tuple[RGB, Bools | None]:
        """Like `read`, but what cannot be decoded is white and said to be not seen.

        Returns:
            the pixels, and (height, width) bool that is False where a pixel needed what could not be decoded; None
            where everything was. What lies outside the slide counts as seen.
        """
        return self._read(_checked(Area(x, y, width, height, mpp)), strict=False)

    @abstractmethod
    def _read(self, area: Area, strict: bool) -> tuple[RGB, Bools | None]:
        """`read_seen`; with `strict`, what cannot be decoded is an error."""

    @abstractmethod
    def close(self) -> None:
        """Let go of every handle of this process; reading afterwards raises SlideError."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *raised: object) -> None:
        self.close()


class Level(NamedTuple):
    """A pyramid level: its size in pixels and the level-0 pixels per pixel along x and y."""

    width: int
    height: int
    downsample_x: float
    downsample_y: float


def level_for(levels: Sequence[Level], ratio: float) -> int:
    """The coarsest level that is not coarser than `ratio` level-0 pixels per pixel; level 0 where all are."""
    fine = [n for n, level in enumerate(levels) if max(level.downsample_x, level.downsample_y) <= ratio * (1 + 1e-6)]
    return max(fine, key=lambda number: levels[number].downsample_x, default=0)


def open_slide(
    path: str | Path, mpp: float | None = None, reader: str | None = None, cache: TileCache | None = None
) -> FileSlide:
    """Open a slide of any known format.

    Args:
        path: the slide's file, or the folder of an OME-NGFF image.
        mpp: micrometres per level-0 pixel where the file does not know it, or knows it wrong.
        reader: one of `readers.choose.READERS`, or None to choose by the file.
        cache: where decoded tiles are kept; None for one of its own.

    Raises:
        SlideError: no such file, not a slide, damaged, or larger than any slide is.
        MissingMppError: the scale is unknown and not given.
        ConfigError: no reader of that name.

    Example:
        >>> with open_slide("slide.tif") as slide:
        ...     slide.read(x=100, y=50, width=64, height=32, mpp=2 * slide.mpp).shape
        (32, 64, 3)
    """
    return FileSlide(Path(path), mpp, reader, cache)


class FileSlide(Slide):
    """A `Slide` in a file.

    Safe to share between threads, to fork while no other thread reads, and to pickle: handles are opened when first
    read.

    Attributes:
        levels: the pyramid, finest first.
    """

    def __init__(
        self, path: Path, mpp: float | None = None, reader: str | None = None, cache: TileCache | None = None
    ) -> None:
        self.path = path
        self._closed = False
        self._reader = open_reader(path, reader, cache)
        self.reader = self._reader.name
        sizes = self._reader.sizes
        self.dimensions = check_size(path, sizes[0])
        if any(size[0] > self.dimensions[0] or size[1] > self.dimensions[1] or min(size) < 1 for size in sizes):
            raise SlideError(f"{path}: a level is larger than level 0; its header is damaged, copy it again")
        self.levels = tuple(level_of(self.dimensions, size) for size in sizes)
        resolved = resolve_mpp(path, self._reader.properties, mpp)
        self.mpp, self.mpp_source, self.mpp_doubt = resolved.value, resolved.source, resolved.doubt
        self.bounds = _bounds(self._reader.properties, self.dimensions)

    def close(self) -> None:
        self._closed = True
        self._reader.close()

    def _read(self, area: Area, strict: bool) -> tuple[RGB, Bools | None]:
        if self._closed:
            raise SlideError(f"{self.path}: the slide was closed; open it again")
        x, y, width, height, mpp = area
        ratio = 1.0 if mpp is None else mpp / self.mpp
        index = level_for(self.levels, ratio)
        level = self.levels[index]
        columns = plan_axis(x / level.downsample_x, _snap(ratio / level.downsample_x), width)
        rows = plan_axis(y / level.downsample_y, _snap(ratio / level.downsample_y), height)
        whole = rows.weights is None and columns.weights is None
        if not whole and rows.length * columns.length > _MOST_LEVEL_PX and width * height > 1:
            # Halves, so that a coarse view of a slide without a pyramid fits in memory.
            return read_halves(lambda *part: self._read(Area(*part)._replace(mpp=mpp), strict), *area[:4], ratio)
        pixels, seen = self._read_level(index, columns, rows, strict)
        return resample(pixels, rows, columns), None if seen is None else _wholly_seen(seen, rows, columns)

    def _read_level(self, index: int, columns: Axis, rows: Axis, strict: bool) -> tuple[RGB, Bools | None]:
        """Whole pixels of one level, white outside the slide."""
        level = self.levels[index]

        def decode(*rectangle: int) -> tuple[RGB, Bools | None]:
            return (self._reader.read(*rectangle), None) if strict else self._reader.read_seen(*rectangle)

        left, right = max(columns.first, 0), min(columns.first + columns.length, level.width)
        top, bottom = max(rows.first, 0), min(rows.first + rows.length, level.height)
        inside = left < right and top < bottom
        if inside and (right - left, bottom - top) == (columns.length, rows.length):
            return decode(index, left, top, columns.length, rows.length)
        pixels = np.full((rows.length, columns.length, 3), 255, np.uint8)
        if not inside:
            return pixels, None
        place = np.s_[top - rows.first : bottom - rows.first, left - columns.first : right - columns.first]
        pixels[place], part_seen = decode(index, left, top, right - left, bottom - top)
        if part_seen is None:
            return pixels, None
        seen = np.ones(pixels.shape[:2], np.bool_)
        seen[place] = part_seen
        return pixels, seen


def _checked(area: Area) -> Area:
    """The area; AreaError where there is none."""
    x, y, width, height, mpp = area
    if width < 1 or height < 1:
        raise AreaError(f"width and height must be at least 1, got {width} x {height}")
    if mpp is not None and not (math.isfinite(mpp) and mpp > 0):
        raise AreaError(f"mpp must be a positive number, got {mpp}")
    if not (math.isfinite(x) and math.isfinite(y)):
        raise AreaError(f"x and y must be numbers, got {x}, {y}")
    return area


def check_size(path: Path, size: tuple[int, int]) -> tuple[int, int]:
    """The size of a slide, if a glass slide can have it.

    Raises:
        SlideError: no slide is as large, or the size is not positive: the header is damaged or made up.
    """
    if min(size) < 1 or max(size) > _LONGEST_SIDE_PX or size[0] * size[1] > _LARGEST_AREA_PX:
        raise SlideError(
            f"{path}: {size[0]} x {size[1]} px is no size of a slide; its header is damaged, copy it again"
        )
    return size


def _bounds(properties: Mapping[str, str], dimensions: tuple[int, int]) -> tuple[int, int, int, int]:
    keys = [f"openslide.bounds-{name}" for name in ("x", "y", "width", "height")]
    if not all(properties.get(key, "").isdecimal() for key in keys):
        return (0, 0, *dimensions)
    x, y, width, height = (int(properties[key]) for key in keys)
    if min(width, height) < 1 or x + width > dimensions[0] or y + height > dimensions[1]:
        return (0, 0, *dimensions)
    return x, y, width, height


def _wholly_seen(seen: Bools, rows: Axis, columns: Axis) -> Bools:
    """The output pixels that need no unseen pixel."""
    unseen = np.where(seen, 0, 255).astype(np.uint8)
    return resample(np.repeat(unseen[..., None], 3, axis=2), rows, columns)[..., 0] < 1


def thumbnail(slide: Slide, longest_px: int) -> tuple[RGB, float]:
    """The whole slide as one picture of at most `longest_px` a side, and its level-0 pixels per pixel.

    What cannot be decoded is hatched, as glass would be white.
    """
    width, height = slide.dimensions
    level0_px = max(1.0, max(width, height) / longest_px)
    size = max(1, round(width / level0_px)), max(1, round(height / level0_px))
    pixels, seen = read_blocks(slide, *size, mpp=slide.mpp * level0_px)
    return pixels if seen is None else hatched(pixels, ~seen), level0_px


def read_blocks(slide: Slide, width: int, height: int, mpp: float) -> tuple[RGB, Bools | None]:
    """A slide from its corner on, as `Slide.read_seen` gives it, in blocks: damage costs a block at most, and memory
    holds the picture and what one block is made of.
    """
    pixels, seen = np.empty((height, width, 3), np.uint8), None
    level0_px = mpp / slide.mpp
    for top in range(0, height, _BLOCK_PX):
        for left in range(0, width, _BLOCK_PX):
            place = np.s_[top : top + _BLOCK_PX, left : left + _BLOCK_PX]
            rows, columns = pixels[place].shape[:2]
            pixels[place], part = slide.read_seen(left * level0_px, top * level0_px, columns, rows, mpp)
            if part is not None:
                seen = np.ones((height, width), np.bool_) if seen is None else seen
                seen[place] = part
    return pixels, seen


def hatched(pixels: RGB, mask: Bools) -> RGB:
    """A copy of a picture (h, w, 3) with grey stripes where `mask` (h, w) is True: nothing is known there."""
    rows, columns = np.indices(mask.shape)
    stripes = np.where((rows + columns) // _STRIPE_PX % 2, *_STRIPE_GREYS).astype(np.uint8)
    return np.where(mask[..., None], stripes[..., None], pixels)


_POWER_NEAR = 0.05  # our choice: beyond it a power of 2 is another factor that happens to fit


def level_of(base: tuple[int, int], size: tuple[int, int]) -> Level:
    """The scale of a level of that size.

    Writers round odd sizes up or down, so base / size is not the scale: 2,967 px over 741 px is a factor of 4, not
    4.004, which would drift by most of a pixel over the slide. The longer side tells the factor best. Of a coarse
    level several fit, and a power of 2 is the likeliest.
    """
    longer = 0 if base[0] >= base[1] else 1
    ratio = base[longer] / size[longer]
    nearest = round(ratio)
    exact = base == (nearest * size[0], nearest * size[1])
    doubled = 2 ** round(math.log2(ratio))
    for factor in (nearest,) if exact or abs(doubled / ratio - 1) > _POWER_NEAR else (doubled, nearest):
        if all(part in (whole // factor, math.ceil(whole / factor)) for whole, part in zip(base, size, strict=True)):
            return Level(*size, float(factor), float(factor))
    return Level(*size, base[0] / size[0], base[1] / size[1])


def _snap(scale: float) -> float:
    """A scale that differs from 1 by rounding error alone becomes 1: level pixels are then given as they are."""
    return 1.0 if abs(scale - 1.0) < 1e-9 else scale
