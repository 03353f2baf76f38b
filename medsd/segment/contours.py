"""The classes of a slide's pixels as polygons for viewers."""

from __future__ import annotations

import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import shapely
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from medsd.annotations.geojson import feature, moved, write_features
from medsd.heatmap.regions import polygons_above
from medsd.heatmap.scale import class_ink
from medsd.segment.stitch import SlideLabels
from medsd.slides.readers.base import Bools

_BLOCK_PX = 2048
_SMALLEST_PX = 64
_TOLERANCE = 0.4  # below half a pixel, which is what corners are cut by: straight sides stay where they are
_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "medsd.segment")


@dataclass(frozen=True)
class ClassRegion:
    """A connected area of a class, in level-0 pixels: a valid polygon with its holes."""

    number: int
    polygon: shapely.Polygon
    area_um2: float


def class_regions(labels: SlideLabels, slide_mpp: float, dimensions: tuple[int, int]) -> list[ClassRegion]:
    """The regions of every class but the background, by class and then by size.

    Marching squares between pixels' centres, so that corners are cut by half a pixel; block by block and joined, so
    that memory does not grow with the slide. Outlines are simplified by 0.4 pixels (Douglas and Peucker 1973), and what
    is then smaller than 64 pixels, or a hole of that size, is left out (our choices): it would bury a viewer, and
    counts among the areas all the same.

    Args:
        labels: the classes.
        slide_mpp: micrometres per level-0 pixel.
        dimensions: (width, height) at level 0; nothing reaches beyond.
    """
    smallest = _SMALLEST_PX * labels.level0_px**2
    regions = []
    for number in range(1, len(labels.classes)):
        if not labels.pixels[number]:
            continue
        pieces = np.array(list(_pieces(labels, number, dimensions)), dtype=object)
        if not len(pieces):  # too small for whole pixels
            continue
        simple = shapely.simplify(_joined(pieces), _TOLERANCE * labels.level0_px)
        for polygon in _valid(simple):
            kept = [ring for ring in polygon.interiors if shapely.Polygon(ring).area >= smallest]
            polygon = shapely.orient_polygons(shapely.normalize(shapely.Polygon(polygon.exterior, kept)))
            if polygon.area >= smallest:
                regions.append(ClassRegion(number, polygon, polygon.area * slide_mpp**2))
    return sorted(regions, key=lambda region: (region.number, -region.area_um2, region.polygon.bounds))


def _pieces(labels: SlideLabels, number: int, dimensions: tuple[int, int]) -> Iterator[shapely.Polygon]:
    """The class's polygons within each block; those of neighbours meet at the blocks' borders."""
    height, width = labels.numbers.shape
    for top in range(0, height, _BLOCK_PX):
        for left in range(0, width, _BLOCK_PX):
            mask = _with_border(labels, top, left) == number + 1
            if not mask.any():
                continue
            side = labels.level0_px
            box = (left * side, top * side, (left + _BLOCK_PX) * side, (top + _BLOCK_PX) * side)
            frame = shapely.box(*box[:2], min(box[2], dimensions[0]), min(box[3], dimensions[1]))
            yield from polygons_above(mask.astype(np.float64), 0.5, side, (left - 2, top - 2), frame)


def _joined(pieces: npt.NDArray[np.object_]) -> npt.NDArray[np.object_]:
    """The polygons of the union of polygons, on whole pixels.

    Neighbours are united among themselves: the union of thousands that lie apart costs ten times as much. Rings begin
    at their leftmost corner, for what simplification leaves depends on that, and unions begin anywhere.
    """
    pairs = shapely.STRtree(pieces).query(pieces, predicate="dwithin", distance=1.0)  # rounding moves lines by less
    _, group = connected_components(coo_array((np.ones(pairs.shape[1]), pairs), shape=(len(pieces),) * 2))
    together = np.split(pieces[np.argsort(group, kind="stable")], np.cumsum(np.bincount(group))[:-1])
    found = [
        shapely.union_all(each, grid_size=1.0) if len(each) > 1 else shapely.set_precision(each[0], 1.0)
        for each in together
    ]
    parts: npt.NDArray[np.object_] = shapely.normalize(shapely.get_parts(found))
    return parts


def _with_border(labels: SlideLabels, top: int, left: int) -> npt.NDArray[np.uint8]:
    """A block with one pixel of its neighbours around, so that both draw the same line there; 0 around that."""
    rows, columns = (
        slice(max(0, start - 1), min(start + _BLOCK_PX + 1, length))
        for start, length in zip((top, left), labels.numbers.shape, strict=True)
    )
    found = np.asarray(labels.numbers[rows, columns])
    return np.pad(found, [(rows.start - top + 2, 1), (columns.start - left + 2, 1)])


def _valid(polygons: Sequence[shapely.Geometry]) -> Iterator[shapely.Polygon]:
    for polygon in polygons:
        valid = shapely.make_valid(polygon, method="structure", keep_collapsed=False)
        snapped = shapely.set_precision(valid, 1.0)
        yield from (part for part in shapely.get_parts(snapped) if part.geom_type == "Polygon" and not part.is_empty)


def write_class_regions(
    path: str | Path,
    regions: Sequence[ClassRegion],
    classes: Sequence[str],
    slide_name: str,
    qupath_origin_px: tuple[int, int] = (0, 0),
) -> None:
    """Write the regions as QuPath annotations of their classes, atomically; places as of `write_regions`.

    Raises:
        OutputError: the file cannot be written.
    """
    features, numbers = [], dict.fromkeys(range(len(classes)), 0)
    for region in regions:
        numbers[region.number] += 1
        name = classes[region.number]
        object_id = uuid.uuid5(_NAMESPACE, f"{slide_name!a} {region.number} {region.polygon.wkt}")
        polygon = moved(region.polygon, -qupath_origin_px[0], -qupath_origin_px[1])
        properties = {"isLocked": False, "measurements": {"Area um^2": region.area_um2}}
        label, ink = f"{name} {numbers[region.number]}", class_ink(region.number)
        features.append(feature(polygon, object_id, label, f"{name} (model)", ink, properties))
    write_features(path, features)


def class_shares(labels: SlideLabels, number: int, cell_px: int) -> npt.NDArray[np.float32]:
    """The share (0 to 1) of a class in squares of `cell_px` pixels, of what was judged there; NaN where nothing was.

    Args:
        labels: the classes.
        number: of the class.
        cell_px: a power of 2, at most 2,048.
    """
    height, width = (-(-length // cell_px) for length in labels.numbers.shape)
    shares = np.full((height, width), np.nan, np.float32)
    for top in range(0, labels.numbers.shape[0], _BLOCK_PX):
        for left in range(0, labels.numbers.shape[1], _BLOCK_PX):
            found = np.asarray(labels.numbers[top : top + _BLOCK_PX, left : left + _BLOCK_PX])
            judged, having = (_sums(mask, cell_px) for mask in (found > 0, found == number + 1))
            row, column = top // cell_px, left // cell_px
            place = shares[row : row + judged.shape[0], column : column + judged.shape[1]]
            np.divide(having, judged, out=place, where=judged > 0, casting="unsafe")
    return shares


def _sums(mask: Bools, side: int) -> npt.NDArray[np.int64]:
    padded = np.pad(mask, [(0, -length % side) for length in mask.shape])
    rows, columns = (length // side for length in padded.shape)
    sums: npt.NDArray[np.int64] = padded.reshape(rows, side, columns, side).sum(axis=(1, 3), dtype=np.int64)
    return sums
