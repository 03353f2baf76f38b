"""A folder of tiles: what a run that is killed or meets a full disk leaves, and how runs into one folder add up."""

from __future__ import annotations

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

from medsd.cohort import runner, tiling
from medsd.cohort.entry import SlideEntry, named_slides
from medsd.cohort.index import TileIndex
from medsd.cohort.kept import gather
from medsd.cohort.tiling import Tiles, Tiling, tile_slides, tiled_slides
from medsd.errors import DatasetError, OutputError
from tests.cohort.tiled import GRID, TILING, of, table, times

pytestmark = pytest.mark.usefixtures("quick_tiling")

RUN = """
import sys
from medsd.cohort.camelyon import find_slides
from medsd.cohort.index import TileGrid
from medsd.cohort.tiling import Tiles, Tiling, tile_slides, tiled_slides
tile_slides(find_slides(sys.argv[1]), sys.argv[2], Tiling(TileGrid(64, 64, 1.0)), 1)
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_run_goes_on(entries: list[SlideEntry], phantoms: Path, tmp_path: Path, opened: list[str]) -> None:
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


def test_runs_into_one_folder_add_up(entries: list[SlideEntry], tmp_path: Path) -> None:
    one, two = (tile_slides([entry], tmp_path, TILING) for entry in (entries[2], entries[0]))
    assert list(table(tmp_path)) == [entries[0].name, entries[2].name]
    whole = TileIndex.load(tmp_path / "tiles.npz")
    assert whole.names == (entries[0].name, entries[2].name) and len(whole) == len(one.index) + len(two.index)
    assert one.index.names == (entries[2].name,) and np.array_equal(of(whole, entries[2].name).x, one.index.x)
    assert tile_slides([entries[2]], tmp_path, TILING).slides == one.slides


def test_a_slide_that_is_there_twice_is_refused(entries: list[SlideEntry], tmp_path: Path) -> None:
    """As where a namesake came to its manifest, so that it got another name."""
    for name in ("a", "a-1"):
        tile_slides([replace(entries[0], name=name)], tmp_path, TILING)
    with pytest.raises(DatasetError, match=rf"slides/a-1\.json and a\.json: are both of {entries[0].path}; delete one"):
        tiled_slides(tmp_path)
    (tmp_path / "slides/a-1.json").unlink()
    gather(Tiles(tmp_path))
    assert [slide.name for slide in tiled_slides(tmp_path)[0]] == list(table(tmp_path)) == ["a"]


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
