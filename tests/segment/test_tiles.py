"""Outlines become masks of tiles: the same as the whole slide's mask cut, several classes by name."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import shapely
from shapely.geometry import MultiPolygon, Point

from medsd.annotations import Annotations, Outline, annotations_of, rasterise, write_geojson
from medsd.cohort.entry import SlideEntry
from medsd.cohort.index import TileIndex
from medsd.errors import AnnotationError
from medsd.phantom.files import write_pyramid
from medsd.segment.tiles import MaskedTiles, OutlinedClasses, outlined_classes


@pytest.fixture(scope="module")
def slide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("slide") / "a.tif"
    write_pyramid(path, np.random.default_rng(0).integers(100, 200, (600, 800, 3), dtype=np.uint8), 0.5, 2)
    return path


def test_a_tile_s_mask_is_the_slide_s_cut_there() -> None:
    star = shapely.union_all([Point(150, 130).buffer(90), Point(300, 200).buffer(60), Point(20, 20).buffer(15)])
    hole = star.difference(Point(150, 130).buffer(30))
    area = MultiPolygon(list(shapely.get_parts(hole)))
    classes = OutlinedClasses({"a": area, "b": MultiPolygon([shapely.box(140, 0, 180, 400)])})
    whole = rasterise(Annotations(area), 100, 80, 4.0).astype(np.uint8)
    whole[rasterise(Annotations(MultiPolygon([shapely.box(140, 0, 180, 400)])), 100, 80, 4.0)] = 2
    for x, y in ((0, 0), (16, 24), (40, 48), (68, 16)):
        np.testing.assert_array_equal(classes.mask(4 * x, 4 * y, 32, 4.0), whole[y : y + 32, x : x + 32])
    assert not classes.mask(1000, 1000, 32, 4.0).any()
    exact = classes.share([0], [0], 128.0)[0]
    union = area.union(shapely.box(140, 0, 180, 400))
    assert exact == pytest.approx(union.intersection(shapely.box(0, 0, 128, 128)).area / 128**2)


def test_groups_are_classes_by_name(slide: Path, tmp_path: Path) -> None:
    drawn = [
        Outline("", "Gland", False, shapely.box(0, 0, 200, 200)),
        Outline("", "Vessel", False, shapely.box(100, 0, 300, 100)),
        Outline("", "Other: Positive", False, shapely.box(400, 400, 500, 500)),
        Outline("", "Normal", True, shapely.box(0, 0, 50, 50)),
    ]
    write_geojson(tmp_path / "a.geojson", annotations_of(drawn))
    entry = SlideEntry("a", slide, annotation=tmp_path / "a.geojson")
    found = outlined_classes(entry, ("background", "gland", "vessel", "other"))
    assert {name: area.area for name, area in found.areas.items()} == {
        "gland": 200**2 - 50**2, "vessel": 20000.0, "other": 10000.0
    }  # fmt: skip
    mask = found.mask(0, 0, 32, 10.0)
    assert mask[2, 2] == 0 and mask[15, 15] == 1 and mask[5, 15] == 2 and mask[5, 25] == 2
    with pytest.raises(AnnotationError, match=r"a\.geojson: .*'Other: Positive'"):
        outlined_classes(entry, ("background", "gland", "vessel"))
    assert outlined_classes(SlideEntry("b", slide, label=0), ("background", "gland")).areas["gland"].is_empty


def test_tiles_and_masks_are_of_one_place(slide: Path) -> None:
    columns = {"slide": np.zeros(3, np.int32), "label": np.zeros(3, np.int8), "tissue": np.ones(3, np.float32)}
    index = TileIndex(
        *(("a",), (str(slide),), (0.5,)),
        x=np.array([0, 128, 300], np.int32), y=np.array([0, 64, 200], np.int32), tile_px=64, mpp=1.0, **columns
    )  # fmt: skip
    outlines = OutlinedClasses({"gland": MultiPolygon([shapely.box(0, 0, 64, 128)])})
    items = MaskedTiles(index, {"a": outlines}, {"a": "p1"})
    sample = items[0]
    assert sample["image"].shape == (3, 64, 64) and sample["label"].shape == (1, 64, 64)
    assert sample["label"][0, :, :32].all() and not sample["label"][0, :, 32:].any()
    assert items.shares.tolist() == [0.5, 0, 0] and items.groups.tolist() == ["a outlined", "a not", "a not"]
    assert items.patients.tolist() == ["p1"] * 3 and items.units.tolist() == ["a"] * 3
    other = MaskedTiles(index, {"a": OutlinedClasses({"gland": MultiPolygon()})}, {})
    assert other.fingerprint() != items.fingerprint() and other.patients.tolist() == ["a"] * 3
