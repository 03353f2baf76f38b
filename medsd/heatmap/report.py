"""The page a pathologist reads: one self-contained HTML file a slide, and an index of a cohort."""

from __future__ import annotations

import base64
import io
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import numpy as np
import numpy.typing as npt
from PIL import Image

from medsd.files import write_text
from medsd.heatmap.overlay import explanation_warning
from medsd.heatmap.regions import Region
from medsd.heatmap.scale import ColourScale
from medsd.heatmap.tiff import RESEARCH_USE_ONLY, shrink
from medsd.heatmap.value_map import ValueMap

MAX_MAP_SIDE_PX = 1536
MAX_THUMBNAIL_SIDE_PX = 2048
MAX_REGIONS = 20
_REGION_PICTURE_PX = 160
_JPEG_QUALITY = 88
_LAST_CODE = 65535


@dataclass(frozen=True)
class ReportContent:
    """What a slide's report shows.

    Attributes:
        slide_name: name of the slide; untrusted text.
        dimensions: (width, height) at level 0.
        mpp: micrometres per level-0 pixel.
        mpp_source: where the mpp comes from.
        thumbnail: (height, width, 3) uint8 RGB, the whole slide.
        thumbnail_level0_px: level-0 pixels per thumbnail pixel.
        probability: the probability map.
        probability_scale: its colours.
        saliency: the explanation, a map of saliency or of masks, on any grid.
        saliency_scale: its colours.
        threshold: the threshold of the regions, in the probability's values.
        threshold_source: where it comes from, in words.
        regions: the regions, largest first.
        scores: label to value, in words, in the order to be shown.
        region_pictures: (height, width, 3) uint8 RGB of the first regions, in their order; may be fewer.
        provenance: label to value, in words.
        caveats: sentences the reader must know; 'research use only' is always added.
    """

    slide_name: str
    dimensions: tuple[int, int]
    mpp: float
    mpp_source: str
    thumbnail: npt.NDArray[np.uint8]
    thumbnail_level0_px: float
    probability: ValueMap
    probability_scale: ColourScale
    saliency: ValueMap
    saliency_scale: ColourScale
    threshold: float
    threshold_source: str
    regions: Sequence[Region]
    scores: Mapping[str, str]
    region_pictures: Sequence[npt.NDArray[np.uint8]]
    provenance: Mapping[str, str]
    caveats: Sequence[str]


@dataclass(frozen=True)
class IndexRow:
    """A slide of a cohort's index.

    Attributes:
        slide: name of the slide; untrusted text.
        status: "ok", "empty" or "failed".
        reason: why it is empty or failed, else empty.
        score: the slide's score, None without one.
        region_count: number of regions.
        region_area_mm2: their area together, square millimetres.
        report: path of the slide's report relative to the index, None without one.
        overlay: path of the slide's overlay picture relative to the index, None without one.
    """

    slide: str
    status: str
    reason: str = ""
    score: float | None = None
    region_count: int = 0
    region_area_mm2: float = 0.0
    report: str | None = None
    overlay: str | None = None


@dataclass(frozen=True)
class PackedValues:
    """A map's values as text: 16-bit codes, 0 for unseen, code c for low + (c - 1) * step.

    The codes are differences along each row (modulo 65,536), little-endian, deflated (zlib), base64. Not a PNG:
    browsers that guard privacy alter the pixels that a page reads back from a picture.

    Attributes:
        low: lowest value of the map.
        step: distance of two codes; a value is off by half of it at most.
        data: the codes.
    """

    low: float
    step: float
    data: str


def pack_values(values: npt.NDArray[np.float32]) -> PackedValues:
    """Quantise a (height, width) map to 65,535 levels between its own extremes; NaN and infinity become unseen."""
    seen = np.isfinite(values)
    low, high = (float(values[seen].min()), float(values[seen].max())) if seen.any() else (0.0, 0.0)
    step = (high - low) / (_LAST_CODE - 1) or 1.0
    level = np.rint((np.where(seen, values, low).astype(np.float64) - low) / step)
    codes = np.where(seen, level + 1, 0).astype(np.uint16)
    differences = np.diff(codes, axis=1, prepend=np.uint16(0))
    packed = zlib.compress(differences.astype("<u2").tobytes(), 9)
    return PackedValues(low, step, base64.b64encode(packed).decode("ascii"))


def write_report(path: str | Path, content: ReportContent) -> None:
    """Write `report.html`, atomically: one file, no network, nothing beside it.

    Maps with a side above 1,536 px are halved (means of what is seen) until they fit; the page names the resolution it
    shows. Values under the cursor are exact to the stated step.

    Raises:
        OutputError: the file cannot be written.
    """
    scales = {"saliency": content.saliency_scale, "probability": content.probability_scale}
    layers = {
        "saliency": _layer(shrink(content.saliency, MAX_MAP_SIDE_PX), content.saliency_scale),
        "probability": _layer(shrink(content.probability, MAX_MAP_SIDE_PX), content.probability_scale),
    }
    slide, slide_width, slide_height = _jpeg(content.thumbnail, MAX_THUMBNAIL_SIDE_PX)
    height, width = content.thumbnail.shape[:2]
    rows = _region_rows(content)
    data = {
        "width": content.dimensions[0],
        "height": content.dimensions[1],
        "mpp": content.mpp,
        "thumbnail": {"width": width * content.thumbnail_level0_px, "height": height * content.thumbnail_level0_px},
        "threshold": content.threshold,
        "layers": layers,
        "boxes": [row["bounds"] for row in rows],
    }
    page = (
        _environment()
        .get_template("report.html.j2")
        .render(
            content=content,
            data=data,
            slide_picture=slide,
            picture_width=slide_width,
            picture_height=slide_height,
            maps=[_legend(name, layers[name], scale) for name, scale in scales.items()],
            regions=rows,
            area_mm2=sum(region.area_um2 for region in content.regions) / 1e6,
            research_use_only=RESEARCH_USE_ONLY,
            not_probability=explanation_warning(content.saliency),
        )
    )
    write_text(path, _encodable(page))


def write_index(path: str | Path, rows: Sequence[IndexRow], title: str) -> None:
    """Write `index.html`, atomically: the cohort's slides, those that failed with the reason, links to the reports.

    Raises:
        OutputError: the file cannot be written.
    """
    counts = {status: sum(row.status == status for row in rows) for status in ("ok", "empty", "failed")}
    page = (
        _environment()
        .get_template("index.html.j2")
        .render(
            rows=[row for row in rows if row.status == "ok"],
            others=[row for row in rows if row.status != "ok"],
            counts=counts,
            title=title,
            research_use_only=RESEARCH_USE_ONLY,
        )
    )
    write_text(path, _encodable(page))


def _encodable(page: str) -> str:
    """`page` with what UTF-8 has no place for (a file name of undecodable bytes) as question marks."""
    return page.encode("utf-8", "replace").decode("utf-8")


def _layer(value_map: ValueMap, scale: ColourScale) -> dict[str, Any]:
    packed = pack_values(value_map.values)
    rows, columns = value_map.values.shape
    return {
        "rows": rows,
        "columns": columns,
        "side": value_map.level0_px,
        "mpp": value_map.mpp,
        "low": packed.low,
        "step": packed.step,
        "data": packed.data,
        "vmin": scale.vmin,
        "vmax": scale.vmax,
        "unit": scale.unit,
        "colours": scale.colours().ravel().tolist(),
    }


def _legend(name: str, layer: dict[str, Any], scale: ColourScale) -> dict[str, Any]:
    stops = ", ".join(f"rgb({red},{green},{blue})" for red, green, blue in scale.colours()[::16])
    ticks = [f"{tick:.3g}" for tick in np.linspace(scale.vmin, scale.vmax, 5)]
    return {"name": name, "title": scale.title, "label": scale.label, "stops": stops, "ticks": ticks, **layer}


def _region_rows(content: ReportContent) -> list[dict[str, Any]]:
    shown = content.regions[:MAX_REGIONS]
    pictures = [_jpeg(picture, _REGION_PICTURE_PX)[0] for picture in content.region_pictures[: len(shown)]]
    pictures += [""] * (len(shown) - len(pictures))
    return [
        {"region": region, "picture": picture, "bounds": region.polygon.bounds, "area": area_text(region.area_um2)}
        for region, picture in zip(shown, pictures, strict=True)
    ]


def area_text(area_um2: float) -> str:
    """An area in words: square micrometres below 0.01 mm², square millimetres from there."""
    return f"{area_um2:,.0f} µm²" if area_um2 < 1e4 else f"{area_um2 / 1e6:.3g} mm²"


def _jpeg(picture: npt.NDArray[np.uint8], max_side_px: int) -> tuple[str, int, int]:
    """A data address of the picture, made smaller when it is too large, with its width and height in pixels."""
    image = Image.fromarray(picture)
    image.thumbnail((max_side_px, max_side_px), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=_JPEG_QUALITY)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode('ascii')}", *image.size


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("medsd.heatmap", "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    # A relative link only: a colon is quoted too, so that no name becomes an address with a scheme.
    environment.filters["relative_link"] = lambda target: quote(target, safe="/")
    return environment
