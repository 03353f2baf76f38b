"""Many slides, each made into its own outputs: what is done stays, a bad slide costs only itself.

Any number of processes and machines may run in one folder. A process writes only the outputs of the slides it was
given, and claims each while it is at work on it; tables are made of the records of all slides in the folder.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from abc import abstractmethod
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Generic

import medsd
from medsd.checks import WORKERS, check_number
from medsd.claims import Claim, claimed, forget_abandoned
from medsd.cohort.before import Before
from medsd.cohort.entry import SlideEntry, check_names, with_own_names
from medsd.cohort.kept import Current, Kept, Row, gather, write_rows
from medsd.cohort.owner import check_kind, check_owner, known_identity, with_free_name
from medsd.errors import DatasetError, MedsdError, OutputError, SlideError
from medsd.files import make_folder, remove_leftovers
from medsd.progress import Progress, no_progress
from medsd.record import differences, read_record, rewrite_record, write_record
from medsd.slides.isolate.slide import IsolatedSlide
from medsd.slides.parts import slide_identity
from medsd.slides.readers.damage import UNFORESEEN, in_one_line
from medsd.slides.slide import Slide, open_slide

logger = logging.getLogger(__name__)

_TABLE_SECONDS = 1.0
# Of the time, for the table of thousands of slides.
_TABLE_SHARE = 0.05


@dataclass(frozen=True)
class Made(Generic[Row]):
    """What a slide was made into: its row, and what its record keeps beside that."""

    row: Row
    outputs: Sequence[str] = ()
    content: Mapping[str, Any] = field(default_factory=dict)


class Work(Kept[Row]):
    """What is done with each slide of a cohort, beside how it is kept.

    Attributes:
        outputs: all files that a slide may leave, named as `record`, from the record's folder; those of an earlier
            recipe stand aside while new ones are made.
        summaries: files of the whole cohort that are wrong while slides are made anew, and go before.
    """

    outputs: Sequence[str]
    summaries: Sequence[str] = ()

    @abstractmethod
    def recipe(self, entry: SlideEntry) -> Mapping[str, Any]:
        """What a slide's outputs follow from beside its file and scale, as JSON values."""

    def row(self, entry: SlideEntry, status: str, reason: str = "") -> Row:
        """The row of a slide of which nothing else is known."""
        return self.row_now(self.row_type(entry.name, status, reason), entry)

    @abstractmethod
    def make(self, slide: Slide, entry: SlideEntry, progress: Progress) -> Made[Row]:
        """Make a slide's outputs; any error that a damaged file can cause makes it a failed one."""


@dataclass(frozen=True)
class Sharing:
    """How a run shares its folder with others.

    Attributes:
        rename: give a slide whose name another one's outputs have in the folder one of its own, instead of refusing it.
        gather: leave tables of all slides in the folder; of many runs at once, one may do it for all in the end.
    """

    rename: bool = False
    gather: bool = True


ALONE = Sharing()


def run_cohort(
    work: Work[Row],
    entries: Sequence[SlideEntry],
    workers: int | None = 1,
    isolate: bool = True,
    progress: Progress = no_progress,
    sharing: Sharing = ALONE,
) -> list[Row]:
    """Make the outputs of every slide, its record last; leave `slides.csv` and the work's summaries in its folder.

    A slide whose record matches is not done again; one that failed is. A run that is killed loses only the slides at
    work. A slide that another run has in hand comes last: it is waited for, and done here only if that run failed.

    Args:
        work: what is done.
        entries: the slides.
        workers: slides at work at once; None for as many as there are processors.
        isolate: read each slide in a process of its own, so that a file that crashes or hangs a decoder costs only
            its slide.
        progress: shows the slides that are done, and with one worker what is done of each.
        sharing: with other runs in the folder.

    Returns:
        the rows of `entries`, in their order.

    Raises:
        DatasetError: no slides, two of one name, or outputs of another slide of that name, or of another kind, in the
            folder.
        ConfigError: fewer than one worker.
        OutputError: the folder cannot be written to.
    """
    if not entries:
        raise DatasetError("no slides; name slides, a folder of them or a manifest")
    if workers is not None:
        check_number("workers", workers, WORKERS, whole=True)
    if sharing.rename:
        entries = with_own_names([with_free_name(work, entry) for entry in entries])
    check_names(entries)
    run = _Run(work, Current({entry.name: entry for entry in entries}), isolate)
    check_kind(work)
    for entry in entries:
        check_owner(work, entry)
    make_folder(work.folder)
    done = {entry.name: row for entry in entries if (row := run.refreshed(entry)) is not None}
    todo = [entry for entry in entries if entry.name not in done]
    if todo:
        run.tell_of_replaced(todo)
        run.remove((work.folder / name for name in work.summaries), todo)
    try:
        _go_through(run, todo, workers, progress, sharing.gather, done)
        if sharing.gather:
            gather(work, run.current)
    except KeyboardInterrupt:
        if sharing.gather:
            with suppress(MedsdError):
                write_rows(work, run.current)  # outputs that stood aside are back
        logger.warning("%s: stopped; the same command goes on (medsd gather: tables of what is there)", work.folder)
        raise
    return [done[entry.name] for entry in entries]


def _go_through(
    run: _Run[Row],
    todo: Sequence[SlideEntry],
    workers: int | None,
    progress: Progress,
    tables: bool,
    done: dict[str, Row],
) -> None:
    """Make the outputs of slides, with their rows into `done`, and now and then the table of those so far."""
    work, written, pause = run.work, 0.0, 0.0
    with closing(run.finished(todo, workers, progress)) as finished:
        for row in progress(finished, len(todo), "slide") if todo else ():
            done[row.slide] = row
            logger.info("%s: %s, %g s%s", row.slide, row.status, row.seconds, f"; {row.reason}" if row.reason else "")
            if time.monotonic() - written > pause and tables:
                started = time.monotonic()
                try:
                    write_rows(work, run.current)
                except MedsdError as error:  # the next or the last may go well
                    logger.warning("%s", error)
                written = time.monotonic()
                pause = max(_TABLE_SECONDS, (written - started) / _TABLE_SHARE)


def is_made(work: Work[Row], entries: Sequence[SlideEntry]) -> bool:
    """Whether `run_cohort` has been through all `entries`, as they are now: each has its outputs, or failed."""
    run = _Run(work, Current(), False)
    return all(run.kept(entry) or run.has_failed(entry) for entry in entries)


def _is_stop(error: BaseException | None) -> bool:
    """Whether Ctrl-C is behind an error: what libraries raise that it breaks into is no word on the slide."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _is_blameless(error: BaseException) -> bool:
    """Whether a disk or memory was full, which is not the slide's fault; torch says so by an error without a class."""
    return isinstance(error, OutputError | OSError | MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in str(error) or "allocate memory" in str(error))
    )


class _StoppedError(Exception):
    """The run ends before its slides are done."""


@dataclass(frozen=True)
class _Run(Generic[Row]):
    """One call of `run_cohort`."""

    work: Work[Row]
    current: Current[Row]
    isolate: bool
    stop: threading.Event = field(default_factory=threading.Event)

    def finished(
        self, todo: Sequence[SlideEntry], workers: int | None, progress: Progress
    ) -> Generator[Row, None, None]:
        """The rows of slides as they are done, those that other runs have in hand last."""
        workers = min(workers or os.cpu_count() or 1, max(len(todo), 1))
        pool = ThreadPoolExecutor(workers) if workers > 1 else None
        if pool is None:
            done: Iterable[tuple[SlideEntry, Row | None]] = ((entry, self.finish(entry, progress)) for entry in todo)
        else:
            jobs = {pool.submit(self.finish, entry, self.until_stopped): entry for entry in todo}
            done = ((jobs[job], job.result()) for job in as_completed(jobs))
        elsewhere = []
        try:
            for entry, row in done:
                if row is None:
                    elsewhere.append(entry)
                else:
                    yield row
            for entry in elsewhere:
                row = self.finish(entry, progress, wait=True)
                assert row is not None
                yield row
        finally:
            self.stop.set()
            if pool is not None:
                pool.shutdown(cancel_futures=True)

    def until_stopped(self, items: Iterable[Any], _total: int, _unit: str) -> Iterator[Any]:
        """A `Progress` that shows nothing and ends with the run."""
        for item in items:
            if self.stop.is_set():
                raise _StoppedError
            yield item

    def kept(self, entry: SlideEntry) -> Row | None:
        """The row of a slide whose outputs are those that would be made."""
        record = self._kept_record(entry)
        return None if record is None else self._row(record, entry)

    def refreshed(self, entry: SlideEntry) -> Row | None:
        """`kept`, with what changed of the row alone written to the record."""
        record = self._kept_record(entry)
        if record is None:
            return None
        row = self._row(record, entry)
        forget_abandoned(self._claim_of(entry))  # of a run that was killed between record and release
        before = self._before(entry)
        if before.folder.is_dir():
            with claimed(self._claim_of(entry)) as claim:
                if claim is not None and self.kept(entry) is not None:
                    before.forget()
        if asdict(row) != record["result"]:
            rewrite_record(self.work.record_of(entry.name), {**record, "result": asdict(row)})
        return row

    def tell_of_replaced(self, entries: Sequence[SlideEntry]) -> None:
        """Warn of finished outputs that go since the settings differ: the folder may be another's than was meant."""
        changed: dict[str, list[str]] = {}
        for entry in entries:
            record = read_record(self.work.record_of(entry.name))
            if record is not None and record["status"] != "failed" and (found := self._changed(record, entry)):
                changed[entry.name] = found
        if changed:
            logger.warning(
                "%s: finished outputs of %d slides are made anew, since these differ: %s",
                *(
                    self.work.folder,
                    len(changed),
                    ", ".join(sorted({key for names in changed.values() for key in names})),
                ),
            )

    def _changed(self, record: Mapping[str, Any], entry: SlideEntry) -> list[str]:
        """What a slide's recipe has different now; nothing where an input is not there, which trying tells."""
        try:
            return differences(record["recipe"], {"medsd": medsd.__version__, **self._recipe(entry)})
        except OSError:
            return []

    def has_failed(self, entry: SlideEntry) -> bool:
        """Whether a run tried the slide, as it is now, in vain, or its file cannot be reached now."""
        record = read_record(self.work.record_of(entry.name))
        if record is None or known_identity(entry.path) is None:
            return record is not None
        return record["status"] == "failed" and not self._changed(record, entry)

    def finish(self, entry: SlideEntry, progress: Progress, wait: bool = False) -> Row | None:
        """Make the slide's outputs and record, unless another run just did; a failure is a row, too.

        None where another run has it in hand, which `wait` waits for.
        """
        try:
            with claimed(self._claim_of(entry), wait) as claim:
                if claim is None:
                    return None
                self._before(entry).bring_back()  # of a run that was killed
                return self.kept(entry) or self._make(entry, progress, claim)
        except (OutputError, OSError) as error:  # of the claim
            logger.error("%s", error)
            self.current.unrecorded[entry.name] = row = self.work.row(entry, "failed", str(error))
            return row

    def _claim_of(self, entry: SlideEntry) -> Path:
        record = self.work.record_of(entry.name)
        return record.with_name(f".{record.name}.claim")

    def _make(self, entry: SlideEntry, progress: Progress, claim: Claim) -> Row:
        started, before = time.perf_counter(), self._before(entry)
        try:
            check_owner(self.work, entry)
            recipe = self._recipe_of_opening(entry)
            with IsolatedSlide(entry.path, entry.mpp) if self.isolate else open_slide(entry.path, entry.mpp) as slide:
                before.set_aside()
                self.remove((), [entry])
                made = self.work.make(slide, entry, progress)
            if self._recipe_of_opening(entry) != recipe:
                raise SlideError(f"{entry.path}: was changed while it was read; run again when it is whole")
            made = replace(made, row=replace(made.row, seconds=round(time.perf_counter() - started, 2)))
            if made.row.status == "failed":
                logger.error("%s", made.row.reason)
            self._write_record(entry, made, recipe, claim)
            before.forget()
            return made.row
        except BaseException as error:
            if (stopped := _is_stop(error)) or not isinstance(error, (MedsdError, *UNFORESEEN)):
                if claim.held:
                    before.bring_back()
                if stopped:
                    raise KeyboardInterrupt from error
                raise
            blameless = _is_blameless(error)
            if isinstance(error, MedsdError):
                reason = str(error)
                logger.error("%s", reason)
            else:
                # Nobody foresaw these; the cohort goes on all the same, and the log keeps where it happened.
                reason = in_one_line(entry.path, error)
                logger.exception("%s", entry.path)
        row = replace(self.work.row(entry, "failed", reason), seconds=round(time.perf_counter() - started, 2))
        try:
            self._fail(entry, row, claim, blameless)
        except (MedsdError, *UNFORESEEN) as error:
            logger.error("%s", error)
            self.current.unrecorded[entry.name] = row
        return row

    def remove(self, files: Iterable[Path], entries: Sequence[SlideEntry]) -> None:
        """Remove files, and what killed processes left half written in the folders of the outputs of `entries`."""
        for path in files:
            path.unlink(missing_ok=True)
        for folder in {self.work.folder, *(path.parent for entry in entries for path in self._files(entry))}:
            remove_leftovers(folder)

    def _kept_record(self, entry: SlideEntry) -> dict[str, Any] | None:
        try:
            record = read_record(self.work.record_of(entry.name), self._recipe(entry))
            if record is None or record["status"] == "failed":
                return None
            self._row(record, entry)
        except (OSError, KeyError, TypeError):
            return None  # a file is not there, or the record is of another version: trying tells
        return record

    def _row(self, record: Mapping[str, Any], entry: SlideEntry) -> Row:
        return self.work.row_now(self.work.row_of(record), entry)

    def _fail(self, entry: SlideEntry, row: Row, claim: Claim, blameless: bool) -> None:
        """Record a failure, unless outputs stay: of another file, or of this one where it is not the slide's fault.

        So it is where the slide cannot be reached, or, `blameless`, where a disk or memory is full: such outputs of
        earlier settings are no worse than they were.
        """
        check_owner(self.work, entry)
        claim.check()
        before = self._before(entry)
        stays = blameless or known_identity(entry.path) is None
        if stays:
            before.bring_back()
        record = read_record(self.work.record_of(entry.name))
        if record is not None and record["status"] != "failed" and stays:
            self.current.unrecorded[entry.name] = row
            return
        self.remove(self._files(entry), [])
        before.forget()
        try:
            recipe = self._recipe(entry)
        except OSError:  # no longer there
            recipe = {}
        self._write_record(entry, Made(row), recipe, claim)

    def _write_record(self, entry: SlideEntry, made: Made[Row], recipe: Mapping[str, Any], claim: Claim) -> None:
        claim.check()
        content = {"status": made.row.status, "result": asdict(made.row), **made.content}
        write_record(self.work.record_of(entry.name), recipe, made.outputs, **content)

    def _recipe(self, entry: SlideEntry) -> dict[str, Any]:
        return {"slide": slide_identity(entry.path), "mpp": entry.mpp, **self.work.recipe(entry)}

    def _recipe_of_opening(self, entry: SlideEntry) -> dict[str, Any]:
        try:
            return self._recipe(entry)
        except OSError as error:
            raise SlideError(
                f"{error.filename or entry.path}: no such file ({error.strerror}); check the path"
            ) from error

    def _before(self, entry: SlideEntry) -> Before:
        record, *outputs = self._files(entry)
        return Before(record, outputs)

    def _files(self, entry: SlideEntry) -> list[Path]:
        """The record of a slide, which goes first, and all its outputs: what the work names, and what the record does.

        Of an earlier recipe there may have been others in the folder, such as maps of methods of other packages.
        """
        record = self.work.record_of(entry.name)
        names = [name.format(entry.name) for name in self.work.outputs]
        kept = read_record(record) or {"outputs": ()}
        others = [name for name in kept["outputs"] if Path(name).name == name and name not in names]
        return [record, *(record.parent / name for name in [*names, *others])]
