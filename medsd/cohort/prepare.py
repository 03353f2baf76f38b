"""From a data set's slides to tiles with labels: tissue, grid, annotation, and the split for validation."""

from __future__ import annotations

import csv
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from medsd.cohort.camelyon import split_validation
from medsd.cohort.entry import SlideEntry
from medsd.cohort.index import TileGrid, TileIndex
from medsd.cohort.tile_store import INDEX, TABLE, THUMBNAILS, Tiling
from medsd.cohort.tiling import tile_slides
from medsd.errors import DatasetError, NoTissueError
from medsd.files import make_folder, write_json
from medsd.progress import Progress, no_progress

_RECORD = "prepared.json"
# Raised whenever the same slides and settings give other tiles.
_FORMAT = 2


@dataclass(frozen=True)
class PreparedSlides:
    """Tiles of a data set and the part each slide plays.

    Attributes:
        index: the tiles of all slides with tissue.
        slides: the slides, in the order found.
        training, validation, testing: names of the slides with tissue.
    """

    index: TileIndex
    slides: tuple[SlideEntry, ...]
    training: tuple[str, ...]
    validation: tuple[str, ...]
    testing: tuple[str, ...]

    def entry(self, name: str) -> SlideEntry:
        """The slide of that name."""
        return next(slide for slide in self.slides if slide.name == name)


def prepare_slides(
    slides: Sequence[SlideEntry],
    folder: str | Path,
    grid: TileGrid,
    validation_share: float,
    seed: int,
    progress: Progress = no_progress,
    workers: int | None = None,
) -> PreparedSlides:
    """Find tissue and tiles of every slide; leave index, split, thumbnails and `slides.csv` in `folder`.

    A run with the same slides and settings is not repeated, and one that was killed goes on, see `tile_slides`. A slide
    without tissue has the status `empty`, one that cannot be read (or its annotation) `failed` with the reason; neither
    plays a part, and failed ones are tried again by the next run.

    Raises:
        DatasetError: no slides, or two of one name.
        NoTissueError: no tile at all on the training or testing side.
    """
    folder = make_folder(folder)
    record = _record(slides, grid, validation_share, seed)
    if not _is_current(folder, record):
        (folder / _RECORD).unlink(missing_ok=True)  # or a run killed below would pass for a whole one
        tile_slides(slides, folder, Tiling(grid), workers, progress=progress)
        write_json(folder / _RECORD, record)
    return load_prepared(slides, folder, grid, validation_share, seed)


def load_prepared(
    slides: Sequence[SlideEntry], folder: str | Path, grid: TileGrid, validation_share: float, seed: int
) -> PreparedSlides:
    """What `prepare_slides` left in `folder`.

    Raises:
        DatasetError: nothing is there, it was not finished, or it is of other slides or settings.
        NoTissueError: no tile at all on the training or testing side.
    """
    folder = Path(folder)
    if not (folder / _RECORD).is_file():
        raise DatasetError(f"{folder}: slides are not prepared; run the stage 'prepare' first")
    if not _matches(folder, _record(slides, grid, validation_share, seed)):
        raise DatasetError(f"{folder}: other slides or settings were prepared; run the stage 'prepare' again")
    index = TileIndex.load(folder / INDEX)
    with_tiles = {index.names[number] for number in np.unique(index.slide)}
    kept = [slide for slide in slides if slide.name in with_tiles]
    for part in ("training", "testing"):
        if not any(slide.part == part for slide in kept):
            raise NoTissueError(f"{part}: no tissue in any slide; look at {folder / THUMBNAILS}")
    training, validation = split_validation(kept, validation_share, seed)
    testing = [slide.name for slide in kept if slide.part == "testing"]
    return PreparedSlides(index, tuple(slides), tuple(training), tuple(validation), tuple(testing))


def _record(slides: Sequence[SlideEntry], grid: TileGrid, validation_share: float, seed: int) -> dict[str, Any]:
    if not slides:
        raise DatasetError("no slides to prepare; check dataset_dir")
    files = [path for slide in slides for path in (slide.path, slide.annotation) if path is not None]
    return {
        "format": _FORMAT,
        "grid": asdict(grid),
        "validation_share": validation_share,
        "seed": seed,
        "partly_annotated": [slide.name for slide in slides if not slide.exhaustive],
        "files": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }


def failed_slides(folder: str | Path) -> dict[str, str]:
    """The slides that could not be prepared, with the reason of each, from the `slides.csv` in `folder`."""
    path = Path(folder) / TABLE
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as handle:
        return {row["slide"]: row["reason"] for row in csv.DictReader(handle) if row["status"] == "failed"}


def _is_current(folder: Path, record: dict[str, Any]) -> bool:
    files = (folder / name for name in (_RECORD, INDEX, TABLE))
    return all(file.is_file() for file in files) and _matches(folder, record) and not failed_slides(folder)


def _matches(folder: Path, record: dict[str, Any]) -> bool:
    try:
        return bool(json.loads((folder / _RECORD).read_text("utf-8")) == record)
    except ValueError:
        return False  # damaged: prepared again
