"""Is it done already?"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from medsd.record import differences, identity, read_record, write_record


@pytest.fixture
def done(tmp_path: Path) -> Path:
    (tmp_path / "map.tif").touch()
    write_record(tmp_path / "record.json", {"scale": (1, 2)}, ["map.tif"], score=0.5)
    return tmp_path / "record.json"


def test_a_record_of_the_same_recipe_is_given_back(done: Path) -> None:
    record = read_record(done, {"scale": (1, 2)})
    assert record is not None and record["score"] == 0.5 and record["versions"]["torch"]
    assert read_record(done) == record


def test_another_recipe_is_made_again(done: Path) -> None:
    assert read_record(done, {"scale": (1, 3)}) is None
    assert read_record(done, {}) is None


def test_another_version_is_made_again(done: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("medsd.__version__", "other")
    assert read_record(done, {"scale": (1, 2)}) is None


def test_a_lost_output_is_made_again(done: Path) -> None:
    (done.parent / "map.tif").unlink()
    assert read_record(done, {"scale": (1, 2)}) is None


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"recipe": 1}', '{"recipe": 1, "outputs": 5}', "null", "[" * 5000]
)
def test_a_damaged_record_is_made_again(done: Path, text: str) -> None:
    done.write_text(text)
    assert read_record(done) is None


def test_an_altered_record_is_made_again(done: Path) -> None:
    kept = json.loads(done.read_text())
    for change in ({"score": 0.6}, {"more": 1}):
        done.write_text(json.dumps({**kept, **change}))
        assert read_record(done) is None
    done.write_text(json.dumps(kept, indent=3))  # the same in other words
    assert read_record(done) is not None


def test_no_record_is_made(tmp_path: Path) -> None:
    assert read_record(tmp_path / "record.json") is None


def test_identity_tells_a_file_and_what_lies_in_a_folder(tmp_path: Path) -> None:
    (tmp_path / "data").write_text("one")
    before, folder = identity(tmp_path / "data"), identity(tmp_path)
    (tmp_path / "other").touch()
    assert identity(tmp_path / "data") == before == json.loads(json.dumps(before)) and identity(tmp_path) != folder
    os.utime(tmp_path / "data", ns=(1, 1))
    assert identity(tmp_path / "data") != before


def test_differences_are_named() -> None:
    assert differences({"lr": 0.1, "gone": 1, "same": [1]}, {"lr": 0.2, "new": 1, "same": (1,)}) == [
        "gone",
        "lr",
        "new",
    ]


def test_a_truncated_output_is_made_again(tmp_path: Path) -> None:
    (tmp_path / "map.tif").write_text("whole")
    (tmp_path / "folder").mkdir()
    write_record(tmp_path / "record.json", {}, ["map.tif", "folder"])
    (tmp_path / "folder" / "more").touch()
    assert read_record(tmp_path / "record.json", {}) is not None
    (tmp_path / "map.tif").write_text("who")
    assert read_record(tmp_path / "record.json", {}) is None
