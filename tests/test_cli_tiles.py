"""`medsd tiles` as a user runs it."""

from __future__ import annotations

import csv
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from medsd import cli
from medsd.cohort.index import TileIndex
from medsd.slides.tissue import METHODS

pytestmark = pytest.mark.usefixtures("quick_tiling")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> Path:
    """Two slides, one with tumour outlined."""
    path, training = tmp_path_factory.mktemp("slides"), phantoms / "training"
    for source, name in (
        ("normal/normal_001.tif", "one/a.tif"),
        ("tumor/tumor_001.tif", "b.tif"),
        ("lesion_annotations/tumor_001.xml", "outlines/b.xml"),
    ):
        (path / name).parent.mkdir(exist_ok=True)
        shutil.copy(training / source, path / name)
    return path


def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["medsd", "tiles", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def statuses(out: Path) -> dict[str, str]:
    with open(out / "slides.csv", newline="", encoding="utf-8") as handle:
        return {row["slide"]: row["status"] for row in csv.DictReader(handle)}


def test_a_folder_becomes_tiles(monkeypatch, capsys, folder, tmp_path):
    out = tmp_path / "out"
    options = ("--tile-px", 128, "--min-tissue", 0.9, "--annotations", folder / "outlines", "--workers", 1)
    code, said, _ = run(monkeypatch, capsys, folder, "--out", out, *options)
    index = TileIndex.load(out / "tiles.npz")
    assert code == 0 and said == f"2 ok; {len(index)} tiles; see {out / 'slides.csv'} and {out / 'thumbnails'}\n"
    assert (index.tile_px, index.mpp, index.names) == (128, 0.5, ("a", "b"))
    assert (index.x % 128 == 0).all() and index.tissue.min() >= 0.9
    assert (index.label[index.slide == 0] == -1).all() and (index.label[index.slide == 1] == 1).any()
    assert sorted(path.name for path in (out / "thumbnails").iterdir()) == ["a.png", "b.png"]


def test_a_failed_slide_is_exit_code_1_after_the_others(monkeypatch, capsys, folder, tmp_path):
    broken = tmp_path / "c.tif"
    broken.write_bytes(b"II*\0 nonsense")
    (tmp_path / "slides.csv").write_text(f"slide,mpp\nc.tif,0.5\n{folder / 'b.tif'},0.25\n")
    out = tmp_path / "out"
    code, said, _ = run(monkeypatch, capsys, tmp_path / "slides.csv", "--out", out, "--stride-px", 64)
    assert code == 1 and said.startswith("1 ok, 1 failed; ")
    assert statuses(out) == {"c": "failed", "b": "ok"}
    index = TileIndex.load(out / "tiles.npz")
    assert index.slide_mpp == (None, 0.25) and set((index.x % 512).tolist()) > {0, 128}


def test_a_manifest_chooses_in_a_folder_and_an_output_in_it_is_not_searched(monkeypatch, capsys, folder, tmp_path):
    (tmp_path / "chosen.csv").write_text("slide\none/a.tif\n")
    out = folder / "out"
    for _ in range(2):
        code, said, _ = run(monkeypatch, capsys, folder, "--manifest", tmp_path / "chosen.csv", "--out", out)
        assert code == 0 and said.startswith("1 ok; ") and statuses(out) == {"a": "ok"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none"], "none: no such folder; name one with slides, or a manifest"),
        (["none.csv"], "none.csv: cannot be read"),
        (["{folder}", "--tile-px", "0"], "tile_px=0: must be a whole number from 1 to 16384"),
        (["{folder}", "--tissue", "otsu"], "tissue='otsu': use one of saturation, tiatoolbox-otsu"),
        (["{folder}", "--workers", "0"], "workers=0"),
        (["{folder}", "--max-unseen", "2"], "max_unseen=2.0"),
        (["{folder}", "--annotations", "{folder}/one"], "no annotation of any slide"),
    ],
)
def test_a_mistake_is_one_line_and_nothing_is_written(monkeypatch, capsys, folder, tmp_path, arguments, words):
    filled = [argument.format(folder=folder) for argument in arguments]
    code, _, err = run(monkeypatch, capsys, *filled, "--out", tmp_path / "out")
    assert code == 1 and err.startswith("medsd: ") and err.count("\n") == 1 and words in err
    assert not (tmp_path / "out").exists()


def test_help_answers_at_once_and_names_every_tissue_method():
    code = """
import sys
sys.argv = ["medsd", "tiles", "--help"]
import medsd.cli
try:
    medsd.cli.main()
except SystemExit:
    pass
heavy = {"torch", "tiatoolbox", "openslide", "matplotlib", "numpy", "scipy", "PIL"} & set(sys.modules)
assert not heavy, heavy
"""
    environment = {"COLUMNS": "300", "TERM": "dumb", "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert all(method in done.stdout for method in METHODS)
