"""Lesion outlines: ASAP XML files (CAMELYON) to polygons, and polygons to labels of tiles and pixels.

Everything is in level-0 pixels of the slide, x to the right, y down, origin at the top left.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element, ParseError

import numpy as np
import numpy.typing as npt
import shapely
from defusedxml.ElementTree import fromstring
from shapely.geometry import MultiPolygon, Polygon

from medsd.errors import AnnotationError, nearest

_log = logging.getLogger(__name__)

TUMOUR_GROUPS = ("_0", "_1", "Tumor", "metastases", "None")
EXCLUDED_GROUPS = ("_2", "Exclusion", "normal")
OUTLINE_TYPES = ("Polygon", "Spline", "Rectangle")
POINT_TYPES = ("Dot", "PointSet")

# No slide is 2^31 pixels wide; numbers beyond it overflow areas without a word.
_LARGEST_PX = 2.0**31
# Vertices of the pieces that tiles are cut with: small enough for fast cuts, large enough for few pieces.
_PIECE_VERTICES = 64


@dataclass(frozen=True)
class Annotations:
    """The outlines of one slide, in level-0 pixels.

    Attributes:
        tumour: tumour area; overlapping outlines are merged and the excluded area is cut out.
        repaired: number of self-crossing rings that were repaired (even-odd rule).
        excluded: area drawn as not tumour, as drawn (it may reach beyond the tumour outlines).
        dropped: number of rings without an area (fewer than three points) that were left out.
    """

    tumour: MultiPolygon
    repaired: int
    excluded: MultiPolygon
    dropped: int = 0


def read_asap_xml(path: str | Path) -> Annotations:
    """Read the outlines of one slide from an ASAP XML file.

    Groups are those of CAMELYON16 (`_0`, `_1`, `Tumor` tumour; `_2`, `Exclusion` holes) and CAMELYON17 (`metastases`,
    `normal`), in any case. `None` is ASAP's word for an outline without a group; in CAMELYON16 files such outlines are
    tumour, and are taken as that. Splines are taken as the polygon through their points. Dots and point sets have
    no area and are left out with a warning. A file without any outline is valid: the slide has no tumour.

    Args:
        path: the XML file.

    Raises:
        AnnotationError: the file is missing, is not ASAP XML, declares entities, has an unknown group or type,
            an outline without coordinates, or coordinates that are not finite level-0 pixels.
    """
    path = Path(path)
    rings: dict[bool, list[Polygon]] = {True: [], False: []}
    points_only = dropped = repaired = 0
    for annotation in _root(path).iter("Annotation"):
        kind = annotation.get("Type", "")
        if kind in POINT_TYPES:
            points_only += 1
            continue
        is_tumour = _is_tumour(annotation, path)
        if kind not in OUTLINE_TYPES:
            known = OUTLINE_TYPES + POINT_TYPES
            raise AnnotationError(
                f"{path}: annotation type {kind!r} is unknown{nearest(kind, known)}; redraw it in ASAP as one of "
                f"{', '.join(known)}"
            )
        ring = _ring(annotation, path)
        if len(ring) < 3:
            dropped += 1
            continue
        polygon = Polygon(ring)
        repaired += not polygon.is_valid
        rings[is_tumour].append(polygon)
    if points_only:
        _log.warning("%s: %d dots and point sets have no area and are left out", path, points_only)
    if dropped:
        _log.warning("%s: %d outlines have fewer than three points and are left out", path, dropped)
    try:
        excluded = _merged(rings[False])
        tumour = _only_polygons(shapely.difference(_merged(rings[True]), excluded))
    except shapely.errors.GEOSException as error:
        raise AnnotationError(f"{path}: outlines cannot be merged ({error}); redraw crossing ones in ASAP") from error
    return Annotations(tumour, repaired, excluded, dropped)


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


def rasterise(annotations: Annotations, width: int, height: int, level0_px: float) -> npt.NDArray[np.bool_]:
    """The tumour as a mask: a pixel is tumour if its centre lies inside (on a left or upper edge counts as inside).

    Scan lines with the even-odd rule: an edge flips all pixels of the row whose centres lie right of it.

    Args:
        annotations: outlines of the slide.
        width, height: size of the mask in its own pixels.
        level0_px: side of a mask pixel in level-0 pixels; the mask's origin is that of level 0.

    Returns:
        shape (height, width).
    """
    flips = np.zeros((height, width + 1), np.bool_)
    for ring in _rings(annotations.tumour):
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
    return np.logical_xor.accumulate(flips, axis=1)[:, :width]


def _root(path: Path) -> Element:
    """The root of the XML file, after the checks that concern the file as a whole."""
    try:
        root: Element = fromstring(path.read_bytes())
    except OSError as error:
        raise AnnotationError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    # ValueError: entities (defusedxml) and broken encodings; LookupError: encodings Python does not know.
    except (ParseError, ValueError, LookupError) as error:
        raise AnnotationError(f"{path}: is not plain XML ({error}); save the annotations again from ASAP") from error
    if root.tag != "ASAP_Annotations":
        raise AnnotationError(f"{path}: root is {root.tag!r}, not 'ASAP_Annotations'; give an XML file saved by ASAP")
    return root


def _is_tumour(annotation: Element, path: Path) -> bool:
    group = annotation.get("PartOfGroup", "")
    folded = group.casefold()
    if folded in (name.casefold() for name in TUMOUR_GROUPS):
        return True
    if folded in (name.casefold() for name in EXCLUDED_GROUPS):
        return False
    known = TUMOUR_GROUPS + EXCLUDED_GROUPS
    raise AnnotationError(
        f"{path}: annotation group {group!r} is unknown{nearest(group, known)}; rename it in ASAP to one of "
        f"{', '.join(TUMOUR_GROUPS)} (tumour) or {', '.join(EXCLUDED_GROUPS)} (not tumour)"
    )


def _ring(annotation: Element, path: Path) -> list[tuple[float, float]]:
    """The corners of one outline in level-0 pixels, in the order of the file."""
    name = annotation.get("Name", "")
    ring = []
    for coordinate in annotation.iter("Coordinate"):
        try:
            corner = (float(coordinate.get("X", "")), float(coordinate.get("Y", "")))
        except ValueError as error:
            raise AnnotationError(f"{path}: annotation {name!r} has a corner without numbers; redraw it") from error
        if not all(math.isfinite(value) and abs(value) < _LARGEST_PX for value in corner):
            raise AnnotationError(f"{path}: annotation {name!r} has a corner off any slide, {corner}; redraw it")
        ring.append(corner)
    if not ring:
        raise AnnotationError(f"{path}: annotation {name!r} has no coordinates; delete or redraw it in ASAP")
    return ring


def _merged(polygons: Iterable[Polygon]) -> MultiPolygon:
    """The union of outlines; a self-crossing one counts by the even-odd rule (shapely's `linework` method)."""
    return _only_polygons(shapely.union_all([_only_polygons(shapely.make_valid(polygon)) for polygon in polygons]))


def _only_polygons(geometry: Any) -> MultiPolygon:
    """The polygons of any geometry: repairs and cuts leave lines and points behind, which have no area."""
    parts = shapely.get_parts(shapely.get_parts(geometry))
    return MultiPolygon([part for part in parts if isinstance(part, Polygon) and part.area > 0])


def _rings(area: MultiPolygon) -> list[Any]:
    return [ring for polygon in area.geoms for ring in (polygon.exterior, *polygon.interiors)]


def _pieces(polygon: Polygon, depth: int = 24) -> list[Polygon]:
    """`polygon` cut in halves until every piece has few vertices, which makes cutting thousands of tiles fast."""
    if shapely.get_num_coordinates(polygon) <= _PIECE_VERTICES or not depth:
        return [polygon]
    left, top, right, bottom = polygon.bounds
    if right - left > bottom - top:
        middle = (left + right) / 2
        halves = [shapely.box(left, top, middle, bottom), shapely.box(middle, top, right, bottom)]
    else:
        middle = (top + bottom) / 2
        halves = [shapely.box(left, top, right, middle), shapely.box(left, middle, right, bottom)]
    cut = [_only_polygons(shapely.intersection(polygon, half)) for half in halves]
    return [piece for half in cut for part in half.geoms for piece in _pieces(part, depth - 1)]
