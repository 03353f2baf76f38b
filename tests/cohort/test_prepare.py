"""From phantom slides to labelled tiles: what is left behind, when it is redone, and what has no tissue."""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsd.annotations import read_annotations, tumour_share
from medsd.cohort import making, tiling
from medsd.cohort.camelyon import find_slides
from medsd.cohort.entry import RESERVED, SlideEntry
from medsd.cohort.index import MIXED, NORMAL, TileGrid
from medsd.cohort.prepare import PreparedSlides, failed_slides, load_prepared, prepare_slides
from medsd.cohort.tiling import Tiling
from medsd.errors import DatasetError, NoTissueError
from medsd.slides.slide import open_slide
from medsd.slides.tissue import find_tissue
from tests.cohort.tiled import GRID, TILING, of, table, times

pytestmark = pytest.mark.usefixtures("quick_tiling")

FILES = ["slides", "slides.csv", "thumbnails", "tiles.npz"]


@pytest.fixture(scope="session")
def done(entries: list[SlideEntry], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, PreparedSlides]:
    folder = tmp_path_factory.mktemp("prepared") / "work"
    return folder, prepare_slides(entries, folder, TILING, 0.5, 0)


@pytest.fixture
def copy(done: tuple[Path, PreparedSlides], tmp_path: Path) -> Path:
    """A prepared folder of one's own."""
    return Path(shutil.copytree(done[0], tmp_path / "work", copy_function=shutil.copy2))


def test_what_is_left_behind(done: tuple[Path, PreparedSlides], entries: list[SlideEntry]) -> None:
    folder, prepared = done
    assert (
        sorted(path.name for path in folder.iterdir()) == FILES and set(FILES) <= RESERVED
    )  # which no slide is called
    names = [entry.name for entry in entries]
    assert sorted(path.stem for path in (folder / "thumbnails").iterdir()) == sorted(names)
    assert list(table(folder)) == names == list(prepared.index.names)
    assert prepared.slides == tuple(entries) and prepared.entry(names[1]) == entries[1]
    assert sorted((*prepared.training, *prepared.validation)) == sorted(names[:4])
    assert list(prepared.testing) == names[4:]
    for name, row in table(folder).items():
        tiles = of(prepared.index, name)
        assert row["status"] == "ok" and int(row["tiles"]) == len(tiles) > 0
        counts = [int((tiles.label == label).sum()) for label in (1, NORMAL, MIXED)]
        assert [int(row[f"{word}_tiles"]) for word in ("tumour", "normal", "mixed")] == counts
        assert (row["part"], row["label"]) == (prepared.entry(name).part, "tumour" if "tumor" in name else row["label"])


def test_tiles_hold_tissue_and_the_annotations_labels(done: tuple[Path, PreparedSlides]) -> None:
    _, prepared = done
    for entry in prepared.slides:
        tiles = of(prepared.index, entry.name)
        with open_slide(entry.path) as slide:
            share = find_tissue(slide).share(tiles.x, tiles.y, 128)
        assert (share >= 0.5).all() and np.allclose(share, tiles.tissue)
        assert (tiles.x % 128 == 0).all() and tiles.x.max() <= 1024 - 128
        if entry.annotation is None:
            assert (tiles.label == NORMAL).all()
        else:
            tumour = tumour_share(read_annotations(entry.annotation), tiles.x, tiles.y, 128)
            assert np.array_equal(tiles.label == 1, tumour >= 0.5)
            assert np.array_equal(tiles.label == MIXED, (tumour > 0) & (tumour < 0.5))
    assert (prepared.index.label == 1).any() and (prepared.index.label == NORMAL).any()


def test_a_second_call_opens_no_slide(copy: Path, entries: list[SlideEntry], monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    monkeypatch.setattr(making, "IsolatedSlide", None)
    again = prepare_slides(entries, copy, TILING, 0.5, 0)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before and len(again.index) > 0


@pytest.mark.parametrize("spoil", ["grid", "table_gone", "index_gone", "slide_changed"])
def test_what_changed_is_redone(copy: Path, phantoms: Path, tmp_path: Path, spoil: str) -> None:
    entries, grid = find_slides(phantoms), GRID
    before = times(copy)
    if spoil == "grid":
        grid = TileGrid(128, 128, 1.0)
    elif spoil.endswith("gone"):
        (copy / {"table": "slides.csv", "index": "tiles.npz"}[spoil[:-5]]).unlink()
    else:
        data = Path(shutil.copytree(phantoms, tmp_path / "data", copy_function=shutil.copy2))
        entries = find_slides(data)
        (data / "training" / "lesion_annotations" / f"{entries[2].name}.xml").touch()
    prepared = prepare_slides(entries, copy, Tiling(grid), 0.5, 0)
    after = times(copy)
    whole = {"slides.csv", "tiles.npz"}
    of_slides = {name for name in before if "/" in name}
    # The data were moved: records name the new places.
    of_changed = {n for n in of_slides if Path(n).stem == entries[2].name or n.endswith(".json")}
    redone = {"grid": of_slides, "slide_changed": of_changed}
    assert {name for name in after if after[name] > before.get(name, 0)} == whole | redone.get(spoil, set())
    assert set(after) == whole | of_slides and len(of_slides) == 3 * len(entries)
    assert prepared.index.tile_px == grid.tile_px


def test_what_an_earlier_version_prepared_is_prepared_again(copy: Path, entries: list[SlideEntry]) -> None:
    path = copy / "slides" / f"{entries[1].name}.json"
    record = json.loads(path.read_text())
    record["recipe"]["format"] = 0
    path.write_text(json.dumps(record))
    with pytest.raises(DatasetError, match="run the stage 'prepare' again"):
        load_prepared(entries, copy, TILING, 0.5, 0)
    assert len(prepare_slides(entries, copy, TILING, 0.5, 0).index) > 0


class Killed(BaseException):
    """Stands for a signal."""


def test_killed_half_way_is_not_taken_for_whole(
    copy: Path, entries: list[SlideEntry], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:

        def killed(*_: Any) -> None:
            raise Killed

        # After the new tiles of every slide are written, before their index: the old one must not vouch for them.
        patch.setattr(tiling, "join", killed)
        with pytest.raises(Killed):
            prepare_slides(entries, copy, Tiling(TileGrid(128, 128, 1.0)), 0.5, 0)
    assert not (copy / "tiles.npz").exists()
    with pytest.raises(DatasetError, match="not prepared; run the stage 'prepare'"):
        load_prepared(entries, copy, TILING, 0.5, 0)
    assert prepare_slides(entries, copy, TILING, 0.5, 0).index.tile_px == 64
    assert not list(copy.rglob(".*"))
    os.utime(copy / "tiles.npz", (1, 1))  # as another process left it, before a slide was done anew
    with pytest.raises(DatasetError, match="run the stage 'prepare' again"):
        load_prepared(entries, copy, TILING, 0.5, 0)


def test_loading_what_is_not_there_or_of_other_slides(
    done: tuple[Path, PreparedSlides], entries: list[SlideEntry], tmp_path: Path
) -> None:
    with pytest.raises(DatasetError, match="not prepared; run the stage 'prepare' first"):
        load_prepared(entries, tmp_path, TILING, 0.5, 0)
    with pytest.raises(DatasetError, match="other slides or settings were prepared"):
        load_prepared([*entries, replace(entries[0], name="new")], done[0], TILING, 0.5, 0)
    with pytest.raises(DatasetError, match="other slides or settings were prepared"):
        load_prepared(entries, done[0], Tiling(replace(GRID, stride_px=GRID.stride_px + 1)), 0.5, 0)
    loaded = load_prepared(entries, done[0], TILING, 0.5, 0)
    assert (loaded.training, loaded.validation, loaded.testing) == (
        done[1].training,
        done[1].validation,
        done[1].testing,
    )
    fewer = load_prepared(entries[::-1][1:], done[0], TILING, 0.5, 0)  # slides of other runs play no part
    assert fewer.index.names == tuple(entry.name for entry in entries[::-1][1:])
    assert np.array_equal(of(fewer.index, entries[4].name).x, of(loaded.index, entries[4].name).x)


@pytest.fixture
def blank(tmp_path: Path, coding: Any) -> Path:
    """A slide of clean glass."""
    coding.write_levels(tmp_path / "blank.tif", [np.full((1024, 1024, 3), 243, np.uint8)], 0.5, 2)
    return tmp_path / "blank.tif"


def test_a_slide_without_tissue_is_empty_and_plays_no_part(
    entries: list[SlideEntry], tmp_path: Path, blank: Path
) -> None:
    empty = [
        SlideEntry("blank_train", blank, 0, "training", None),
        SlideEntry("blank_test", blank, 1, "testing", None),
    ]
    prepared = prepare_slides([*entries, *empty], tmp_path / "work", TILING, 0.5, 0)
    rows = table(tmp_path / "work")
    for entry in empty:
        assert (rows[entry.name]["status"], rows[entry.name]["tiles"]) == ("empty", "0")
        assert entry.name not in (*prepared.training, *prepared.validation, *prepared.testing)
        assert entry in prepared.slides and (tmp_path / "work" / "thumbnails" / f"{entry.name}.png").is_file()
    assert sum(row["status"] == "ok" for row in rows.values()) == 6


@pytest.mark.parametrize("part", ["training", "testing"])
def test_a_side_without_any_tissue_is_the_error(
    entries: list[SlideEntry], tmp_path: Path, blank: Path, part: str
) -> None:
    slides = [entry for entry in entries if entry.part != part]
    slides.append(SlideEntry("blank", blank, 0, part, None))
    for _ in range(2):  # and the same the second time
        with pytest.raises(NoTissueError, match=f"{part}: no tissue in any slide; look at .*thumbnails"):
            prepare_slides(slides, tmp_path / "work", TILING, 0.5, 0)


def test_no_tissue_anywhere_and_no_slides(tmp_path: Path, blank: Path) -> None:
    slides = [SlideEntry(part, blank, 0, part, None) for part in ("training", "testing")]
    with pytest.raises(NoTissueError):
        prepare_slides(slides, tmp_path / "work", TILING, 0.5, 0)
    with pytest.raises(DatasetError, match="no slides"):
        prepare_slides([], tmp_path / "work", TILING, 0.5, 0)


@pytest.mark.parametrize("annotation", [None, "empty"])
def test_a_tumour_slide_that_nobody_outlined_has_only_mixed_tiles(
    entries: list[SlideEntry], tmp_path: Path, annotation: str | None
) -> None:
    outline = None
    if annotation is not None:
        outline = tmp_path / "none.xml"
        outline.write_text("<ASAP_Annotations><Annotations/><AnnotationGroups/></ASAP_Annotations>")
    changed = [
        SlideEntry(s.name, s.path, s.label, s.part, outline) if (s.part, s.label) == ("testing", 1) else s
        for s in entries
    ]
    prepared = prepare_slides(changed, tmp_path / "work", TILING, 0.5, 0)
    name = next(s.name for s in changed if (s.part, s.label) == ("testing", 1))
    tiles = of(prepared.index, name)
    assert len(tiles) > 0 and (tiles.label == MIXED).all()
    assert name in prepared.testing and len(prepared.index.of_slides([name])) == 0
    assert table(tmp_path / "work")[name]["label"] == "tumour"


def test_outside_the_outlines_of_a_partly_annotated_slide_no_tile_is_normal(
    entries: list[SlideEntry], tmp_path: Path
) -> None:
    """There may be tumour that nobody outlined; a run before the slides were marked is not taken for this one."""
    whole = prepare_slides(entries, tmp_path / "work", TILING, 0.5, 0)
    partly = [replace(slide, exhaustive=slide.label == 0) for slide in entries]
    prepared = prepare_slides(partly, tmp_path / "work", TILING, 0.5, 0)
    for slide in entries:
        before, after = of(whole.index, slide.name).label, of(prepared.index, slide.name).label
        if slide.label == 0:
            assert np.array_equal(before, after) and (after == NORMAL).all()
        else:
            assert (before == NORMAL).any() and np.array_equal(after, np.where(before == NORMAL, MIXED, before))


def test_a_bad_slide_costs_only_itself_and_is_tried_again(entries: list[SlideEntry], tmp_path: Path) -> None:
    broken = tmp_path / "broken.tif"
    broken.write_bytes(b"II*\0 nonsense")
    slides = [*entries, SlideEntry("broken", broken, 0, "training", None)]
    prepared = prepare_slides(slides, tmp_path / "work", TILING, 0.5, 0)
    assert "broken" not in (*prepared.training, *prepared.validation, *prepared.testing)
    row = table(tmp_path / "work")["broken"]
    assert row["status"] == "failed" and str(broken) in row["reason"] and row["tiles"] == "0"
    assert failed_slides(tmp_path / "work") == {"broken": row["reason"]}
    shutil.copyfile(entries[0].path, broken)
    prepared = prepare_slides(slides, tmp_path / "work", TILING, 0.5, 0)
    assert "broken" in (*prepared.training, *prepared.validation)
    assert failed_slides(tmp_path / "work") == {} == failed_slides(tmp_path)


def test_progress_counts_slides(entries: list[SlideEntry], tmp_path: Path) -> None:
    seen = []

    def progress(items: Any, total: int, unit: str) -> Any:
        seen.append((total, unit))
        return iter(items)

    prepare_slides(entries, tmp_path / "work", TILING, 0.5, 0, progress)
    assert seen == [(6, "slide")]
