"""Annotations to labels of tiles and pixels; everything in level-0 pixels, x to the right, y down."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import shapely
from shapely.geometry import MultiPolygon, Polygon

from medsd.annotations.shapes import Annotations, only_polygons

# Vertices of the pieces that tiles are cut with: small enough for fast cuts, large enough for few pieces.
_PIECE_VERTICES = 256


def tumour_share(
    annotations: Annotations, x: npt.ArrayLike, y: npt.ArrayLike, side_px: float
) -> npt.NDArray[np.float64]:
    """The share of each square tile's area that is tumour, exact up to rounding.

    Args:
        annotations: outlines of the slide.
        x, y: top-left corners in level-0 pixels, shape (n,).
        side_px: side of the tiles in level-0 pixels.

    Returns:
        shape (n,), 0 to 1; a tile that lies fully inside has exactly 1, one that does not touch the tumour exactly 0.

    Example:
        >>> tumour = Annotations(MultiPolygon([shapely.box(0, 0, 30, 10)]))  # or read_annotations("slide.xml")
        >>> tumour_share(tumour, x=[0, 20, 40], y=[0, 0, 0], side_px=20)
        array([0.5 , 0.25, 0.  ])
    """
    left, top = np.broadcast_arrays(np.asarray(x, np.float64), np.asarray(y, np.float64))
    tiles = shapely.box(left, top, left + side_px, top + side_px)
    covered = np.zeros(left.shape, np.float64)
    if annotations.tumour.is_empty or not len(covered):
        return covered
    tree = shapely.STRtree(tiles)
    whole = tree.query(annotations.tumour.geoms, predicate="covers")[1]
    pieces = np.array([piece for polygon in annotations.tumour.geoms for piece in _pieces(polygon)], object)
    piece, tile = tree.query(pieces, predicate="intersects")
    partial = ~np.isin(tile, whole)
    piece, tile = piece[partial], tile[partial]
    area_px2 = shapely.area(shapely.intersection(pieces[piece], tiles[tile]))
    covered += np.bincount(tile, area_px2, minlength=len(covered)) / side_px**2
    covered[whole] = 1.0
    return np.minimum(covered, 1.0)


def rasterise(
    annotations: Annotations, width: int, height: int, level0_px: float | tuple[float, float]
) -> npt.NDArray[np.bool_]:
    """The tumour as a mask: a pixel is tumour if its centre lies inside (on a left or upper edge counts as inside).

    Scan lines with the even-odd rule: an edge flips all pixels of the row whose centres lie right of it.

    Args:
        annotations: outlines of the slide.
        width, height: size of the mask in its own pixels.
        level0_px: side of a mask pixel in level-0 pixels, or its width and height where these differ (pyramid levels
            of rounded size); the mask's origin is that of level 0. A mask at some mpp has mpp / slide.mpp.

    Returns:
        shape (height, width).
    """
    flips = np.zeros((height, width + 1), np.bool_)
    for ring in shapely.get_rings(shapely.get_parts(annotations.tumour)):
        # In units of mask pixels, moved by half of one, so that centres have whole numbers.
        points = shapely.get_coordinates(ring) / level0_px - 0.5
        x0, y0 = points[:-1].T
        x1, y1 = points[1:].T
        first = np.clip(np.ceil(np.minimum(y0, y1)), 0, height).astype(np.int64)
        last = np.clip(np.ceil(np.maximum(y0, y1)), 0, height).astype(np.int64)
        rows_each = last - first
        edge = np.repeat(np.arange(len(x0)), rows_each)
        row = np.arange(len(edge)) - np.repeat(np.cumsum(rows_each) - rows_each, rows_each) + first[edge]
        crossing = x0[edge] + (row - y0[edge]) * (x1[edge] - x0[edge]) / (y1[edge] - y0[edge])
        column = np.clip(np.ceil(crossing), 0, width).astype(np.int64)
        np.logical_xor.at(flips, (row, column), True)
    np.logical_xor.accumulate(flips, axis=1, out=flips)
    return flips[:, :width]


def _pieces(polygon: Polygon, depth: int = 24) -> list[Polygon]:
    """`polygon` cut in halves until every piece has few vertices, which makes cutting thousands of tiles fast."""
    if shapely.get_num_coordinates(polygon) <= _PIECE_VERTICES or not depth:
        return [polygon]
    left, top, right, bottom = polygon.bounds
    along_x = right - left > bottom - top
    half = halves(polygon, (left + right) / 2 if along_x else (top + bottom) / 2, along_x)
    return [piece for area in half for part in area.geoms for piece in _pieces(part, depth - 1)]


def halves(polygon: Polygon, at: float, along_x: bool) -> tuple[MultiPolygon, MultiPolygon]:
    """A valid polygon on both sides of the line x = `at`, or y = `at`."""
    left, top, right, bottom = polygon.bounds
    if along_x:
        sides = (left, top, at, bottom), (at, top, right, bottom)
    else:
        sides = (left, top, right, at), (left, at, right, bottom)
    first, second = (only_polygons(shapely.intersection(polygon, shapely.box(*side))) for side in sides)
    return first, second
