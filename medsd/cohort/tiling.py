"""A cohort of slides becomes tiles with labels."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from medsd.checks import check_choice, check_number
from medsd.classes import CLASSES, checked_classes
from medsd.cohort.entry import SlideEntry
from medsd.cohort.index import MIXED, TileGrid, TileIndex, join, no_tiles, tiles_of_slide
from medsd.cohort.kept import TILES, Kept, SlideRow
from medsd.cohort.labels import forget_unknown, label_doubts, shared_tiles
from medsd.cohort.outlines import read_outlines
from medsd.cohort.runner import ALONE, Sharing, is_made, run_cohort
from medsd.cohort.tile_picture import draw_tiles
from medsd.cohort.work import Made, Work
from medsd.errors import DatasetError, NoTissueError
from medsd.files import as_json
from medsd.progress import Progress, no_progress
from medsd.record import identity, read_record
from medsd.slides.reading import read_tiles
from medsd.slides.slide import Slide
from medsd.slides.tissue import METHODS, TissueMask, find_tissue

logger = logging.getLogger(__name__)

INDEX = "tiles.npz"
THUMBNAILS = "thumbnails"
_COLUMNS = (
    *("slide", "path", "part", "label", "annotation", "patient", "status", "reason"),
    *("mpp", "mpp_source", "reader", "width", "height"),
    *("tissue_mm2", "tiles"),
)
_LAST_COLUMNS = ("mixed_tiles", "shared_tiles", "unseen_tiles", "seconds")
# Raised whenever the same settings give other tiles or another record.
_FORMAT = 4
# Tiles so much finer than the slide are told (our choice).
_ENLARGED = 1.1


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
        classes: names of the classes by the number of labels, that of normal tissue first.

    Raises:
        ConfigError: a value is out of its range.
    """

    grid: TileGrid
    tissue: str = METHODS[0]
    force_tissue: bool = False
    verify: bool = True
    max_unseen: float = 0.05
    classes: Sequence[str] = CLASSES

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", checked_classes(self.classes))
        check_choice("tissue", self.tissue, METHODS)
        check_number("max_unseen", self.max_unseen, "[0, 1]")


@dataclass(frozen=True)
class TiledSlide(SlideRow):
    """What became of a slide: a row of `slides.csv`.

    Attributes:
        part: the slide's part in its data set.
        label: name of the slide's class; empty where nobody says.
        annotation: the file of its outlines, if any.
        patient: whose slide it is; empty where nobody says.
        mpp, mpp_source: micrometres per level-0 pixel, and where the number comes from; None where it never opened.
        reader: the library that reads the file.
        width, height: size at level 0 in pixels.
        tissue_mm2: area of the tissue.
        tiles: number of tiles.
        class_tiles: of these, those of each class by its name: columns such as `tumour_tiles`.
        mixed_tiles: of these, those of no class, see `tile_labels`; also tiles whose label nobody knows.
        shared_tiles: of these, those that outlines of two classes or more touch, whatever their label.
        unseen_tiles: tiles that could not be decoded and were left out.
    """

    part: str = ""
    label: str = ""
    annotation: str = ""
    patient: str = ""
    mpp: float | None = None
    mpp_source: str = ""
    reader: str = ""
    width: int | None = None
    height: int | None = None
    tissue_mm2: float | None = None
    tiles: int = 0
    class_tiles: Mapping[str, int] = field(default_factory=dict)
    mixed_tiles: int = 0
    shared_tiles: int = 0
    unseen_tiles: int = 0


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
    sharing: Sharing = ALONE,
) -> TiledCohort:
    """Find tissue and tiles of every slide; leave `tiles.npz`, `slides.csv` and a picture of each slide in `folder`.

    Slides that are done, by their record, are not done again; failed ones are tried again by the next run. A slide
    whose file, annotation or settings changed is redone. Slides of earlier runs into the folder stay, and are listed.

    Args:
        entries: the slides.
        folder: where to write.
        tiling: how slides become tiles.
        workers, isolate, progress, sharing: see `run_cohort`. The tiles given back are those in the folder, which are
            none of these slides' where nothing is gathered.

    Raises:
        DatasetError: no slides, two of one name, or tiles of another slide of that name in `folder`.
        ConfigError: fewer than one worker.
        OutputError: `folder` cannot be written to.

    Example:
        >>> slides = [SlideEntry("slide", Path("slide.tif"), annotation=Path("slide.xml"))]
        >>> tiled = tile_slides(slides, "tiles", Tiling(TileGrid(tile_px=64, stride_px=64, mpp=1.0)))
        >>> tiled.slides[0].status, tiled.slides[0].class_tiles["tumour"] > 0
        ('ok', True)
    """
    work = _TilingWork(Path(folder), tiling)
    rows = run_cohort(work, entries, workers, isolate, progress, sharing)
    if sharing.gather:
        index = TileIndex.load(Path(folder) / INDEX).named([row.slide for row in rows])
    else:
        index = join([work.tiles_of(row) for row in rows])
    return TiledCohort(index, tuple(rows))


def tiled_slides(folder: str | Path) -> tuple[list[SlideEntry], Tiling]:
    """The slides that `tile_slides` left in `folder`, as they were given to it, and how they were tiled.

    Raises:
        DatasetError: there are none, one is there twice, or they were tiled with several settings.
    """
    kept, entries, settings = Tiles(Path(folder)), [], set()
    records: dict[str, Path] = {}
    for path in sorted(kept.folder.glob(kept.record.format("*"))):
        record = read_record(path)
        if record is None:
            raise DatasetError(f"{path}: not whole, or of another version; run medsd tiles again")
        if record["status"] == "failed":
            continue
        row, recipe = TiledSlide(**record["result"]), record["recipe"]
        if (other := records.setdefault(row.path, path)) != path:
            raise DatasetError(
                f"{other} and {path.name}: are both of {row.path}; delete one, then run medsd gather {folder}"
            )
        annotation = Path(row.annotation) if row.annotation else None
        about = recipe["label"], row.part, annotation, recipe["mpp"], recipe["exhaustive"], row.patient
        entries.append(SlideEntry(row.slide, Path(row.path), *about))
        settings.add(json.dumps(recipe["tiling"]))
    if len(settings) != 1:
        raise DatasetError(f"{folder}: slides tiled with {len(settings)} settings; tile all with the same ones")
    tiling = json.loads(settings.pop())
    return entries, Tiling(**{**tiling, "grid": TileGrid(**tiling["grid"])})


def find_tiles(entries: Sequence[SlideEntry], folder: str | Path, tiling: Tiling) -> TileIndex | None:
    """The tiles of `entries` that `tile_slides` left in `folder`, in the order of the slides.

    None where a slide was not tiled, has changed since, was tiled with other settings, or a run ended half way.
    """
    folder = Path(folder)
    work = _TilingWork(folder, tiling)
    records = [folder / work.record.format(entry.name) for entry in entries]
    if not is_made(work, entries) or not (folder / INDEX).is_file():
        return None
    # The index comes last: one that is older than a slide's record may hold the slide as it was before.
    if max(path.stat().st_mtime_ns for path in records) > (folder / INDEX).stat().st_mtime_ns:
        return None
    return TileIndex.load(folder / INDEX).named([entry.name for entry in entries])


def prepared_tiles(entries: Sequence[SlideEntry], folder: str | Path, tiling: Tiling, place: str) -> TileIndex:
    """`find_tiles` of slides that are to be prepared; `place` is where they come from.

    Raises:
        DatasetError: they are not prepared.
        NoTissueError: none of them has tissue.
    """
    index = find_tiles(entries, folder, tiling)
    if index is None:
        raise DatasetError(f"{folder}: these slides are not prepared; run the stage 'prepare' first")
    if not len(index):
        raise NoTissueError(f"{place}: no tissue in any slide; look at the thumbnails in {folder}")
    return index


@dataclass(frozen=True)
class Tiles(Kept[TiledSlide]):
    """Tiled slides; see `Kept`."""

    folder: Path
    row_type = TiledSlide
    columns = _COLUMNS
    record = TILES

    def cells(self, row: TiledSlide) -> Mapping[str, Any]:
        return asdict(row) | {f"{name}_tiles": count for name, count in row.class_tiles.items()}

    def header(self, rows: Sequence[TiledSlide]) -> Sequence[str]:
        names = dict.fromkeys(name for row in rows for name in row.class_tiles)
        return (*self.columns, *(f"{name}_tiles" for name in names), *_LAST_COLUMNS)

    def publish(self, rows: Sequence[TiledSlide], recipes: Mapping[str, Mapping[str, Any]]) -> None:
        found = [json.dumps(recipes[row.slide]["tiling"]) for row in rows if row.status != "failed"]
        counts = Counter(found)
        settings = max(counts, key=lambda text: counts[text]) if found else None
        if settings is not None:
            write_index(self, rows, recipes, json.loads(settings))


def write_index(
    kept: Kept[TiledSlide],
    rows: Sequence[TiledSlide],
    recipes: Mapping[str, Mapping[str, Any]],
    settings: Mapping[str, Any],
) -> None:
    """Write the index of the slides that were tiled with these settings."""
    grid = TileGrid(**settings["grid"])
    parts = [
        tiles_in(kept, row, grid) for row in rows if row.status == "failed" or recipes[row.slide]["tiling"] == settings
    ]
    if len(parts) < len(rows):
        logger.warning("%s: lacks %d slides tiled with other settings", kept.folder / INDEX, len(rows) - len(parts))
    join(parts).save(kept.folder / INDEX)


def tiles_in(kept: Kept[TiledSlide], row: TiledSlide, grid: TileGrid) -> TileIndex:
    """The tiles of a slide, none of one that failed."""
    if row.status == "failed":
        return no_tiles(row.slide, row.path, row.mpp, grid)
    return replace(TileIndex.load(kept.record_of(row.slide).with_name(f"{row.slide}.npz")), paths=(row.path,))


@dataclass(frozen=True)
class _TilingWork(Tiles, Work[TiledSlide]):
    """A slide becomes `slides/<name>.npz` and `thumbnails/<name>.png`; see `Work`."""

    tiling: Tiling
    outputs = ("{}.npz", f"../{THUMBNAILS}/{{}}.png")
    summaries = (INDEX,)

    def recipe(self, entry: SlideEntry) -> dict[str, Any]:
        return {
            # Since 5 masks of rounded size lie elsewhere, and tumour marked without an area is refused; what has no
            # annotation need not be tiled anew.
            "format": _FORMAT if entry.annotation is None else 5,
            "annotation": None if entry.annotation is None else identity(entry.annotation),
            "label": entry.label,
            "exhaustive": entry.exhaustive,
            "tiling": asdict(self.tiling),
        }

    def row_now(self, row: TiledSlide, entry: SlideEntry) -> TiledSlide:
        return replace(
            row,
            path=str(entry.path),
            part=entry.part,
            label="" if entry.label is None else self.tiling.classes[entry.label],
            annotation="" if entry.annotation is None else str(entry.annotation),
            patient=entry.patient,
            class_tiles=row.class_tiles or dict.fromkeys(self.tiling.classes, 0),
        )

    def make(self, slide: Slide, entry: SlideEntry, progress: Progress) -> Made[TiledSlide]:
        tiling = self.tiling
        outlines = read_outlines(entry, slide.dimensions, slide.bounds[:2], tiling.classes)
        tissue = find_tissue(slide, method=tiling.tissue, force=tiling.force_tissue)
        found = tiles_of_slide(slide, entry.name, tiling.grid, tissue, outlines)
        enlarged = f"tiles ({found.mpp:g} um per pixel) are finer than the slide ({slide.mpp:g}): they are enlarged"
        doubts = [slide.mpp_doubt] if slide.mpp_doubt else []
        doubts += [enlarged] if slide.mpp > _ENLARGED * found.mpp else []
        doubts += label_doubts(found, entry, outlines, tiling.classes)
        labelled = forget_unknown(found, entry, outlines, slide.mpp, tiling.grid.outlined_from)
        seen = np.ones(len(found), np.bool_)
        if tiling.verify:
            places = read_tiles(slide, found.x, found.y, found.tile_px, found.mpp)
            for tile in progress(places, len(found), "tile"):
                seen[tile.row] = tile.seen is None or tile.seen.all()
        for doubt in doubts:
            logger.warning("%s: %s", entry.path, doubt)
        picture = self.folder / THUMBNAILS / f"{entry.name}.png"
        draw_tiles(picture, slide, found, tissue, ~seen, tiling.classes if labelled else ())
        tiles, unseen = found.rows(seen), found.rows(~seen)
        row = replace(
            self.row(entry, *_verdict(slide, tissue, len(found), len(unseen), tiling)),
            mpp=slide.mpp,
            mpp_source=slide.mpp_source,
            reader=slide.reader,
            width=slide.dimensions[0],
            height=slide.dimensions[1],
            tissue_mm2=round(float(tissue.mask.sum()) * (tissue.level0_px * slide.mpp) ** 2 / 1e6, 4),
            unseen_tiles=len(unseen),
        )
        if row.status == "failed":
            return Made(row)
        row = replace(row, reason="; ".join([row.reason, *doubts] if row.reason else doubts))
        tiles.save(self.record_of(entry.name).with_name(f"{entry.name}.npz"))
        mixed, *counts = (int((tiles.label == label).sum()) for label in range(MIXED, len(tiling.classes)))
        row = replace(
            row,
            tiles=len(tiles),
            class_tiles=dict(zip(tiling.classes, counts, strict=True)),
            mixed_tiles=mixed,
            shared_tiles=shared_tiles(tiles, outlines, slide.mpp),
        )
        corners = list(zip(unseen.x.tolist(), unseen.y.tolist(), strict=True))
        return Made(row, [name.format(entry.name) for name in self.outputs], {"unseen_level0": corners})

    def publish(self, rows: Sequence[TiledSlide], recipes: Mapping[str, Mapping[str, Any]]) -> None:
        write_index(self, rows, recipes, as_json(self.tiling))

    def tiles_of(self, row: TiledSlide) -> TileIndex:
        """The tiles of a slide that was tiled with these settings."""
        return tiles_in(self, row, self.tiling.grid)


def _verdict(slide: Slide, tissue: TissueMask, tiles: int, unseen: int, tiling: Tiling) -> tuple[str, str]:
    """Status and reason of a slide with so many tiles, of which so many could not be decoded."""
    share = max(tissue.unseen, unseen / tiles if tiles else 0.0)
    if share > tiling.max_unseen or (tiles and unseen == tiles):
        what = f"{unseen} of {tiles} tiles" if share > tissue.unseen else f"{tissue.unseen:.0%} of the slide"
        return "failed", f"{slide.path}: {what} cannot be decoded (allowed: {tiling.max_unseen:.0%}); copy it again"
    if tiles:
        return "ok", ""
    side_um, slide_um = tiling.grid.tile_px * tiling.grid.mpp, min(slide.dimensions) * slide.mpp
    if side_um > slide_um:
        return "empty", f"a tile ({side_um:g} um) is larger than the slide ({slide_um:g} um)"
    if not tissue.mask.any():
        return "empty", "no tissue found; see the thumbnail"
    return "empty", f"too little tissue for a tile (min_tissue={tiling.grid.min_tissue:g}); see the thumbnail"
