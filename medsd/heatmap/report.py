"""The page a pathologist reads: one self-contained HTML file a slide, and an index of a cohort."""

from __future__ import annotations

import base64
import json
import os
import re
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import quote

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image

from medsd import RESEARCH_USE_ONLY
from medsd.cohort.entry import file_words
from medsd.cohort.kept import Kept, SlideRow, count_by_status
from medsd.files import write_text
from medsd.heatmap.numbers import probability_text, score_texts
from medsd.heatmap.overlay import MappedSlide, ShownMap
from medsd.heatmap.regions import Region
from medsd.heatmap.scale import OPACITY
from medsd.heatmap.tiff import shrink
from medsd.heatmap.value_map import ValueMap
from medsd.heatmap.zoom import BUDGET_BYTES, TILE_PX, ZoomTiles, as_jpeg, zoom_steps

PAGE_BYTES = 15_000_000
"""What a report takes at most, so that it can be sent by mail and opened on a telephone."""
MAX_MAP_SIDE_PX = 1536
MAX_THUMBNAIL_SIDE_PX = 2048
LISTED_REGIONS = 20
_REGION_PICTURE_PX = 160
_JPEG_QUALITY = 88
_LAST_CODE = 65535
# Of the page: all maps at most, what is cut by the slide's tiles whatever else there is, and styles, scripts, words.
_MAPS_BYTES, _REST_BYTES = 8_000_000, 300_000
_LEAST_MAP_SIDE_PX = 128


@dataclass(frozen=True)
class ReportedSlide(SlideRow):
    """What became of a slide that has a report: a row of `slides.csv` and of `index.html`.

    Attributes:
        model: what the network was trained on, for which tissue and at which scale, in words.
        misfit: where the slide is not what that asks for, in words; empty where it is.
        weights: the first digits of the network's digest, see `short_digest`: words may be those of several networks.
    """

    model: str = field(default="", kw_only=True)
    misfit: str = field(default="", kw_only=True)
    weights: str = field(default="", kw_only=True)


Reported = TypeVar("Reported", bound=ReportedSlide)


def short_digest(sha256: str) -> str:
    """The eight hexadecimal digits that a network is told by where its whole digest has no room."""
    return sha256[:8]


class KeptReports(Kept[Reported]):
    """Outputs of a network; see `Kept`."""

    def row_of(self, record: Mapping[str, Any]) -> Reported:
        row = super().row_of(record)  # those of before did not say it
        return replace(row, weights=short_digest(record["recipe"].get("weights_sha256", ""))) if row.model else row


@dataclass(frozen=True)
class SlideResult(ReportedSlide):
    """What became of a slide that was mapped.

    Attributes:
        score: mean of the highest 1 % of the probability map's tissue; None unless ok, and without classes.
        verdict: what the score means, by what its cut-off did on validation slides; empty without a score.
        regions: number of regions at the threshold; None, as their area, where the score is: nobody counted.
        region_area_mm2: their area.
        drop_brightest, drop_random, drop_lowest: mean fall of the log-odds when a tenth of a tile is hidden, see
            `medsd.heatmap.faithfulness.Faithfulness`; None where it was not measured.
        target: name of the class that score, verdict and regions speak of; empty without classes.
        cut_off: that the verdict compares the score with; None where none is known.
    """

    score: float | None = None
    regions: int | None = None
    region_area_mm2: float | None = None
    verdict: str = ""
    drop_brightest: float | None = None
    drop_random: float | None = None
    drop_lowest: float | None = None
    target: str = ""
    cut_off: float | None = None


def pack_values(values: npt.NDArray[np.float32]) -> dict[str, Any]:
    """A (height, width) map quantised to 65,535 levels between its own extremes; NaN and infinity become unseen.

    Codes of 16 bits, 0 for unseen, code c for low + (c - 1) * step; as differences along each row (modulo 65,536),
    little-endian, deflated (zlib), base64. Not a PNG: browsers that guard privacy alter the pixels that a page reads
    back from a picture.

    Returns:
        `low`, `step` (a value is off by half of it at most) and `data`, the codes.
    """
    seen = np.isfinite(values)
    low, high = (float(values[seen].min()), float(values[seen].max())) if seen.any() else (0.0, 0.0)
    step = (high - low) / (_LAST_CODE - 1) or 1.0
    level = np.rint((np.where(seen, values, low).astype(np.float64) - low) / step)
    codes = np.where(seen, level + 1, 0).astype(np.uint16)
    differences = np.diff(codes, axis=1, prepend=np.uint16(0))
    packed = zlib.compress(differences.astype("<u2").tobytes(), 9)
    return {"low": low, "step": step, "data": base64.b64encode(packed).decode("ascii")}


def write_report(path: str | Path, slide: MappedSlide, cut: Callable[[int], ZoomTiles] | None = None) -> None:
    """Write `report.html`, atomically: one file, no network, nothing beside it.

    A menu chooses the map that is shown, its colour bar and what its values mean. Maps with a side above 1,536 px, or
    that take more than 8 MB together, are halved (means of what is seen) until they fit; the page names the resolution
    it shows. Tiles get what is left of 15 MB. Values under the cursor are those of the map in 16 bits. Behind `medsd
    view`, with `?tiles` in its address, it asks for the slide's tiles.

    Args:
        path: the file.
        slide: what is shown.
        cut: makes the slide's tiles for zooming within a number of bytes; None for the thumbnail alone.

    Raises:
        OutputError: the file cannot be written.
    """
    layers = _layers(slide.maps)
    found = slide.findings
    picture, picture_width, picture_height = _jpeg(slide.thumbnail, MAX_THUMBNAIL_SIDE_PX)
    height, width = slide.thumbnail.shape[:2]
    side = slide.thumbnail_level0_px
    data = {
        "width": slide.dimensions[0],
        "height": slide.dimensions[1],
        "mpp": slide.mpp,
        "overview": {"width": width * side, "height": height * side, "step": width * side / picture_width},
        "opacity": OPACITY,
        "threshold": None if found is None else found.threshold,
        "layers": layers,
        "first": slide.maps[0].key,
        "regions": [] if found is None else [_region(region) for region in found.regions],
    }
    pictures = [] if found is None else [_jpeg(one, _REGION_PICTURE_PX)[0] for one in found.region_pictures]
    # Characters are bytes here, and three bytes of a tile take four.
    left = PAGE_BYTES - _REST_BYTES - len(json.dumps(data)) - sum(map(len, (picture, *pictures)))
    none = ZoomTiles(zoom_steps(slide.dimensions), {})
    tiles = none if cut is None else cut(min(BUDGET_BYTES, max(0, left * 3 // 4)))
    data["tiles"] = _tiles(tiles)
    _write_page(
        path,
        "report.html.j2",
        slide=slide,
        found=found,
        data=data,
        slide_picture=picture,
        picture_width=picture_width,
        picture_height=picture_height,
        maps=[_legend(shown, layers[shown.key]) for shown in slide.maps],
        explained=slide.explanations[0],
        segmented=slide.explanations[0].value_map.quantity == "share",
        listed=LISTED_REGIONS,
        region_pictures=pictures,
        tiles_in_words=tiles.words,
    )


def write_index(
    path: str | Path,
    rows: Sequence[ReportedSlide],
    title: str,
    areas_mm2: Mapping[str, Mapping[str, float]] | None = None,
) -> None:
    """Write `index.html`, atomically: the cohort's slides, those that failed with the reason, links to the reports.

    Args:
        path: the file.
        rows: a slide each; `SlideResult`s, unless areas stand for scores.
        title: of the page.
        areas_mm2: of slides that were segmented, by name: the area of each class.

    Raises:
        OutputError: the file cannot be written.
    """
    _write_page(
        path,
        "index.html.j2",
        rows=[row for row in rows if row.status == "ok"],
        others=[row for row in rows if row.status != "ok"],
        counts=count_by_status(rows),
        models=list(dict.fromkeys(row.model for row in rows if row.model)),
        networks=list(dict.fromkeys(row.weights for row in rows if row.status == "ok" and row.weights)),
        targets=len({row.target for row in rows if isinstance(row, SlideResult) and row.target}),
        areas=areas_mm2,
        classes=list(dict.fromkeys(name for found in (areas_mm2 or {}).values() for name in found)),
        title=title,
    )


def quoted(name: str) -> str:
    """A slide's name in an address: a colon is quoted too, so that none becomes an address with a scheme."""
    return quote(os.fsencode(name), safe="")  # as bytes: a file's name need not be UTF-8


def packed_map(value_map: ValueMap) -> dict[str, Any]:
    """A map as the page takes it: its grid, and its values as of `pack_values`."""
    rows, columns = value_map.values.shape
    grid = {"rows": rows, "columns": columns, "side": value_map.level0_px, "mpp": value_map.mpp}
    return {**grid, **pack_values(value_map.values)}


def _layers(maps: Sequence[ShownMap]) -> dict[str, dict[str, Any]]:
    """Of all maps by key, as fine as the page has room for."""
    side = MAX_MAP_SIDE_PX
    layers = {shown.key: _layer(shown, side) for shown in maps}
    while sum(len(layer["data"]) for layer in layers.values()) > _MAPS_BYTES and side > _LEAST_MAP_SIDE_PX:
        side //= 2
        layers = {shown.key: _layer(shown, side) for shown in maps}
    return layers


def _layer(shown: ShownMap, side_px: int) -> dict[str, Any]:
    value_map, scale = shrink(shown.value_map, side_px), shown.scale
    return {
        **packed_map(value_map),
        "halved": value_map is not shown.value_map,
        "vmin": scale.vmin,
        "vmax": scale.vmax,
        "title": shown.title,
        "above": scale.above,
        "below": scale.below,
    }


def _legend(shown: ShownMap, layer: dict[str, Any]) -> dict[str, Any]:
    scale = shown.scale
    above, below = (",".join(map(str, ink)) for ink in (scale.above, scale.below))
    zero = 100 * abs(scale.vmin) / (scale.vmax - scale.vmin)
    # As opaque as values are large, so that the bar is the map.
    stops = f"rgba({above},0) {zero:g}%, rgba({above},1)"
    if zero:
        stops = f"rgba({below},1), rgba({below},0) {zero:g}%, {stops}"
    return {"shown": shown, "stops": stops, **layer}


def _region(region: Region) -> dict[str, Any]:
    rings = [ring[:-1].astype(int).ravel().tolist() for ring in region.rings]
    return {"rings": rings, "box": region.polygon.bounds, "top": region.top}


def _tiles(tiles: ZoomTiles) -> dict[str, Any]:
    kept: list[dict[str, str]] = [{} for _ in tiles.steps]
    for (level, column, row), jpeg in tiles.kept.items():
        kept[level][f"{column}_{row}"] = base64.b64encode(jpeg).decode("ascii")
    return {"side": TILE_PX, "steps": tiles.steps, "kept": kept}


def _jpeg(picture: npt.NDArray[np.uint8], max_side_px: int) -> tuple[str, int, int]:
    """A data address of the picture, made smaller when it is too large, with its width and height in pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS)
    jpeg = as_jpeg(np.asarray(image), _JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode('ascii')}", *image.size


def _write_page(path: str | Path, template: str, **shown: Any) -> None:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("medsd.heatmap", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "relative_link": lambda target: quote(os.fsencode(target), safe="/"),
        "area": "{:.4f}".format,
        "renamed": lambda row: file_words(Path(row.path)) if row.path and Path(row.path).stem != row.slide else "",
        "probability": probability_text,
        "score": lambda found: score_texts(found.score, found.cut_off)[0],
    }
    page = environment.get_template(template).render(research_use_only=RESEARCH_USE_ONLY, **shown)
    page = re.sub(r"(?<=\d) %", "\u00a0%", page)  # no line ends between a number and its sign
    # What UTF-8 has no place for (a file name of undecodable bytes) becomes question marks.
    write_text(path, page.encode("utf-8", "replace").decode("utf-8"))
