"""Masks of tumour in TIFF files to polygons that follow the edges of their pixels."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely
import tifffile
from shapely.geometry import MultiPolygon, Polygon

from medsd.annotations.shapes import Annotations, Outline, one_line
from medsd.errors import AnnotationError
from medsd.slides.readers.base import Bools
from medsd.slides.readers.damage import DAMAGED
from medsd.slides.readers.tiff_layout import has_too_many_pages
from medsd.slides.slide import level_of

_log = logging.getLogger(__name__)

_GROUP = "Tumor"

# One byte a pixel, and some four more for the pixels of the rectangle around the tumour.
MOST_MASK_PX = 2**27
# Of the areas: half a minute of work. A hundred lesions have fewer; noise has one every other pixel.
MOST_MASK_EDGES = 500_000


def parse_mask(path: Path, slide_size_px: tuple[int, int], tumour_values: Sequence[int]) -> Annotations:
    """A mask in a TIFF file, placed over the whole of a slide.

    Each area of pixels that share edges becomes one outline of the group `Tumor`, with its holes, along the pixels'
    edges: `rasterise` at the mask's size, with its pixels' width and height in level-0 pixels, gives the mask back.
    Of a pyramid, the finest level of at most `MOST_MASK_PX` (2^27) pixels is read, which takes about 1 GB of memory.

    Args:
        path: the TIFF file, one channel of whole numbers.
        slide_size_px: width and height of the slide at level 0. The mask may have another resolution.
        tumour_values: the values that are tumour; without them 0 is not tumour, and either 1 or 255 is.
    """
    mask = _tumour(_pixels(path), tumour_values, path)
    if (corners := _corners(mask)) > MOST_MASK_EDGES:
        raise AnnotationError(
            f"{path}: areas with {corners:,} straight edges, more than {MOST_MASK_EDGES:,}: noise? smooth the mask, or "
            "save a coarser one"
        )
    polygons = mask_polygons(mask, _scale(mask, slide_size_px, path))
    outlines = tuple(Outline(f"Region {n}", _GROUP, False, polygon) for n, polygon in enumerate(polygons, 1))
    return Annotations(MultiPolygon(polygons), 0, MultiPolygon(), outlines=outlines)


def mask_polygons(mask: Bools, scale: tuple[float, float] = (1.0, 1.0)) -> list[Polygon]:
    """The areas of True pixels that share edges, as valid polygons along the pixels' edges, in raster order.

    Args:
        mask: shape (height, width).
        scale: width and height of a pixel in the polygons' units; the origin is the mask's corner.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return []
    corner = np.array([columns[0], rows[0]])
    cropped = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].view(np.int8)
    edges = np.concatenate([_edges(cropped), _edges(cropped.T)[..., ::-1]])
    found: list[tuple[int, int, Polygon]] = []
    for face in shapely.get_parts(shapely.polygonize(shapely.linestrings(edges))):
        points = shapely.get_coordinates(face.exterior).astype(np.int64)
        x, y = points[np.lexsort(points.T)[0]]  # the first corner in raster order, with the face's first pixel
        if cropped[y, x]:
            found.append((y, x, face))
    found.sort(key=lambda item: item[:2])
    return list(shapely.transform([face for *_, face in found], lambda points: (points + corner) * scale))


def _corners(mask: Bools) -> int:
    """How many corners the areas have, which is how many straight edges."""
    sides = np.pad(mask, 1)
    sides = sides[1:] ^ sides[:-1]  # a horizontal edge lies here
    return int(np.count_nonzero(sides[:, 1:] ^ sides[:, :-1])) + 2 * _touching(mask)


def _touching(mask: Bools) -> int:
    """Where areas touch at a corner alone: two corners each."""
    first, second = mask[:-1, :-1], mask[:-1, 1:]
    return int(np.count_nonzero((first == mask[1:, 1:]) & (second == mask[1:, :-1]) & (first != second)))


def _edges(mask: npt.NDArray[np.int8]) -> npt.NDArray[np.int64]:
    """Horizontal edges of the areas, from corner to corner: (n, 2, 2), the ends' x and y."""
    # Where areas lie above and where below: an edge also ends where it changes sides.
    side = np.pad(np.diff(mask, axis=0, prepend=0, append=0), ((0, 0), (1, 1)))
    turns = side[:, 1:] != side[:, :-1]
    ends = [np.argwhere(turns & (beside != 0)) for beside in (side[:, 1:], side[:, :-1])]
    return np.stack(ends, axis=1)[..., ::-1]


def _pixels(path: Path) -> npt.NDArray[Any]:
    """The finest level that is small enough, shape (height, width)."""
    try:
        with tifffile.TiffFile(path) as file:
            if has_too_many_pages(file):
                raise AnnotationError(f"{path}: damaged mask (a list of pages without end); copy it again")
            levels = file.series[0].levels
            sizes = [int(np.prod(level.shape, dtype=object)) for level in levels]
            chosen = next((number for number, size in enumerate(sizes) if size <= MOST_MASK_PX), None)
            if chosen is None:
                raise AnnotationError(
                    f"{path}: no level of the mask has fewer than {MOST_MASK_PX:,} pixels; save it as a pyramid"
                )
            pixels = levels[chosen].asarray(maxworkers=1)
    except FileNotFoundError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except (*DAMAGED, AssertionError) as error:
        raise AnnotationError(f"{path}: damaged mask, or no TIFF file ({one_line(error)}); copy it again") from error
    if pixels.ndim == 3 and 1 in (pixels.shape[0], pixels.shape[2]):
        pixels = pixels[0] if pixels.shape[0] == 1 else pixels[:, :, 0]
    if pixels.ndim != 2 or not pixels.size or pixels.dtype.kind not in "bui":
        raise AnnotationError(
            f"{path}: no mask, but {pixels.dtype} values of shape {pixels.shape}; save one channel of whole numbers"
        )
    if chosen:
        _log.info("%s: level %d of %d is read, %d x %d pixels", path, chosen, len(levels), *pixels.shape[::-1])
    return pixels


def _tumour(pixels: npt.NDArray[Any], tumour_values: Sequence[int], path: Path) -> Bools:
    if len(tumour_values):
        return np.asarray(np.isin(pixels, np.asarray(tumour_values)))
    tumour = np.asarray(pixels != 0)
    if not any(np.array_equal(tumour, pixels == value) for value in (1, 255)):
        shown = ", ".join(str(int(value)) for value in np.unique(pixels)[:10])
        raise AnnotationError(
            f"{path}: the mask has the values {shown}, not 0 and 1 or 0 and 255; name the tumour's in tumour_values"
        )
    return tumour


def _scale(mask: Bools, slide_size_px: tuple[int, int], path: Path) -> tuple[float, float]:
    """Level-0 pixels per mask pixel along x and y: a level of its slide, whose size is rounded, see `level_of`."""
    lows, highs = [], []
    for slide, size in zip(slide_size_px, mask.shape[::-1], strict=True):
        lows.append(slide / (size + 1))
        highs.append(slide / (size - 1) if size > 1 else np.inf)
    if max(lows) > min(highs):
        raise AnnotationError(
            f"{path}: a mask of {mask.shape[1]} x {mask.shape[0]} pixels does not fit a slide of "
            f"{slide_size_px[0]} x {slide_size_px[1]}; give the mask of this slide"
        )
    level = level_of(slide_size_px, (mask.shape[1], mask.shape[0]))
    return level.downsample_x, level.downsample_y
