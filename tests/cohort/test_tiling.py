"""A cohort with bad slides in it: what is left behind, what is redone, what a killed run loses."""

from __future__ import annotations

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import shapely
import tifffile
from PIL import Image

import medsd
from medsd.annotations import Outline, annotations_of, read_annotations, tumour_share, write_geojson
from medsd.cohort import runner, tile_picture, tiling
from medsd.cohort.camelyon import find_slides
from medsd.cohort.entry import SlideEntry, named_slides
from medsd.cohort.index import MIXED, NORMAL, TileGrid, TileIndex
from medsd.cohort.tiling import TiledCohort, Tiling, tile_slides
from medsd.errors import ConfigError, DatasetError, OutputError
from medsd.phantom import PhantomSpec, draw_phantom
from medsd.slides.slide import open_slide, thumbnail
from medsd.slides.tissue import METHODS, find_tissue

GRID = TileGrid(tile_px=64, stride_px=64, mpp=1.0)
TILING = Tiling(GRID)


@pytest.fixture(scope="session")
def entries(phantoms: Path) -> list[SlideEntry]:
    return find_slides(phantoms)


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory, coding: Any, phantoms: Path) -> Path:
    """Slides that are blank, broken, or know no scale."""
    folder = tmp_path_factory.mktemp("odd")
    coding.write_levels(folder / "blank.tif", [np.full((1024, 1024, 3), 243, np.uint8)], 0.5, 2)
    tissue = draw_phantom(PhantomSpec(5, False, 1024)).image
    coding.write_levels(folder / "bare.tif", [tissue], 500.0, 2)  # no microscope has 500 um per pixel
    (folder / "broken.tif").write_bytes(b"II*\0 nonsense")
    coding.write_levels(folder / "damaged.tif", [tissue, coding.halved(tissue, 2), coding.halved(tissue, 4)], 0.5, 2)
    shutil.copyfile(folder / "damaged.tif", folder / "ruined.tif")
    spoil(folder / "damaged.tif", [4 * 8 + 4])
    spoil(folder / "ruined.tif", range(64))
    return folder


def spoil(path: Path, tiles: Any) -> None:
    """Overwrite the data of tiles (64 px, 8 a row) of level 1, which the grid is read from."""
    with tifffile.TiffFile(path) as file:
        page = file.pages[1]
        places = [(page.dataoffsets[tile], page.databytecounts[tile]) for tile in tiles]
    with open(path, "r+b") as handle:
        for offset, count in places:
            handle.seek(offset)
            handle.write(b"\xff" * count)


def cohort_of(entries: list[SlideEntry], odd: Path) -> list[SlideEntry]:
    names = ("bare", "blank", "broken", "damaged", "ruined")
    return [*entries, *(SlideEntry(name, odd / f"{name}.tif", None, "", None) for name in names)]


@pytest.fixture(scope="session")
def cohort(entries: list[SlideEntry], odd: Path) -> list[SlideEntry]:
    return cohort_of(entries, odd)


@pytest.fixture(scope="session")
def done(cohort: list[SlideEntry], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TiledCohort]:
    """The cohort, read by child processes."""
    folder = tmp_path_factory.mktemp("tiled") / "out"
    return folder, tile_slides(cohort, folder, TILING, workers=2)


@pytest.fixture
def copy(done: tuple[Path, TiledCohort], tmp_path: Path) -> Path:
    return Path(shutil.copytree(done[0], tmp_path / "out", copy_function=shutil.copy2))


@pytest.fixture(autouse=True)
def quick(done: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures and no child processes for what is tiled in a test; `done` is made before, with both."""
    monkeypatch.setattr(tile_picture, "_LONGEST_PX", 64)
    monkeypatch.setattr(runner, "IsolatedSlide", open_slide)


def table(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "slides.csv", newline="", encoding="utf-8") as handle:
        return {row["slide"]: row for row in csv.DictReader(handle)}


def times(folder: Path) -> dict[str, int]:
    return {p.relative_to(folder).as_posix(): p.stat().st_mtime_ns for p in folder.rglob("*") if p.is_file()}


def of(index: TileIndex, name: str) -> TileIndex:
    return index.rows(index.slide == index.names.index(name))


def test_one_row_a_slide_and_bad_ones_cost_only_themselves(
    done: tuple[Path, TiledCohort], cohort: list[SlideEntry]
) -> None:
    folder, tiled = done
    rows = table(folder)
    assert list(rows) == [entry.name for entry in cohort] == list(tiled.index.names)
    assert {name: rows[name]["status"] for name in list(rows)[6:]} == {
        "bare": "failed",
        "blank": "empty",
        "broken": "failed",
        "damaged": "ok",
        "ruined": "failed",
    }
    assert all(row["status"] == "ok" for row in list(rows.values())[:6])
    assert rows["bare"]["reason"].endswith("which no microscope has); give it with mpp=... (--mpp), or in a manifest")
    assert "broken.tif" in rows["broken"]["reason"] and "ruined.tif" in rows["ruined"]["reason"]
    assert rows["blank"]["reason"] == "no tissue found; see the thumbnail"
    for entry, row in zip(cohort, rows.values(), strict=True):
        tiles = of(tiled.index, entry.name)
        assert (row["path"], row["part"]) == (str(entry.path), entry.part)
        assert row["label"] == {1: "tumour", 0: "normal", None: ""}[entry.label]
        assert int(row["tiles"]) == len(tiles) and (len(tiles) > 0) == (row["status"] == "ok")
        counts = [int((tiles.label == label).sum()) for label in (1, NORMAL, MIXED)]
        assert [int(row[f"{word}_tiles"]) for word in ("tumour", "normal", "mixed")] == counts
        if row["status"] == "ok":
            assert [row[key] for key in ("mpp", "width", "height")] == ["0.5", "1024", "1024"]
            assert row["reader"] == "tifffile" and row["mpp_source"] == "TIFF resolution tags"
            assert tiled.index.slide_mpp[tiled.index.names.index(entry.name)] == 0.5


def test_what_is_left_behind(done: tuple[Path, TiledCohort], cohort: list[SlideEntry]) -> None:
    folder, _ = done
    files = {"slides.csv", "tiles.npz", "thumbnails/ruined.png"}  # seen before it was given up, and worth a look
    for name, row in table(folder).items():
        files |= {f"slides/{name}.json"}
        files |= {f"slides/{name}.npz", f"thumbnails/{name}.png"} if row["status"] != "failed" else set()
    assert set(times(folder)) == files and "slides/blank.npz" in files


def test_tiles_have_their_tissue_share_and_label(done: tuple[Path, TiledCohort], entries: list[SlideEntry]) -> None:
    _, tiled = done
    for entry in entries:
        tiles = of(tiled.index, entry.name)
        with open_slide(entry.path) as slide:
            mask = find_tissue(slide)
        assert np.allclose(mask.share(tiles.x, tiles.y, 128), tiles.tissue) and (tiles.tissue >= 0.5).all()
        row = next(row for row in tiled.slides if row.slide == entry.name)
        assert row.tissue_mm2 == pytest.approx(mask.mask.sum() * (mask.level0_px * 0.5) ** 2 / 1e6, abs=1e-4)
        if entry.annotation is None:
            assert (tiles.label == NORMAL).all()
        else:
            share = tumour_share(read_annotations(entry.annotation), tiles.x, tiles.y, 128)
            assert np.array_equal(tiles.label, np.where(share >= 0.5, 1, np.where(share > 0, MIXED, NORMAL)))


def test_tiles_that_cannot_be_decoded_are_left_out_and_counted(done: tuple[Path, TiledCohort], odd: Path) -> None:
    folder, tiled = done
    tiles, row = of(tiled.index, "damaged"), table(folder)["damaged"]
    record = json.loads((folder / "slides" / "damaged.json").read_text())
    # The file's tile in row and column 4 of level 1 is the tile at (512, 512), to the pixel.
    assert record["unseen_level0"] == [[512, 512]] and row["unseen_tiles"] == "1"
    assert len(tiles) == int(row["tiles"]) > 20
    assert (512, 512) not in set(zip(tiles.x.tolist(), tiles.y.tolist(), strict=True))
    assert (tiles.label == MIXED).all()  # nobody said what the slide is
    with open_slide(odd / "damaged.tif") as slide:
        for x, y in zip(tiles.x.tolist(), tiles.y.tolist(), strict=True):
            slide.read(x, y, 64, 64, 1.0)  # raises where it cannot be decoded


def test_past_a_share_of_undecodable_tiles_the_slide_is_failed(odd: Path, tmp_path: Path) -> None:
    slides = [SlideEntry(name, odd / f"{name}.tif", None, "", None) for name in ("damaged", "ruined")]
    tiled = tile_slides(slides, tmp_path / "strict", replace(TILING, max_unseen=0.01))
    assert [row.status for row in tiled.slides] == ["failed", "failed"] and len(tiled.index) == 0
    assert tiled.slides[0].unseen_tiles == 1
    assert "damaged.tif: 1 of " in tiled.slides[0].reason and "(allowed: 1%); copy it again" in tiled.slides[0].reason
    lenient = tile_slides(slides, tmp_path / "lenient", replace(TILING, max_unseen=1.0))
    assert [row.status for row in lenient.slides] == ["ok", "failed"]  # of a ruined slide nothing is left at all
    trusting = tile_slides(slides[:1], tmp_path / "trusting", replace(TILING, verify=False))
    assert trusting.slides[0].unseen_tiles == 0 and trusting.slides[0].tiles == lenient.slides[0].tiles + 1


def test_the_picture_shows_tissue_and_tiles_and_nothing_else(
    done: tuple[Path, TiledCohort], cohort: list[SlideEntry]
) -> None:
    folder, tiled = done
    for entry in (cohort[2], cohort[7]):  # a tumour slide and the blank one
        with open_slide(entry.path) as slide:
            plain, level0_px = thumbnail(slide, 1280)
            mask = find_tissue(slide).at(1024, 1024, 1.0) >= 0.5
        picture = np.asarray(Image.open(folder / "thumbnails" / f"{entry.name}.png"))
        assert level0_px == 1 and picture.shape == (1024 + 58, 1024, 3)
        changed = (picture[:1024] != plain).any(-1)
        edge = mask & ~np.roll(mask, 1, 0) | mask & ~np.roll(mask, 1, 1)
        tiles, inside = of(tiled.index, entry.name), mask.copy()
        for x, y in zip(tiles.x, tiles.y, strict=True):
            inside[y : y + 128, x : x + 128] = True
            assert changed[y + 1 : y + 127, x + 1 : x + 127].mean() > 0.9
        assert not edge.any() or changed[edge].mean() > 0.95
        assert not changed[~inside].any()
        assert (picture[1024:] < 128).any()  # the legend


def test_a_slide_without_enough_tissue_for_a_tile_is_empty(entries: list[SlideEntry], tmp_path: Path) -> None:
    tiled = tile_slides(entries[:1], tmp_path, Tiling(TileGrid(500, 500, 1.0, min_tissue=1.0)))
    assert tiled.slides[0].status == "empty" and len(tiled.index) == 0
    assert tiled.slides[0].reason == "too little tissue for a tile (min_tissue=1); see the thumbnail"


def test_the_manifests_scale_is_used_and_kept(odd: Path, tmp_path: Path) -> None:
    tiled = tile_slides([SlideEntry("bare", odd / "bare.tif", None, "", None, 0.25)], tmp_path, TILING)
    assert tiled.slides[0].status == "ok" and tiled.slides[0].mpp_source == "given by the caller"
    assert tiled.index.slide_mpp == (0.25,) == TileIndex.load(tmp_path / "tiles.npz").slide_mpp
    assert (tiled.index.x % 256 == 0).all() and tiled.index.x.max() > 0


def test_a_second_run_redoes_failures_only(
    copy: Path, cohort: list[SlideEntry], odd: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, whole = times(copy), (copy / "tiles.npz").read_bytes()
    opened: list[str] = []
    monkeypatch.setattr(runner, "IsolatedSlide", lambda path, mpp: (opened.append(path.stem), open_slide(path, mpp))[1])
    again = tile_slides(cohort, copy, TILING)
    assert sorted(opened) == ["bare", "broken", "ruined"]
    assert (copy / "tiles.npz").read_bytes() == whole
    assert {name for name, when in times(copy).items() if when != before[name]} == {
        "slides.csv",
        "tiles.npz",
        "thumbnails/ruined.png",
        "slides/bare.json",
        "slides/broken.json",
        "slides/ruined.json",
    }
    # Mended and moved: tried again, and the folder's name is no part of a slide.
    moved = Path(shutil.copytree(odd, tmp_path / "moved", copy_function=shutil.copy2))
    shutil.copyfile(cohort[0].path, moved / "broken.tif")
    opened.clear()
    slides = [*cohort[:6], *(replace(entry, path=moved / entry.path.name) for entry in cohort[6:])]
    mended = tile_slides(slides, copy, TILING)
    assert sorted(opened) == ["bare", "broken", "ruined"]
    assert [row.status for row in mended.slides].count("failed") == [row.status for row in again.slides].count(
        "failed"
    ) - 1
    assert mended.index.paths[7] == str(moved / "blank.tif") == mended.slides[7].path


SPOILT = ["slide", "annotation", "label", "mpp", "grid", "tissue", "version", "record", "tiles", "picture"]


@pytest.mark.parametrize("what", SPOILT)
def test_what_changed_is_redone(
    what: str, copy: Path, phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = Path(shutil.copytree(phantoms, tmp_path / "data", copy_function=shutil.copy2))
    entries, settings = find_slides(data), TILING
    name = entries[2].name
    redone = {name}
    if what == "slide":
        entries[2].path.touch()
    elif what == "annotation":
        assert entries[2].annotation is not None
        entries[2].annotation.touch()
    elif what == "label":
        entries[2] = replace(entries[2], label=None)
    elif what == "mpp":
        entries[2] = replace(entries[2], mpp=0.4)
    elif what in ("grid", "tissue", "version"):
        settings = {"grid": Tiling(replace(GRID, min_tissue=0.4)), "tissue": Tiling(GRID, force_tissue=True)}.get(
            what, TILING
        )
        redone = {entry.name for entry in entries}
        if what == "version":
            monkeypatch.setattr(medsd, "__version__", "0.0.0")
    else:
        path = {"record": f"slides/{name}.json", "tiles": f"slides/{name}.npz", "picture": f"thumbnails/{name}.png"}
        (copy / path[what]).unlink() if what == "picture" else (copy / path[what]).write_bytes(b"{")
    opened = []
    monkeypatch.setattr(runner, "IsolatedSlide", lambda path, mpp: (opened.append(path.stem), open_slide(path, mpp))[1])
    tiled = tile_slides(entries, copy, settings, workers=1)
    assert set(opened) == redone and all(row.status == "ok" for row in tiled.slides)
    assert not list(copy.rglob(".*"))


def test_workers_and_children_change_nothing(
    done: tuple[Path, TiledCohort], cohort: list[SlideEntry], tmp_path: Path
) -> None:
    tile_slides(cohort, tmp_path, TILING, workers=1, isolate=False)
    assert (tmp_path / "tiles.npz").read_bytes() == (done[0] / "tiles.npz").read_bytes()
    columns = [set(row.items()) - {("seconds", row["seconds"])} for row in table(tmp_path).values()]
    expected = [set(row.items()) - {("seconds", row["seconds"])} for row in table(done[0]).values()]
    by_reason = {("reason", row["reason"]) for folder in (tmp_path, done[0]) for row in table(folder).values()}
    assert [row - by_reason for row in columns] == [row - by_reason for row in expected]


RUN = """
import sys
from medsd.cohort.camelyon import find_slides
from medsd.cohort.index import TileGrid
from medsd.cohort.tiling import Tiling, tile_slides
tile_slides(find_slides(sys.argv[1]), sys.argv[2], Tiling(TileGrid(64, 64, 1.0)), 1)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_run_goes_on(
    done: tuple[Path, TiledCohort],
    entries: list[SlideEntry],
    phantoms: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (tmp_path / "tiles.npz").write_bytes(b"of other slides")
    run = subprocess.Popen([sys.executable, "-c", RUN, str(phantoms), str(tmp_path)])
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("slides/[!.]*.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    assert run.wait() == -signal.SIGKILL
    kept = {path.stem for path in tmp_path.glob("slides/[!.]*.json")}
    assert 2 <= len(kept) < 6 and not (tmp_path / "tiles.npz").exists()
    rows = table(tmp_path)
    assert set(rows) <= kept and all(row["status"] == "ok" for row in rows.values())
    for name in (".4194305-tiles.npz", "slides/.4194305-a.json", "thumbnails/.4194305-a.png"):
        (tmp_path / name).touch()
    (tmp_path / ".hidden").touch()
    opened: list[str] = []
    monkeypatch.setattr(runner, "IsolatedSlide", lambda path, mpp: (opened.append(path.stem), open_slide(path, mpp))[1])
    tile_slides(entries, tmp_path, TILING)
    assert sorted(opened) == sorted({entry.name for entry in entries} - kept)
    tile_slides(entries, tmp_path / "whole", TILING)
    assert (tmp_path / "tiles.npz").read_bytes() == (tmp_path / "whole" / "tiles.npz").read_bytes()
    assert [path.name for path in tmp_path.rglob(".*")] == [".hidden"]


def test_an_interrupted_run_stops_at_once_and_keeps_its_table(
    entries: list[SlideEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "_TABLE_SECONDS", 0.0)
    monkeypatch.setattr(runner, "_TABLE_SHARE", math.inf)
    seen = []

    def progress(items: Any, total: int, unit: str) -> Any:
        for item in items:
            yield item
            seen.extend([item] if unit == "slide" else [])
            if len(seen) == 2:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tile_slides(entries, tmp_path, TILING, workers=1, progress=progress)
    assert 2 <= len(table(tmp_path)) < 6 and len(list((tmp_path / "slides").glob("*.json"))) < 6


def test_what_nobody_foresaw_costs_one_slide_and_a_full_disk_the_run(
    entries: list[SlideEntry], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = tiling.find_tissue

    def find(slide: Any, **options: Any) -> Any:
        if slide.path == entries[1].path:
            raise RuntimeError("odd\nthing")
        return real(slide, **options)

    monkeypatch.setattr(tiling, "find_tissue", find)
    tiled = tile_slides(entries, tmp_path / "out", TILING)
    assert [row.status for row in tiled.slides] == ["ok", "failed", "ok", "ok", "ok", "ok"]
    assert tiled.slides[1].reason == f"{entries[1].path}: RuntimeError: odd thing"
    assert "Traceback" in caplog.text
    monkeypatch.setattr(tiling, "find_tissue", real)
    replace_file = Path.replace

    def full(self: Path, target: Path) -> Path:
        if os.path.dirname(target) == str(tmp_path / "full"):
            raise OSError(28, "No space left on device")
        return replace_file(self, target)

    monkeypatch.setattr(Path, "replace", full)
    with pytest.raises(OutputError, match=r"slides\.csv: cannot be written \(No space left"):
        tile_slides(entries, tmp_path / "full", TILING)


def test_cohorts_and_settings_that_mean_nothing(entries: list[SlideEntry], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no slides; name"):
        tile_slides([], tmp_path / "out", TILING)
    with pytest.raises(DatasetError, match="a slide of this name is also at"):
        tile_slides([entries[0], entries[0]], tmp_path / "out", TILING)
    with pytest.raises(ConfigError, match="workers=0: must be a whole number from 1 on"):
        tile_slides(entries, tmp_path / "out", TILING, workers=0)
    with pytest.raises(ConfigError, match=rf"tissue='saturatin': use one of .*; did you mean '{METHODS[0]}'\?"):
        Tiling(GRID, tissue="saturatin")
    with pytest.raises(ConfigError, match=r"max_unseen=1\.5: must be a number from 0 to 1"):
        Tiling(GRID, max_unseen=1.5)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose another output folder"):
        tile_slides(entries, tmp_path / "file", TILING)
    assert not (tmp_path / "out").exists()


def test_runs_into_one_folder_add_up(entries: list[SlideEntry], tmp_path: Path) -> None:
    one, two = (tile_slides([entry], tmp_path, TILING) for entry in (entries[2], entries[0]))
    assert list(table(tmp_path)) == [entries[0].name, entries[2].name]
    whole = TileIndex.load(tmp_path / "tiles.npz")
    assert whole.names == (entries[0].name, entries[2].name) and len(whole) == len(one.index) + len(two.index)
    assert one.index.names == (entries[2].name,) and np.array_equal(of(whole, entries[2].name).x, one.index.x)
    assert tile_slides([entries[2]], tmp_path, TILING).slides == one.slides


def test_slides_tiled_with_other_settings_stay_listed_and_out_of_the_index(
    entries: list[SlideEntry], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tile_slides(entries[:1], tmp_path, TILING)
    other = tile_slides(entries[1:2], tmp_path, Tiling(replace(GRID, tile_px=128)))
    assert len(table(tmp_path)) == 2 and TileIndex.load(tmp_path / "tiles.npz").names == other.index.names
    assert "tiles.npz: lacks 1 slides tiled with other settings" in caplog.text


def test_another_slide_of_the_same_name_is_refused(entries: list[SlideEntry], tmp_path: Path) -> None:
    folder, name = tmp_path / "out", entries[0].name
    tile_slides(entries[:1], folder, TILING)
    before = times(folder)
    for number, other in enumerate((entries[1].path, entries[0].path)):
        path = tmp_path / str(number) / entries[0].path.name
        path.parent.mkdir()
        data = bytearray(other.read_bytes())
        data[-1] ^= number  # of the same size, and yet another file
        path.write_bytes(data)
        with pytest.raises(DatasetError, match=rf"outputs of another slide of this name, {entries[0].path}; rename"):
            tile_slides([SlideEntry(name, path)], folder, TILING)
    assert times(folder) == before
    copied = tmp_path / "copied" / entries[0].path.name
    copied.parent.mkdir()
    shutil.copyfile(entries[0].path, copied)
    assert tile_slides([replace(entries[0], path=copied)], folder, TILING).index.paths == (str(copied),)


def test_a_failed_slide_is_listed_until_it_is_taken_away(entries: list[SlideEntry], tmp_path: Path) -> None:
    broken = tmp_path / "broken.tif"
    broken.write_bytes(b"II*\0 nonsense")
    folder = tmp_path / "out"
    tile_slides([SlideEntry("broken", broken)], folder, TILING)
    tile_slides(entries[:1], folder, TILING)
    assert [row["status"] for row in table(folder).values()] == ["ok", "failed"]
    broken.unlink()
    tile_slides(entries[:1], folder, TILING)
    assert list(table(folder)) == [entries[0].name]
    assert (folder / "slides" / "broken.json").is_file()


def test_a_slide_out_of_reach_keeps_what_it_has(entries: list[SlideEntry], tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    shutil.copyfile(entries[0].path, path)
    tile_slides([SlideEntry("a", path)], tmp_path / "out", TILING)
    path.rename(tmp_path / "away.tif")
    before = times(tmp_path / "out" / "slides")
    assert tile_slides([SlideEntry("a", path)], tmp_path / "out", TILING).slides[0].status == "failed"
    assert table(tmp_path / "out")["a"]["status"] == "failed" and times(tmp_path / "out" / "slides") == before
    (tmp_path / "away.tif").rename(path)
    assert tile_slides([SlideEntry("a", path)], tmp_path / "out", TILING).slides[0].status == "ok"
    assert times(tmp_path / "out" / "slides") == before


def test_a_name_that_is_no_utf8_costs_at_most_its_own_slide(entries: list[SlideEntry], tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"f\xe9vrier.tif")
    shutil.copyfile(entries[0].path, path)
    tiled = tile_slides([*named_slides([path]), *entries[:1]], tmp_path / "out", TILING)
    assert [row.status for row in tiled.slides] == ["ok", "ok"]
    assert list(table(tmp_path / "out")) == ["f_vrier", entries[0].name]


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

    monkeypatch.setattr(runner, "IsolatedSlide", scanned)
    other = tile_slides([replace(entries[2], annotation=tmp_path / "as_shown.geojson")], tmp_path / "other", TILING)
    assert np.array_equal(other.index.label, expected.label)
