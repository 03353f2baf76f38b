"""A cohort of slides becomes tiles: in parallel, one bad slide costing only itself, a killed run going on."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medsd.annotations import Annotations, read_annotations
from medsd.cohort.entry import SlideEntry, check_names
from medsd.cohort.index import MIXED, NORMAL, TUMOUR, TileIndex, join, no_tiles, tiles_of_slide
from medsd.cohort.tile_picture import draw_tiles
from medsd.cohort.tile_store import INDEX, TiledSlide, TileStore, Tiling
from medsd.errors import ConfigError, DatasetError, MedsdError, MissingMppError
from medsd.files import make_folder
from medsd.progress import Progress, no_progress
from medsd.slides.isolate.slide import IsolatedSlide
from medsd.slides.reading import read_tiles
from medsd.slides.slide import Slide, open_slide
from medsd.slides.tissue import TissueMask, find_tissue
from medsd.slides.unforeseen import UNFORESEEN, in_one_line

logger = logging.getLogger(__name__)

_LABELS = {1: "tumor", 0: "normal", None: ""}
# Writing the table of thousands of slides takes a while, too.
_TABLE_SECONDS = 1.0


@dataclass(frozen=True)
class TiledCohort:
    """The tiles of all slides, and what became of each, in the order given."""

    index: TileIndex
    slides: tuple[TiledSlide, ...]


def tile_slides(
    entries: Sequence[SlideEntry],
    folder: str | Path,
    tiling: Tiling,
    workers: int | None = None,
    isolate: bool = True,
    progress: Progress = no_progress,
) -> TiledCohort:
    """Find tissue and tiles of every slide; leave `tiles.npz`, `slides.csv` and a picture of each slide in `folder`.

    Slides that are done, by their record, are not done again; failed ones are tried again by the next run. A slide
    whose file, annotation or settings changed is redone. A run that is killed loses only the slides at work.

    Args:
        entries: the slides.
        folder: where to write.
        tiling: how slides become tiles.
        workers: slides at work at once; None for as many as there are processors.
        isolate: read each slide in a process of its own, so that a file that crashes or hangs a decoder costs only
            its slide.
        progress: shows the slides that are done.

    Raises:
        DatasetError: no slides, or two of one name.
        ConfigError: fewer than one worker.
        OutputError: `folder` cannot be written to.
    """
    if not entries:
        raise DatasetError("no slides to tile; name a folder or a manifest with slides")
    if workers is not None and workers < 1:
        raise ConfigError(f"workers={workers}: allowed is 1 or more")
    check_names(entries)
    store = TileStore(make_folder(folder), tiling)
    store.clean()
    kept = {entry.name: store.load(entry) for entry in entries}
    done = {name: result for name, result in kept.items() if result is not None}
    todo = [entry for entry in entries if entry.name not in done]

    def write_table() -> float:
        store.write_table(done[entry.name][1] for entry in entries if entry.name in done)
        return time.monotonic()

    if todo:
        (store.folder / INDEX).unlink(missing_ok=True)  # or a run killed below would leave one of other slides
    written = write_table()
    pool = ThreadPoolExecutor(min(workers or os.cpu_count() or 1, max(len(todo), 1)))
    work = _Work(store, isolate)
    try:
        jobs = {pool.submit(work.finish, entry): entry.name for entry in todo}
        for job in progress(as_completed(jobs), len(jobs), "slide") if jobs else ():
            done[jobs[job]] = job.result()
            if time.monotonic() - written > _TABLE_SECONDS:
                written = write_table()
    finally:
        work.stop.set()
        pool.shutdown(cancel_futures=True)
    index = join([done[entry.name][0] for entry in entries])
    index.save(store.folder / INDEX)
    write_table()
    return TiledCohort(index, tuple(done[entry.name][1] for entry in entries))


class _StoppedError(Exception):
    """The run ends before its slides are done."""


@dataclass(frozen=True)
class _Work:
    """What a thread does with a slide."""

    store: TileStore
    isolate: bool
    stop: threading.Event = field(default_factory=threading.Event)

    def finish(self, entry: SlideEntry) -> tuple[TileIndex, TiledSlide]:
        """The slide's files, and its row; a failure is a row too, and keeps no record."""
        started = time.perf_counter()
        try:
            self.store.drop(entry)
            with IsolatedSlide(entry.path, entry.mpp) if self.isolate else open_slide(entry.path, entry.mpp) as slide:
                tiles, row, unseen = self._tile(slide, entry)
            row = replace(row, seconds=round(time.perf_counter() - started, 2))
            if row.status != "failed":
                self.store.save(entry, tiles, row, unseen)
                return tiles, row
            logger.error("%s", row.reason)
        except MedsdError as error:
            reason = _reason(error)
            logger.error("%s", reason)
            row = _row(entry, "failed", reason)
        except UNFORESEEN as error:
            # Nobody foresaw these; the cohort goes on all the same, and the log keeps where it happened.
            logger.exception("%s", entry.path)
            row = _row(entry, "failed", in_one_line(entry.path, error))
        row = replace(row, seconds=round(time.perf_counter() - started, 2))
        return no_tiles(entry.name, str(entry.path), row.mpp, self.store.tiling.grid), row

    def _tile(self, slide: Slide, entry: SlideEntry) -> tuple[TileIndex, TiledSlide, list[tuple[int, int]]]:
        """The tiles that can be decoded, the row without its time, and where the other tiles are."""
        tiling = self.store.tiling
        annotations = None if entry.annotation is None else read_annotations(entry.annotation, slide.dimensions)
        tissue = find_tissue(slide, method=tiling.tissue, force=tiling.force_tissue)
        found = tiles_of_slide(slide, entry.name, tiling.grid, tissue, annotations)
        labelled = _has_labels(entry, annotations)
        if not labelled:
            found.label[:] = MIXED  # nobody says what a tile is: no honest label
        elif not entry.exhaustive:
            found.label[found.label == NORMAL] = MIXED  # there may be tumour that nobody outlined
        seen = self._seen(slide, found) if tiling.verify else np.ones(len(found), np.bool_)
        draw_tiles(self.store.thumbnail(entry.name), slide, found, tissue, ~seen, labelled)
        tiles, unseen = found.rows(seen), found.rows(~seen)
        row = replace(
            _row(entry, *_verdict(slide.path, tissue, len(found), len(unseen), tiling)),
            mpp=slide.mpp,
            mpp_source=slide.mpp_source,
            reader=slide.reader,
            width=slide.dimensions[0],
            height=slide.dimensions[1],
            tissue_mm2=round(float(tissue.mask.sum()) * (tissue.level0_px * slide.mpp) ** 2 / 1e6, 4),
            unseen_tiles=len(unseen),
        )
        if row.status == "ok":
            row = replace(
                row,
                tiles=len(tiles),
                tumour_tiles=int((tiles.label == TUMOUR).sum()),
                normal_tiles=int((tiles.label == NORMAL).sum()),
                mixed_tiles=int((tiles.label == MIXED).sum()),
            )
        return tiles, row, list(zip(unseen.x.tolist(), unseen.y.tolist(), strict=True))

    def _seen(self, slide: Slide, tiles: TileIndex) -> npt.NDArray[np.bool_]:
        """(n,) whether each tile can be decoded, wholly."""
        seen = np.zeros(len(tiles), np.bool_)
        for tile in read_tiles(slide, tiles.x, tiles.y, tiles.tile_px, tiles.mpp):
            seen[tile.row] = tile.seen is None or tile.seen.all()
            if self.stop.is_set():
                raise _StoppedError
        return seen


def _row(entry: SlideEntry, status: str, reason: str) -> TiledSlide:
    return TiledSlide(entry.name, str(entry.path), entry.part, _LABELS[entry.label], status, reason)


def _reason(error: MedsdError) -> str:
    """The error in one line, its fix as it is for a cohort."""
    if isinstance(error, MissingMppError):
        return f"{str(error).partition('; give')[0]}; give it in the column 'mpp' of a manifest"
    return str(error)


def _has_labels(entry: SlideEntry, annotations: Annotations | None) -> bool:
    """Whether tiles can be labelled: by outlines, or because the whole slide is normal."""
    outlined = annotations is not None and not annotations.tumour.is_empty
    return outlined or entry.label == 0 or (entry.label is None and annotations is not None)


def _verdict(path: Path, tissue: TissueMask, tiles: int, unseen: int, tiling: Tiling) -> tuple[str, str]:
    """Status and reason of a slide with so many tiles, of which so many could not be decoded."""
    share = max(tissue.unseen, unseen / tiles if tiles else 0.0)
    if share > tiling.max_unseen or (tiles and unseen == tiles):
        what = f"{unseen} of {tiles} tiles" if share > tissue.unseen else f"{tissue.unseen:.0%} of the slide"
        return "failed", f"{path}: {what} cannot be decoded (allowed: {tiling.max_unseen:.0%}); copy it again"
    if tiles:
        return "ok", ""
    if not tissue.mask.any():
        return "empty", "no tissue found; see the thumbnail"
    return "empty", f"too little tissue for a tile (min_tissue={tiling.grid.min_tissue:g}); see the thumbnail"
