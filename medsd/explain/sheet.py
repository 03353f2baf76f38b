"""The contact sheet: a row an image, a column a method, one colour scale a column."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image
from scipy.ndimage import binary_dilation

from medsd.drawing import BLACK, FAINT, INK, RED, WHITE, Canvas, pale, resized, wrapped
from medsd.errors import DatasetError
from medsd.heatmap.scale import OPACITY, ColourScale
from medsd.slides.readers.base import RGB, Bools

CELL_PX = 200
ROWS = 12

_MARGIN_PX, _GAP_PX, _CAPTION_PX, _BAR_PX = 28, 14, 40, 12
_TITLE_PX, _LINE_PX, _HEAD_PX = 50, 18, 92
_NARROWEST_PX = 900
_PAGE = re.compile(r"sheet(-\d{2,})?\.png")


@dataclass(frozen=True)
class SheetRow:
    """An image of the sheet.

    Attributes:
        picture: as `small_picture` makes it.
        region: of the picture's size, outlined on it; None for none.
        captions: lines below the picture: its name, what is predicted.
        explained: the class that its maps explain; "" for none.
        maps: (h, w) a column, signed, as computed.
    """

    picture: RGB
    region: Bools | None
    captions: tuple[str, str]
    explained: str
    maps: tuple[npt.NDArray[np.float32], ...]


@dataclass(frozen=True)
class SheetColumn:
    """A method of the sheet.

    Attributes:
        name: of the method.
        scale: for all images.
        source: where the scale's limit comes from, in a few words.
        caption: what stands before the class below each of its maps; "" where they explain none.
    """

    name: str
    scale: ColourScale
    source: str
    caption: str


def small_picture(pixels: RGB, resample: Image.Resampling = Image.Resampling.LANCZOS) -> RGB:
    """The picture, or a mask (height, width) uint8, with its longer side at `CELL_PX`."""
    height, width = pixels.shape[:2]
    factor = CELL_PX / max(height, width)
    return resized(pixels, max(1, round(width * factor)), max(1, round(height * factor)), resample)


def draw_sheets(
    folder: Path,
    rows: Sequence[SheetRow],
    columns: Sequence[SheetColumn],
    title: str,
    notes: Sequence[str],
    warning: str = "",
) -> list[Path]:
    """Draw `sheet.png`, or `sheet-01.png` and so on where there are more than `ROWS` images; atomic, each page whole.

    Maps are brought to the picture by nearest neighbour, so that what was computed is seen, and laid over the picture
    in light grey, their strongest colours at `OPACITY`; colours are the scale's. Pages of an earlier sheet are removed.

    Args:
        folder: where the pages go.
        rows: the images.
        columns: the methods, in the order of the rows' maps.
        title: one line.
        notes: how to read the sheet, sentences for its foot.
        warning: what must not be overlooked, in red below the title.

    Raises:
        DatasetError: a map with values that are not finite, which have no colour.
        OutputError: a page cannot be written.
    """
    pages = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
    digits = max(2, len(str(len(pages))))
    names = ["sheet.png"] if len(pages) == 1 else [f"sheet-{n:0{digits}}.png" for n in range(1, len(pages) + 1)]
    for number, (name, page) in enumerate(zip(names, pages, strict=True), start=1):
        counted = title if len(pages) == 1 else f"{title}, page {number} of {len(pages)}"
        _draw_page(folder / name, page, columns, counted, notes, warning)
    for old in folder.glob("sheet*.png"):
        if _PAGE.fullmatch(old.name) and old.name not in names:
            old.unlink()
    return [folder / name for name in names]


def _draw_page(
    path: Path,
    rows: Sequence[SheetRow],
    columns: Sequence[SheetColumn],
    title: str,
    notes: Sequence[str],
    warning: str,
) -> None:
    step = CELL_PX + _GAP_PX
    width = max(_NARROWEST_PX, 2 * _MARGIN_PX + (1 + len(columns)) * step - _GAP_PX)
    room = width - 2 * _MARGIN_PX
    foot = wrapped(" ".join(notes), 12, room)
    warned = wrapped(warning, 14, room, bold=True) if warning else []
    head = _TITLE_PX + _LINE_PX * len(warned)
    top = head + _HEAD_PX
    bottom = top + len(rows) * (CELL_PX + _CAPTION_PX)
    picture = Canvas(width, bottom + _LINE_PX * len(foot) + _MARGIN_PX)
    picture.text(_MARGIN_PX, 30, title, 18, bold=True, width=room)
    for number, sentence in enumerate(warned):
        picture.text(_MARGIN_PX, _TITLE_PX + _LINE_PX * number, sentence, 14, RED, bold=True)
    picture.text(_MARGIN_PX, head + 18, "image", 14, bold=True)
    places = [(_MARGIN_PX + number * step, column) for number, column in enumerate(columns, start=1)]
    for x, column in places:
        scale = column.scale
        picture.text(x, head + 18, column.name.replace("_", " "), 14, bold=True, width=CELL_PX)
        ticks = [f"{tick:.3g}" for tick in (scale.vmin, (scale.vmin + scale.vmax) / 2, scale.vmax)]
        picture.colour_bar(x, head + 26, CELL_PX, _BAR_PX, scale.bar(), ticks, 11)
        picture.text(x, head + 65, scale.title, 10, FAINT, width=step - 2)
        picture.text(x, head + 78, column.source, 10, FAINT, width=step - 2)
    for number, row in enumerate(rows):
        y = top + number * (CELL_PX + _CAPTION_PX)
        below = y + row.picture.shape[0] + 13
        picture.paste(_outlined(row), _MARGIN_PX, y)
        for line, (caption, colour) in enumerate(zip(row.captions, (FAINT, INK), strict=True)):
            picture.text(_MARGIN_PX, below + 13 * line, caption, 11, colour, width=CELL_PX)
        for (x, column), values in zip(places, row.maps, strict=True):
            picture.paste(_blended(row, values, column), x, y)
            caption = f"{column.caption} {row.explained}" if column.caption else "for no class"
            picture.text(x, below, caption, 11, width=CELL_PX)
    for number, sentence in enumerate(foot):
        picture.text(_MARGIN_PX, bottom + _LINE_PX * (number + 1), sentence, 12, FAINT)
    picture.save(path, title)


def _blended(row: SheetRow, values: npt.NDArray[np.float32], column: SheetColumn) -> RGB:
    """The map's colours over the picture in grey."""
    if not np.isfinite(values).all():
        raise DatasetError(f"{row.captions[0]}: the map of {column.name} is not finite everywhere; it is not drawn")
    height, width = row.picture.shape[:2]
    shown = np.asarray(Image.fromarray(values).resize((width, height), Image.Resampling.NEAREST))
    return column.scale.over(pale(row.picture), shown, OPACITY)


def _outlined(row: SheetRow) -> RGB:
    """The picture with its region's outline: dark on light, seen on every stain."""
    picture = row.picture.copy()
    if row.region is not None:
        grown = binary_dilation(row.region)
        picture[binary_dilation(grown, iterations=2) & ~row.region] = WHITE
        picture[grown & ~row.region] = BLACK
    return picture
