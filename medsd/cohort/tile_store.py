"""What is kept of every slide of a cohort, so that a run goes on where another one ended."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import medsd
from medsd.cohort.entry import SlideEntry
from medsd.cohort.index import TileGrid, TileIndex
from medsd.errors import ConfigError, DatasetError, nearest
from medsd.files import write_json, write_text
from medsd.slides.tissue import METHODS

TABLE = "slides.csv"
INDEX = "tiles.npz"
THUMBNAILS = "thumbnails"
_SLIDES = "slides"
# Raised whenever the same settings give other tiles or another record.
_FORMAT = 1
# What `files.atomic_path` leaves behind where a process is killed.
_LEFTOVER = re.compile(r"\.\d+-.+\.(npz|json|png|csv)", re.DOTALL)


@dataclass(frozen=True)
class Tiling:
    """How slides become tiles.

    Attributes:
        grid: size, step and scale of the tiles, and how much tissue they need.
        tissue: how tissue is found, one of `tissue.METHODS`.
        force_tissue: look for tissue also where a slide is no stained tissue on bright glass.
        verify: decode every tile once, and leave out those that cannot be decoded.
        max_unseen: the share of a slide's tiles (or of its area, when tissue is looked for) that may be undecodable;
            beyond it the slide is failed (our choice).

    Raises:
        ConfigError: a value is out of its range.
    """

    grid: TileGrid
    tissue: str = METHODS[0]
    force_tissue: bool = False
    verify: bool = True
    max_unseen: float = 0.05

    def __post_init__(self) -> None:
        if self.tissue not in METHODS:
            known = ", ".join(METHODS)
            raise ConfigError(f"tissue method '{self.tissue}' is unknown{nearest(self.tissue, METHODS)} ({known})")
        if not 0 <= self.max_unseen <= 1:
            raise ConfigError(f"max_unseen={self.max_unseen!r}: allowed is 0 to 1")


@dataclass(frozen=True)
class TiledSlide:
    """What became of a slide: a row of `slides.csv`.

    Attributes:
        slide, path, part: the slide's name, file, and part in its data set.
        label: "tumor", "normal", or empty where nobody says.
        status: "ok", "empty" (no tissue, or too little for a tile) or "failed".
        reason: why it is empty or failed.
        mpp, mpp_source: micrometres per level-0 pixel, and where the number comes from; None where it never opened.
        reader: the library that reads the file.
        width, height: size at level 0 in pixels.
        tissue_mm2: area of the tissue.
        tiles: number of tiles.
        tumour_tiles, normal_tiles, mixed_tiles: of these, by label; mixed are also tiles whose label nobody knows.
        unseen_tiles: tiles that could not be decoded and were left out.
        seconds: time spent on the slide.
    """

    slide: str
    path: str
    part: str
    label: str
    status: str
    reason: str = ""
    mpp: float | None = None
    mpp_source: str = ""
    reader: str = ""
    width: int | None = None
    height: int | None = None
    tissue_mm2: float | None = None
    tiles: int = 0
    tumour_tiles: int = 0
    normal_tiles: int = 0
    mixed_tiles: int = 0
    unseen_tiles: int = 0
    seconds: float = 0.0


class TileStore:
    """The folder of a cohort: `slides/<name>.npz` and `.json`, `thumbnails/<name>.png`, `slides.csv`, `tiles.npz`.

    A slide's record is its last file, so a slide that has one is whole.
    """

    def __init__(self, folder: Path, tiling: Tiling) -> None:
        self.folder = folder
        self.tiling = tiling

    def thumbnail(self, name: str) -> Path:
        """Where the picture of a slide goes."""
        return self.folder / THUMBNAILS / f"{name}.png"

    def load(self, entry: SlideEntry) -> tuple[TileIndex, TiledSlide] | None:
        """The finished slide, if it was made of this very file with these settings."""
        try:
            record = json.loads(self._record(entry.name).read_text("utf-8"))
            if record["recipe"] != self._recipe(entry) or not self.thumbnail(entry.name).is_file():
                return None
            row = TiledSlide(**record["result"])
            index = TileIndex.load(self._tiles(entry.name))
        except (OSError, ValueError, KeyError, TypeError, DatasetError):
            return None  # not there, damaged, or of another version: made again
        return replace(index, paths=(str(entry.path),)), replace(row, path=str(entry.path), part=entry.part)

    def save(self, entry: SlideEntry, index: TileIndex, row: TiledSlide, unseen: list[tuple[int, int]]) -> None:
        """Keep a finished slide; `unseen` are the corners, in level-0 pixels, of tiles that could not be decoded."""
        index.save(self._tiles(entry.name))
        content = {"recipe": self._recipe(entry), "result": asdict(row), "unseen_level0": unseen}
        write_json(self._record(entry.name), content)

    def drop(self, entry: SlideEntry) -> None:
        """Forget what is kept of a slide, its record first."""
        for path in (self._record(entry.name), self._tiles(entry.name), self.thumbnail(entry.name)):
            path.unlink(missing_ok=True)

    def clean(self) -> None:
        """Remove what killed runs left half written."""
        for folder in (self.folder / _SLIDES, self.folder / THUMBNAILS):
            for path in folder.glob(".*"):
                if _LEFTOVER.fullmatch(path.name):
                    path.unlink(missing_ok=True)
        for name in (TABLE, INDEX):
            for path in self.folder.glob(f".*-{name}"):
                path.unlink(missing_ok=True)

    def write_table(self, rows: Iterable[TiledSlide]) -> None:
        """Write `slides.csv`."""
        text = io.StringIO()
        writer = csv.DictWriter(text, [field.name for field in fields(TiledSlide)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(vars(row) for row in rows)
        write_text(self.folder / TABLE, text.getvalue())

    def _record(self, name: str) -> Path:
        return self.folder / _SLIDES / f"{name}.json"

    def _tiles(self, name: str) -> Path:
        return self.folder / _SLIDES / f"{name}.npz"

    def _recipe(self, entry: SlideEntry) -> dict[str, Any]:
        """What a slide's tiles follow from; not its folder, which may be moved."""
        return {
            "format": _FORMAT,
            "medsd": medsd.__version__,
            "slide": _identity(entry.path),
            "annotation": None if entry.annotation is None else _identity(entry.annotation),
            "label": entry.label,
            "exhaustive": entry.exhaustive,
            "mpp": entry.mpp,
            **asdict(self.tiling),
        }


def _identity(path: Path) -> list[Any]:
    """Name, size and time of change of a file: gigabytes are not read to find nothing to do.

    Of a Zarr store and of the folder beside a MIRAX file, what lies directly in it counts too.
    """
    folder = path if path.is_dir() else path.with_suffix("") if path.suffix.lower() == ".mrxs" else None
    parts = [path] if folder is None else [path, *sorted(folder.glob("*"))]
    return [[part.name, part.stat().st_size, part.stat().st_mtime_ns] for part in parts]
