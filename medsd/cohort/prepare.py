"""From a data set's slides to tiles with labels, and the split for validation."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from medsd.classes import CLASSES
from medsd.cohort.entry import SlideEntry
from medsd.cohort.index import TileIndex
from medsd.cohort.kept import TABLE
from medsd.cohort.split import PARTS, patients_on_two_sides, split_validation
from medsd.cohort.tiling import INDEX, THUMBNAILS, Tiling, find_tiles, tile_slides
from medsd.errors import DatasetError, NoTissueError
from medsd.progress import Progress, no_progress
from medsd.tables import read_table

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PreparedSlides:
    """Tiles of a data set and the part each slide plays.

    Attributes:
        index: the tiles of all slides with tissue.
        slides: the slides, in the order found.
        training, validation, testing: names of the slides with tissue.
        classes: names by the numbers of labels.
        shared: tiles of each slide that outlines of two classes touch.
    """

    index: TileIndex
    slides: tuple[SlideEntry, ...]
    training: tuple[str, ...]
    validation: tuple[str, ...]
    testing: tuple[str, ...]
    classes: tuple[str, ...] = CLASSES
    shared: Mapping[str, int] = field(default_factory=dict)

    def tell(self) -> None:
        """Log slides, patients and tiles of each part by class, and warn of patients on two sides."""
        sides = []
        for part in PARTS:
            entries = [self.entry(name) for name in getattr(self, part)]
            tiles = self.index.of_slides([entry.name for entry in entries]).label
            counts = [
                f"{sum(entry.label == label for entry in entries)} {word} slides ({int((tiles == label).sum())} tiles)"
                for label, word in enumerate(self.classes)
            ]
            patients = {entry.patient for entry in entries if entry.patient}
            logger.info("%s: %s%s", part, ", ".join(counts), f" of {len(patients)} patients" if patients else "")
            if touched := sum(self.shared.get(entry.name, 0) for entry in entries):
                logger.info(
                    "%s: outlines of two classes touch %d tiles, see 'shared_tiles' and 'mixed_tiles'", part, touched
                )
            sides.append(entries)
        if leaks := patients_on_two_sides(sides):
            logger.warning(
                "%d patients have slides in more than one part, so scores are too good: %s",
                len(leaks),
                ", ".join(leaks),
            )

    def entry(self, name: str) -> SlideEntry:
        """The slide of that name."""
        return next(slide for slide in self.slides if slide.name == name)


def prepare_slides(
    slides: Sequence[SlideEntry],
    folder: str | Path,
    tiling: Tiling,
    validation_share: float,
    seed: int,
    progress: Progress = no_progress,
    workers: int | None = None,
) -> PreparedSlides:
    """Find tissue and tiles of every slide, see `tile_slides`, and split them.

    A slide without tissue has the status `empty`, one that cannot be read (or its annotation) `failed` with the reason;
    neither plays a part, and failed ones are tried again by the next run.

    Raises:
        DatasetError: no slides, or two of one name.
        NoTissueError: no tile at all on the training or testing side.
    """
    tile_slides(slides, folder, tiling, workers, progress=progress)
    return load_prepared(slides, folder, tiling, validation_share, seed)


def load_prepared(
    slides: Sequence[SlideEntry], folder: str | Path, tiling: Tiling, validation_share: float, seed: int
) -> PreparedSlides:
    """What `prepare_slides` left in `folder`, or `tile_slides`.

    Raises:
        DatasetError: nothing is there, it was not finished, or it is of other slides or settings.
        NoTissueError: no tile at all on the training or testing side.
    """
    folder = Path(folder)
    index = find_tiles(slides, folder, tiling)
    if index is None and not (folder / INDEX).is_file():
        raise DatasetError(f"{folder}: slides are not prepared; run the stage 'prepare' first")
    if index is None:
        raise DatasetError(f"{folder}: other slides or settings were prepared; run the stage 'prepare' again")
    with_tiles = {index.names[number] for number in np.unique(index.slide)}
    kept = [slide for slide in slides if slide.name in with_tiles]
    for part in ("training", "testing"):
        if not any(slide.part == part for slide in kept):
            raise NoTissueError(f"{part}: no tissue in any slide; look at {folder / THUMBNAILS}")
    training, validation = split_validation(kept, validation_share, seed, tiling.classes)
    testing = [slide.name for slide in kept if slide.part == "testing"]
    rows = read_table(folder / TABLE, ("slide", "shared_tiles"))
    shared = {name: int(count) for name, count in zip(rows["slide"], rows["shared_tiles"], strict=True) if count}
    parts = tuple(training), tuple(validation), tuple(testing)
    return PreparedSlides(index, tuple(slides), *parts, tuple(tiling.classes), shared)


def failed_slides(folder: str | Path) -> dict[str, str]:
    """The slides that could not be prepared, with the reason of each, from the `slides.csv` in `folder`."""
    path = Path(folder) / TABLE
    if not path.is_file():
        return {}
    table = read_table(path)
    return dict(table.loc[table["status"] == "failed", ["slide", "reason"]].to_numpy().tolist())
