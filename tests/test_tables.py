"""Tables in and out."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from medsd.errors import DatasetError
from medsd.tables import read_table, write_table


def test_what_is_written_is_read_as_text(tmp_path: Path) -> None:
    rows = [{"slide": "ä, 1", "score": 0.1, "regions": 3}, {"slide": 'b"', "score": None, "regions": None}]
    write_table(tmp_path / "t.csv", rows)
    assert (tmp_path / "t.csv").read_bytes() == 'slide,score,regions\n"ä, 1",0.1,3\n"b""",,\n'.encode()
    assert read_table(tmp_path / "t.csv", ["slide"]).to_dict("index") == {
        2: {"slide": "ä, 1", "score": "0.1", "regions": "3"},
        3: {"slide": 'b"', "score": "", "regions": ""},
    }
    write_table(tmp_path / "t.csv", [], ["slide"])
    assert (tmp_path / "t.csv").read_text() == "slide\n" and len(read_table(tmp_path / "t.csv", ["slide"])) == 0


def test_what_is_no_text_costs_no_table(tmp_path: Path) -> None:
    write_table(tmp_path / "t.csv", [{"slide": os.fsdecode(b"f\xe9vrier"), "reason": "one\ntwo", "score": math.nan}])
    assert (tmp_path / "t.csv").read_text() == "slide,reason,score\nf?vrier,one?two,\n"


def test_rows_keep_their_numbers_and_short_ones_are_filled_up_without_a_header(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a, b,c\n\n d\n")
    assert read_table(tmp_path / "t.csv", header=False).T.to_dict("list") == {1: ["a", "b", "c"], 3: ["d", "", ""]}


@pytest.mark.parametrize("text", ["slide,mpp\n,,,\na,1\n", "slide,mpp\na,1\n,,,", "slide,mpp\n\na,1\n,\n"])
def test_rows_without_a_word_are_no_rows_however_long(tmp_path: Path, text: str) -> None:
    path = tmp_path / "t.csv"
    path.write_text(text)
    assert read_table(path, ["slide"]).to_numpy().tolist() == [["a", "1"]]
    path.write_text("slide\n,")
    assert read_table(path, ["slide"]).empty


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "row 1: no column 'slide'; the first row names the columns"),
        ("slid\n", r"row 1: no column 'slide'; did you mean 'slid'\?; the first row"),
        ("slide;mpp\n", "row 1: cells are separated by semicolons"),
        ("slide,slide\n", "row 1: column 'slide' is there twice"),
        ("slide\n\na,b\n", "row 3: 2 cells where the first row has 1"),
        ("slide\n\x00\n", "row 2: characters that are no text"),
        ('slide\n"a\n', "close every quote"),
    ],
)
def test_mistakes_name_the_row(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(DatasetError, match=words):
        read_table(tmp_path / "t.csv", ["slide"])


def test_no_cell_is_a_formula(tmp_path: Path) -> None:
    cells = ["=cmd|'/c calc'!A1", "+1+1", "@SUM(A1)", "-slide", "-1.5", "+2", "a=b"]
    write_table(tmp_path / "a.csv", [{"slide": cell} for cell in cells])
    lines = (tmp_path / "a.csv").read_text().splitlines()[1:]
    assert lines == ["'=cmd|'/c calc'!A1", "'+1+1", "'@SUM(A1)", "'-slide", "-1.5", "+2", "a=b"]
    assert read_table(tmp_path / "a.csv")["slide"].tolist() == cells
