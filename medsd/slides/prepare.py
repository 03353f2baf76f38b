"""From a data set's slides to tiles with labels: tissue, grid, annotation, and the split for validation."""

from __future__ import annotations

import csv
import io
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from medsd.errors import AnnotationError, DatasetError, NoTissueError, SlideError
from medsd.files import atomic_path, make_folder, write_json, write_text
from medsd.progress import Progress, no_progress
from medsd.slides.annotations import read_asap_xml
from medsd.slides.camelyon import SlideEntry, split_validation
from medsd.slides.index import COLUMNS, MIXED, NORMAL, TUMOUR, TileGrid, TileIndex, join, tiles_of_slide
from medsd.slides.slide import Slide, open_slide, thumbnail
from medsd.slides.tissue import find_tissue

logger = logging.getLogger(__name__)

_THUMBNAIL_PX = 1024
_RECORD = "prepared.json"


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
) -> PreparedSlides:
    """Find tissue and tiles of every slide; leave index, split, thumbnails and `slides.csv` in `folder`.

    A run with the same slides and settings is not repeated. A slide without tissue has the status `empty`, one that
    cannot be read (or its annotation) `failed` with the reason; neither plays a part, and failed ones are tried again
    by the next run.

    Raises:
        NoTissueError: no tile at all on the training or testing side.
    """
    folder = make_folder(folder)
    record = _record(slides, grid, validation_share, seed)
    if not _is_current(folder, record):
        (folder / _RECORD).unlink(missing_ok=True)  # or a run killed below would pass for a whole one
        parts, rows = [], []
        for entry in progress(slides, len(slides), "slide"):
            reason = ""
            try:
                tiles = _prepare_slide(entry, grid, folder / "thumbnails")
            except (SlideError, AnnotationError) as error:
                logger.error("%s", error)
                tiles, reason = _no_tiles(entry, grid), str(error)
            parts.append(tiles)
            rows.append(_row(entry, tiles, reason))
        join(parts).save(folder / "tiles.npz")
        write_text(folder / "slides.csv", _table(rows))
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
    index = TileIndex.load(folder / "tiles.npz")
    with_tiles = {index.names[number] for number in np.unique(index.slide)}
    kept = [slide for slide in slides if slide.name in with_tiles]
    for part in ("training", "testing"):
        if not any(slide.part == part for slide in kept):
            raise NoTissueError(f"{part}: no tissue in any slide; look at {folder / 'thumbnails'}")
    training, validation = split_validation(kept, validation_share, seed)
    testing = [slide.name for slide in kept if slide.part == "testing"]
    return PreparedSlides(index, tuple(slides), tuple(training), tuple(validation), tuple(testing))


def _prepare_slide(entry: SlideEntry, grid: TileGrid, thumbnails: Path) -> TileIndex:
    annotations = None if entry.annotation is None else read_asap_xml(entry.annotation)
    with open_slide(entry.path) as slide:
        tiles = tiles_of_slide(slide, entry.name, grid, find_tissue(slide), annotations)
        if entry.label == 1 and (annotations is None or annotations.tumour.is_empty):
            tiles.label[:] = MIXED  # tumour somewhere, nobody says where: no honest label for a tile
        _draw_tiles(slide, tiles, thumbnails / f"{entry.name}.png")
    return tiles


def _draw_tiles(slide: Slide, tiles: TileIndex, path: Path) -> None:
    """The slide with its tiles: tumour red, normal blue, mixed grey."""
    pixels, level0_px = thumbnail(slide, _THUMBNAIL_PX)
    picture = Image.fromarray(pixels)
    draw = ImageDraw.Draw(picture, "RGBA")
    colours = {TUMOUR: (214, 39, 40, 110), NORMAL: (31, 119, 180, 60), MIXED: (90, 90, 90, 110)}
    side = tiles.tile_px * tiles.mpp / slide.mpp / level0_px
    for x, y, label in zip(tiles.x / level0_px, tiles.y / level0_px, tiles.label.tolist(), strict=True):
        inset = side * 0.06
        draw.rectangle((x + inset, y + inset, x + side - inset, y + side - inset), outline=colours[label])
    with atomic_path(path) as temporary:
        picture.save(temporary)


def _no_tiles(entry: SlideEntry, grid: TileGrid) -> TileIndex:
    empty = {name: np.zeros(0, dtype) for name, dtype in COLUMNS.items()}
    return TileIndex((entry.name,), (str(entry.path),), tile_px=grid.tile_px, mpp=grid.mpp, **empty)


def _row(entry: SlideEntry, tiles: TileIndex, reason: str) -> dict[str, Any]:
    return {
        "slide": entry.name,
        "part": entry.part,
        "label": "tumor" if entry.label else "normal",
        "status": "failed" if reason else "ok" if len(tiles) else "empty",
        "reason": reason,
        "tiles": len(tiles),
        "tumour_tiles": int((tiles.label == TUMOUR).sum()),
        "normal_tiles": int((tiles.label == NORMAL).sum()),
        "mixed_tiles": int((tiles.label == MIXED).sum()),
    }


def _table(rows: list[dict[str, Any]]) -> str:
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _record(slides: Sequence[SlideEntry], grid: TileGrid, validation_share: float, seed: int) -> dict[str, Any]:
    if not slides:
        raise DatasetError("no slides to prepare; check dataset_dir")
    files = [path for slide in slides for path in (slide.path, slide.annotation) if path is not None]
    return {
        "grid": asdict(grid),
        "validation_share": validation_share,
        "seed": seed,
        "files": [[str(path), path.stat().st_size, path.stat().st_mtime_ns] for path in files],
    }


def failed_slides(folder: str | Path) -> dict[str, str]:
    """The slides that could not be prepared, with the reason of each, from the `slides.csv` in `folder`."""
    path = Path(folder) / "slides.csv"
    if not path.is_file():
        return {}
    with open(path, newline="", encoding="utf-8") as handle:
        return {row["slide"]: row["reason"] for row in csv.DictReader(handle) if row["status"] == "failed"}


def _is_current(folder: Path, record: dict[str, Any]) -> bool:
    files = (folder / name for name in (_RECORD, "tiles.npz", "slides.csv"))
    return all(file.is_file() for file in files) and _matches(folder, record) and not failed_slides(folder)


def _matches(folder: Path, record: dict[str, Any]) -> bool:
    try:
        return bool(json.loads((folder / _RECORD).read_text("utf-8")) == record)
    except ValueError:
        return False  # damaged: prepared again
