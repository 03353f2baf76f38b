"""tiles.geojson: what QuPath's class QuPathTypeAdapters takes for detections, and what their numbers are."""

from __future__ import annotations

import json
import uuid
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import numpy as np
import pytest
import shapely

from medsd.heatmap import detections
from medsd.heatmap.detections import write_tiles
from medsd.heatmap.overlay import shown_explanation
from medsd.heatmap.tiff import read_ome_tiff
from medsd.heatmap.value_map import ValueMap
from medsd.slides.slide import open_slide

CORNER = {"type": "array", "items": {"type": "integer"}, "minItems": 2, "maxItems": 2}
RING = {"type": "array", "items": CORNER, "minItems": 5, "maxItems": 5}
SCHEMA = {
    "type": "object",
    "required": ["type", "features"],
    "properties": {
        "type": {"const": "FeatureCollection"},
        "features": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["type", "id", "geometry", "properties"],
                "additionalProperties": False,
                "properties": {
                    "type": {"const": "Feature"},
                    "id": {"type": "string", "format": "uuid"},
                    "geometry": {
                        "type": "object",
                        "required": ["type", "coordinates"],
                        "additionalProperties": False,
                        "properties": {
                            "type": {"const": "Polygon"},
                            "coordinates": {"type": "array", "items": RING, "minItems": 1, "maxItems": 1},
                        },
                    },
                    "properties": {
                        "type": "object",
                        "required": ["objectType", "measurements"],
                        "additionalProperties": False,
                        "properties": {
                            "objectType": {"const": "detection"},
                            "measurements": {"type": "object", "additionalProperties": {"type": "number"}},
                        },
                    },
                },
            },
        },
    },
}


# QuPath lists a project's slides in one table, of whatever class their maps are.
NAMES = ("Probability (tumour)", "Saliency: gradient x activation (tumour)")


def read(path: Path) -> list[dict]:
    content = json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)
    jsonschema.validate(content, SCHEMA)
    features: list[dict] = content["features"]
    assert len({uuid.UUID(feature["id"]) for feature in features}) == len(features)
    return features


def test_squares_of_a_slide_hold_its_maps(mapped: Path, fiducial_slide: Path) -> None:
    features = read(mapped / "tiles.geojson")
    probability, saliency = (read_ome_tiff(mapped / f"{name}.ome.tif") for name in ("probability", "saliency"))
    with open_slide(fiducial_slide) as slide:
        side = round(32 / slide.mpp)  # tiles of 32 px at 1 um
    shapes = [shapely.geometry.shape(feature["geometry"]) for feature in features]
    assert all(shape.area == side**2 and shape.exterior.is_ccw for shape in shapes)
    for feature, shape in zip(features[::7], shapes[::7], strict=True):
        left, top, right, bottom = shape.bounds
        values = feature["properties"]["measurements"]
        for value_map, name in zip((probability, saliency), NAMES, strict=True):
            at = (
                slice(*(round(place / value_map.level0_px) for place in ends))
                for ends in ((top, bottom), (left, right))
            )
            inside = value_map.values[tuple(at)]
            assert values[name] == pytest.approx(float(np.nanmean(inside)), rel=1e-5, abs=1e-9)
            if value_map is probability:
                assert values["Seen share"] == pytest.approx(np.isfinite(inside).mean())
    seen = sum(feature["properties"]["measurements"]["Seen share"] for feature in features) * side**2
    assert seen == pytest.approx(np.isfinite(probability.values).sum() * probability.level0_px**2)


def test_sums_add_up_lines_are_shared_and_the_frame_is_qupaths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(25, 34)).astype(np.float32)
    values[:, :9] = np.nan
    value_map = ValueMap(values, 7.3, 1.8, "saliency", "tumour", "drawn", "log-odds")
    shown = shown_explanation("deeplift", value_map, 1.0, "")
    mapped = SimpleNamespace(maps=[shown], name="s", dimensions=(247, 182))
    assert write_tiles(tmp_path / "t.geojson", mapped, 4 * 7.3, (100, 60)) == 7 * 7
    features = read(tmp_path / "t.geojson")
    whole = features[0]["properties"]["measurements"]
    name = shown.heading
    np.testing.assert_allclose(whole[f"{name}, sum"], np.nansum(values[:4, 8:12]), rtol=1e-5)
    np.testing.assert_allclose(whole[name], np.nanmean(values[:4, 8:12]), rtol=1e-5)
    assert whole["Seen share"] == 0.75
    total = sum(feature["properties"]["measurements"][f"{name}, sum"] for feature in features)
    assert total == pytest.approx(float(np.nansum(values)), rel=1e-4)
    shapes = [shapely.geometry.shape(feature["geometry"]) for feature in features]
    assert shapely.union_all(shapes).equals(shapely.box(58 - 100, -60, 247 - 100, 182 - 60))
    assert sum(shape.area for shape in shapes) == shapely.union_all(shapes).area
    first = (tmp_path / "t.geojson").read_bytes()
    write_tiles(tmp_path / "t.geojson", mapped, 4 * 7.3, (100, 60))
    assert (tmp_path / "t.geojson").read_bytes() == first
    monkeypatch.setattr(detections, "MOST_TILES", 20)
    assert write_tiles(tmp_path / "few.geojson", mapped, 4 * 7.3) == 4 * 4  # twice as wide
    assert sum(
        feature["properties"]["measurements"][f"{name}, sum"] for feature in read(tmp_path / "few.geojson")
    ) == pytest.approx(total, rel=1e-4)
