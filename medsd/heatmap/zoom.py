"""Tiles of a slide for zooming: all of them one by one, or in one file those that matter, within a budget."""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from medsd.heatmap.overlay import MappedSlide
from medsd.slides.readers.base import RGB, Bools
from medsd.slides.slide import Slide, hatched

TILE_PX = 256
BUDGET_BYTES = 7_500_000
"""Of the tiles within a report, at most (our choice); what maps leave of the page may be less."""
_AROUND_PX = 512
_REGIONS = 20
# Of the viewer's side, a region and its margin fill it: what it needs is about this wide.
_SHOWN_PX = 600
_AS_SCANNED = "for {:.0f} µm around the most probable place at {:.2g}, as scanned"
_JPEG_QUALITY = 80

Place = tuple[int, int, int]
"""Of a tile: number of its level, column, row."""


@dataclass(frozen=True)
class ZoomTiles:
    """Tiles within a page.

    A tile at level l, column i and row j covers the level-0 square of `TILE_PX * steps[l]` px from (i, j) times that,
    as far as the slide reaches.

    Attributes:
        steps: level-0 pixels per pixel of each level.
        kept: JPEG files of tiles by their place.
        words: what is there, a sentence.
    """

    steps: list[int]
    kept: dict[Place, bytes]
    words: str = ""


def zoom_steps(dimensions: tuple[int, int]) -> list[int]:
    """Level-0 pixels per pixel of each level of tiles, doubled until a slide (width, height) is a single tile."""
    steps = [1]
    while max(dimensions) > TILE_PX * steps[-1]:
        steps.append(2 * steps[-1])
    return steps


def read_tile(slide: Slide, step: int, column: int, row: int) -> RGB:
    """The pixels (h, w, 3) of a tile, grey stripes where nothing could be decoded; places as of `ZoomTiles`."""
    x, y = (TILE_PX * step * index for index in (column, row))
    width, height = (
        min(TILE_PX, -(-(side - start) // step)) for side, start in zip(slide.dimensions, (x, y), strict=True)
    )
    pixels, seen = slide.read_seen(x, y, width, height, mpp=slide.mpp * step)
    return pixels if seen is None else hatched(pixels, ~seen)


def as_jpeg(pixels: RGB, quality: int = _JPEG_QUALITY) -> bytes:
    """A JPEG file of the pixels."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="JPEG", quality=quality)
    return buffer.getvalue()


def cut_tiles(slide: Slide, mapped: MappedSlide, budget: int = BUDGET_BYTES) -> ZoomTiles:
    """The tiles that matter of a slide.

    A third of the budget at most goes to what lies within 256 px of the most probable places of the 20 largest regions,
    as scanned; then, as far as two thirds, to the whole tissue, level by level from coarse to fine; the rest to these
    regions, each at the level at which a viewer shows all of it (our choice).

    Args:
        slide: the slide.
        mapped: its maps and regions.
        budget: bytes of all tiles.
    """
    steps = zoom_steps(slide.dimensions)
    cutter = _Cutter(slide, steps)
    regions = [] if mapped.findings is None else mapped.findings.regions[:_REGIONS]
    peaks = shown = 0
    for x, y in (region.peak for region in regions):
        box = x - _AROUND_PX / 2, y - _AROUND_PX / 2, x + _AROUND_PX / 2, y + _AROUND_PX / 2
        if not cutter.add(_places(slide.dimensions, steps, 0, box), budget // 3):
            break
        peaks += 1
    seen, reached = mapped.maps[0].value_map, len(steps)
    for level in reversed(range(len(steps))):
        if steps[level] < mapped.thumbnail_level0_px:
            places = _tissue_places(slide.dimensions, steps, level, seen.seen, seen.level0_px)
            if not (cutter.fits(places, budget * 2 // 3) and cutter.add(places, budget * 2 // 3)):
                break
            reached = level
    for region in regions:
        left, top, right, bottom = region.polygon.bounds
        level = max(0, int(np.log2(max(right - left, bottom - top) / _SHOWN_PX)))
        if level < reached and not cutter.add(
            _places(slide.dimensions, steps, level, (left, top, right, bottom)), budget
        ):
            break
        shown += 1
    tissue = steps[reached] if reached < len(steps) else None
    return ZoomTiles(steps, cutter.kept, _in_words(slide.mpp, mapped.thumbnail_level0_px, tissue, shown, peaks))


class _Cutter:
    """Cuts tiles while they fit."""

    def __init__(self, slide: Slide, steps: list[int]) -> None:
        self._slide, self._steps = slide, steps
        self._used = 0
        self.kept: dict[Place, bytes] = {}

    def add(self, places: Iterable[Place], limit: int) -> bool:
        """Cut tiles until there are `limit` bytes; whether all fitted."""
        for place in places:
            if place in self.kept:
                continue
            level, column, row = place
            jpeg = as_jpeg(read_tile(self._slide, self._steps[level], column, row))
            if self._used + len(jpeg) > limit:
                return False
            self.kept[place] = jpeg
            self._used += len(jpeg)
        return True

    def fits(self, places: list[Place], limit: int) -> bool:
        """Whether all would, judged by some of them, so that no level is begun in vain."""
        missing = [place for place in places if place not in self.kept]
        some, before = missing[:: max(1, len(missing) // 8)], self._used
        added = self.add(some, limit)
        return added and (self._used - before) / max(1, len(some)) * len(missing) <= limit - before


def _places(
    dimensions: tuple[int, int], steps: list[int], level: int, box: tuple[float, float, float, float]
) -> Iterator[Place]:
    """Of the tiles that a level-0 box (left, top, right, bottom) meets."""
    size = TILE_PX * steps[level]
    columns, rows = (
        range(max(0, int(low // size)), min(-(-side // size), int(high // size) + 1))
        for side, low, high in zip(dimensions, box[:2], box[2:], strict=True)
    )
    return ((level, column, row) for row in rows for column in columns)


def _tissue_places(
    dimensions: tuple[int, int], steps: list[int], level: int, seen: Bools, level0_px: float
) -> list[Place]:
    """Of the tiles in which a map has seen something."""
    tiles_per_pixel = level0_px / (TILE_PX * steps[level])
    counts = [-(-side // (TILE_PX * steps[level])) for side in reversed(dimensions)]
    ranges = []
    for places, count in zip(np.nonzero(seen), counts, strict=True):
        first, behind = np.floor(places * tiles_per_pixel), np.ceil((places + 1) * tiles_per_pixel)
        ranges.append([ends.astype(np.int64).clip(max=count) for ends in (first, behind)])
    # Of each map pixel a rectangle of tiles, by its corners: sums along both axes count how many hold a tile.
    (top, bottom), (left, right) = ranges
    corners = np.zeros([count + 1 for count in counts], np.int64)
    for row, column, sign in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
        np.add.at(corners, (row, column), sign)
    held = corners.cumsum(axis=0).cumsum(axis=1)[:-1, :-1] > 0
    return [(level, int(column), int(row)) for row, column in np.argwhere(held)]


def _in_words(mpp: float, overview_step: float, tissue_step: int | None, shown: int, peaks: int) -> str:
    parts = [f"overview at {overview_step * mpp:.2g} µm per pixel"]
    if tissue_step is not None:
        parts.append(f"the tissue at {tissue_step * mpp:.2g}")
    if tissue_step != 1:
        for count, words in ((shown, "as finely as 'Show' needs"), (peaks, _AS_SCANNED.format(_AROUND_PX * mpp, mpp))):
            if count:
                parts.append(f"the {f'{count} largest regions' if count > 1 else 'largest region'} {words}")
        parts[-1] += ". 'medsd view' shows all of the slide as scanned"
    return f"Picture in this file: {'; '.join(parts)}."
