"""Many slides, each made into its own outputs: what is done stays, a bad slide costs only itself, tables tell of all.

Any number of processes and machines may run in one folder. A process writes only the outputs of the slides it was
given; tables are made of the records of all slides in the folder.
"""

from __future__ import annotations

import filecmp
import json
import logging
import os
import threading
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from medsd.checks import check_number
from medsd.cohort.entry import SlideEntry, check_names
from medsd.errors import DatasetError, MedsdError
from medsd.files import make_folder, remove_leftovers
from medsd.progress import Progress, no_progress
from medsd.record import identity, read_record, write_record
from medsd.slides.isolate.slide import IsolatedSlide
from medsd.slides.readers.damage import UNFORESEEN, in_one_line
from medsd.slides.slide import Slide, open_slide
from medsd.tables import write_table

logger = logging.getLogger(__name__)

TABLE = "slides.csv"
_TABLE_SECONDS = 1.0
# Of the time, for the table of thousands of slides.
_TABLE_SHARE = 0.05


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


@dataclass(frozen=True)
class Made(Generic[Row]):
    """What a slide was made into: its row, and what its record keeps beside that."""

    row: Row
    outputs: Sequence[str] = ()
    content: Mapping[str, Any] = field(default_factory=dict)


class Work(ABC, Generic[Row]):
    """What is done with each slide of a cohort.

    Attributes:
        folder: where outputs are kept.
        row_type: class of the rows.
        columns: of `slides.csv`, names of fields of the rows.
        record: place of a slide's record in the folder, such as "{}/record.json", with the slide's name for `{}`.
        outputs: all files that a slide may leave, likewise, from the record's folder; those of an earlier recipe go
            before new ones are made.
        summaries: files of the whole cohort that are wrong while slides are made anew, and go before.
    """

    folder: Path
    row_type: type[Row]
    columns: Sequence[str]
    record: str
    outputs: Sequence[str]
    summaries: Sequence[str] = ()

    @abstractmethod
    def recipe(self, entry: SlideEntry) -> Mapping[str, Any]:
        """What a slide's outputs follow from beside its file and scale, as JSON values."""

    def row(self, entry: SlideEntry, status: str, reason: str = "") -> Row:
        """The row of a slide of which nothing else is known."""
        return self.row_type(entry.name, status, reason, path=str(entry.path))

    @abstractmethod
    def make(self, slide: Slide, entry: SlideEntry, progress: Progress) -> Made[Row]:
        """Make a slide's outputs; any error that a damaged file can cause makes it a failed one."""

    @abstractmethod
    def publish(self, rows: Sequence[Row], recipes: Mapping[str, Mapping[str, Any]]) -> None:
        """Write the cohort's summaries from the rows of all slides in the folder, and the recipes of those by name."""


def run_cohort(
    work: Work[Row],
    entries: Sequence[SlideEntry],
    workers: int | None = 1,
    isolate: bool = True,
    progress: Progress = no_progress,
) -> list[Row]:
    """Make the outputs of every slide, its record last; leave `slides.csv` and the work's summaries in its folder.

    A slide whose record matches is not done again; one that failed is. A run that is killed loses only the slides at
    work.

    Args:
        work: what is done.
        entries: the slides.
        workers: slides at work at once; None for as many as there are processors.
        isolate: read each slide in a process of its own, so that a file that crashes or hangs a decoder costs only
            its slide.
        progress: shows the slides that are done, and with one worker what is done of each.

    Returns:
        the rows of `entries`, in their order.

    Raises:
        DatasetError: no slides, two of one name, or outputs of another slide of that name in the folder.
        ConfigError: fewer than one worker.
        OutputError: the folder cannot be written to.
    """
    if not entries:
        raise DatasetError("no slides; name slides, a folder of them or a manifest")
    if workers is not None:
        check_number("workers", workers, "[1, inf)", whole=True)
    check_names(entries)
    run = _Run(work, {entry.name: entry for entry in entries}, isolate)
    for entry in entries:
        run.check_owner(entry)
    make_folder(work.folder)
    done = {entry.name: row for entry in entries if (row := run.kept(entry)) is not None}
    todo = [entry for entry in entries if entry.name not in done]
    if todo:
        run.remove((work.folder / name for name in work.summaries), todo)
    workers = min(workers or os.cpu_count() or 1, max(len(todo), 1))
    pool = ThreadPoolExecutor(workers) if workers > 1 else None
    if pool is None:
        finished: Iterable[Row] = (run.finish(entry, progress) for entry in todo)
    else:
        jobs = [pool.submit(run.finish, entry, run.until_stopped) for entry in todo]
        finished = (job.result() for job in as_completed(jobs))
    written, pause = 0.0, 0.0
    try:
        for row in progress(finished, len(todo), "slide") if todo else ():
            done[row.slide] = row
            if time.monotonic() - written > pause:
                started = time.monotonic()
                try:
                    run.write_table()
                except MedsdError as error:  # the next or the last may go well
                    logger.warning("%s", error)
                written = time.monotonic()
                pause = max(_TABLE_SECONDS, (written - started) / _TABLE_SHARE)
    finally:
        run.stop.set()
        if pool is not None:
            pool.shutdown(cancel_futures=True)
    work.publish(*run.write_table())
    return [done[entry.name] for entry in entries]


def is_made(work: Work[Row], entries: Sequence[SlideEntry]) -> bool:
    """Whether `run_cohort` has been through all `entries`, as they are now: each has its outputs, or failed."""
    run = _Run(work, {}, False)
    return all(run.kept(entry) or run.has_failed(entry) for entry in entries)


class _StoppedError(Exception):
    """The run ends before its slides are done."""


@dataclass(frozen=True)
class _Run(Generic[Row]):
    """One call of `run_cohort`; `unrecorded` are rows of failed slides that have no record of it."""

    work: Work[Row]
    entries: Mapping[str, SlideEntry]
    isolate: bool
    unrecorded: dict[str, Row] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    def until_stopped(self, items: Iterable[Any], _total: int, _unit: str) -> Iterator[Any]:
        """A `Progress` that shows nothing and ends with the run."""
        for item in items:
            if self.stop.is_set():
                raise _StoppedError
            yield item

    def check_owner(self, entry: SlideEntry) -> None:
        """Raise DatasetError where the folder holds outputs of another slide of this name, which are not ours."""
        record = read_record(self._record(entry.name))
        if record is None or record["status"] == "failed":
            return
        other = str(record["result"]["path"])
        if not _is_same_slide(entry.path, other, record["recipe"]["slide"]):
            raise DatasetError(
                f"{entry.path}: {self.work.folder} holds outputs of another slide of this name, {other}; "
                "rename one, or use another folder"
            )

    def kept(self, entry: SlideEntry) -> Row | None:
        """The row of a slide whose outputs are those that would be made."""
        try:
            record = read_record(self._record(entry.name), self._recipe(entry))
            if record is None or record["status"] == "failed":
                return None
            return self._row(record)
        except (OSError, KeyError, TypeError):
            return None  # a file is not there, or the record is of another version: trying tells

    def has_failed(self, entry: SlideEntry) -> bool:
        """Whether a run tried the slide in vain, or its file cannot be reached now."""
        record = read_record(self._record(entry.name))
        return record is not None and (record["status"] == "failed" or _identity(entry.path) is None)

    def finish(self, entry: SlideEntry, progress: Progress) -> Row:
        """Make the slide's outputs and record; a failure is a row, too."""
        started = time.perf_counter()
        try:
            self.check_owner(entry)
            with IsolatedSlide(entry.path, entry.mpp) if self.isolate else open_slide(entry.path, entry.mpp) as slide:
                self.remove(self._files(entry), [entry])
                made = self.work.make(slide, entry, progress)
            made = replace(made, row=replace(made.row, seconds=round(time.perf_counter() - started, 2)))
            if made.row.status == "failed":
                logger.error("%s", made.row.reason)
            self._write_record(entry, made)
            return made.row
        except MedsdError as error:
            reason = str(error)
            logger.error("%s", reason)
        except UNFORESEEN as error:
            # Nobody foresaw these; the cohort goes on all the same, and the log keeps where it happened.
            reason = in_one_line(entry.path, error)
            logger.exception("%s", entry.path)
        row = replace(self.work.row(entry, "failed", reason), seconds=round(time.perf_counter() - started, 2))
        try:
            self._fail(entry, row)
        except (MedsdError, *UNFORESEEN) as error:
            logger.error("%s", error)
            self.unrecorded[entry.name] = row
        return row

    def remove(self, files: Iterable[Path], entries: Sequence[SlideEntry]) -> None:
        """Remove files, and what killed processes left half written in the folders of the outputs of `entries`."""
        for path in files:
            path.unlink(missing_ok=True)
        for folder in {self.work.folder, *(path.parent for entry in entries for path in self._files(entry))}:
            remove_leftovers(folder)

    def write_table(self) -> tuple[list[Row], dict[str, Any]]:
        """Write `slides.csv`; the rows of all slides in the folder, this run's first, and their recipes by name."""
        rows, recipes = dict(self.unrecorded), {}
        for path in self.work.folder.glob(self.work.record.format("*")):
            try:
                record = read_record(path)
                row = None if record is None else self._row(record)
            except (KeyError, TypeError):
                continue  # of an earlier version: done again by a run that is given the slide
            # Of a slide that failed and was taken away, nobody needs to hear again.
            if record is None or row is None or (row.status == "failed" and self._is_gone(row)):
                continue
            recipes[row.slide] = record["recipe"]
            rows.setdefault(row.slide, row)
        order = {name: number for number, name in enumerate(self.entries)}
        ordered = sorted(rows.values(), key=lambda row: (order.get(row.slide, len(order)), row.slide))
        write_table(self.work.folder / TABLE, map(asdict, ordered), self.work.columns)
        return ordered, recipes

    def _is_gone(self, row: Row) -> bool:
        return row.slide not in self.entries and not os.path.exists(row.path)

    def _row(self, record: Mapping[str, Any]) -> Row:
        """The row in a record, with the slide's place as it is for this run: folders may be moved."""
        row = self.work.row_type(**record["result"])
        entry = self.entries.get(row.slide)
        return row if entry is None else replace(row, path=str(entry.path))

    def _fail(self, entry: SlideEntry, row: Row) -> None:
        """Record a failure, unless there are outputs of another file, or of this one that merely cannot be reached."""
        self.check_owner(entry)
        record = read_record(self._record(entry.name))
        if record is not None and record["status"] != "failed" and _identity(entry.path) is None:
            self.unrecorded[entry.name] = row
            return
        self.remove(self._files(entry), [])
        self._write_record(entry, Made(row))

    def _write_record(self, entry: SlideEntry, made: Made[Row]) -> None:
        recipe = {} if made.row.status == "failed" else self._recipe(entry)
        content = {"status": made.row.status, "result": asdict(made.row), **made.content}
        write_record(self._record(entry.name), recipe, made.outputs, **content)

    def _recipe(self, entry: SlideEntry) -> dict[str, Any]:
        return {"slide": identity(entry.path), "mpp": entry.mpp, **self.work.recipe(entry)}

    def _record(self, name: str) -> Path:
        return self.work.folder / self.work.record.format(name)

    def _files(self, entry: SlideEntry) -> list[Path]:
        """The record of a slide, which goes first, and all its outputs: what the work names, and what the record does.

        Of an earlier recipe there may have been others in the folder, such as maps of methods of other packages.
        """
        record = self._record(entry.name)
        names = [name.format(entry.name) for name in self.work.outputs]
        kept = read_record(record) or {"outputs": ()}
        others = [name for name in kept["outputs"] if Path(name).name == name and name not in names]
        return [record, *(record.parent / name for name in [*names, *others])]


def _identity(path: Path) -> Any:
    """As records hold it; None where the file cannot be reached."""
    try:
        return json.loads(json.dumps(identity(path)))
    except OSError:
        return None


def _is_same_slide(path: Path, recorded: str, recorded_identity: Any) -> bool:
    """Whether `path` is what was `recorded`, changed or copied, and no other file of the same name."""
    now = _identity(path)
    if str(path) == recorded or now in (None, recorded_identity):
        return True
    if [part[:2] for part in now] != [part[:2] for part in recorded_identity]:
        return False  # another name or size
    both = path.is_file() and os.path.isfile(recorded)
    return not os.path.exists(recorded) or (both and filecmp.cmp(path, recorded, shallow=False))
