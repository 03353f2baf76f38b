"""Pictures for people: text that fits, ink that is seen on any tissue, whole files that say what they are for."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from medsd import RESEARCH_USE_ONLY
from medsd.files import atomic_path, printable

RGB = npt.NDArray[np.uint8]
Colour = tuple[int, int, int]

BLACK: Colour = (0, 0, 0)
WHITE: Colour = (255, 255, 255)
INK: Colour = (28, 31, 35)
FAINT: Colour = (91, 97, 104)
RED: Colour = (168, 20, 20)
_FONT = "DejaVu Sans"  # comes with matplotlib
_SHIFT = 4


class Canvas:
    """A white picture in pixels, y down; what is drawn later lies on top. Safe in threads, one picture each."""

    def __init__(self, width: int, height: int) -> None:
        self.image = Image.new("RGB", (width, height), "white")
        self._draw = ImageDraw.Draw(self.image)

    def paste(self, pixels: RGB, x: int, y: int) -> None:
        """Lay pixels (h, w, 3) with their top left corner at (x, y)."""
        self.image.paste(Image.fromarray(pixels), (x, y))

    def box(
        self, x: float, y: float, width: float, height: float, fill: Colour | None = None, outline: Colour | None = None
    ) -> None:
        """Draw a rectangle of whole pixels, its outline within it."""
        self._draw.rectangle((x, y, x + width - 1, y + height - 1), fill, outline)

    def text(
        self,
        x: float,
        y: float,
        text: str,
        size: float,
        colour: Colour = INK,
        bold: bool = False,
        align: Literal["l", "m", "r"] = "l",
        width: float | None = None,
    ) -> None:
        """Write one line, taken as it is, never as markup.

        Args:
            x, y: left, middle or right end (as `align` says) of its baseline.
            text: letters that the font lacks become question marks.
            size: of the font, in pixels.
            colour: of the letters.
            bold: whether they are bold.
            align: what `x` is.
            width: the middle of a longer line is left out; None for no limit.
        """
        self._draw.text((x, y), fitted(text, size, width, bold), colour, _font(size, bold), anchor=f"{align}s")

    def colour_bar(self, x: int, y: int, width: int, height: int, bar: RGB, ticks: Sequence[str], size: float) -> None:
        """Draw a bar (h, n, 3) at another size, ticks evenly spaced below, the outer two within the bar's width."""
        self.paste(resized(bar, width, height, Image.Resampling.NEAREST), x, y)
        last = len(ticks) - 1
        for number, tick in enumerate(ticks):
            align: Literal["l", "m", "r"] = "l" if number == 0 else "r" if number == last else "m"
            self.text(x + width * number / last, y + height + size + 3, tick, size, align=align)

    def save(self, path: str | Path, title: str) -> None:
        """Write a PNG, atomically, with title and intended use in its metadata.

        Raises:
            OutputError: the file cannot be written.
        """
        about = PngInfo()
        for key, value in _about(title).items():
            about.add_text(key, value)
        with atomic_path(path) as temporary:
            self.image.save(temporary, "PNG", pnginfo=about)


def save_figure(path: str | Path, figure: Figure, title: str) -> None:
    """Write a matplotlib figure as `Canvas.save` writes a picture. No pyplot: no global state, safe in threads."""
    FigureCanvasAgg(figure)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", metadata=_about(title))


def resized(
    pixels: RGB, width: int, height: int, filter: Image.Resampling = Image.Resampling.LANCZOS
) -> npt.NDArray[np.uint8]:
    """Pixels (h, w, 3) at another size."""
    return np.array(Image.fromarray(pixels).resize((width, height), filter))


def pale(pixels: RGB) -> npt.NDArray[np.uint8]:
    """Pixels (h, w, 3) in light grey, 128 to 255: what lies over them keeps its hue, on black nuclei too."""
    grey = np.asarray(Image.fromarray(pixels).convert("L"))
    return np.repeat((128 + grey // 2)[..., np.newaxis], 3, axis=2)


def outline(pixels: RGB, shapes: Sequence[Sequence[npt.NDArray[np.float64]]]) -> None:
    """Draw shapes into pixels (h, w, 3), where (0, 0) is the corner of the first pixel.

    A dark line, and a light band on its inner side: seen on glass, on tissue and on every colour of the scales, and a
    hole is told from a shape.

    Args:
        pixels: changed.
        shapes: closed rings (n, 2) of x and y, the first the outer one, the others holes.
    """
    band = np.zeros(pixels.shape[:2], np.uint8)
    for rings in shapes:
        # OpenCV takes fixed-point numbers, and pixel centres for whole ones.
        points = [np.rint((ring - 0.5) * 2**_SHIFT).astype(np.int32) for ring in rings]
        inside, lines = np.zeros_like(band), np.zeros_like(band)
        cv2.fillPoly(inside, points, 255, cv2.LINE_8, _SHIFT)
        cv2.polylines(lines, points, True, 255, 5, cv2.LINE_8, _SHIFT)
        band |= inside & lines
    pixels[band > 0] = WHITE
    for rings in shapes:
        points = [np.rint((ring - 0.5) * 2**_SHIFT).astype(np.int32) for ring in rings]
        cv2.polylines(pixels, points, True, BLACK, 1, cv2.LINE_AA, _SHIFT)


def text_width(text: str, size: float, bold: bool = False) -> float:
    """Pixels that one line takes."""
    return _font(size, bold).getlength(text)


def fitted(text: str, size: float, width: float | None, bold: bool = False) -> str:
    """`text` as `Canvas.text` writes it."""
    known = get_font(_font_file(bold)).get_char_index
    text = "".join(character if known(ord(character)) else "?" for character in printable(text))
    if width is None or text_width(text, size, bold) <= width:
        return text

    def without_middle(kept: int) -> str:
        return f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"

    longer = bisect_right(range(len(text)), width, key=lambda kept: text_width(without_middle(kept), size, bold))
    return without_middle(max(0, longer - 1))


def wrapped(text: str, size: float, width: float, bold: bool = False) -> list[str]:
    """Lines of at most `width` pixels, broken between words."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if text_width(longer, size, bold) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def _about(title: str) -> dict[str, str]:
    return {"Software": "medsd", "Title": printable(title), "Description": RESEARCH_USE_ONLY}


@cache
def _font_file(bold: bool) -> str:
    return findfont(FontProperties(family=_FONT, weight="bold" if bold else "normal"))


@cache
def _font(size: float, bold: bool) -> ImageFont.FreeTypeFont:
    # Not Raqm, which is not in every Pillow: widths would differ.
    return ImageFont.truetype(_font_file(bold), size, layout_engine=ImageFont.Layout.BASIC)
