"""Outlines become areas of classes, by the names that are written with them, and labels of tiles."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import tifffile

from medsd.annotations import Outline, annotations_of, read_annotations, write_asap_xml, write_geojson
from medsd.cohort import making
from medsd.cohort.entry import SlideEntry
from medsd.cohort.index import MIXED, NORMAL, TileGrid
from medsd.cohort.outlines import holds, raster, read_outlines
from medsd.cohort.tiling import Tiling, tile_slides
from medsd.errors import AnnotationError
from medsd.slides.slide import open_slide
from tests.cohort.tiled import TILING, table

NAMES = ("benign", "in situ", "invasive")
SIZE = (1000, 1000)

pytestmark = pytest.mark.usefixtures("quick_tiling")


def entry(path: Path, *drawn: tuple[str, tuple[int, int, int, int]], label: int | None = None) -> SlideEntry:
    """A slide with an outline a group."""
    outlines = [Outline("", group, False, shapely.box(*place)) for group, place in drawn]
    (write_asap_xml if path.suffix == ".xml" else write_geojson)(path, annotations_of(outlines))
    return SlideEntry("a", path.with_suffix(".tif"), label, annotation=path)


@pytest.mark.parametrize("suffix", [".xml", ".geojson"])
def test_a_group_names_its_class(tmp_path: Path, suffix: str) -> None:
    drawn = [
        ("In Situ", (0, 0, 100, 100)),
        ("invasive: grade 2", (50, 0, 150, 100)),  # half of it on the other
        ("Invasive", (400, 400, 500, 500)),
        ("benign", (0, 0, 20, 100)),
        ("Exclusion", (400, 400, 410, 500)),
    ]
    slide = entry(tmp_path / f"a{suffix}", *drawn)
    found = read_outlines(slide, SIZE, (0, 0), NAMES)
    assert found is not None and {number: area.tumour.area for number, area in found.items()} == {
        0: 20 * 100,
        1: 80 * 100,
        2: 100 * 100 + 90 * 100,
    }
    assert [holds(slide, found, number) for number in (1, 2, 3)] == [True, True, False]
    mask = raster(found, 2, (100, 100), 10.0)
    assert mask.sum() == 190 and mask[:10, 5:15].all() and mask[40:50, 41:50].all()
    assert not raster(found, 3, (5, 5), 10.0).any() and not raster(None, 1, (5, 5), 10.0).any()
    assert read_outlines(SlideEntry("b", Path("b.tif")), SIZE, (0, 0), NAMES) is None


def test_outlines_without_a_name_are_of_the_slides_class(tmp_path: Path) -> None:
    for group in ("Tumor", "_0", "None"):
        for label in (1, 2):
            slide = entry(tmp_path / "a.xml", (group, (0, 0, 10, 10)), label=label)
            found = read_outlines(slide, SIZE, (0, 0), NAMES)
            assert found is not None and list(found) == [label]
        two = read_outlines(entry(tmp_path / "a.xml", (group, (0, 0, 10, 10))), SIZE, (0, 0), ("benign", "malignant"))
        assert two is not None and list(two) == [1]  # there is no other
        with pytest.raises(AnnotationError, match=rf"group '{group}' names none of the classes in situ, invasive"):
            read_outlines(entry(tmp_path / "a.xml", (group, (0, 0, 10, 10))), SIZE, (0, 0), NAMES)
    tifffile.imwrite(tmp_path / "a_mask.tif", np.eye(10, dtype=np.uint8) * 255)
    masked = SlideEntry("a", Path("a.tif"), 2, annotation=tmp_path / "a_mask.tif")
    found = read_outlines(masked, SIZE, (0, 0), NAMES)
    assert found is not None and list(found) == [2] and found[2].tumour.area == 10 * 100**2


def test_what_contradicts_is_refused_in_the_classes_own_words(tmp_path: Path) -> None:
    slide = entry(tmp_path / "a.geojson", ("invasive", (0, 0, 10, 10)), label=0)
    with pytest.raises(AnnotationError, match="outlines invasive on a slide that is labelled benign; correct either"):
        read_outlines(slide, SIZE, (0, 0), NAMES)
    slide = entry(tmp_path / "a.geojson", ("invasiv", (0, 0, 10, 10)))
    with pytest.raises(AnnotationError, match="'invasiv' is unknown; did you mean 'invasive'") as error:
        read_outlines(slide, SIZE, (0, 0), NAMES)
    assert "tumo" not in str(error.value) and "in situ, invasive, or of benign, " in str(error.value)
    slide = entry(tmp_path / "a.geojson", ("in situ", (2000, 2000, 2010, 2010)))
    with pytest.raises(AnnotationError, match="most of what is outlined, x 2000"):
        read_outlines(slide, SIZE, (0, 0), NAMES)


def outline(path: Path, *boxes: tuple[int, int, int, int]) -> Path:
    drawn = [Outline("", "Tumor", False, shapely.box(*box)) for box in boxes]
    write_geojson(path, annotations_of(drawn))
    return path


def test_what_nobody_said_of_tiles_is_told_and_is_no_label(
    entries: list[SlideEntry], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    slide, finer = entries[2].path, Tiling(TileGrid(64, 64, 0.25))
    elsewhere = outline(tmp_path / "elsewhere.geojson", (0, 0, 8, 8))  # glass
    missed, without = SlideEntry("b", slide, 1, "", elsewhere), SlideEntry("c", slide, 1)
    cases = {
        "tiles (0.25 um per pixel) are finer than the slide (0.5): they are enlarged": (entries[0], finer),
        "no outline lies on tissue, so no tile has a label": (missed, TILING),
        "a slide of the class tumour without outlines: no tile has a label": (without, TILING),
    }
    for number, (words, (entry, settings)) in enumerate(cases.items()):
        tiled = tile_slides([entry], tmp_path / str(number), settings)
        assert tiled.slides[0].status == "ok" and words in tiled.slides[0].reason and words in caplog.text
        assert (tiled.index.label == (MIXED if number else NORMAL)).all() and len(tiled.index) > 0
    drawn = outline(tmp_path / "drawn.geojson", (300, 300, 700, 700))
    row = tile_slides([SlideEntry("d", slide, 0, "", drawn)], tmp_path / "other", TILING).slides[0]
    assert row.status == "failed" and "outlines tumour on a slide that is labelled normal; correct either" in row.reason
    row = tile_slides([SlideEntry("e", slide)], tmp_path / "large", Tiling(TileGrid(1024, 1024, 1.0))).slides[0]
    assert row.status == "empty" and row.reason == "a tile (1024 um) is larger than the slide (512 um)"


def test_tiles_of_several_classes_are_counted_and_shared_ones_told(entries: list[SlideEntry], tmp_path: Path) -> None:
    tiling = Tiling(TileGrid(64, 64, 1.0, min_tissue=0.0), classes=("benign", "in situ", "mixture"), verify=False)
    places = {"in situ": (256, 256, 640, 512), "Mixture": (512, 256, 768, 512)}  # they share a column of tiles
    drawn = [Outline("", group, False, shapely.box(*place)) for group, place in places.items()]
    write_geojson(tmp_path / "a.geojson", annotations_of(drawn))
    entry = SlideEntry("a", entries[2].path, 2, annotation=tmp_path / "a.geojson")
    tiled = tile_slides([entry], tmp_path / "out", tiling, isolate=False)
    # Tiles are 128 px of the slide: 3 by 2 in situ, 2 by 2 of the other, one column of two in both.
    row = tiled.slides[0]
    assert row.class_tiles == {"benign": 64 - 8, "in situ": 4, "mixture": 2}
    assert (row.label, row.tiles, row.mixed_tiles, row.shared_tiles) == ("mixture", 64, 2, 2)
    written = table(tmp_path / "out")["a"]
    assert [written[f"{name}_tiles"] for name in ("benign", "in situ", "mixture", "mixed", "shared")] == [
        *("56", "4", "2"),
        *("2", "2"),
    ]
    partly = tile_slides([replace(entry, exhaustive=False)], tmp_path / "out", tiling, isolate=False)
    assert partly.slides[0].class_tiles == {"benign": 0, "in situ": 4, "mixture": 2}
    drawn.append(Outline("", "Benign", False, shapely.box(0, 0, 128, 1024)))
    write_geojson(tmp_path / "a.geojson", annotations_of(drawn))
    partly = tile_slides([replace(entry, exhaustive=False)], tmp_path / "out", tiling, isolate=False)
    assert partly.slides[0].class_tiles == {"benign": 8, "in situ": 4, "mixture": 2}
    other = tile_slides([replace(entry, label=1)], tmp_path / "other", replace(tiling, classes=("b", "in situ", "x")))
    assert other.slides[0].status == "failed" and "'Mixture' is unknown" in other.slides[0].reason
    write_geojson(tmp_path / "a.geojson", annotations_of(drawn[:1]))
    (doubted,) = tile_slides([entry], tmp_path / "doubted", tiling, isolate=False).slides
    assert doubted.reason == "labelled mixture, of which nothing is outlined, though other classes are"


def test_outlines_of_qupath_count_from_the_scanned_area(
    entries: list[SlideEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = read_annotations(entries[2].annotation)
    write_geojson(tmp_path / "as_shown.geojson", drawn, qupath_origin_px=(100, 60))
    assert shapely.equals_exact(
        read_annotations(tmp_path / "as_shown.geojson", qupath_origin_px=(100, 60)).tumour, drawn.tumour, 1e-6
    )
    expected = tile_slides([entries[2]], tmp_path / "one", TILING).index

    def scanned(path: Path, mpp: float | None) -> Any:
        slide = open_slide(path, mpp)
        slide.bounds = (100, 60, 800, 800)
        return slide

    monkeypatch.setattr(making, "IsolatedSlide", scanned)
    other = tile_slides([replace(entries[2], annotation=tmp_path / "as_shown.geojson")], tmp_path / "other", TILING)
    assert np.array_equal(other.index.label, expected.label)
