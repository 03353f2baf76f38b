"""A table of maps beside controls, from maps on disk whose answers are known."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import shapely

from medsd.annotations import annotations_of, write_geojson
from medsd.annotations.shapes import Outline
from medsd.cohort.entry import SlideEntry
from medsd.evaluate.lesion_scores import (
    CONSTANT,
    MODEL,
    PEAKS,
    RANDOM,
    JudgedSlide,
    judge_slides,
    score_lesions,
    write_lesion_scores,
)
from medsd.evaluate.plots import RUN_STYLES, draw_froc
from medsd.files import as_json
from medsd.heatmap.tiff import write_ome_tiff
from medsd.heatmap.value_map import ValueMap
from medsd.networks.calibrated import Calibration
from medsd.networks.weights import ModelCard
from medsd.record import write_record

CARD = ModelCard("test_resnet", ("normal", "tumour"), 64, 1.0, "drawings", Calibration(0.5, {}, "", "none", "drawings"))
BOXES = ((640, 640, 1280, 1280), (1920, 1280, 2560, 1600), (1920, 320, 1984, 384))  # the last is isolated cells


def slide(folder: Path, name: str, label: int | None, size_px=(3200, 1920), shown=None, **changes) -> SlideEntry:
    """Of 3,200 x 1,920 px at 0.5 um; the map, of 32 um, finds the first lesion, and misses the second."""
    values = np.full((30, 50), 0.01, np.float32)
    values[:2] = np.nan
    annotation = None
    if label:
        left, top, right, bottom = (corner // 64 for corner in BOXES[0])
        values[top:bottom, left:right] = 0.9
        values[25:28, 5:8] = 0.6  # a false region
        outlines = [Outline(f"{n}", "Tumor", False, shapely.box(*box)) for n, box in enumerate(BOXES)]
        annotation = folder / f"{name}.geojson"
        write_geojson(annotation, annotations_of(outlines))
    probability = ValueMap(values if shown is None else shown, 64.0, 32.0, "probability", "tumour", "drawn", "")
    (folder / name).mkdir()
    write_ome_tiff(folder / name / "probability.ome.tif", probability)
    scale = {"mpp": 0.5, "dimensions": size_px, "bounds": [0, 0, *size_px]}
    write_record(folder / name / "record.json", {}, ["probability.ome.tif"], scale=scale)
    return SlideEntry(name, folder / f"{name}.tif", label, annotation=annotation, **changes)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("maps")


@pytest.fixture(scope="module")
def judged(folder) -> dict[str, list[JudgedSlide]]:
    entries = [slide(folder, "a", 1), slide(folder, "b", 1), slide(folder, "c", 0), slide(folder, "d", 0)]
    entries += [slide(folder, "partly", 1, exhaustive=False), slide(folder, "unknown", None), slide(folder, "empty", 1)]
    write_geojson(folder / "empty.geojson", annotations_of([]))
    return judge_slides(entries, folder, CARD, folder / "candidates")


def test_scores_are_those_of_the_drawing(judged, folder):
    found = score_lesions(judged)
    assert (found.slides, found.target_slides, found.lesions, found.isolated) == (4, 2, 4, 2)
    model, peaks, random, constant = (found.maps[name] for name in (MODEL, PEAKS, RANDOM, CONSTANT))
    # One of two lesions, then a false region on every other slide; the map's lesser maxima find the other one at last.
    assert peaks.froc.value == 0.5 and peaks.sensitivity == (0.5,) * 6
    assert model.sensitivity[0] == 0.5 and model.froc.value >= 0.5
    assert model.slide_auc.value == 1.0 and (random.slide_auc.low, random.slide_auc.high) != (1, 1)
    assert constant.slide_auc.value == 0.5 and math.isnan(constant.slide_auc.low)  # in every resample
    # Tumour of 100 + 50 + 1 map pixels, 100 of them and 9 others above; and of all 1,400 that are seen.
    assert model.dice.value == pytest.approx(2 * 100 / (151 + 109)) and model.dice == peaks.dice
    assert constant.dice.value == pytest.approx(2 * 151 / (1400 + 151))
    assert 0.5 * constant.dice.value < random.dice.value < 1.5 * constant.dice.value
    assert constant.froc.value < 0.5 and random.froc.value < 0.5
    assert json.dumps(as_json(found))
    assert {path.stem for path in (folder / "candidates").iterdir()} == {"a", "b", "c", "d"}
    first = (folder / "candidates" / "a.csv").read_text().splitlines()[0].split(",")
    assert float(first[0]) == pytest.approx(0.9) and (int(first[1]), int(first[2])) == (672, 672)


def test_what_lies_on_the_slide_by_less_than_half_a_map_pixel_is_a_place_of_it(folder):
    """Tissue at the edge of a slide of 3,160 x 1,900 px, whose map of 64 px ends at 3,200 x 1,920."""
    values = np.full((30, 50), np.nan, np.float32)
    values[27:, 47:], values[-1, -1] = 0.8, 0.9
    found = judge_slides([slide(folder, "edge", 1, (3160, 1900), values)], folder, CARD, folder / "edges")
    assert {len(slides) for slides in found.values()} == {1}
    assert math.isnan(found[MODEL][0].dice)  # what is outlined lies where the map has seen nothing
    places = [line.split(",")[1:] for line in (folder / "edges" / "edge.csv").read_text().splitlines()]
    assert places and all(int(x) < 3160 and int(y) < 1900 for x, y in places)


def test_tables_and_figure(judged, tmp_path):
    found = score_lesions(judged)
    write_lesion_scores(tmp_path, judged, found)
    draw_froc(tmp_path / "froc.png", judged, found)
    assert (tmp_path / "froc.png").stat().st_size > 10_000
    tables = {}
    for name in ("lesions", "froc", "roc"):
        with open(tmp_path / f"{name}.csv", newline="", encoding="utf-8") as handle:
            tables[name] = list(csv.DictReader(handle))
    assert [row["map"] for row in tables["lesions"]] == [MODEL, PEAKS, RANDOM, CONSTANT]
    assert float(tables["lesions"][0]["froc"]) == found.maps[MODEL].froc.value
    assert float(tables["lesions"][1]["sensitivity_at_0.25"]) == 0.5
    peaks = [(row["false_per_slide"], row["sensitivity"]) for row in tables["froc"] if row["map"] == PEAKS]
    assert peaks == [("0.0", "0.0"), ("0.0", "0.5"), ("0.5", "0.5")]
    assert {row["map"] for row in tables["roc"]} == {MODEL, RANDOM, CONSTANT}


def test_no_control_hides_the_models_curve(judged, tmp_path, monkeypatch):
    """On a good map and a lucky draw they lie on each other: the model's is solid, and shows between dashes."""
    drawn = []
    monkeypatch.setattr("medsd.evaluate.plots.save_figure", lambda _, figure, __: drawn.append(figure))
    draw_froc(tmp_path / "froc.png", judged, score_lesions(judged))
    for axes in drawn[0].axes:
        solid = [line for line in axes.lines if line.get_linestyle() == "-"]
        assert [line.get_color() for line in solid] == [RUN_STYLES[0][0]]
        filled = [line for line in axes.lines if line.get_marker() != "None" and line.get_markerfacecolor() != "none"]
        assert [line.get_color() for line in filled] == [RUN_STYLES[0][0]]


def test_of_several_classes_one_is_asked_about(tmp_path: Path) -> None:
    """The lesions of the others are tissue without it, and a map that finds those alone finds nothing."""
    calibration = Calibration(0.5, {}, "", "none", "drawings")
    names, entries = ("normal", "in situ", "invasive"), []
    for name in ("a", "b"):
        entry = slide(tmp_path, name, 1)
        drawn = zip(("In situ", "Invasive"), BOXES, strict=False)
        outlines = [Outline("", group, False, shapely.box(*box)) for group, box in drawn]
        write_geojson(entry.annotation, annotations_of(outlines))  # type: ignore[arg-type]
        entries.append(entry)
    entries.append(slide(tmp_path, "c", 0))
    card = ModelCard("test_resnet", names, 64, 1.0, "drawings", calibration, others={"invasive": calibration})
    found = {
        target: score_lesions(judge_slides(entries, tmp_path, card, tmp_path / "candidates", target=target))
        for target in ("in situ", "invasive")
    }
    assert {(one.slides, one.target_slides, one.lesions) for one in found.values()} == {(3, 2, 2)}
    peaks = {target: one.maps[PEAKS] for target, one in found.items()}
    assert (peaks["in situ"].froc.value, peaks["invasive"].froc.value) == (1.0, 0.0)
    assert peaks["in situ"].dice.value == pytest.approx(2 * 100 / (100 + 109)) and peaks["invasive"].dice.value == 0


def test_no_lesions_and_one_class_have_no_scores(judged, tmp_path):
    normal = {name: slides[2:] for name, slides in judged.items()}
    for slides in (normal, {name: [] for name in judged}):
        found = score_lesions(slides)
        assert all(value is None for value in as_json(found)["maps"][MODEL]["sensitivity"])
        assert np.isnan([found.maps[MODEL].froc.value, found.maps[MODEL].slide_auc.value]).all()
        write_lesion_scores(tmp_path, slides, found)
        draw_froc(tmp_path / "froc.png", slides, found)
    assert not (tmp_path / "froc.png").exists()
