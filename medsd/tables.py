"""Tables on disk: one way to read a CSV, with errors that name the row, and one way to write it."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from medsd.errors import DatasetError, nearest
from medsd.files import printable, write_text

_FORMULA = ("=", "+", "-", "@")


def read_table(
    path: str | Path, columns: Iterable[str] = (), known: Sequence[str] = (), header: bool = True
) -> pd.DataFrame:
    """The cells of a CSV in UTF-8 as text without surrounding blanks, empty where empty; empty rows are left out.

    Args:
        path: the table, separated by commas; the first row names the columns, which are given back in lower case.
        columns: those that must be there.
        known: those that may be there; none for any.
        header: False where the first row is a row as others; columns are then numbered, and short rows filled up.

    Returns:
        a frame whose index is the number of the row in the file, counted from 1.

    Raises:
        DatasetError: the file cannot be read, is no such table, or lacks a column; with the row and what to do.

    Example:
        >>> write_table("slides.csv", [{"slide": "a.svs", "mpp": None}, {"slide": "b.svs", "mpp": 0.25}])
        >>> read_table("slides.csv", ["slide"]).loc[3].to_dict()
        {'slide': 'b.svs', 'mpp': '0.25'}
    """
    rows = [[_plain(cell.strip()) for cell in row] for row in _rows(Path(path))]
    heads = [cell.lower() for cell in rows[0]] if rows else []
    # Rows without a word may be longer than the first, as spreadsheets leave them.
    found = {number: row for number, row in enumerate(rows, start=1) if any(row) and not (header and number == 1)}
    if header:
        _check_header(f"{path}: row 1", heads, columns, known)
        for number, row in found.items():
            if len(row) != len(heads):
                raise DatasetError(
                    f"{path}: row {number}: {len(row)} cells where the first row has {len(heads)}; "
                    "quote cells that hold a comma"
                )
    names = heads if header else None
    return pd.DataFrame(list(found.values()), list(found), names, dtype=object).fillna("")


def write_table(path: str | Path, rows: Iterable[Mapping[str, Any]], columns: Sequence[str] | None = None) -> None:
    """Write rows as CSV in UTF-8, atomically; None and NaN are empty cells.

    What is no text (line breaks, undecodable bytes of a file's name) becomes a question mark. Text that a spreadsheet
    would take for a formula (a slide named `=cmd`) gets an apostrophe in front, which `read_table` takes away.

    Args:
        path: the file.
        rows: values by column.
        columns: their order; that of the rows where not given, which must not be empty then.

    Raises:
        OutputError: the file cannot be written.
    """
    cells = [
        {name: _no_formula(printable(value)) if isinstance(value, str) else value for name, value in row.items()}
        for row in rows
    ]
    frame = pd.DataFrame(cells, columns=columns, dtype=object)  # or pandas makes 3 beside None 3.0
    write_text(path, frame.to_csv(index=False, lineterminator="\n"))


def _no_formula(text: str) -> str:
    if not text.startswith(_FORMULA):
        return text
    try:
        float(text)
    except ValueError:
        return f"'{text}"
    return text


def _plain(cell: str) -> str:
    return cell[1:] if cell[:1] == "'" and cell[1:].startswith(_FORMULA) else cell


def _rows(path: Path) -> list[list[str]]:
    try:
        data = path.read_bytes()
        text = data.decode("utf-8-sig")
    except OSError as error:
        raise DatasetError(f"{path}: cannot be read ({error.strerror}); name a table (.csv)") from error
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        raise DatasetError(f"{path}: row {number}: not UTF-8; save the table as CSV in UTF-8") from error
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.replace("\t", " ").isprintable():
            raise DatasetError(f"{path}: row {number}: characters that are no text; save the table as CSV in UTF-8")
    try:
        return list(csv.reader(text.splitlines(keepends=True), strict=True))
    except csv.Error as error:
        raise DatasetError(f"{path}: not a table ({error}); close every quote") from error


def _check_header(where: str, heads: Sequence[str], columns: Iterable[str], known: Sequence[str]) -> None:
    for separator, word in ((";", "semicolons"), ("\t", "tabs")):
        if len(heads) == 1 and separator in heads[0]:
            raise DatasetError(f"{where}: cells are separated by {word}; save the table with commas")
    for name in heads:
        if known and name not in known:
            raise DatasetError(f"{where}: column '{name}' is unknown{nearest(name, known)} ({', '.join(known)})")
        if heads.count(name) > 1:
            raise DatasetError(f"{where}: column '{name}' is there twice; drop one")
    for name in columns:
        if name not in heads:
            raise DatasetError(
                f"{where}: no column '{name}'{nearest(name, heads)}; the first row names the columns"
                + (f", {','.join(known)}" if known else "")
            )
