"""The contact sheet: a row an image, a column a method, one colour scale a column."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, get_font
from PIL import Image
from scipy.ndimage import binary_dilation

from medsd.errors import DatasetError
from medsd.files import atomic_path
from medsd.heatmap.scale import ColourScale
from medsd.heatmap.tiff import RESEARCH_USE_ONLY
from medsd.slides.readers.base import RGB, Bools

CELL_PX = 200
ROWS = 12
OPACITY = 0.45

_DPI = 100
_MARGIN_PX, _GAP_PX, _CAPTION_PX, _BAR_PX = 28, 14, 40, 12
_TITLE_PX, _LINE_PX, _HEAD_PX = 50, 18, 92
_NARROWEST_PX = 900
_LETTER_PX = 6.8
_INK, _FAINT = "#1c1f23", "#5b6168"
_OUTLINE, _HALO = (0, 0, 0), (255, 255, 255)
_PAGE = re.compile(r"sheet(-\d{2,})?\.png")
# Letters of a caption, which is as wide as a picture.
_LONGEST = 27


@dataclass(frozen=True)
class SheetRow:
    """An image of the sheet.

    Attributes:
        picture: as `thumbnail` makes it.
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
        of_class: whether its maps speak for or against a class.
    """

    name: str
    scale: ColourScale
    source: str
    of_class: bool


def thumbnail(pixels: RGB) -> RGB:
    """The picture with its longer side at `CELL_PX`."""
    height, width = pixels.shape[:2]
    factor = CELL_PX / max(height, width)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    return np.array(Image.fromarray(pixels).resize(size, Image.Resampling.LANCZOS))


def draw_sheets(
    folder: Path, rows: Sequence[SheetRow], columns: Sequence[SheetColumn], title: str, notes: Sequence[str]
) -> list[Path]:
    """Draw `sheet.png`, or `sheet-01.png` and so on where there are more than `ROWS` images; atomic, each page whole.

    Maps are brought to the picture by nearest neighbour, so that what was computed is seen, and laid at `OPACITY` over
    the picture in light grey; colours are the scale's. Pages of an earlier sheet are removed.

    Args:
        folder: where the pages go.
        rows: the images.
        columns: the methods, in the order of the rows' maps.
        title: one line.
        notes: how to read the sheet, sentences for its foot.

    Raises:
        DatasetError: a map with values that are not finite, which have no colour.
        OutputError: a page cannot be written.
    """
    pages = [rows[start : start + ROWS] for start in range(0, len(rows), ROWS)]
    digits = max(2, len(str(len(pages))))
    names = ["sheet.png"] if len(pages) == 1 else [f"sheet-{n:0{digits}}.png" for n in range(1, len(pages) + 1)]
    for number, (name, page) in enumerate(zip(names, pages, strict=True), start=1):
        counted = title if len(pages) == 1 else f"{title}, page {number} of {len(pages)}"
        _draw_page(folder / name, page, columns, counted, notes)
    for old in folder.glob("sheet*.png"):
        if _PAGE.fullmatch(old.name) and old.name not in names:
            old.unlink()
    return [folder / name for name in names]


def _draw_page(
    path: Path, rows: Sequence[SheetRow], columns: Sequence[SheetColumn], title: str, notes: Sequence[str]
) -> None:
    step = CELL_PX + _GAP_PX
    width = max(_NARROWEST_PX, 2 * _MARGIN_PX + (1 + len(columns)) * step - _GAP_PX)
    foot = textwrap.wrap(" ".join(notes), round(width / _LETTER_PX))
    top = _TITLE_PX + _HEAD_PX
    height = top + len(rows) * (CELL_PX + _CAPTION_PX) + _LINE_PX * len(foot) + _MARGIN_PX
    canvas = np.full((height, width, 3), 255, np.uint8)
    for number, row in enumerate(rows):
        y = top + number * (CELL_PX + _CAPTION_PX)
        for place, cell in enumerate(
            (_outlined(row), *(_blended(row, item) for item in zip(row.maps, columns, strict=True)))
        ):
            _paste(canvas, cell, _MARGIN_PX + place * step, y)
    for place, column in enumerate(columns, start=1):
        bar = np.broadcast_to(_stretched(column.scale.colours()[np.newaxis], _BAR_PX, CELL_PX), (_BAR_PX, CELL_PX, 3))
        _paste(canvas, bar, _MARGIN_PX + place * step, _TITLE_PX + 26)
    figure, axes = _page(canvas)
    _text(axes, _MARGIN_PX, 30, title, 13, weight="bold")
    _text(axes, _MARGIN_PX, _TITLE_PX + 18, "image", 10, weight="bold")
    for place, column in enumerate(columns, start=1):
        _head(axes, _MARGIN_PX + place * step, column)
    for number, row in enumerate(rows):
        y = top + number * (CELL_PX + _CAPTION_PX) + row.picture.shape[0]
        for line, caption in enumerate(row.captions):
            _text(axes, _MARGIN_PX, y + 13 + 13 * line, _shorten(caption), 8, _INK if line else _FAINT)
        for place, column in enumerate(columns, start=1):
            meaning = f"brown: for {row.explained}" if column.of_class else "for no class"
            _text(axes, _MARGIN_PX + place * step, y + 13, _shorten(meaning), 8)
    for number, sentence in enumerate(reversed(foot)):
        _text(axes, _MARGIN_PX, height - _MARGIN_PX // 2 - _LINE_PX * number, sentence, 8.5, _FAINT)
    about = {"Software": "medsd", "Title": title, "Description": RESEARCH_USE_ONLY}
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=_DPI, metadata=about)


def _blended(row: SheetRow, item: tuple[npt.NDArray[np.float32], SheetColumn]) -> RGB:
    """The map's colours over the picture in grey."""
    values, column = item
    if not np.isfinite(values).all():
        raise DatasetError(f"{row.captions[0]}: the map of {column.name} is not finite everywhere; it is not drawn")
    height, width = row.picture.shape[:2]
    colours = _stretched(column.scale.rgba(values)[..., :3], height, width)
    # The darker half is left to the colours: on black nuclei brown and teal would be the same.
    grey = 127.5 + np.asarray(Image.fromarray(row.picture).convert("L"), np.float64)[..., np.newaxis] / 2
    return np.rint((1 - OPACITY) * grey + OPACITY * colours).astype(np.uint8)


def _outlined(row: SheetRow) -> RGB:
    """The picture with its region's outline: dark on light, seen on every stain."""
    picture = row.picture.copy()
    if row.region is not None:
        grown = binary_dilation(row.region)
        picture[binary_dilation(grown, iterations=2) & ~row.region] = _HALO
        picture[grown & ~row.region] = _OUTLINE
    return picture


def _stretched(pixels: RGB, height: int, width: int) -> RGB:
    return np.asarray(Image.fromarray(pixels).resize((width, height), Image.Resampling.NEAREST))


def _paste(canvas: RGB, cell: RGB, x: int, y: int) -> None:
    canvas[y : y + cell.shape[0], x : x + cell.shape[1]] = cell


def _page(canvas: RGB) -> tuple[Figure, Axes]:
    """A figure with axes in page pixels, y down, that hold the canvas pixel by pixel."""
    height, width = canvas.shape[:2]
    # A hundredth more, since matplotlib rounds 409.99999 pixels down and would shrink the canvas by one.
    figure = Figure(figsize=((width + 0.01) / _DPI, (height + 0.01) / _DPI), dpi=_DPI)
    FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.imshow(canvas, extent=(0, width, height, 0), interpolation="nearest", aspect="auto")
    return figure, axes


def _head(axes: Axes, x: int, column: SheetColumn) -> None:
    scale = column.scale
    _text(axes, x, _TITLE_PX + 18, column.name.replace("_", " "), 10, weight="bold")
    ticks = ((0.0, scale.vmin, "left"), (0.5, (scale.vmin + scale.vmax) / 2, "center"), (1.0, scale.vmax, "right"))
    for share, value, align in ticks:
        _text(axes, x + share * CELL_PX, _TITLE_PX + 51, f"{value:.3g}", 8, align=align)
    _text(axes, x, _TITLE_PX + 65, scale.title, 7.5, _FAINT)
    _text(axes, x, _TITLE_PX + 78, column.source, 7.5, _FAINT)


def _text(
    axes: Axes,
    x: float,
    y: float,
    text: str,
    size: float,
    colour: str = _INK,
    weight: str = "normal",
    align: str = "left",
) -> None:
    # parse_math off: a file's name with two dollar signs is a name, not a formula.
    label = axes.text(x, y, text, fontsize=size, fontweight=weight, color=colour, ha=align, va="baseline")
    label.set_parse_math(False)


def _shorten(text: str) -> str:
    """One printable line that fits below a picture, of letters that the font has."""
    known = get_font(findfont("DejaVu Sans")).get_char_index
    text = "".join(character if character.isprintable() and known(ord(character)) else "?" for character in text)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST // 2]}…{text[-_LONGEST // 2 + 1 :]}"
