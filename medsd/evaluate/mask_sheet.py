"""The contact sheet of a segmentation: what was drawn and what was found, the worst first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import binary_dilation, binary_erosion

from medsd.drawing import FAINT, INK, WHITE, Canvas, Colour, pale, resized, wrapped
from medsd.slides.readers.base import RGB, Bools

TRUE: Colour = (0, 72, 178)
FOUND: Colour = (226, 98, 0)

_CELL_PX, _MARGIN_PX, _GAP_PX, _CAPTION_PX = 260, 28, 14, 40
_TOP_PX, _LINE_PX, _KEY_PX = 112, 18, 34
_NARROWEST_PX = 900
_MOST_CLASSES, _MOST_CELLS = 5, 6
_TINT = 0.2
_TINTS = "Tints: blue was drawn and not found, orange was found and not drawn, brown is both."


@dataclass(frozen=True)
class SheetItem:
    """An image with its mask and prediction, all of one size.

    Attributes:
        pixels: (H, W, 3).
        mask, found: (H, W) class numbers.
        captions: two lines, such as its name and scores.
        dice: the mean over the classes that mask or prediction has; what the sheet is sorted by.
    """

    pixels: RGB
    mask: npt.NDArray[np.uint8]
    found: npt.NDArray[np.uint8]
    captions: tuple[str, str]
    dice: float


def draw_mask_sheet(
    path: str | Path, items: Sequence[SheetItem], classes: Sequence[str], title: str, notes: Sequence[str]
) -> None:
    """Draw each item: the image, then its outlines for each class, drawn and found; the worst Dice first. Atomic.

    Outlines lie over the image in light grey: what was drawn as a broad blue line, what was found as a thin orange one
    on top, so that both are seen where they agree, by colour-blind eyes and in print, too. Their inside is tinted: a
    line that leaves the picture would not say which side is meant. Of equal Dice the larger error comes first.

    Args:
        path: a PNG.
        items: as many as there shall be rows.
        classes: names, the background's first; of many, those that are seen in the items, up to five.
        title: one line.
        notes: sentences for its foot.

    Raises:
        OutputError: the file cannot be written.
    """
    rows = sorted(items, key=lambda item: (item.dice, -int((item.mask != item.found).sum())))
    seen = [n for n in range(1, len(classes)) if any((row.mask == n).any() or (row.found == n).any() for row in rows)]
    shown = (seen or [1])[:_MOST_CLASSES]
    left_out = [classes[number] for number in seen[_MOST_CLASSES:]]
    step = _CELL_PX + _GAP_PX
    cells = 1 + len(shown)
    abreast = min(len(rows), max(1, _MOST_CELLS // cells))
    width = max(_NARROWEST_PX, 2 * _MARGIN_PX + abreast * cells * step - _GAP_PX)
    room = width - 2 * _MARGIN_PX
    more = [f"Not drawn for want of room: {', '.join(left_out)}."] if left_out else []
    foot = wrapped(" ".join([_TINTS, *notes, *more]), 12, room)
    bottom = _TOP_PX + -(-len(rows) // abreast) * (_CELL_PX + _CAPTION_PX)
    picture = Canvas(width, bottom + _LINE_PX * len(foot) + _MARGIN_PX)
    picture.text(_MARGIN_PX, 30, title, 18, bold=True, width=room)
    _draw_key(picture, 50)
    for column in range(abreast):
        for place, name in enumerate(["image", *(classes[number] for number in shown)]):
            x = _MARGIN_PX + (column * cells + place) * step
            picture.text(x, _TOP_PX - 12, name, 14, bold=True, width=_CELL_PX)
    for number, row in enumerate(rows):
        x = _MARGIN_PX + number % abreast * cells * step
        y = _TOP_PX + number // abreast * (_CELL_PX + _CAPTION_PX)
        small = _small(row.pixels)
        picture.paste(small, x, y)
        for place, shown_class in enumerate(shown, start=1):
            picture.paste(_outlined(small, row.mask == shown_class, row.found == shown_class), x + place * step, y)
        for line, (caption, colour) in enumerate(zip(row.captions, (FAINT, INK), strict=True)):
            picture.text(x, y + small.shape[0] + 14 + 15 * line, caption, 12, colour, width=cells * step - _GAP_PX)
    for number, sentence in enumerate(foot):
        picture.text(_MARGIN_PX, bottom + _LINE_PX * (number + 1), sentence, 12, FAINT)
    picture.save(path, title)


def _draw_key(picture: Canvas, y: int) -> None:
    places = (
        (_MARGIN_PX, 5, TRUE, "drawn: the mask that was given"),
        (_MARGIN_PX + 320, 2, FOUND, "found: what the network predicts"),
    )
    for x, thick, colour, words in places:
        picture.box(x, y + 8 - thick // 2, _KEY_PX, thick, colour)
        picture.text(x + _KEY_PX + 8, y + 13, words, 13)


def _small(pixels: RGB) -> RGB:
    height, width = pixels.shape[:2]
    factor = _CELL_PX / max(height, width)
    return resized(pixels, max(1, round(width * factor)), max(1, round(height * factor)))


def _outlined(picture: RGB, drawn: Bools, found: Bools) -> RGB:
    """The picture in light grey with both regions, brought to its size: their insides tinted, their edges drawn."""
    size = picture.shape[1], picture.shape[0]
    cell = pale(picture)
    layers = []
    for region, colour, broad_px in ((drawn, TRUE, 4), (found, FOUND, 2)):
        inside = np.asarray(Image.fromarray(region.astype(np.uint8)).resize(size, Image.Resampling.NEAREST)) > 0
        cell[inside] = np.rint(cell[inside] * (1 - _TINT) + np.array(colour) * _TINT).astype(np.uint8)
        layers.append((inside, colour, broad_px))
    for inside, colour, broad_px in layers:
        # Nothing lies beyond the picture: a region that is cut by its edge has no outline there.
        edge = inside & ~binary_erosion(inside, iterations=broad_px, border_value=1)
        if colour == TRUE:
            cell[binary_dilation(edge) & ~edge] = WHITE
        cell[edge] = colour
    return cell
