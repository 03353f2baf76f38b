"""Shapes in masks of whole slides: growing, smoothing, dropping small pieces and filling small holes, by OpenCV."""

from __future__ import annotations

import cv2
import numpy as np
import numpy.typing as npt

from medsd.slides.readers.base import Bools

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int32]


def smooth(mask: Bools, close_radius: int, open_radius: int) -> Bools:
    """Closing, then opening, by discs of these radii in pixels; what lies outside the mask has no say."""
    closed = cv2.morphologyEx(_bytes(mask), cv2.MORPH_CLOSE, _disc(close_radius))
    return np.asarray(cv2.morphologyEx(closed, cv2.MORPH_OPEN, _disc(open_radius)), np.bool_)


def grow_square(mask: Bools, radius: int) -> Bools:
    """True where a True pixel is at most `radius` pixels away along both axes."""
    square = np.ones((2 * radius + 1, 2 * radius + 1), np.uint8)
    return np.asarray(cv2.dilate(_bytes(mask), square), np.bool_)


def drop_small(mask: Bools, most_px: int, corners: bool = False) -> Bools:
    """The mask without its pieces of at most `most_px` pixels.

    Pieces are joined along rows and columns, with `corners` also across corners.
    """
    piece, stats = _pieces(mask, corners)
    return _drawn(piece, stats[:, cv2.CC_STAT_AREA] > most_px)


def fill_small_holes(mask: Bools, most_px: int) -> Bools:
    """The mask with its holes of at most `most_px` pixels filled.

    What touches the edge is no hole: nobody knows how large it is.
    """
    piece, stats = _pieces(~mask)
    left, top, width, height, area = stats.T
    inside = (left > 0) & (top > 0) & (left + width < mask.shape[1]) & (top + height < mask.shape[0])
    return mask | _drawn(piece, inside & (area <= most_px))


def _pieces(mask: Bools, corners: bool = False) -> tuple[Ints, Ints]:
    """The number of each pixel's piece, 0 for none; (numbers, 5) left, top, width, height and area of each."""
    _, piece, stats, _ = cv2.connectedComponentsWithStats(_bytes(mask), connectivity=8 if corners else 4)
    return np.asarray(piece, np.int32), np.asarray(stats, np.int32)


def _drawn(piece: Ints, which: Bools) -> Bools:
    """A mask of some of the pieces, row by row: at once, NumPy would make 8 bytes of each pixel's number."""
    which[0] = False
    out = np.empty(piece.shape, np.bool_)
    for row, numbers in zip(out, piece, strict=True):
        row[:] = which[numbers]
    return out


def _bytes(mask: Bools) -> Bytes:
    return np.ascontiguousarray(mask).view(np.uint8)


def _disc(radius: int) -> Bytes:
    """The pixels whose centres are at most `radius` away."""
    across = np.arange(-radius, radius + 1) ** 2
    return (across[:, None] + across <= radius**2).astype(np.uint8)
