"""One picture a slide: the tissue, the maps over it, the contours, and what is needed to read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from medsd import RESEARCH_USE_ONLY
from medsd.drawing import BLACK, FAINT, RED, WHITE, Canvas, outline, resized, text_width, wrapped
from medsd.heatmap.legend import MASK, name_of
from medsd.heatmap.numbers import percent, probability_text, score_texts
from medsd.heatmap.picture import tinted
from medsd.heatmap.regions import Region
from medsd.heatmap.scale import OPACITY, ColourScale, explanation_scale, probability_scale
from medsd.heatmap.tiff import shrink
from medsd.heatmap.value_map import ValueMap

_WIDTH_PX = 1800
_MARGIN_PX = 30
_TITLE_PX = 56
_BAR_PX = 104
_HEADING_PX = 24
_LINE_PX = 20
_SMALL_PX = 13
_MAX_PANEL_HEIGHT_PX = 1400
# A narrower or lower panel would be covered by its scale bar, which then stands below it.
_LEAST_PANEL_PX = 120
_SCALE_PX = 30
_WIDE = 2.2
_MOST_COLUMNS = 3
_FRAME = (201, 204, 209)


class ShownMap(NamedTuple):
    """A map with its colours.

    Attributes:
        key, title: what it is called in addresses and in headings.
        value_map, scale: its values and their colours.
        limits: what the ends of the scale are, a sentence; of a segmented class its area.
    """

    key: str
    title: str
    value_map: ValueMap
    scale: ColourScale
    limits: str

    @property
    def heading(self) -> str:
        """The title with its class, for where maps of several may stand side by side; of a segmented class its area."""
        if self.value_map.quantity == "share":
            return f"{self.title}, {self.limits}"
        return f"{self.title} ({self.value_map.target})"


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
        verdict: what the score means, in sentences; the first stands alone.
        cut_off: that the verdict compares the score with; None where none is known.
    """

    probability: ValueMap
    threshold: float
    threshold_source: str
    regions: Sequence[Region]
    region_pictures: Sequence[npt.NDArray[np.uint8]]
    score: float
    verdict: Sequence[str]
    cut_off: float | None = None

    @property
    def region_area_mm2(self) -> float:
        """Area of all regions."""
        return sum(region.area_um2 for region in self.regions) / 1e6


@dataclass(frozen=True)
class MappedSlide:
    """A slide with its maps and what they come to: all that its overlay and its report show.

    Attributes:
        name: of the slide; untrusted text.
        model: what the network was trained on, for which tissue and at which scale, in words.
        misfits: sentences on where this slide is not what the network was trained for.
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
    model: str
    misfits: Sequence[str]
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
        """The probability, if there is one, which says where the target is seen; then the explanations."""
        scale, found = probability_scale(), self.findings
        if found is None:
            return [*self.explanations]
        words = f"How strongly the model takes the tissue around a point for {found.probability.target}, from 0 to 1."
        return [ShownMap("probability", scale.label, found.probability, scale, words), *self.explanations]


class Panel(NamedTuple):
    """A panel's place in the picture: left, top, width and height in picture pixels, origin at the top left.

    It stands in the middle of its cell, `room` wide from `cell_left`, which heading, bar and legend have to themselves.
    """

    left: int
    top: int
    width: int
    height: int
    cell_left: int
    room: int

    @property
    def is_small(self) -> bool:
        """Whether there is no place for a scale bar on it."""
        return min(self.width, self.height) < _LEAST_PANEL_PX


def layout(panel_count: int, slide_aspect: float, top_px: int = _TITLE_PX) -> tuple[list[Panel], int]:
    """Panels in even rows, or below each other when the slide is wide; and the height of all with their bars.

    Args:
        panel_count: number of panels.
        slide_aspect: width of the thumbnail divided by its height.
        top_px: where the first row starts.
    """
    columns = 1 if slide_aspect > _WIDE else math.ceil(panel_count / math.ceil(panel_count / _MOST_COLUMNS))
    cell = (_WIDTH_PX - _MARGIN_PX * (columns + 1)) // columns
    width = max(1, round(min(cell, _MAX_PANEL_HEIGHT_PX * slide_aspect)))
    height = max(1, round(width / slide_aspect))
    below = _BAR_PX + (_SCALE_PX if min(width, height) < _LEAST_PANEL_PX else 0)
    boxes = []
    for index in range(panel_count):
        row, column = divmod(index, columns)
        left = _MARGIN_PX + column * (cell + _MARGIN_PX)
        top = top_px + row * (height + below + _HEADING_PX)
        boxes.append(Panel(left + (cell - width) // 2, top, width, height, left, cell))
    return boxes, boxes[-1].top + height + below


def round_length_um(width_um: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is at most a quarter of `width_um` (micrometres)."""
    power = 10.0 ** math.floor(math.log10(width_um / 4))
    # 0.5 too: a logarithm may round up to the next power.
    return max(step * power for step in (0.5, 1, 2, 5) if step * power <= width_um / 4)


def length_text(length_um: float) -> str:
    """A length in words: micrometres below 1 mm, millimetres from there."""
    return f"{length_um:g} µm" if length_um < 1000 else f"{length_um / 1000:g} mm"


def draw_overlay(path: str | Path, slide: MappedSlide, opacity: float = OPACITY) -> None:
    """Write the overview of a slide as PNG, `overlay.png`, atomically; the other arguments are `overlay_picture`'s.

    Raises:
        OutputError: the file cannot be written.
    """
    overlay_picture(slide, opacity).save(path, slide.name)


def overlay_picture(slide: MappedSlide, opacity: float = OPACITY) -> Canvas:
    """The overview of a slide.

    The first panel is the slide in its colours, then one panel a map, laid over the slide in light grey where the map
    has seen it. All panels share level-0 coordinates; the regions, if there are any, are outlined and numbered on each.

    Args:
        slide: what is shown.
        opacity: of the maps' strongest colours, 0 to 1.
    """
    room = _WIDTH_PX - 2 * _MARGIN_PX
    head = [(line, FAINT) for line in wrapped(slide.model, 15, room)]
    if slide.findings is not None:
        score, _ = score_texts(slide.findings.score, slide.findings.cut_off)
        words = f"Slide score, {slide.findings.probability.target}: {score}. {' '.join(slide.findings.verdict)}"
        head += [(line, BLACK) for line in wrapped(words, 15, room)]
    head += [(line, RED) for words in slide.misfits for line in wrapped(words, 15, room, bold=True)]
    foot = _footer(slide, opacity)
    height, width = slide.thumbnail.shape[:2]
    boxes, bottom = layout(1 + len(slide.maps), width / height, head_px(len(head)))
    picture = Canvas(_WIDTH_PX, bottom + _LINE_PX * len(foot) + _MARGIN_PX)
    level0_px = width * slide.thumbnail_level0_px / boxes[0].width, height * slide.thumbnail_level0_px / boxes[0].height
    plain = resized(slide.thumbnail, boxes[0].width, boxes[0].height)
    regions = [] if slide.findings is None else slide.findings.regions
    shapes = [[ring / level0_px for ring in region.rings] for region in regions]
    numbers = number_places([region.top for region in regions], level0_px, boxes[0])
    for box, shown in zip(boxes, (None, *slide.maps), strict=True):
        pixels, heading = plain.copy(), "Slide"
        if shown is not None:
            heading = shown.heading
            pixels = with_map(pixels, shown, level0_px, opacity)
            _draw_bar(picture, box, shown.scale, opacity)
        outline(pixels, shapes)
        picture.paste(pixels, box.left, box.top)
        picture.box(box.left - 1, box.top - 1, box.width + 2, box.height + 2, outline=_FRAME)
        # Of the longer side, which whole pixels stretch less.
        _scale_bar(picture, box, level0_px[0 if box.width >= box.height else 1] * slide.mpp)
        for number, (x, y) in numbers.items():
            picture.box(box.left + x, box.top + y, *_label_size(number), fill=WHITE)
            picture.text(box.left + x + 2, box.top + y + 11, str(number), 11, BLACK, bold=True)
        picture.text(box.cell_left, box.top - 10, heading, 15, bold=True, width=box.room)
    picture.text(_MARGIN_PX, 36, slide.name, 22, bold=True, width=room)
    for number, (line, colour) in enumerate(head):
        picture.text(_MARGIN_PX, 60 + _LINE_PX * number, line, 15, colour, bold=colour == RED)
    for number, line in enumerate(foot):
        picture.text(_MARGIN_PX, bottom + _LINE_PX * (number + 1), line, _SMALL_PX, FAINT)
    return picture


def head_px(lines: int) -> int:
    """Where the panels start below so many lines on the model."""
    return _TITLE_PX + _LINE_PX * lines + _HEADING_PX


def number_places(
    tops: Sequence[tuple[float, float]], level0_px: tuple[float, float], panel: Panel
) -> dict[int, tuple[float, float]]:
    """Where the regions' numbers, from 1, stand in a panel: right of their top, left out where another one stands.

    Args:
        tops: (x, y) of each region's highest corner in level-0 pixels; earlier ones have their numbers first.
        level0_px: level-0 pixels per pixel across and down.
        panel: whose size counts.
    """
    places: dict[int, tuple[float, float]] = {}
    for number, (x, y) in enumerate(tops, start=1):
        width, height = _label_size(number)
        left = min(x / level0_px[0] + 3, panel.width - width)
        top = max(0.0, min(y / level0_px[1] - height, panel.height - height))
        # The widest of all numbers so far is this one.
        if all(abs(left - other[0]) >= width or abs(top - other[1]) >= height for other in places.values()):
            places[number] = left, top
    return places


def _label_size(number: int) -> tuple[float, float]:
    return text_width(str(number), 11, bold=True) + 4, 14.0


def with_map(
    pixels: npt.NDArray[np.uint8],
    shown: ShownMap,
    level0_px: tuple[float, float],
    opacity: float = OPACITY,
    place: tuple[float, float] = (0, 0),
) -> npt.NDArray[np.uint8]:
    """A part of the slide with a map over it, each pixel with the value under its centre.

    Args:
        pixels: (h, w, 3) of the slide.
        shown: the map.
        level0_px: level-0 pixels per pixel across and down.
        opacity: of the strongest colour, 0 to 1.
        place: level-0 x and y of the pixels' top left corner.
    """
    height, width = pixels.shape[:2]
    x, y = (
        start + (np.arange(size) + 0.5) * side
        for start, size, side in zip(place, (width, height), level0_px, strict=True)
    )
    value_map = shown.value_map
    # Halved until a map pixel is about a pixel of the picture: each shows the mean of what it covers.
    covered = max(1.0, min(level0_px) / value_map.level0_px)
    value_map = shrink(value_map, max(1, math.ceil(max(value_map.values.shape) / covered)))
    return tinted(pixels, value_map, shown.scale, x, y, opacity)


def _draw_bar(picture: Canvas, box: Panel, scale: ColourScale, opacity: float) -> None:
    top, middle = box.top + box.height + (_SCALE_PX if box.is_small else 0), box.cell_left + box.room / 2
    picture.colour_bar(box.cell_left, top + 14, box.room, 18, scale.bar(opacity), scale.ticks, _SMALL_PX)
    picture.text(middle, top + 68, scale.title, _SMALL_PX, align="m", width=box.room)
    picture.text(middle, top + 86, f"{scale.hues}; faded: not looked at", _SMALL_PX, align="m", width=box.room)


def _scale_bar(picture: Canvas, box: Panel, mpp: float) -> None:
    length_um = round_length_um((box.room if box.is_small else box.width) * mpp)
    length, text = length_um / mpp, length_text(length_um)
    if box.is_small:
        bottom = box.top + box.height + 22
        picture.box(box.cell_left, bottom - 6, round(length), 6, BLACK)
        picture.text(box.cell_left + length + 8, bottom + 2, text, 14, BLACK)
        return
    side = min(box.width, box.height)
    thick, margin = max(3, round(0.012 * side)), round(0.03 * side)
    left, bottom, half = box.left + margin, box.top + box.height - margin, text_width(text, 14) / 2 + 3
    middle = max(left + length / 2, box.left + half)
    picture.box(middle - half, bottom - thick - 22, 2 * half, 18, WHITE)
    picture.box(left - 1, bottom - thick - 1, round(length) + 2, thick + 2, BLACK, WHITE)
    picture.text(middle, bottom - thick - 8, text, 14, BLACK, align="m")


def _footer(slide: MappedSlide, opacity: float) -> list[str]:
    parts = ["Grey stripes: could not be decoded, not judged."] if slide.damaged else []
    if (found := slide.findings) is not None:
        threshold = probability_text(found.threshold)
        above = f"{found.probability.target} probability above {threshold} ({found.threshold_source})"
        where = (
            "none smaller than a tile of the network, light on their inner side, numbered by size as in report and "
            "GeoJSON where there is room"
        )
        parts.insert(0, f"Outlines ({len(found.regions)}): {above}, {where}.")
    parts.append(f"Slide: {slide.mpp:.4g} µm per pixel ({slide.mpp_source}).")
    warning = (
        f"{RESEARCH_USE_ONLY} Maps lie over the slide in light grey, their strongest colours at {percent(opacity)}; "
        "bars show each colour over grey from glass (top) to dark nuclei (bottom)."
    )
    for shown in slide.maps:
        value_map = shown.value_map
        parts.append(f"{shown.title}: {value_map.method}, {value_map.mpp:.3g} µm per map pixel.")
        if value_map.meaning:
            warning += f" {shown.title}: {value_map.meaning[0].lower()}{value_map.meaning[1:]}"
    width = _WIDTH_PX - 2 * _MARGIN_PX
    return [line for text in (" ".join(parts), warning) for line in wrapped(text, _SMALL_PX, width)]
