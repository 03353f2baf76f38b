"""What a folder holds of many slides, and the tables of it: made of all records there, whoever made which slide."""

from __future__ import annotations

import logging
import os
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from medsd.claims import claimed
from medsd.cohort.entry import SlideEntry
from medsd.errors import DatasetError
from medsd.record import is_damaged, read_record
from medsd.tables import write_table

logger = logging.getLogger(__name__)

TABLE = "slides.csv"
# Where each kind of outputs has the records of its slides, by name. A folder holds outputs of one kind.
TILES, FEATURES, FOLDERS = "slides/{}.json", "records/{}.json", "{}/record.json"
_CLAIM = ".tables.claim"
_CHANGED = "damaged or changed, or not all of its files are whole; give the slide again, or delete this file"


@dataclass(frozen=True)
class SlideRow:
    """What became of a slide: a row of `slides.csv`.

    Attributes:
        slide: its name, which its outputs are kept by.
        status: "ok", "empty" (no tissue, or too little) or "failed".
        reason: why it is empty or failed, or what of it could not be judged.
        path: its file.
        seconds: time spent when its outputs were made.
    """

    slide: str
    status: str
    reason: str = ""
    path: str = field(default="", kw_only=True)
    seconds: float = field(default=0.0, kw_only=True)


Row = TypeVar("Row", bound=SlideRow)


def count_by_status(rows: Iterable[SlideRow]) -> dict[str, int]:
    """How many slides are ok, empty and failed."""
    return {"ok": 0, "empty": 0, "failed": 0} | Counter(row.status for row in rows)


class Kept(ABC, Generic[Row]):
    """Outputs of one kind in a folder.

    Attributes:
        folder: where outputs are kept.
        row_type: class of the rows.
        columns: of `slides.csv`, names of fields of the rows.
        record: place of a slide's record in the folder, such as "{}/record.json", with the slide's name for `{}`.
    """

    folder: Path
    row_type: type[Row]
    columns: Sequence[str]
    record: str

    @abstractmethod
    def publish(self, rows: Sequence[Row], recipes: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the cohort's summaries from the rows of all slides in the folder, and the recipes of those by name."""

    def record_of(self, name: str) -> Path:
        """The record of a slide."""
        return self.folder / self.record.format(name)

    def row_of(self, record: Mapping[str, Any]) -> Row:
        """The row that a record holds; TypeError where that is of another version."""
        return self.row_type(**record["result"])

    def cells(self, row: Row) -> Mapping[str, Any]:
        """A row as `slides.csv` has it."""
        return asdict(row)

    def header(self, _rows: Sequence[Row]) -> Sequence[str]:
        """The columns of the table of these rows."""
        return self.columns

    def row_now(self, row: Row, entry: SlideEntry) -> Row:
        """A row with what a run knows better: folders may be moved."""
        return replace(row, path=os.path.abspath(entry.path))  # readers start elsewhere


@dataclass(frozen=True)
class Current(Generic[Row]):
    """What one run adds to the records.

    Attributes:
        entries: its slides by name; their rows come first, in this order.
        unrecorded: rows of failed slides that have no record of it.
    """

    entries: Mapping[str, SlideEntry] = field(default_factory=dict)
    unrecorded: dict[str, Row] = field(default_factory=dict)


def holds(folder: Path, place: str) -> bool:
    """Whether a folder has a record in such a place, of a slide whose place it is.

    A slide may be called "records" or "record", and then has its record where another kind has them.
    """
    for path in folder.glob(place.format("*")):
        record = read_record(path)
        if record is not None and folder / place.format(record["result"]["slide"]) == path:
            return True
    return False


def gather(kept: Kept[Row], current: Current[Row] | None = None) -> list[Row]:
    """Write `slides.csv` and the summaries from all records in the folder; one process at a time does.

    Raises:
        DatasetError: there is none.
        OutputError: the folder cannot be written to.
    """
    with claimed(kept.folder / _CLAIM, wait=True):
        rows, recipes, elsewhere = _write_rows(kept, current or Current())
        if elsewhere:
            logger.warning(
                "%s: %d records are not where their slides have them (copied or renamed), left out, the first: %s",
                *(kept.folder, len(elsewhere), min(elsewhere)),
            )
        if not rows:
            raise DatasetError(
                f"{kept.folder}: no records of slides; name one that medsd tiles, heatmap, segment or features wrote"
            )
        kept.publish(rows, recipes)
    return rows


def write_rows(kept: Kept[Row], current: Current[Row]) -> None:
    """Write `slides.csv` as far as it goes, unless another process is at it."""
    with claimed(kept.folder / _CLAIM) as claim:
        if claim is not None:
            _write_rows(kept, current)


def _write_rows(kept: Kept[Row], current: Current[Row]) -> tuple[list[Row], dict[str, Any], list[Path]]:
    """The rows of all slides in the folder, this run's first, their recipes by name, and records that are left out."""
    rows, recipes, elsewhere = dict(current.unrecorded), {}, []
    for path in kept.folder.glob(kept.record.format("*")):
        try:
            record = read_record(path)
            if record is None:
                name = _name_of(path, kept)
                # Or it is being made again, or it is no record at all.
                if name not in current.entries and is_damaged(path):
                    rows.setdefault(name, kept.row_type(name, "failed", f"{path}: {_CHANGED}"))
                continue
            row = kept.row_of(record)
        except (KeyError, TypeError):
            continue  # of an earlier version: done again by a run that is given the slide
        if kept.record_of(row.slide) != path:
            elsewhere.append(path)
            continue
        # Of a slide that failed and was taken away, nobody needs to hear again.
        if row.status == "failed" and _is_gone(row, current):
            continue
        recipes[row.slide] = record["recipe"]
        entry = current.entries.get(row.slide)
        rows.setdefault(row.slide, row if entry is None else kept.row_now(row, entry))
    order = {name: number for number, name in enumerate(current.entries)}
    ordered = sorted(rows.values(), key=lambda row: (order.get(row.slide, len(order)), row.slide))
    write_table(kept.folder / TABLE, map(kept.cells, ordered), kept.header(ordered))
    return ordered, recipes, elsewhere


def _name_of(record: Path, kept: Kept[Any]) -> str:
    before, behind = kept.record.split("{}")
    return record.relative_to(kept.folder).as_posix().removeprefix(before).removesuffix(behind)


def _is_gone(row: SlideRow, current: Current[Row]) -> bool:
    return row.slide not in current.entries and not Path(row.path).exists()
