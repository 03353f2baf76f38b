"""One picture a slide: the tissue, the maps over it, the contours, and what is needed to read them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import shapely

from medsd import RESEARCH_USE_ONLY
from medsd.drawing import BLACK, FAINT, WHITE, Canvas, outline, resized, text_width, wrapped
from medsd.heatmap.legend import MASK, name_of
from medsd.heatmap.regions import Region
from medsd.heatmap.scale import ColourScale, explanation_scale, probability_scale
from medsd.heatmap.tiff import shrink
from medsd.heatmap.value_map import ValueMap

_WIDTH_PX = 1800
_MARGIN_PX = 30
_TITLE_PX = 90
_BAR_PX = 90
_HEADING_PX = 24
_LINE_PX = 20
_SMALL_PX = 13
_MAX_PANEL_HEIGHT_PX = 1400
_WIDE = 2.2
_MOST_COLUMNS = 3
_FRAME = (201, 204, 209)


class ShownMap(NamedTuple):
    """A map with its colours.

    Attributes:
        key, title: what it is called in addresses and in headings.
        value_map, scale: its values and their colours.
        limits: what the ends of the scale are, a sentence.
    """

    key: str
    title: str
    value_map: ValueMap
    scale: ColourScale
    limits: str


def shown_explanation(method: str, value_map: ValueMap, limit: float, limits: str) -> ShownMap:
    """A method's map, whose colour scale ends at the limit."""
    scale = explanation_scale(method, limit, value_map.unit)
    title = scale.label if method == MASK else f"{scale.label}: {name_of(method)}"
    return ShownMap(method, title, value_map, scale, limits)


@dataclass(frozen=True)
class Findings:
    """What a classifier's probabilities come to on a slide.

    Attributes:
        probability: the probability map.
        threshold: the threshold of the regions, in the probability's values.
        threshold_source: where it comes from, in words.
        regions: the regions, in level-0 pixels, largest first.
        region_pictures: (height, width, 3) uint8 RGB of the first regions, in their order; may be fewer.
        score: mean of the highest 1 % of the probability in tissue.
    """

    probability: ValueMap
    threshold: float
    threshold_source: str
    regions: Sequence[Region]
    region_pictures: Sequence[npt.NDArray[np.uint8]]
    score: float

    @property
    def region_area_mm2(self) -> float:
        """Area of all regions."""
        return sum(region.area_um2 for region in self.regions) / 1e6


@dataclass(frozen=True)
class MappedSlide:
    """A slide with its maps and what they come to: all that its overlay and its report show.

    Attributes:
        name: of the slide; untrusted text.
        dimensions: (width, height) at level 0.
        mpp: micrometres per level-0 pixel.
        mpp_source: where the mpp comes from.
        thumbnail: (height, width, 3) uint8 RGB, the whole slide.
        thumbnail_level0_px: level-0 pixels per thumbnail pixel.
        damaged: whether grey stripes in the thumbnail mark what could not be decoded.
        explanations: maps of saliency or of masks, on any grids; the first is the slide's own.
        findings: of a classifier; None of an encoder alone.
        provenance: label to value, in words.
        caveats: sentences the reader must know; 'research use only' is always added.
    """

    name: str
    dimensions: tuple[int, int]
    mpp: float
    mpp_source: str
    thumbnail: npt.NDArray[np.uint8]
    thumbnail_level0_px: float
    damaged: bool
    explanations: Sequence[ShownMap]
    findings: Findings | None
    provenance: Mapping[str, str]
    caveats: Sequence[str]

    @property
    def maps(self) -> list[ShownMap]:
        """The explanations, and the probability if there is one."""
        scale, found = probability_scale(), self.findings
        if found is None:
            return [*self.explanations]
        words = f"How strongly the model takes the tissue around a point for {found.probability.target}, from 0 to 1."
        return [*self.explanations, ShownMap("probability", scale.label, found.probability, scale, words)]


class Panel(NamedTuple):
    """A panel's place in the picture: left, top, width and height in picture pixels, origin at the top left."""

    left: int
    top: int
    width: int
    height: int


def layout(panel_count: int, slide_aspect: float) -> tuple[list[Panel], int]:
    """Panels in even rows, or below each other when the slide is wide; and the height of all with their bars.

    Args:
        panel_count: number of panels.
        slide_aspect: width of the thumbnail divided by its height.
    """
    columns = 1 if slide_aspect > _WIDE else math.ceil(panel_count / math.ceil(panel_count / _MOST_COLUMNS))
    cell = (_WIDTH_PX - _MARGIN_PX * (columns + 1)) // columns
    width = max(1, round(min(cell, _MAX_PANEL_HEIGHT_PX * slide_aspect)))
    height = max(1, round(width / slide_aspect))
    boxes = []
    for index in range(panel_count):
        row, column = divmod(index, columns)
        left = _MARGIN_PX + column * (cell + _MARGIN_PX) + (cell - width) // 2
        boxes.append(Panel(left, _TITLE_PX + row * (height + _BAR_PX + _HEADING_PX), width, height))
    return boxes, boxes[-1].top + height + _BAR_PX


def round_length_um(width_um: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is at most a quarter of `width_um` (micrometres)."""
    power = 10.0 ** math.floor(math.log10(width_um / 4))
    # 0.5 too: a logarithm may round up to the next power.
    return max(step * power for step in (0.5, 1, 2, 5) if step * power <= width_um / 4)


def length_text(length_um: float) -> str:
    """A length in words: micrometres below 1 mm, millimetres from there."""
    return f"{length_um:g} µm" if length_um < 1000 else f"{length_um / 1000:g} mm"


def draw_overlay(path: str | Path, slide: MappedSlide, opacity: float = 0.45) -> None:
    """Draw the overview of a slide as PNG, atomically.

    The first panel is the slide, then one panel a map, blended over it where the map has seen it. All panels share
    level-0 coordinates; the contours of the regions, if there are any, are on each.

    Args:
        path: the file, `overlay.png`.
        slide: what is shown.
        opacity: opacity of the maps, 0 to 1.

    Raises:
        OutputError: the file cannot be written.
    """
    footer = _footer(slide, opacity)
    height, width = slide.thumbnail.shape[:2]
    boxes, bottom = layout(1 + len(slide.maps), width / height)
    picture = Canvas(_WIDTH_PX, bottom + _LINE_PX * len(footer) + _MARGIN_PX)
    level0_px = width * slide.thumbnail_level0_px / boxes[0].width, height * slide.thumbnail_level0_px / boxes[0].height
    plain = resized(slide.thumbnail, boxes[0].width, boxes[0].height)
    regions = [] if slide.findings is None else slide.findings.regions
    for box, shown in zip(boxes, (None, *slide.maps), strict=True):
        pixels, heading = plain.copy(), "Slide"
        if shown is not None:
            heading, scale = f"{shown.title} ({shown.value_map.target})", shown.scale
            _blend(pixels, shown.value_map, scale, level0_px, opacity)
            ticks = [f"{tick:.3g}" for tick in np.linspace(scale.vmin, scale.vmax, 5)]
            picture.colour_bar(box.left, box.top + box.height + 14, box.width, 14, scale.colours(), ticks, _SMALL_PX)
            middle, below = box.left + box.width / 2, box.top + box.height + 66
            picture.text(middle, below, scale.title, _SMALL_PX, align="m", width=box.width)
        outline(pixels, [ring / level0_px for ring in _rings(regions)])
        picture.paste(pixels, box.left, box.top)
        picture.box(box.left - 1, box.top - 1, box.width + 2, box.height + 2, outline=_FRAME)
        _scale_bar(picture, box, level0_px[0] * slide.mpp)
        picture.text(box.left, box.top - 10, heading, 15, bold=True, width=box.width)
    picture.text(_MARGIN_PX, 40, slide.name, 22, bold=True, width=_WIDTH_PX - 2 * _MARGIN_PX)
    for number, line in enumerate(footer):
        picture.text(_MARGIN_PX, bottom + _LINE_PX * (number + 1), line, _SMALL_PX, FAINT)
    picture.save(path, slide.name)


def _blend(
    panel: npt.NDArray[np.uint8],
    value_map: ValueMap,
    scale: ColourScale,
    level0_px: tuple[float, float],
    opacity: float,
) -> None:
    """Lay the map's colours over the panel, each of whose pixels has the value under its centre."""
    value_map = shrink(value_map, 2 * max(panel.shape))
    x, y = (
        ((np.arange(size) + 0.5) * side / value_map.level0_px).astype(np.int64)
        for size, side in zip((panel.shape[1], panel.shape[0]), level0_px, strict=True)
    )
    rows, columns = value_map.values.shape
    inside = np.ix_(y[y < rows], x[x < columns])
    below = panel[: len(inside[0]), : inside[1].shape[1]]
    colours = scale.rgba(value_map.values[inside])
    share = opacity * (colours[..., 3:] / 255)
    below[:] = np.rint(share * colours[..., :3] + (1 - share) * below)


def _rings(regions: Iterable[Region]) -> list[npt.NDArray[np.float64]]:
    """Every ring's corners (n, 2), level-0 pixels."""
    polygons = [region.polygon for region in regions]
    return [shapely.get_coordinates(ring) for polygon in polygons for ring in (polygon.exterior, *polygon.interiors)]


def _scale_bar(picture: Canvas, box: Panel, mpp: float) -> None:
    length_um = round_length_um(box.width * mpp)
    length, thick = length_um / mpp, max(1, round(0.010 * box.width))
    left, bottom = box.left + round(0.03 * box.width), box.top + box.height - round(0.03 * box.width)
    text, middle = length_text(length_um), left + length / 2
    half = text_width(text, 14) / 2 + 3
    picture.box(middle - half, bottom - thick - 22, 2 * half, 18, WHITE)
    picture.box(left - 1, bottom - thick - 1, round(length) + 2, thick + 2, BLACK, WHITE)
    picture.text(middle, bottom - thick - 8, text, 14, BLACK, align="m")


def _footer(slide: MappedSlide, opacity: float) -> list[str]:
    parts = ["Grey stripes: could not be decoded, not judged."] if slide.damaged else []
    if (found := slide.findings) is not None:
        above = f"{found.probability.target} probability above {found.threshold:.2f} ({found.threshold_source})"
        parts.insert(0, f"Contours: {above}.")
    parts.append(f"Slide: {slide.mpp:.4g} µm per pixel ({slide.mpp_source}).")
    warning = f"{RESEARCH_USE_ONLY} Maps are drawn over the slide at {opacity:.0%} opacity, bars in full colour."
    for shown in slide.maps:
        value_map = shown.value_map
        parts.append(f"{shown.title}: {value_map.method}, {value_map.mpp:.3g} µm per map pixel.")
        if value_map.meaning:
            warning += f" {shown.title}: {value_map.meaning[0].lower()}{value_map.meaning[1:]}"
    width = _WIDTH_PX - 2 * _MARGIN_PX
    return [line for text in (" ".join(parts), warning) for line in wrapped(text, _SMALL_PX, width)]
