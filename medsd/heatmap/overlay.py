"""One picture a slide: the tissue, the maps over it, the contours, and what is needed to read them.

Drawn with matplotlib's objects (Figure, FigureCanvasAgg), never pyplot: no global state, safe in threads.
"""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import shapely
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from medsd.files import atomic_path
from medsd.heatmap.regions import Region
from medsd.heatmap.scale import ColourScale
from medsd.heatmap.tiff import RESEARCH_USE_ONLY, shrink
from medsd.heatmap.value_map import ValueMap

# What a map is not, by its quantity.
_WARNINGS = {
    "saliency": "What the model reacts to, not tumour probability.",
    "mask": "Which of its features the model used, each seeing more than its place; not tumour probability.",
}
_DPI = 100
_WIDTH_PX = 1800
_MARGIN_PX = 30
_TITLE_PX = 90
_BAR_PX = 90
_MAX_PANEL_HEIGHT_PX = 1400
_WIDE = 2.2
_INK = "#1c1f23"
_FAINT = "#5b6168"


@dataclass(frozen=True)
class Box:
    """A rectangle of a picture: left, top, width and height in picture pixels, origin at the top left."""

    left: int
    top: int
    width: int
    height: int


@dataclass(frozen=True)
class Layout:
    """Where the parts of an overview lie: one box a panel, whole pixels; the picture's width and height in pixels."""

    panels: tuple[Box, ...]
    width: int
    height: int


def layout(panel_count: int, slide_aspect: float, footer_lines: int) -> Layout:
    """Panels side by side, or below each other when the slide is wide.

    Args:
        panel_count: number of panels.
        slide_aspect: width of the thumbnail divided by its height.
        footer_lines: lines of text at the foot.
    """
    columns = 1 if slide_aspect > _WIDE else panel_count
    cell = (_WIDTH_PX - _MARGIN_PX * (columns + 1)) // columns
    width = round(min(cell, _MAX_PANEL_HEIGHT_PX * slide_aspect))
    height = max(1, round(width / slide_aspect))
    rows = math.ceil(panel_count / columns)
    boxes = []
    for index in range(panel_count):
        row, column = divmod(index, columns)
        left = _MARGIN_PX + column * (cell + _MARGIN_PX) + (cell - width) // 2
        boxes.append(Box(left, _TITLE_PX + row * (height + _BAR_PX), width, height))
    return Layout(tuple(boxes), _WIDTH_PX, _TITLE_PX + rows * (height + _BAR_PX) + 20 * footer_lines + _MARGIN_PX)


def round_length_um(width_um: float) -> float:
    """The largest of 1, 2, 5 times a power of ten that is at most a quarter of `width_um` (micrometres)."""
    power = 10.0 ** math.floor(math.log10(width_um / 4))
    return max(step * power for step in (1, 2, 5) if step * power <= width_um / 4)


def length_text(length_um: float) -> str:
    """A length in words: micrometres below 1 mm, millimetres from there."""
    return f"{length_um:g} µm" if length_um < 1000 else f"{length_um / 1000:g} mm"


def draw_overlay(
    path: str | Path,
    thumbnail: npt.NDArray[np.uint8],
    thumbnail_level0_px: float,
    maps: Sequence[tuple[ValueMap, ColourScale]],
    regions: Sequence[Region],
    slide_name: str,
    slide_mpp: float,
    mpp_source: str,
    caption: str,
    opacity: float = 0.45,
) -> None:
    """Draw the overview of a slide as PNG, atomically.

    The first panel is the slide, then one panel a map, blended over it where the map has seen it. All panels share
    level-0 coordinates; the contours of the regions are on each.

    Args:
        path: the file, `overlay.png`.
        thumbnail: (height, width, 3) uint8 RGB, the whole slide.
        thumbnail_level0_px: level-0 pixels per thumbnail pixel.
        maps: the maps with their scales.
        regions: the regions, in level-0 pixels.
        slide_name: the title; taken as it is, never as markup.
        slide_mpp: micrometres per level-0 pixel.
        mpp_source: where the mpp comes from.
        caption: what the contours are (threshold and its source) and whatever else belongs below the picture.
        opacity: opacity of the maps, 0 to 1.

    Raises:
        OutputError: the file cannot be written.
    """
    footer = _footer(maps, slide_mpp, mpp_source, caption, opacity)
    height, width = thumbnail.shape[:2]
    place = layout(1 + len(maps), width / height, len(footer))
    figure = Figure(figsize=(place.width / _DPI, place.height / _DPI), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    extent = (0.0, width * thumbnail_level0_px, height * thumbnail_level0_px, 0.0)
    for index, box in enumerate(place.panels):
        axes = _axes(figure, place, box)
        axes.imshow(thumbnail, extent=extent, interpolation="antialiased", aspect="auto")
        heading = "Slide"
        if index > 0:
            value_map, scale = maps[index - 1]
            heading = f"{scale.label}: {value_map.target}"
            _blend(axes, shrink(value_map, 2 * max(box.width, box.height)), scale, opacity)
            _colour_bar(figure, place, box, scale)
        _contours(axes, regions)
        axes.set_xlim(0, extent[1])
        axes.set_ylim(extent[2], 0)
        _scale_bar(axes, extent[1], extent[2], slide_mpp)
        _text(figure, place, box.left, box.top - 10, heading, size=11, weight="bold")
    _text(figure, place, _MARGIN_PX, 40, _shorten(slide_name), size=16, weight="bold")
    for number, line in enumerate(reversed(footer)):
        _text(figure, place, _MARGIN_PX, place.height - _MARGIN_PX // 2 - 20 * number, line, size=9.5, colour=_FAINT)
    about = {"Software": "medsd", "Title": _shorten(slide_name), "Description": f"{RESEARCH_USE_ONLY} {caption}"}
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI, metadata=about)


def explanation_warning(value_map: ValueMap) -> str:
    """What a reader must not take the map for, as a sentence; empty for a probability."""
    return _WARNINGS.get(value_map.quantity, "")


def _axes(figure: Figure, place: Layout, box: Box) -> Axes:
    axes = figure.add_axes(
        (
            box.left / place.width,
            1 - (box.top + box.height) / place.height,
            box.width / place.width,
            box.height / place.height,
        )
    )
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set(edgecolor="#c9ccd1", linewidth=0.8)
    return axes


def _text(
    figure: Figure,
    place: Layout,
    x: float,
    y: float,
    text: str,
    size: float,
    weight: str = "normal",
    colour: str = _INK,
    align: str = "left",
) -> None:
    # parse_math off: a slide's name with two dollar signs is a name, not a formula.
    label = figure.text(
        x / place.width, 1 - y / place.height, text, fontsize=size, fontweight=weight, color=colour, ha=align
    )
    label.set_parse_math(False)


def _blend(axes: Axes, value_map: ValueMap, scale: ColourScale, opacity: float) -> None:
    rows, columns = value_map.values.shape
    side = value_map.level0_px
    axes.imshow(
        scale.rgba(value_map.values),
        extent=(0.0, columns * side, rows * side, 0.0),
        interpolation="nearest",
        aspect="auto",
        alpha=opacity,
    )


def _contours(axes: Axes, regions: Sequence[Region]) -> None:
    rings = [
        shapely.get_coordinates(ring)
        for region in regions
        for ring in (region.polygon.exterior, *region.polygon.interiors)
    ]
    # A dark line on a light one: seen on glass, on tissue and on every colour of the scales.
    axes.add_collection(LineCollection(rings, colors="white", linewidths=2.4), autolim=False)
    axes.add_collection(LineCollection(rings, colors="black", linewidths=1.0), autolim=False)


def _scale_bar(axes: Axes, width_px: float, height_px: float, slide_mpp: float) -> None:
    length_um = round_length_um(width_px * slide_mpp)
    length_px = length_um / slide_mpp
    left, bottom = 0.03 * width_px, height_px - 0.03 * width_px
    thick = 0.010 * width_px
    axes.add_patch(Rectangle((left, bottom - thick), length_px, thick, facecolor="black", edgecolor="white", lw=0.8))
    axes.text(
        left + length_px / 2,
        bottom - 1.6 * thick,
        length_text(length_um),
        ha="center",
        va="bottom",
        fontsize=10,
        color="black",
        bbox={"facecolor": "white", "alpha": 0.75, "edgecolor": "none", "pad": 1.5},
    )


def _colour_bar(figure: Figure, place: Layout, box: Box, scale: ColourScale) -> None:
    bar = Box(box.left, box.top + box.height + 14, box.width, 14)
    axes = _axes(figure, place, bar)
    axes.imshow(scale.colours()[np.newaxis], extent=(scale.vmin, scale.vmax, 0, 1), aspect="auto")
    ticks = np.linspace(scale.vmin, scale.vmax, 5)
    axes.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks], fontsize=9, color=_INK)
    axes.tick_params(length=3, color=_FAINT, pad=2)
    axes.get_xticklabels()[0].set_horizontalalignment("left")
    axes.get_xticklabels()[-1].set_horizontalalignment("right")
    _text(figure, place, box.left + box.width / 2, bar.top + 52, scale.title, size=9.5, align="center")


def _footer(
    maps: Sequence[tuple[ValueMap, ColourScale]], slide_mpp: float, mpp_source: str, caption: str, opacity: float
) -> list[str]:
    parts = [f"Slide: {slide_mpp:.4g} µm per pixel ({mpp_source})."]
    parts += [f"{scale.label}: {value_map.method}, {value_map.mpp:.3g} µm per map pixel." for value_map, scale in maps]
    warning = f"{RESEARCH_USE_ONLY} Maps are drawn over the slide at {opacity:.0%} opacity, bars in full colour."
    for value_map, scale in maps:
        words = explanation_warning(value_map)
        if words:
            warning += f" {scale.label}: {words[0].lower()}{words[1:]}"
    return [*textwrap.wrap(f"{caption} {' '.join(parts)}", 240), warning]


def _shorten(name: str, longest: int = 110) -> str:
    """`name` on one line, its middle left out when it is too long to be drawn."""
    name = "".join(character if character.isprintable() else " " for character in name)
    return name if len(name) <= longest else f"{name[: longest // 2]}…{name[-longest // 2 :]}"
