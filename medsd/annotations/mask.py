"""Masks of tumour in TIFF files to polygons that follow the edges of their pixels."""

from __future__ import annotations

import logging
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import tifffile
from scipy import ndimage
from shapely.geometry import MultiPolygon, Polygon

from medsd.annotations.shapes import Annotations, Outline, one_line
from medsd.errors import AnnotationError

_log = logging.getLogger(__name__)

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

GROUP = "Tumor"

# One byte a pixel, and eight more for the pixels of the rectangle around the tumour.
MOST_MASK_PX = 2**27
# What tifffile and imagecodecs raise for damaged bytes (codec errors are RuntimeErrors).
_DAMAGED = (
    OSError, ValueError, RuntimeError, ArithmeticError, LookupError, TypeError, AttributeError, AssertionError,
    MemoryError, struct.error,
)  # fmt: skip


def read_mask(path: str | Path, slide_size_px: tuple[int, int], tumour_values: Sequence[int] = ()) -> Annotations:
    """Read a mask in a TIFF file and place it over the whole of a slide.

    Each area of pixels that share edges becomes one outline of the group `Tumor`, with its holes, along the pixels'
    edges: `rasterise` at the mask's size, with its pixels' width and height in level-0 pixels, gives the mask back.
    Of a pyramid, the finest level of at most `MOST_MASK_PX` (2^27) pixels is read, which takes about 0.5 GB of
    memory for a usual share of tumour and up to 1.2 GB; it is logged which.

    Args:
        path: the TIFF file, one channel of whole numbers.
        slide_size_px: width and height of the slide at level 0. The mask may have another resolution.
        tumour_values: the values that are tumour; without them 0 is not tumour, and either 1 or 255 is.

    Raises:
        AnnotationError: the file is missing, damaged, no mask, larger than that without a pyramid, of another
            shape than the slide, or has values that may mean anything.
    """
    path = Path(path)
    mask = _tumour(_pixels(path), tumour_values, path)
    scale = _scale(mask, slide_size_px, path)
    polygons = list(mask_polygons(mask, scale))
    outlines = tuple(Outline(f"Region {n}", GROUP, False, polygon) for n, polygon in enumerate(polygons, 1))
    return Annotations(MultiPolygon(polygons), 0, MultiPolygon(), outlines=outlines)


def mask_polygons(mask: Bools, scale: tuple[float, float] = (1.0, 1.0)) -> Iterator[Polygon]:
    """The areas of True pixels that share edges, as valid polygons along the pixels' edges, in raster order.

    Args:
        mask: shape (height, width).
        scale: width and height of a pixel in the polygons' units; the origin is the mask's corner.
    """
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not rows.size:
        return
    top, left = rows[0], columns[0]
    cropped = np.pad(mask[top : rows[-1] + 1, left : columns[-1] + 1], 1)
    labels, count = ndimage.label(cropped)
    place, across, along, area_number = _corners(cropped, labels)
    points = (place + np.array([left, top])) * scale
    rings: list[list[npt.NDArray[np.float64]]] = [[] for _ in range(count)]
    for ring in _cycles(across.tolist(), along.tolist()):
        rings[area_number[ring[0]] - 1].append(points[ring])
    for drawn in rings:
        # The ring around an area holds those around its holes.
        drawn.sort(key=_extent, reverse=True)
        yield Polygon(drawn[0], drawn[1:])


def _pixels(path: Path) -> npt.NDArray[Any]:
    """The finest level that is small enough, shape (height, width)."""
    try:
        with tifffile.TiffFile(path) as file:
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
    except _DAMAGED as error:
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
    """Level-0 pixels per mask pixel along x and y; a level's size is the slide's over one factor, rounded."""
    lows, highs = [], []
    for slide, size in zip(slide_size_px, mask.shape[::-1], strict=True):
        lows.append(slide / (size + 1))
        highs.append(slide / (size - 1) if size > 1 else np.inf)
    if max(lows) > min(highs):
        raise AnnotationError(
            f"{path}: a mask of {mask.shape[1]} x {mask.shape[0]} pixels does not fit a slide of "
            f"{slide_size_px[0]} x {slide_size_px[1]}; give the mask of this slide"
        )
    return slide_size_px[0] / mask.shape[1], slide_size_px[1] / mask.shape[0]


def _corners(mask: Bools, labels: npt.NDArray[np.int32]) -> tuple[Ints, Ints, Ints, Ints]:
    """The corners of a padded mask's areas: place (n, 2), partner along the row, partner along the column, area.

    Where two areas meet at a corner, or one meets itself, there are two corners. Those of two areas stay with their own
    pixel, so that areas are apart; of one area the rings part the other way, so that no ring touches itself.
    """
    bits = mask.view(np.uint8)
    code = bits[:-1, :-1] | bits[:-1, 1:] << 1
    code |= bits[1:, :-1] << 2
    code |= bits[1:, 1:] << 3
    # 0 no, 1 a corner, 2 two: pixels across from each other. Straight edges (two pixels side by side) are none.
    corners = np.array([0, 1, 1, 0, 1, 0, 2, 1, 1, 2, 0, 1, 0, 1, 1, 0], np.uint8)[code]
    y, x = np.nonzero(corners)
    single = corners[y, x] == 1
    of_one = np.max([labels[y + dy, x + dx] for dy in (0, 1) for dx in (0, 1)], axis=0)
    y2, x2 = y[~single], x[~single]
    falling = code[y2, x2] == 9  # upper left and lower right are in the mask
    left_label = np.where(falling, labels[y2, x2], labels[y2 + 1, x2])
    right_label = np.where(falling, labels[y2 + 1, x2 + 1], labels[y2, x2 + 1])
    # The corner with the edge to the left has the edge up or the edge down.
    left_goes_up = falling == (left_label != right_label)
    # Per corner: which of two ends at its place comes first along the row (left of right) and the column (up of down).
    place = np.concatenate([np.stack([x, y], 1)[single], *2 * [np.stack([x2, y2], 1)]])
    zeros = np.zeros(int(single.sum()), np.int64)
    row_end = np.concatenate([zeros, np.zeros(len(x2), np.int64), np.ones(len(x2), np.int64)])
    column_end = np.concatenate([zeros, ~left_goes_up, left_goes_up])
    area = np.concatenate([of_one[single], left_label, right_label])
    across = _partners(place[:, 1], place[:, 0], row_end)
    along = _partners(place[:, 0], place[:, 1], column_end)
    return place, across, along, area


def _partners(line: Ints, position: Ints, end: Ints) -> Ints:
    """The other corner of each corner's edge on its line: corners on a line pair up in order."""
    order = np.lexsort([end, position, line])
    partner = np.empty_like(order)
    partner[order[0::2]], partner[order[1::2]] = order[1::2], order[0::2]
    return partner


def _cycles(across: list[int], along: list[int]) -> Iterator[list[int]]:
    """The rings: from corner to corner along a row, then along a column, until one is back."""
    seen = bytearray(len(across))
    for start in range(len(across)):
        ring: list[int] = []
        corner = start
        while not seen[corner]:
            other = across[corner]
            seen[corner] = seen[other] = 1
            ring += (corner, other)
            corner = along[other]
        if ring:
            yield ring


def _extent(ring: npt.NDArray[np.float64]) -> float:
    return float(np.ptp(ring[:, 0]))
