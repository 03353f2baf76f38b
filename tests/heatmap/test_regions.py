from __future__ import annotations

import json
import math
import uuid
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from medsd.errors import ConfigError
from medsd.heatmap.regions import Region, find_regions, write_regions
from medsd.heatmap.value_map import ValueMap

SIDE = 32.0
MPP = 0.25


def as_map(values: np.ndarray, side: float = SIDE, quantity: str = "probability") -> ValueMap:
    return ValueMap(values.astype(np.float32), side, side * MPP, quantity, "tumour", "drawn", "")


def find(values: np.ndarray, threshold: float = 0.5, side: float = SIDE) -> list[Region]:
    height, width = values.shape
    return find_regions(as_map(values, side), threshold, MPP, (int(width * side), int(height * side)))


def centre(region: Region) -> tuple[float, float]:
    return region.polygon.centroid.x, region.polygon.centroid.y


def cone(shape: tuple[int, int], row: float, column: float, radius: float) -> np.ndarray:
    """Falls linearly with the distance; crosses 0.5 at `radius` (map pixels)."""
    rows, columns = np.mgrid[: shape[0], : shape[1]]
    distance = np.hypot(rows + 0.5 - row, columns + 0.5 - column)
    values: np.ndarray = np.clip(0.5 + (radius - distance) * 0.05, 0, 1)
    return values


@pytest.mark.parametrize("radius", [4.0, 11.3, 30.0])
def test_area_and_place_of_a_disc(radius: float) -> None:
    (region,) = find(cone((101, 120), 50.2, 61.7, radius))
    assert region.area_um2 == pytest.approx(math.pi * (radius * SIDE * MPP) ** 2, rel=0.02)
    assert centre(region) == pytest.approx((61.7 * SIDE, 50.2 * SIDE), abs=SIDE * 0.1)
    left, top, right, bottom = region.polygon.bounds
    assert region.top[1] == top and region.top in region.polygon.exterior.coords
    assert (left, right) == pytest.approx(((61.7 - radius) * SIDE, (61.7 + radius) * SIDE), abs=SIDE * 0.2)
    assert (top, bottom) == pytest.approx(((50.2 - radius) * SIDE, (50.2 + radius) * SIDE), abs=SIDE * 0.2)


def test_a_ring_keeps_its_hole_and_an_island_in_it() -> None:
    ring = np.minimum(cone((120, 120), 60, 60, 50), 1 - cone((120, 120), 60, 60, 30))
    values = np.maximum(ring, cone((120, 120), 60, 60, 10))
    outer, island = find(values)
    assert len(outer.polygon.interiors) == 1
    assert not island.polygon.interiors
    unit = math.pi * (SIDE * MPP) ** 2
    assert outer.area_um2 == pytest.approx(unit * (50**2 - 30**2), rel=0.02)
    assert island.area_um2 == pytest.approx(unit * 10**2, rel=0.02)
    assert outer.polygon.disjoint(island.polygon)


def test_regions_close_along_the_border_of_the_slide() -> None:
    (region,) = find(np.full((10, 12), 0.8), threshold=0.7)
    assert region.polygon.bounds == (0, 0, 12 * SIDE, 10 * SIDE)
    # Marching squares cuts each corner by a triangle of half a map pixel.
    assert region.polygon.area == pytest.approx(120 * SIDE**2 - 4 * SIDE**2 / 8, rel=1e-3)


def test_unseen_is_below_and_the_line_runs_along_its_edge() -> None:
    values = np.full((20, 20), 0.9)
    values[:, :7], values[:, 8:] = 1.0, np.nan
    (region,) = find(values, threshold=0.85)
    assert region.polygon.bounds == (0, 0, 8 * SIDE, 20 * SIDE)


def test_nothing_reaches_beyond_a_slide_that_ends_within_a_map_pixel() -> None:
    (region,) = find_regions(as_map(np.ones((4, 4))), 0.5, MPP, (100, 117))
    assert region.polygon.bounds == (0, 0, 100, 117)


def test_a_single_hot_pixel_is_found_where_it_is() -> None:
    values = np.zeros((40, 50))
    values[13, 27] = 1.0
    (region,) = find(values)
    assert centre(region) == pytest.approx(((27.5) * SIDE, 13.5 * SIDE), abs=1)
    assert region.polygon.within(shapely.box(27 * SIDE, 13 * SIDE, 28 * SIDE, 14 * SIDE))
    assert (region.mean_probability, region.max_probability) == (1.0, 1.0)


def test_pixels_that_meet_at_a_corner_are_two_regions() -> None:
    values = np.zeros((6, 6))
    values[2, 2] = values[3, 3] = 1.0
    assert len(find(values)) == 2


def test_measurements_are_those_of_the_pixels_inside() -> None:
    values = np.zeros((30, 30))
    values[5:15, 5:15] = 0.8
    values[10, 10] = 1.0
    saliency = np.full((60, 60), np.nan)
    saliency[10:30, 10:20] = 3.0
    (region,) = find_regions(as_map(values), 0.5, MPP, (960, 960), saliency=as_map(saliency, SIDE / 2, "saliency"))
    assert region.mean_probability == pytest.approx((99 * 0.8 + 1.0) / 100)
    assert region.max_probability == 1.0
    assert region.mean_saliency == pytest.approx(3.0)
    blind = as_map(np.full((60, 60), np.nan), SIDE / 2, "saliency")
    assert find_regions(as_map(values), 0.5, MPP, (960, 960), saliency=blind)[0].mean_saliency is None
    assert find(values)[0].mean_saliency is None


def test_sorted_by_area_and_small_ones_left_out() -> None:
    values = np.maximum.reduce([cone((90, 90), 20, 20, 5), cone((90, 90), 60, 60, 15), cone((90, 90), 20, 70, 9)])
    areas = [region.area_um2 for region in find(values)]
    assert len(areas) == 3 and areas == sorted(areas, reverse=True)
    kept = find_regions(as_map(values), 0.5, MPP, (2880, 2880), min_area_um2=areas[1])
    assert [region.area_um2 for region in kept] == areas[:2]


def test_nothing_seen_or_nothing_above_gives_nothing() -> None:
    assert find(np.full((5, 5), np.nan)) == []
    assert find(np.zeros((5, 5))) == []


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    shape=st.tuples(st.integers(1, 14), st.integers(1, 14)),
    side=st.sampled_from([1.0, 3.7, 32.0]),
    levels=st.sampled_from([2, 5, 1000]),
    hidden=st.sampled_from([0.0, 0.4]),
)
def test_any_map_gives_valid_polygons_inside_the_slide(
    seed: int, shape: tuple[int, int], side: float, levels: int, hidden: float
) -> None:
    rng = np.random.default_rng(seed)
    # Few levels make plateaus at the very threshold, the hard case of marching squares.
    values = rng.integers(0, levels + 1, shape) / levels
    values[rng.random(shape) < hidden] = np.nan
    size = (max(1, int(shape[1] * side - 0.5)), max(1, int(shape[0] * side - 0.5)))
    regions = find_regions(as_map(values, side), 0.4, MPP, size)
    frame = shapely.box(0, 0, *size)
    for region in regions:
        polygon = region.polygon
        assert polygon.geom_type == "Polygon" and polygon.is_valid and not polygon.is_empty
        assert polygon.exterior.is_ring and polygon.exterior.is_ccw
        assert all(hole.is_ring and not hole.is_ccw for hole in polygon.interiors)
        coordinates = shapely.get_coordinates(polygon)
        assert (coordinates == np.rint(coordinates)).all()
        assert frame.covers(polygon)
        assert 0 <= region.mean_probability <= region.max_probability <= 1
    if side == 32.0:
        # Independent: a pixel whose centre is above lies in a region, one below or unseen in none.
        area = shapely.union_all([region.polygon for region in regions])
        rows, columns = np.mgrid[: shape[0], : shape[1]]
        inside = shapely.contains_xy(area, (columns + 0.5) * side, (rows + 0.5) * side)
        sharp = np.abs(np.nan_to_num(values) - 0.4) > 0.05
        np.testing.assert_array_equal(inside[sharp], (np.nan_to_num(values) > 0.4)[sharp])


def test_values_that_are_the_threshold_are_below_it() -> None:
    """Contours touch themselves there, and leave lines without an area."""
    for seed in range(40):
        values = np.random.default_rng(seed).integers(0, 5, (12, 12)) / 4
        inside = shapely.union_all([region.polygon for region in find(values, 0.5)])
        rows, columns = np.nonzero(values != 0.5)
        found = shapely.contains_xy(inside, (columns + 0.5) * SIDE, (rows + 0.5) * SIDE)
        np.testing.assert_array_equal(found, values[rows, columns] > 0.5)


def test_geojson_has_the_keys_of_qupath(tmp_path: Path) -> None:
    ring = np.minimum(cone((120, 120), 60, 60, 50), 1 - cone((120, 120), 60, 60, 30))
    regions = find(np.maximum(ring, cone((120, 120), 60, 60, 10)))
    path = tmp_path / "regions.geojson"
    write_regions(path, regions, "Tumour", "slide_1")
    collection = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert collection["type"] == "FeatureCollection"
    assert len(collection["features"]) == 2
    for feature, region in zip(collection["features"], regions, strict=True):
        assert feature["type"] == "Feature"
        assert uuid.UUID(feature["id"]).version == 5
        shape = shapely.geometry.shape(feature["geometry"])
        assert shape.geom_type == "Polygon" and shape.is_valid and shape.equals(region.polygon)
        rings = feature["geometry"]["coordinates"]
        assert all(ring[0] == ring[-1] for ring in rings)
        assert all(type(place) is int for ring in rings for corner in ring for place in corner)
        properties = feature["properties"]
        assert properties["objectType"] == "annotation"
        assert properties["classification"] == {"name": "Tumour", "color": [214, 39, 40]}
        assert properties["isLocked"] is False
        assert properties["measurements"]["Area um^2"] == region.area_um2
        assert "Mean saliency" not in properties["measurements"]
    first = path.read_bytes()
    write_regions(path, regions, "Tumour", "slide_1")
    assert path.read_bytes() == first
    write_regions(path, regions, "Tumour", "slide_2")
    other = json.loads(path.read_text(encoding="utf-8"))
    assert {f["id"] for f in other["features"]}.isdisjoint(f["id"] for f in collection["features"])
    write_regions(path, regions, "Tumour", "slide_1", qupath_origin_px=(100, 60))  # QuPath shows a part of the canvas
    moved = json.loads(path.read_text(encoding="utf-8"))["features"][0]["geometry"]["coordinates"][0]
    assert moved == [[x - 100, y - 60] for x, y in collection["features"][0]["geometry"]["coordinates"][0]]


def test_no_regions_give_an_empty_collection(tmp_path: Path) -> None:
    write_regions(tmp_path / "r.geojson", [], "Tumour", "s")
    assert json.loads((tmp_path / "r.geojson").read_text(encoding="utf-8"))["features"] == []


@pytest.mark.parametrize(("threshold", "mpp"), [(float("nan"), MPP), (0.5, 0.0), (0.5, float("nan"))])
def test_refuses_numbers_that_are_none(threshold: float, mpp: float) -> None:
    with pytest.raises(ConfigError):
        find_regions(as_map(np.ones((4, 4))), threshold, mpp, (128, 128))
