"""Files are whole or not there."""

from __future__ import annotations

import hashlib
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from medsd.errors import NoTissueError, OutputError, nearest
from medsd.files import (
    MACHINE,
    atomic_path,
    make_folder,
    read_json,
    remove_leftovers,
    sha256_of,
    write_json,
    write_text,
)


def test_atomic_path_replaces_the_old_file_only_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "new" / "map.tif"
    write_text(path, "old")
    with atomic_path(path) as temporary:
        assert temporary.parent == path.parent
        assert temporary.suffix == ".tif"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("error", [ValueError("bad"), NoTissueError("none"), KeyboardInterrupt()])
def test_atomic_path_keeps_the_old_file_after_an_exception(tmp_path: Path, error: BaseException) -> None:
    path = tmp_path / "map.tif"
    path.write_text("old")
    with pytest.raises(type(error)), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_atomic_path_says_which_file_a_full_disk_stopped(tmp_path: Path) -> None:
    path = tmp_path / "map.tif"
    words = r"map\.tif: cannot be written \(No space left on device\)"
    with pytest.raises(OutputError, match=words), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")
    assert not list(tmp_path.iterdir())


def test_atomic_path_without_a_file_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(OutputError), atomic_path(tmp_path / "map.tif"):
        pass


def test_a_folder_below_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot be created") as caught, atomic_path(tmp_path / "file" / "sub" / "x"):
        pass
    assert "\n" not in str(caught.value)
    with pytest.raises(OutputError, match="choose another output folder"):
        make_folder(tmp_path / "file" / "sub")
    with pytest.raises(OutputError, match="choose another output folder"):
        make_folder(tmp_path / "file")


def test_make_folder_leaves_it_empty(tmp_path: Path) -> None:
    assert make_folder(str(tmp_path / "a" / "b")) == tmp_path / "a" / "b"
    assert make_folder(tmp_path / "a" / "b").is_dir()
    assert not list((tmp_path / "a" / "b").iterdir())


def test_write_text_is_utf8(tmp_path: Path) -> None:
    write_text(tmp_path / "x.txt", "0.25 µm, tumour ≥ 0.5\n")
    assert (tmp_path / "x.txt").read_bytes() == "0.25 µm, tumour ≥ 0.5\n".encode()


def test_write_json_round_trip(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": [1, 2.5, None, "µ"]})
    assert json.loads((tmp_path / "x.json").read_text("utf-8")) == {"a": [1, 2.5, None, "µ"]}


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_write_json_refuses_what_is_not_json(tmp_path: Path, value: float) -> None:
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": value})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, "1" * 5000, "nul"])
def test_what_is_no_json_is_one_kind_of_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError):  # noqa: PT011 - its words are the parser's
        read_json(tmp_path / "a.json")


def test_sha256(tmp_path: Path) -> None:
    content = bytes(range(256)) * 5000
    (tmp_path / "x").write_bytes(content)
    assert sha256_of(tmp_path / "x") == hashlib.sha256(content).hexdigest()


def test_nearest() -> None:
    assert nearest("layr2", ["layer1", "layer2", "fc"]) == "; did you mean 'layer2'?"
    assert nearest("TSM", ["gradcam", "tsm", "mtsm"]) == "; did you mean 'tsm'?"
    assert nearest("zzz", ["layer1", "layer2"]) == ""


def test_leftovers_of_dead_processes_go_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    old = [f".{ended.pid}-map.tif", f".{ended.pid}@{MACHINE}-map.tif", ".7@elsewhere-old.tif"]
    living = [f".{os.getppid()}-map.tif", f".{os.getpid()}@{MACHINE}-map.tif", ".7@elsewhere-map.tif"]
    claim = f".{ended.pid}-01.json.claim"  # of a slide whose name begins like a temporary file's
    others = [".hidden", "7-map.tif", ".7x-map.tif", claim, f"{claim}.0123456789abcdef"]
    for name in (*old, *living, *others):
        (tmp_path / name).touch()
    os.utime(tmp_path / ".7@elsewhere-old.tif", (1, 1))
    remove_leftovers(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {*living, *others}
