"""The tissue of a bright-field picture by Otsu's threshold on saturation, without pen marks, frames and dust.

Colours are judged at about 8 um a pixel, where nuclei and stroma have merged and a pen stroke is still wide. The limits
are our choice, set by eye on tiles and patches of several scanners at that scale; each says what it separates.

A colour is judged by its value (largest channel) and chroma (largest less smallest channel) alone, but for its hue.
Both are bytes, so that every judgement is one look into a table of 256 x 256 answers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import cv2
import numpy as np
import numpy.typing as npt
from PIL import Image
from skimage.filters import threshold_otsu

from medsd.slides.readers.base import Bools
from medsd.slides.tissue.morphology import drop_small, fill_small_holes, grow_square, smooth

WORK_MPP = 8.0

# Saturation of glass stays below 0.03, that of pale fat is about 0.04, of pale stroma 0.08. Otsu decides between these
# only, so that tissue is not split into pale and dark tissue, and glass not into clean and dusty glass.
_SATURATION_FLOOR = 0.035
_SATURATION_CEILING = 0.07
# Two modes: the mean saturations of glass and tissue differ by more than this; noise and tinted glass by less.
_MODES_APART = 0.03
# Black frames of scanners are darker than this, and so is opaque black ink.
_BLACK_VALUE = 51
# Thinner black ink is told by its value against the slide's own tissue: dense nodes of a dark slide are as dark as ink
# on a pale one.
_INK_VALUE = 90
_INK_TO_TISSUE = 0.45
# Red ink is redder than eosin (hues -100 to -20 degrees); blood is as red, but its vessels are small.
_RED_HUE = (-20, 5)
_RED_SATURATION = 0.5
# The thin edge of a red stroke is paler, down to this, and as far from what is certainly ink.
_PALE_RED_SATURATION = 0.1
_PALE_RED_UM = 400.0

_CLOSE_UM = 32.0
_OPEN_UM = 16.0
_INK_RIM_UM = 40.0
_SMALLEST_TISSUE_UM2 = 10_000.0
_SMALLEST_INK_UM2 = 100_000.0
_LARGEST_HOLE_UM2 = 40_000.0
# In a tile smaller than these areas, an object counts if it fills this share of the tile.
_SMALLEST_OF_IMAGE = 0.05

# Rows worked on at once: a few of them stay in the processor's cache.
_BAND_ROWS = 64
# Three passes have the variance of a Gaussian of 0.75 pixels.
_BLUR_KERNEL, _BLUR_PASSES = np.array([[3, 26, 3]], np.float32) / 32, 3

_value_of_tone, _chroma_of_tone = np.divmod(np.arange(2**16), 256)
_saturation_of_tone = np.divide(_chroma_of_tone, np.maximum(_value_of_tone, 1)).astype(np.float32)


def tissue_from_rgb(image: npt.NDArray[np.uint8], mpp: float, seen: Bools | None = None) -> Bools:
    """The tissue of a bright-field H&E image.

    Otsu's threshold (1979) on saturation, kept between a floor and a ceiling, then smoothing of the outline. Not tissue
    are glass, dust, thin lines (coverslip edges), black frames and pen marks, also where ink covers tissue. Holes up to
    0.04 mm2 (fat cells, vessels) are filled. A picture without tissue gives an empty mask.

    Args:
        image: RGB, shape (h, w, 3), uint8.
        mpp: micrometres per pixel of the image.
        seen: False where the image shows nothing (it could not be decoded), shape (h, w): no tissue there, and no part
            in the threshold.

    Returns:
        shape (h, w).
    """
    height, width = image.shape[:2]
    coarse, coarse_seen = coarsen(image, mpp, seen)
    mask = _tissue_at_work_scale(coarse, coarse_seen, mpp * width / coarse.shape[1])
    if mask.shape != (height, width):
        mask = np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST), np.bool_)
    return mask if seen is None else mask & seen


def coarsen(
    image: npt.NDArray[np.uint8], mpp: float, seen: Bools | None = None
) -> tuple[npt.NDArray[np.uint8], Bools | None]:
    """The image at about 8 um per pixel, if it is at least twice as fine, and which of its pixels are wholly seen."""
    reduction = WORK_MPP / mpp
    if reduction < 2.0:
        return image, seen
    size = math.ceil(image.shape[1] / reduction), math.ceil(image.shape[0] / reduction)
    coarse = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))
    if seen is None:
        return coarse, None
    light = Image.fromarray(np.where(seen, np.uint8(255), np.uint8(0))).resize(size, Image.Resampling.BOX)
    return coarse, np.asarray(light) == 255


@dataclass(frozen=True)
class _Colours:
    """The colours of a blurred image, in the terms they are judged by.

    Attributes:
        tone: 256 * value + chroma, shape (h, w).
        reddish: red is more than green, shape (h, w). Haematoxylin and eosin absorb green more than red (99.95 % of
            stained pixels of 1,600 CAMELYON patches); green, cyan and blue ink do not.
        ink_red: of the hue of red ink, shape (h, w).
    """

    tone: npt.NDArray[np.uint16]
    reddish: Bools
    ink_red: Bools


def _tissue_at_work_scale(image: npt.NDArray[np.uint8], seen: Bools | None, mpp: float) -> Bools:
    colours = _colours(image)
    ink = _ink(colours, seen, mpp)
    clear = ~ink if seen is None else seen & ~ink
    counts = _count(colours.tone, clear) * (_value_of_tone > _BLACK_VALUE)
    stained = (_value_of_tone > _BLACK_VALUE) & (_saturation_of_tone > np.float32(_saturation_threshold(counts)))
    tissue = clear & colours.reddish & _judge(colours.tone, stained)
    tissue = smooth(tissue, _radius(_CLOSE_UM, mpp), _radius(_OPEN_UM, mpp))
    tissue = drop_small(tissue, _pixels(_SMALLEST_TISSUE_UM2, mpp, tissue.size))
    return fill_small_holes(tissue, round(_LARGEST_HOLE_UM2 / mpp**2)) & clear


def _colours(image: npt.NDArray[np.uint8]) -> _Colours:
    shape = image.shape[:2]
    colours = _Colours(np.empty(shape, np.uint16), np.empty(shape, np.bool_), np.empty(shape, np.bool_))
    for top in range(0, shape[0], _BAND_ROWS):
        rows = slice(top, top + _BAND_ROWS)
        first = max(top - _BLUR_PASSES, 0)
        band = _blur(np.ascontiguousarray(image[first : top + _BAND_ROWS + _BLUR_PASSES]))
        red, green, blue = band[top - first :][:_BAND_ROWS].transpose(2, 0, 1).astype(np.uint16, order="C")
        value = np.maximum(np.maximum(red, green), blue)
        chroma = value - np.minimum(np.minimum(red, green), blue)
        colours.tone[rows] = value * np.uint16(256) + chroma
        colours.reddish[rows] = red > green
        # Where red is the largest channel, the hue is 60 (green - blue) / chroma degrees; 60 * 255 fits in 16 bits.
        degrees_chroma, chroma = (green - blue).view(np.int16) * np.int16(60), chroma.view(np.int16)
        hue = (degrees_chroma > chroma * np.int16(_RED_HUE[0])) & (degrees_chroma < chroma * np.int16(_RED_HUE[1]))
        colours.ink_red[rows] = hue & (red == value)
    return colours


def _blur(image: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """A Gaussian blur of 0.75 pixels, shape (h, w, 3); edge pixels are repeated.

    Equal to Pillow's `GaussianBlur(0.75)` for bytes that are not 0, in a fraction of the time.
    """
    for kernel in (_BLUR_KERNEL, _BLUR_KERNEL.T):
        for _ in range(_BLUR_PASSES):
            # Less half a step, so that halves are rounded down.
            image = cv2.filter2D(image, -1, kernel, delta=-1 / 64, borderType=cv2.BORDER_REPLICATE)  # type: ignore[assignment]
    return image


def _ink(colours: _Colours, seen: Bools | None, mpp: float) -> Bools:
    """Strokes of green, blue, red and black pens with their blurred rim; marks smaller than strokes are left alone."""
    coloured = _saturation_of_tone > np.float32(_SATURATION_CEILING)
    tissue = colours.reddish if seen is None else colours.reddish & seen
    counts = _count(colours.tone, tissue) * (coloured & (_value_of_tone > _BLACK_VALUE))
    dark = _value_of_tone <= max(_BLACK_VALUE, min(_INK_VALUE, _INK_TO_TISSUE * _median_value(counts)))
    strong_red = colours.ink_red & _judge(colours.tone, _saturation_of_tone > np.float32(_RED_SATURATION))
    ink = _judge(colours.tone, dark) | strong_red
    ink |= ~colours.reddish & _judge(colours.tone, coloured)
    ink = drop_small(ink, _pixels(_SMALLEST_INK_UM2, mpp, ink.size))
    strong_red &= ink
    if strong_red.any():
        pale_red = colours.ink_red & _judge(colours.tone, _saturation_of_tone > np.float32(_PALE_RED_SATURATION))
        ink |= pale_red & grow_square(strong_red, round(_PALE_RED_UM / mpp))
    return grow_square(ink, max(round(_INK_RIM_UM / mpp), 1))


def _judge(tone: npt.NDArray[np.uint16], answers: Bools) -> Bools:
    """The answer for each pixel from a table of answers for each tone."""
    out = np.empty(tone.shape, np.bool_)
    for top in range(0, len(tone), _BAND_ROWS):
        # No tone is out of range; 'clip' spares a check of each.
        np.take(answers, tone[top : top + _BAND_ROWS], out=out[top : top + _BAND_ROWS], mode="clip")
    return out


def _count(tone: npt.NDArray[np.uint16], which: Bools) -> npt.NDArray[np.int64]:
    """How often each tone occurs among some pixels, shape (65536,)."""
    counts = np.zeros(2**16, np.int64)
    for top in range(0, len(tone), _BAND_ROWS):
        counts += np.bincount(tone[top : top + _BAND_ROWS][which[top : top + _BAND_ROWS]], minlength=2**16)
    return counts


def _median_value(counts: npt.NDArray[np.int64]) -> float:
    """The median value of the counted tones; 0 of none."""
    total = int(counts.sum())
    if total == 0:
        return 0.0
    middle = np.searchsorted(np.cumsum(counts), [(total + 1) // 2, total // 2 + 1])
    return float(_value_of_tone[middle].mean())


def _saturation_threshold(counts: npt.NDArray[np.int64]) -> float:
    """Otsu's threshold where glass and tissue are two modes, else the ceiling; always from floor to ceiling."""
    there = np.flatnonzero(counts)
    saturation, weight = _saturation_of_tone[there], counts[there]
    if there.size == 0 or saturation.min() == saturation.max():
        return _SATURATION_CEILING
    histogram, edges = np.histogram(saturation, bins=256, weights=weight)
    otsu = float(threshold_otsu(hist=(histogram, (edges[:-1] + edges[1:]) / 2)))  # type: ignore[no-untyped-call]
    upper = saturation > np.float32(otsu)
    if upper.all() or not upper.any():
        return _SATURATION_CEILING
    apart = np.average(saturation[upper], weights=weight[upper]) - np.average(
        saturation[~upper], weights=weight[~upper]
    )
    return min(max(otsu, _SATURATION_FLOOR), _SATURATION_CEILING) if apart >= _MODES_APART else _SATURATION_CEILING


def _radius(diameter_um: float, mpp: float) -> int:
    return round(diameter_um / 2 / mpp)


def _pixels(area_um2: float, mpp: float, image_px: int) -> int:
    return round(min(area_um2 / mpp**2, _SMALLEST_OF_IMAGE * image_px))
