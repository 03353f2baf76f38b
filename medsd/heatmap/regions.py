"""Where a probability map exceeds a threshold: polygons for viewers, and their measurements."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import shapely
from scipy import ndimage
from skimage import measure

from medsd.annotations.geojson import feature, moved, write_features
from medsd.checks import check_number
from medsd.heatmap.value_map import ValueMap

_TUMOUR_COLOUR = (214, 39, 40)
_UUID_NAMESPACE = uuid.uuid5(uuid.NAMESPACE_DNS, "medsd.regions")


@dataclass(frozen=True)
class Region:
    """A connected area of a slide above the threshold.

    Attributes:
        polygon: valid polygon with its holes, integer level-0 pixels; exterior counter-clockwise in (x, y) as RFC
            7946 asks, holes clockwise.
        area_um2: its area without the holes, square micrometres.
        mean_probability: mean of the map pixels whose centre lies in it.
        max_probability: highest of them.
        mean_saliency: mean saliency of the seen map pixels in it; None without a saliency map or when none is seen.
        peak: (x, y) of the centre of the map pixel with the highest probability, level-0 pixels.
    """

    polygon: shapely.Polygon
    area_um2: float
    mean_probability: float
    max_probability: float
    mean_saliency: float | None
    peak: tuple[float, float]

    @property
    def rings(self) -> list[npt.NDArray[np.float64]]:
        """Corners (n, 2) of the exterior, then of each hole, level-0 pixels, the last the first again."""
        return [shapely.get_coordinates(ring) for ring in (self.polygon.exterior, *self.polygon.interiors)]

    @property
    def top(self) -> tuple[float, float]:
        """(x, y) of its highest corner, where its number stands."""
        corners = self.rings[0]
        x, y = corners[corners[:, 1].argmin()]
        return float(x), float(y)


def find_regions(
    probability: ValueMap,
    threshold: float,
    slide_mpp: float,
    slide_dimensions: tuple[int, int],
    saliency: ValueMap | None = None,
    min_area_um2: float = 0.0,
) -> list[Region]:
    """The regions of a slide whose probability exceeds `threshold`, largest first.

    Marching squares (Lorensen and Cline 1987, in scikit-image) between the centres of the map pixels; value (j, i)
    sits at level-0 ((i + 0.5), (j + 0.5)) * level0_px. Unseen pixels and what lies outside the map are below the
    threshold; the contour then runs along the edge of the last seen pixel. Pixels that meet at a corner only are
    separate. One rounding to whole level-0 pixels at the end; what that makes vanish is left out.

    Args:
        probability: the map.
        threshold: the validated threshold, 0 to 1.
        slide_mpp: micrometres per level-0 pixel.
        slide_dimensions: (width, height) at level 0; nothing reaches beyond.
        saliency: a map of the same slide, on any grid, for the regions' mean saliency.
        min_area_um2: smaller regions are left out.

    Raises:
        ConfigError: `threshold` is no probability or `slide_mpp` is not positive.

    Example:
        >>> values = np.zeros((8, 8), np.float32)
        >>> values[2:5, 3:6] = 0.9
        >>> drawn = ValueMap(values, 100.0, 25.0, "probability", "tumour", "drawn", "")
        >>> [region.polygon.bounds for region in find_regions(drawn, 0.45, 0.25, (800, 800))]
        [(300.0, 200.0, 600.0, 500.0)]
    """
    check_number("threshold", threshold, "[0, 1]", hint="give the one found on the validation slides")
    check_number("slide_mpp", slide_mpp, "(0, inf)", hint="micrometres per level-0 pixel")
    regions = [
        _measure(polygon, probability, saliency, slide_mpp)
        for polygon in _polygons(probability, threshold, slide_dimensions)
        if polygon.area * slide_mpp**2 >= min_area_um2
    ]
    return sorted(regions, key=lambda region: (-region.area_um2, region.polygon.bounds))


def _polygons(probability: ValueMap, threshold: float, slide_dimensions: tuple[int, int]) -> list[shapely.Polygon]:
    field, frame = _closed_field(probability.values, threshold), shapely.box(0, 0, *slide_dimensions)
    parts = polygons_above(field, threshold, probability.level0_px, (-1, -1), frame)
    return [shapely.orient_polygons(shapely.normalize(part)) for part in parts]


def polygons_above(
    field: npt.NDArray[np.float64],
    threshold: float,
    level0_px: float,
    first: tuple[int, int],
    frame: shapely.Polygon,
) -> list[shapely.Polygon]:
    """Where a field (h, w) without NaN exceeds a threshold: valid polygons with whole corners, level-0 pixels.

    Args:
        field: below the threshold at its border, or beyond the frame there.
        threshold: of its values.
        level0_px: side of a pixel.
        first: column and row of the field's first pixel, counted from the slide's corner.
        frame: nothing reaches beyond.
    """
    # Row, column of the field to x, y of the slide: + 0.5 for the pixel's centre.
    contours = measure.find_contours(field, threshold)  # type: ignore[no-untyped-call]
    rings = [(ring[:, ::-1] + (first[0] + 0.5, first[1] + 0.5)) * level0_px for ring in contours]
    parts: list[shapely.Polygon] = []
    for polygon in _assemble([ring for ring in rings if len(ring) > 3]):
        # Snap rounding clips and rounds in one step, and what comes out is valid.
        # Rings through values that are the threshold touch themselves; lines that are left of them have no area.
        valid = shapely.make_valid(polygon, method="structure", keep_collapsed=False)
        clipped = shapely.intersection(valid, frame, grid_size=1.0)
        parts += [part for part in shapely.get_parts(clipped) if part.geom_type == "Polygon" and not part.is_empty]
    return parts


def _assemble(rings: list[npt.NDArray[np.float64]]) -> list[shapely.Polygon]:
    """Put every hole into the smallest ring around it; rings around high values are counter-clockwise in (x, y)."""
    filled = np.array([shapely.Polygon(ring) for ring in rings], dtype=object)
    is_hole = np.array([not shapely.LinearRing(ring).is_ccw for ring in rings], dtype=bool)
    area = shapely.area(filled)
    outer = np.flatnonzero(~is_hole)
    holes_of: dict[int, list[npt.NDArray[np.float64]]] = {int(index): [] for index in outer}
    tree = shapely.STRtree(filled[outer])
    for index in np.flatnonzero(is_hole):
        around = outer[tree.query(filled[index].representative_point(), predicate="within")]
        # An island in the hole may hold the point too, but is smaller than the hole.
        around = around[area[around] > area[index]]
        if around.size:
            holes_of[int(around[np.argmin(area[around])])].append(rings[index])
    return [shapely.Polygon(rings[index], holes) for index, holes in holes_of.items()]


def _closed_field(values: npt.NDArray[np.float32], threshold: float) -> npt.NDArray[np.float64]:
    """`values` with a border of one pixel, NaN filled so that a contour runs midway to the highest seen neighbour."""
    field = np.pad(values.astype(np.float64), 1, constant_values=np.nan)
    unseen = ~np.isfinite(field)
    highest = ndimage.maximum_filter(np.where(unseen, -np.inf, field), size=3)
    field[unseen] = np.where(highest > threshold, 2 * threshold - highest, threshold - 1.0)[unseen]
    return field


def _measure(polygon: shapely.Polygon, probability: ValueMap, saliency: ValueMap | None, slide_mpp: float) -> Region:
    inside, places = _inside(probability, polygon)
    explained = _inside(saliency, polygon)[0] if saliency is not None else np.empty(0)
    mean_saliency = float(explained.mean()) if explained.size else None
    highest = int(inside.argmax())
    x, y = places[highest]
    area_um2 = polygon.area * slide_mpp**2
    return Region(polygon, area_um2, float(inside.mean()), float(inside[highest]), mean_saliency, (float(x), float(y)))


def _inside(value_map: ValueMap, polygon: shapely.Polygon) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float64]]:
    """The seen values whose pixel centre lies in `polygon`, and those centres (n, 2), level-0 x and y.

    Where it holds no centre, the value under a point of it, and that point.
    """
    side = value_map.level0_px
    left, top, right, bottom = (int(bound / side) for bound in polygon.bounds)
    values = value_map.values[top : bottom + 1, left : right + 1]
    rows, columns = np.nonzero(np.isfinite(values))
    centres = np.stack([columns + left + 0.5, rows + top + 0.5], axis=1) * side
    shapely.prepare(polygon)
    inside = shapely.contains_xy(polygon, centres[:, 0], centres[:, 1])
    if inside.any():
        return values[rows[inside], columns[inside]], centres[inside]
    point = polygon.representative_point()
    row, column = int(point.y / side), int(point.x / side)
    value = value_map.values[row : row + 1, column : column + 1].ravel()
    return value[np.isfinite(value)], np.array([[point.x, point.y]])


def write_regions(
    path: str | Path,
    regions: Sequence[Region],
    name: str,
    slide_name: str,
    quantity: str = "saliency",
    qupath_origin_px: tuple[int, int] = (0, 0),
) -> None:
    """Write regions as QuPath annotations, atomically: a FeatureCollection in level-0 pixels.

    A region's id is a UUID made from its outline and the slide, so that writing again gives the same file.

    Args:
        path: the file, `regions.geojson`.
        regions: the regions; an empty sequence gives an empty collection.
        name: the class, as QuPath lists it.
        slide_name: the slide's name.
        quantity: what the regions' `mean_saliency` is the mean of, for its name in QuPath.
        qupath_origin_px: the level-0 place that QuPath counts from: the corner of `Slide.bounds`.

    Raises:
        OutputError: the file cannot be written.
    """
    features = []
    for number, region in enumerate(regions, start=1):
        measurements = {
            "Area um^2": region.area_um2,
            "Mean probability": region.mean_probability,
            "Max probability": region.max_probability,
        }
        if region.mean_saliency is not None:
            measurements[f"Mean {quantity}"] = region.mean_saliency
        object_id = uuid.uuid5(_UUID_NAMESPACE, f"{slide_name!a} {region.polygon.wkt}")
        properties = {"isLocked": False, "measurements": measurements}
        polygon = moved(region.polygon, -qupath_origin_px[0], -qupath_origin_px[1])
        features.append(feature(polygon, object_id, f"{name} {number}", name, _TUMOUR_COLOUR, properties))
    write_features(path, features)
