"""A cohort with bad slides in it: what is left behind, and what is redone."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from PIL import Image

import medsd
from medsd.annotations import read_annotations, tumour_share
from medsd.cohort.camelyon import find_slides
from medsd.cohort.entry import SlideEntry
from medsd.cohort.index import MIXED, NORMAL, TileGrid, TileIndex
from medsd.cohort.tiling import TiledCohort, Tiling, find_tiles, tile_slides
from medsd.errors import ConfigError, DatasetError, OutputError
from medsd.phantom import PhantomSpec, draw_phantom
from medsd.slides.slide import open_slide, thumbnail
from medsd.slides.tissue import METHODS, find_tissue
from tests.cohort.tiled import GRID, TILING, of, table, times

pytestmark = pytest.mark.usefixtures("quick_tiling")


@pytest.fixture(scope="session")
def odd(tmp_path_factory: pytest.TempPathFactory, coding: Any, phantoms: Path) -> Path:
    """Slides that are blank, broken, or know no scale."""
    folder = tmp_path_factory.mktemp("odd")
    coding.write_levels(folder / "blank.tif", [np.full((960, 1024, 3), 243, np.uint8)], 0.5, 2)
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


@pytest.fixture(scope="session")
def cohort(entries: list[SlideEntry], odd: Path) -> list[SlideEntry]:
    names = ("bare", "blank", "broken", "damaged", "ruined")
    return [*entries, *(SlideEntry(name, odd / f"{name}.tif", None, "", None) for name in names)]


@pytest.fixture(scope="session")
def done(cohort: list[SlideEntry], tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TiledCohort]:
    """The cohort, read by child processes."""
    folder = tmp_path_factory.mktemp("tiled") / "out"
    return folder, tile_slides(cohort, folder, TILING, workers=2)


@pytest.fixture
def copy(done: tuple[Path, TiledCohort], tmp_path: Path) -> Path:
    return Path(shutil.copytree(done[0], tmp_path / "out", copy_function=shutil.copy2))


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
    assert (rows["blank"]["width"], rows["blank"]["height"]) == ("1024", "960")
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
            mask = find_tissue(slide).at(1024, len(plain), 1.0) >= 0.5
        picture = np.asarray(Image.open(folder / "thumbnails" / f"{entry.name}.png"))
        assert level0_px == 1 and picture.shape == (len(plain) + 58, 1024, 3)
        changed = (picture[: len(plain)] != plain).any(-1)
        edge = mask & ~np.roll(mask, 1, 0) | mask & ~np.roll(mask, 1, 1)
        tiles, inside = of(tiled.index, entry.name), mask.copy()
        for x, y in zip(tiles.x, tiles.y, strict=True):
            inside[y : y + 128, x : x + 128] = True
            assert changed[y + 1 : y + 127, x + 1 : x + 127].mean() > 0.9
        assert not edge.any() or changed[edge].mean() > 0.95
        assert not changed[~inside].any()
        assert (picture[len(plain) :] < 128).any()  # the legend


def test_a_slide_without_enough_tissue_for_a_tile_is_empty(entries: list[SlideEntry], tmp_path: Path) -> None:
    tiled = tile_slides(entries[:1], tmp_path, Tiling(TileGrid(500, 500, 1.0, min_tissue=1.0)))
    assert tiled.slides[0].status == "empty" and len(tiled.index) == 0
    assert tiled.slides[0].reason == "too little tissue for a tile (min_tissue=1); see the thumbnail"


def test_the_manifests_scale_is_used_and_kept(odd: Path, tmp_path: Path) -> None:
    tiled = tile_slides([SlideEntry("bare", odd / "bare.tif", None, "", None, 0.25)], tmp_path, TILING)
    assert tiled.slides[0].status == "ok" and tiled.slides[0].mpp_source == "given by the caller"
    assert tiled.index.slide_mpp == (0.25,) == TileIndex.load(tmp_path / "tiles.npz").slide_mpp
    assert (tiled.index.x % 256 == 0).all() and tiled.index.x.max() > 0


def test_a_scale_that_is_not_the_files_is_told(entries: list[SlideEntry], tmp_path: Path) -> None:
    (row,) = tile_slides([replace(entries[0], mpp=1.0)], tmp_path, TILING).slides
    assert "Scale in doubt: 1 µm per pixel was given, the file says 0.5." in row.reason
    assert row.mpp_source == "given by the caller; the file says 0.5"


def test_a_second_run_redoes_failures_only(
    copy: Path, cohort: list[SlideEntry], odd: Path, tmp_path: Path, opened: list[str]
) -> None:
    before, whole = times(copy), (copy / "tiles.npz").read_bytes()
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
    what: str, copy: Path, phantoms: Path, tmp_path: Path, opened: list[str], monkeypatch: pytest.MonkeyPatch
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


def test_cohorts_and_settings_that_mean_nothing(entries: list[SlideEntry], tmp_path: Path) -> None:
    with pytest.raises(DatasetError, match="no slides; name"):
        tile_slides([], tmp_path / "out", TILING)
    with pytest.raises(DatasetError, match="a slide of this name is also at"):
        tile_slides([entries[0], entries[0]], tmp_path / "out", TILING)
    with pytest.raises(ConfigError, match="workers=0: must be a whole number from 1 to 1024"):
        tile_slides(entries, tmp_path / "out", TILING, workers=0)
    with pytest.raises(ConfigError, match=rf"tissue='saturatin': use one of .*; did you mean '{METHODS[0]}'\?"):
        Tiling(GRID, tissue="saturatin")
    with pytest.raises(ConfigError, match=r"max_unseen=1\.5: must be a number from 0 to 1"):
        Tiling(GRID, max_unseen=1.5)
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="choose another output folder"):
        tile_slides(entries, tmp_path / "file", TILING)
    assert not (tmp_path / "out").exists()


def test_a_failed_slide_that_was_mended_is_asked_for_again(entries: list[SlideEntry], tmp_path: Path) -> None:
    path = tmp_path / "late.tif"
    path.write_bytes(entries[0].path.read_bytes()[:1000])
    late = [SlideEntry("late", path)]
    assert [row.status for row in tile_slides(late, tmp_path / "out", TILING).slides] == ["failed"]
    assert find_tiles(late, tmp_path / "out", TILING) is not None  # tried, as it is
    assert find_tiles(late, tmp_path / "out", replace(TILING, max_unseen=0.5)) is None
    shutil.copy(entries[0].path, path)
    assert find_tiles(late, tmp_path / "out", TILING) is None
    path.unlink()
    assert find_tiles(late, tmp_path / "out", TILING) is not None  # cannot be reached now


def test_a_slide_whose_annotation_is_missing_costs_itself(entries: list[SlideEntry], tmp_path: Path) -> None:
    annotation = tmp_path / "drawn.xml"
    pair = [replace(entries[0], annotation=annotation), replace(entries[1], annotation=None)]
    found = tile_slides(pair, tmp_path / "out", TILING)
    assert [row.status for row in found.slides] == ["failed", "ok"]
    assert find_tiles(pair, tmp_path / "out", TILING) is not None
    annotation.write_text("<ASAP_Annotations><Annotations/></ASAP_Annotations>")
    assert find_tiles(pair, tmp_path / "out", TILING) is None  # it is there now
    assert [row.status for row in tile_slides(pair, tmp_path / "out", TILING).slides] == ["ok", "ok"]
    annotation.unlink()
    assert find_tiles(pair, tmp_path / "out", TILING) is None
