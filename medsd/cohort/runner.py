"""Many slides, each made into its own outputs: what is done stays, a bad slide costs only itself.

Any number of processes and machines may run in one folder. A process writes only the outputs of the slides it was
given, and claims each while it is at work on it; tables are made of the records of all slides in the folder.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import Any

from medsd.checks import WORKERS, check_number
from medsd.cohort.entry import SlideEntry, check_names, with_own_names
from medsd.cohort.kept import Current, Row, gather, write_rows
from medsd.cohort.making import Maker
from medsd.cohort.owner import check_kind, check_owner, with_free_name
from medsd.cohort.work import Work
from medsd.errors import DatasetError, MedsdError
from medsd.files import make_folder
from medsd.progress import Progress, no_progress
from medsd.record import read_record

logger = logging.getLogger(__name__)

_TABLE_SECONDS = 1.0
# Of the time, for the table of thousands of slides.
_TABLE_SHARE = 0.05


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
    maker = Maker(work, Current({entry.name: entry for entry in entries}), isolate)
    check_kind(work)
    for entry in entries:
        check_owner(work, entry)
    make_folder(work.folder)
    done = {entry.name: row for entry in entries if (row := maker.refreshed(entry)) is not None}
    todo = [entry for entry in entries if entry.name not in done]
    if todo:
        _tell_of_replaced(maker, todo)
        maker.remove((work.folder / name for name in work.summaries), todo)
    try:
        _go_through(maker, todo, workers, progress, sharing.gather, done)
        if sharing.gather:
            gather(work, maker.current)
    except KeyboardInterrupt:
        if sharing.gather:
            with suppress(MedsdError):
                write_rows(work, maker.current)  # outputs that stood aside are back
        logger.warning("%s: stopped; the same command goes on (medsd gather: tables of what is there)", work.folder)
        raise
    return [done[entry.name] for entry in entries]


def _go_through(
    maker: Maker[Row],
    todo: Sequence[SlideEntry],
    workers: int | None,
    progress: Progress,
    tables: bool,
    done: dict[str, Row],
) -> None:
    """Make the outputs of slides, with their rows into `done`, and now and then the table of those so far."""
    work, written, pause = maker.work, 0.0, 0.0
    with closing(_finished(maker, todo, workers, progress)) as finished:
        for row in progress(finished, len(todo), "slide") if todo else ():
            done[row.slide] = row
            logger.info("%s: %s, %g s%s", row.slide, row.status, row.seconds, f"; {row.reason}" if row.reason else "")
            if time.monotonic() - written > pause and tables:
                started = time.monotonic()
                try:
                    write_rows(work, maker.current)
                except MedsdError as error:  # the next or the last may go well
                    logger.warning("%s", error)
                written = time.monotonic()
                pause = max(_TABLE_SECONDS, (written - started) / _TABLE_SHARE)


def is_made(work: Work[Row], entries: Sequence[SlideEntry]) -> bool:
    """Whether `run_cohort` has been through all `entries`, as they are now: each has its outputs, or failed."""
    maker = Maker(work, Current(), False)
    return all(maker.kept(entry) or maker.has_failed(entry) for entry in entries)


class _StoppedError(Exception):
    """The run ends before its slides are done."""


def _finished(
    maker: Maker[Row], todo: Sequence[SlideEntry], workers: int | None, progress: Progress
) -> Generator[Row, None, None]:
    """The rows of slides as they are done, those that other runs have in hand last."""
    stop = threading.Event()

    def until_stopped(items: Iterable[Any], _total: int, _unit: str) -> Iterator[Any]:
        for item in items:
            if stop.is_set():
                raise _StoppedError
            yield item

    workers = min(workers or os.cpu_count() or 1, max(len(todo), 1))
    pool = ThreadPoolExecutor(workers) if workers > 1 else None
    if pool is None:
        done: Iterable[tuple[SlideEntry, Row | None]] = ((entry, maker.finish(entry, progress)) for entry in todo)
    else:
        jobs = {pool.submit(maker.finish, entry, until_stopped): entry for entry in todo}
        done = ((jobs[job], job.result()) for job in as_completed(jobs))
    elsewhere = []
    try:
        for entry, row in done:
            if row is None:
                elsewhere.append(entry)
            else:
                yield row
        for entry in elsewhere:
            row = maker.finish(entry, progress, wait=True)
            assert row is not None
            yield row
    finally:
        stop.set()
        if pool is not None:
            pool.shutdown(cancel_futures=True)


def _tell_of_replaced(maker: Maker[Row], entries: Sequence[SlideEntry]) -> None:
    """Warn of finished outputs that go since the settings differ: the folder may be another's than was meant."""
    work = maker.work
    changed: dict[str, list[str]] = {}
    for entry in entries:
        record = read_record(work.record_of(entry.name))
        if record is not None and record["status"] != "failed" and (found := maker.changed(record, entry)):
            changed[entry.name] = found
    if changed:
        keys = ", ".join(sorted({key for names in changed.values() for key in names}))
        logger.warning(
            "%s: finished outputs of %d slides are made anew, since these differ: %s", work.folder, len(changed), keys
        )
