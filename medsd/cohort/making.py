"""One slide of a cohort: whether its outputs are still right, and how they are made, kept or brought back."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Generic

import medsd
from medsd.claims import Claim, claimed, forget_abandoned
from medsd.cohort.before import Before
from medsd.cohort.entry import SlideEntry
from medsd.cohort.kept import Current, Row
from medsd.cohort.owner import check_owner, known_identity
from medsd.cohort.work import Made, Work
from medsd.errors import MedsdError, OutputError, SlideError
from medsd.files import remove_leftovers
from medsd.progress import Progress
from medsd.record import differences, read_record, rewrite_record, write_record
from medsd.slides.isolate.slide import IsolatedSlide
from medsd.slides.parts import slide_identity
from medsd.slides.readers.damage import UNFORESEEN, in_one_line
from medsd.slides.slide import open_slide

logger = logging.getLogger(__name__)


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


@dataclass(frozen=True)
class Maker(Generic[Row]):
    """Makes the outputs of one slide after the other; several threads may share it."""

    work: Work[Row]
    current: Current[Row]
    isolate: bool

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

    def changed(self, record: Mapping[str, Any], entry: SlideEntry) -> list[str]:
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
        return record["status"] == "failed" and not self.changed(record, entry)

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
