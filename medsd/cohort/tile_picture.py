"""A slide with its tissue and tiles as one picture, to see at a glance what was taken and what was not."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw
from scipy.ndimage import binary_erosion

from medsd.cohort.index import MIXED, TileIndex
from medsd.drawing import WHITE, Canvas, Colour, fitted, text_width
from medsd.slides.slide import Slide, thumbnail
from medsd.slides.tissue import TissueMask

_LONGEST_PX = 1280
_NARROWEST_PX = 720
_FOOTER_PX = 58
_MARGIN_PX = 12
_TEXT_PX = 15
_OUTLINE = (0, 120, 60)
_UNSEEN = (230, 120, 0)
_MIXED = (90, 90, 90)
# By the number of the class; further classes begin again with the second.
_COLOURS = (
    *((31, 119, 180), (214, 39, 40), (255, 187, 0), (23, 190, 207)),
    *((140, 86, 75), (227, 119, 194), (44, 160, 44), (148, 103, 189)),
)
# Opacities, of 255: stained nuclei must stay visible through a tile.
_FILL, _EDGE = 48, 230
_SMALLEST_EDGED_PX = 16


def draw_tiles(
    path: str | Path,
    slide: Slide,
    tiles: TileIndex,
    tissue: TissueMask,
    unseen: npt.NDArray[np.bool_],
    classes: Sequence[str],
) -> None:
    """Draw the slide, the outline of its tissue, its tiles by label, and a legend with their numbers, as PNG.

    Args:
        path: the file, written atomically.
        slide: the slide, open.
        tiles: its tiles, those that could not be decoded too.
        tissue: its tissue.
        unseen: (n,) True where a tile could not be decoded.
        classes: names by the labels of the tiles; none where labels mean nothing.

    Raises:
        OutputError: the file cannot be written.
        SlideError: the slide cannot be read.
    """
    pixels, level0_px = thumbnail(slide, _LONGEST_PX)
    pixels = pixels.copy()
    height, width = pixels.shape[:2]
    inside = tissue.at(width, height, level0_px) >= 0.5
    pixels[inside & ~binary_erosion(inside, iterations=2)] = _OUTLINE
    side = tiles.tile_px * tiles.mpp / slide.mpp / level0_px
    colours = [
        _UNSEEN if lost else _colour(label if classes else 0)
        for lost, label in zip(unseen.tolist(), tiles.label.tolist(), strict=True)
    ]
    layer = _layer((width, height), tiles.x / level0_px, tiles.y / level0_px, side, colours)
    picture = Canvas(max(width, _NARROWEST_PX), height + _FOOTER_PX)
    picture.image.paste(Image.alpha_composite(Image.fromarray(pixels).convert("RGBA"), layer).convert("RGB"))
    size_mm = " x ".join(f"{length * slide.mpp / 1000:.1f}" for length in slide.dimensions)
    about = f"{size_mm} mm, tiles of {tiles.tile_px} px at {tiles.mpp:g} µm per px"
    room = picture.image.width - 3 * _MARGIN_PX - text_width(about, _TEXT_PX)
    name = fitted(tiles.names[0], _TEXT_PX, room)
    picture.text(_MARGIN_PX, height + 22, name, _TEXT_PX)
    picture.text(2 * _MARGIN_PX + text_width(name, _TEXT_PX), height + 22, about, _TEXT_PX)
    x = float(_MARGIN_PX)
    for word, colour in _legend(tiles, tissue, unseen, classes):
        picture.box(x, height + 34, 13, 13, colour)
        picture.text(x + 19, height + 46, word, _TEXT_PX)
        x += 41 + text_width(word, _TEXT_PX)
    picture.save(path, tiles.names[0])


def _colour(label: int) -> Colour:
    if label == MIXED:
        return _MIXED
    return _COLOURS[label if label < len(_COLOURS) else 1 + (label - 1) % (len(_COLOURS) - 1)]


def _layer(
    size: tuple[int, int],
    x: npt.NDArray[np.float64],
    y: npt.NDArray[np.float64],
    side: float,
    colours: Sequence[Colour],
) -> Image.Image:
    """Squares alone, translucent, in picture pixels; where they overlap, the last is on top."""
    layer = Image.new("RGBA", size, (0, 0, 0, 0))
    draw = ImageDraw.Draw(layer)
    # Small tiles have no edge, which would cover the tissue, and no gap between them.
    large = side >= _SMALLEST_EDGED_PX
    inset = 1 if large else 0
    for place_x, place_y, colour in zip(x, y, colours, strict=True):
        left, top = math.floor(place_x), math.floor(place_y)
        right, bottom = math.floor(place_x + side) - 1, math.floor(place_y + side) - 1
        corners = (left + inset, top + inset, max(left, right - inset), max(top, bottom - inset))
        draw.rectangle(corners, fill=(*colour, _FILL), outline=(*colour, _EDGE) if large else None)
    return layer


def _legend(
    tiles: TileIndex, tissue: TissueMask, unseen: npt.NDArray[np.bool_], classes: Sequence[str]
) -> list[tuple[str, Colour]]:
    if not tissue.mask.any():
        return [("no tissue found", WHITE)]
    kinds = [*enumerate(classes), (MIXED, "mixed")] if classes else [(MIXED, "tiles")]
    counts = [(int(((tiles.label == label) & ~unseen).sum()), word, label) for label, word in kinds]
    legend = [(f"{count} {word}", _colour(label if classes else 0)) for count, word, label in counts if count]
    if unseen.any():
        legend.append((f"{int(unseen.sum())} damaged", _UNSEEN))
    return [("tissue outline", _OUTLINE), *(legend or [("no tiles", WHITE)])]
