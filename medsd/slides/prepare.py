"""From a data set's slides to tiles with labels: tissue, grid, annotation, and the split for validation."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from medsd.errors import DatasetError, NoTissueError
from medsd.files import atomic_path, make_folder, write_json, write_text
from medsd.progress import Progress, no_progress
from medsd.slides.annotations import read_asap_xml
from medsd.slides.camelyon import SlideEntry, split_validation
from medsd.slides.index import MIXED, NORMAL, TUMOUR, TileGrid, TileIndex, join, tiles_of_slide
from medsd.slides.slide import Slide, open_slide, thumbnail
from medsd.slides.tissue import find_tissue

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

    A run with the same slides and settings is not repeated. A slide without tissue has the status `empty` and plays
    no part.

    Raises:
        SlideError, AnnotationError: a slide or annotation cannot be read.
        NoTissueError: no tile at all on the training or testing side.
    """
    folder = make_folder(folder)
    record = _record(slides, grid, validation_share, seed)
    if not _is_current(folder, record):
        (folder / _RECORD).unlink(missing_ok=True)  # or a run killed below would pass for a whole one
        parts, rows = [], []
        for entry in progress(slides, len(slides), "slide"):
            tiles = _prepare_slide(entry, grid, folder / "thumbnails")
            parts.append(tiles)
            rows.append(_row(entry, tiles))
        join(parts).save(folder / "tiles.npz")
        write_text(folder / "slides.csv", _table(rows))
        write_json(folder / _RECORD, record)
    return load_prepared(slides, folder, validation_share, seed)


def load_prepared(
    slides: Sequence[SlideEntry], folder: str | Path, validation_share: float, seed: int
) -> PreparedSlides:
    """What `prepare_slides` left in `folder`.

    Raises:
        DatasetError: nothing is there, it was not finished, or it is of other slides.
        NoTissueError: no tile at all on the training or testing side.
    """
    folder = Path(folder)
    if not (folder / _RECORD).is_file():
        raise DatasetError(f"{folder}: slides are not prepared; run the stage 'prepare' first")
    index = TileIndex.load(folder / "tiles.npz")
    if index.paths != tuple(str(slide.path) for slide in slides):
        raise DatasetError(f"{folder}: other slides were prepared; run the stage 'prepare' again")
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


def _row(entry: SlideEntry, tiles: TileIndex) -> dict[str, Any]:
    return {
        "slide": entry.name,
        "part": entry.part,
        "label": "tumor" if entry.label else "normal",
        "status": "ok" if len(tiles) else "empty",
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


def _is_current(folder: Path, record: dict[str, Any]) -> bool:
    path = folder / _RECORD
    if not (path.is_file() and (folder / "tiles.npz").is_file() and (folder / "slides.csv").is_file()):
        return False
    try:
        return bool(json.loads(path.read_text("utf-8")) == record)
    except ValueError:
        return False  # damaged: prepared again
