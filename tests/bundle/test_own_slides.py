"""A lab's own slides: a manifest or what `medsd tiles` left stands in for a data set."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import Any

import pytest

from medsd.bundle.data import Phantoms, SlideData
from medsd.cohort import making
from medsd.cohort.index import TileGrid
from medsd.cohort.manifest import read_manifest
from medsd.cohort.tiling import Tiling, tile_slides
from medsd.errors import ConfigError, DatasetError

GRID = TileGrid(64, 64, 1.0)

pytestmark = pytest.mark.usefixtures("quick_tiling")


@pytest.fixture
def table(phantoms: Path, tmp_path: Path) -> Path:
    """Six slides of four patients; one of the tumour slides has no outlines, none says its part."""
    rows = ["slide,label,annotation,patient"]
    for number, (kind, part) in enumerate(
        [("normal_001", "normal"), ("normal_002", "normal"), ("tumor_001", "tumor"), ("tumor_002", "tumor")]
    ):
        annotation = phantoms / "training/lesion_annotations" / f"{kind}.xml" if part == "tumor" else ""
        word = {"normal": "Benign", "tumor": "cancer"}[part]
        rows.append(f"{phantoms}/training/{part}/{kind}.tif,{word},{annotation},p{number}")
    for name in ("test_001", "test_002"):
        outlined = (phantoms / "testing/lesion_annotations" / f"{name}.xml").is_file()
        rows.append(f"{phantoms}/testing/images/{name}.tif,{'cancer' if outlined else 'benign'},,p{name}")
    path = tmp_path / "slides.csv"
    path.write_text("\n".join(rows) + "\n")
    return path


def data(place: Path, work: Path, **settings: Any) -> SlideData:
    settings = {"grid": GRID, "classes": ("benign", "cancer"), "seed": 1, "validation_share": 0.5, **settings}
    return SlideData(str(place), Phantoms("none"), str(work), **settings)


def parts(found: SlideData) -> dict[str, set[str]]:
    return {name: set(getattr(found._prepared, name)) for name in ("training", "validation", "testing")}


def test_a_manifest_feeds_the_bundle(
    table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    found = data(table.parent, tmp_path / "work")
    found.prepare()
    split = parts(found)
    assert sorted(name for names in split.values() for name in names) == sorted(
        entry.name for entry in read_manifest(table, classes=("benign", "cancer"))
    )
    assert all(len(names) == 2 for names in split.values())
    told = [record.getMessage() for record in caplog.records if record.name == "medsd.cohort.prepare"]
    assert [line.split(":")[0] for line in told] == ["training", "validation", "testing"]
    assert all("1 benign slides (" in line and "1 cancer slides (" in line for line in told)
    assert all(line.endswith(" of 2 patients") for line in told)
    assert "a slide of the class cancer without outlines: no tile has a label" in caplog.text
    outlined = {name for name in split if split[name] & {"tumor_001", "tumor_002"}}
    for name in split:
        if name in outlined or name == "testing":
            assert set(found.part(name).labels.tolist()) == ({0, 1} if name in outlined else {0})
        else:
            with pytest.raises(DatasetError, match=f"{name}: no tile of class 'cancer'; outline some"):
                found.part(name)
    assert {entry.name for entry in found.jobs()} == split["testing"]
    with pytest.raises(DatasetError, match=r"none\.csv: no such folder; set dataset_dir to a manifest"):
        data(tmp_path / "none.csv", tmp_path / "other").prepare()
    with pytest.raises(DatasetError, match="row 2, column 'label': 'Benign' is unknown; use normal, tumour or"):
        data(table, tmp_path / "work", classes=("normal", "tumour")).prepare()
    with pytest.raises(ConfigError, match="target='cancr': the classes are benign, cancer; did you mean 'cancer'"):
        data(table, tmp_path / "work", target="cancr")
    with pytest.raises(ConfigError, match="is laid out like CAMELYON16, which has two; give a manifest"):
        data(table.parent / "none", tmp_path / "work", classes=("a", "b", "c")).prepare()


def test_what_medsd_tiles_left_is_not_cut_again(table: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = read_manifest(table, classes=("benign", "cancer"))
    tiling = Tiling(TileGrid(64, 32, 1.0, min_tissue=0.8), classes=("benign", "cancer"))
    tiled = tile_slides(entries, tmp_path / "tiles", tiling, workers=1)
    monkeypatch.setattr(making, "IsolatedSlide", None)  # nothing is opened
    found = data(tmp_path / "tiles", tmp_path / "work")
    found.prepare()
    cut = data(table, tmp_path / "work")
    assert parts(found) == {name: set(names) for name, names in parts_of(cut, entries).items()}
    assert sum(len(found.unlabelled(part)) for part in ("training", "validation")) > 0
    assert len(found._prepared.index) == len(tiled.index) and not (tmp_path / "work").exists()
    names = found._prepared.index.names
    assert {found._prepared.entry(name).annotation for name in names} == {entry.annotation for entry in entries}
    with pytest.raises(ConfigError, match=r"tiles: holds tiles of 64 px at 1 um; set --tile_px 64 --mpp 1"):
        data(tmp_path / "tiles", tmp_path / "work", grid=TileGrid(64, 64, 0.5)).prepare()
    with pytest.raises(ConfigError, match=r"tiles: holds tiles of the classes benign, cancer; set --classes"):
        data(tmp_path / "tiles", tmp_path / "work", classes=("benign", "cancer", "other")).prepare()
    shutil.rmtree(tmp_path / "tiles" / "thumbnails")
    with pytest.raises(DatasetError, match=r"\.json: not whole, or of another version; run medsd tiles again"):
        data(tmp_path / "tiles", tmp_path / "work").prepare()


def parts_of(cut: SlideData, entries: list[Any]) -> dict[str, list[str]]:
    """What the manifest would be split into, were all slides cut."""
    from medsd.cohort.split import split_validation, with_parts

    slides = with_parts(entries, cut.test_share, cut.seed)
    training, validation = split_validation(slides, cut.validation_share, cut.seed)
    testing = [slide.name for slide in slides if slide.part == "testing"]
    return {"training": training, "validation": validation, "testing": testing}
