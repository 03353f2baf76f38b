"""Whether a picture is stained tissue on bright glass, as the tissue step takes for granted."""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from medsd.slides.readers.base import Bools

# The limits are our choice, set on real bright-field pictures of several scanners, on the same pictures inverted
# (255 - RGB) and on fluorescence, at about 8 um per pixel.
# Dark ground: the inverse of tinted glass (value 60) is on one side, overstained tissue from edge to edge (80) on the
# other.
_DARK_VALUE = 70
# With this share of dark ground, the rest must prove that it is no glow: up to here it is ink and dense tissue.
_DARK_GROUND = 0.2
_LEAST_LIT = 0.02
# Glass is bright and hardly coloured.
_GLASS_LEAST = 150
_GLASS_SATURATION = 0.15
_COLOURED = 0.07
# A single fluorescence channel on black leaves other channels dark; stains at this scale reach 0.65.
_VIVID = 0.8
# Light that fades into the dark ground; the edge of a black frame is sharp.
_FADED_VALUE = 110
_MOST_FADED = 0.25
# Correlation of chroma and value: stains are below 0.82, a glow in one colour is above 0.96.
_GLOW = 0.9
_LEAST_GLASS = 0.2
_MOST_FOREIGN = 0.5
# Shares of more pixels than this are no surer.
_ENOUGH_PX = 2**20


def what_else(image: npt.NDArray[np.uint8], seen: Bools | None = None) -> str | None:
    """What a picture looks like if it is not bright field; None if it is, or if it is blank.

    In bright field, stains only take away from white: green first (haematoxylin, eosin, DAB), and the least coloured
    is the brightest. In fluorescence, dark field and inverted pictures the ground is black and colour adds to it.
    Black frames of scanners around a bright picture, pen marks and glass alone are bright field (our choice).

    Args:
        image: RGB at about 8 um per pixel, shape (h, w, 3), uint8.
        seen: False where the image shows nothing, shape (h, w).

    Returns:
        words for a message, or None.
    """
    step = math.ceil(math.sqrt(image.shape[0] * image.shape[1] / _ENOUGH_PX))
    image, seen = image[::step, ::step], None if seen is None else seen[::step, ::step]
    pixels = image.reshape(-1, 3) if seen is None else image[seen]
    value = pixels.max(axis=1, initial=0)
    lit = pixels[value >= _DARK_VALUE]
    if len(pixels) == 0:
        return None
    dark_ground = 1 - len(lit) / len(pixels)
    if dark_ground > 1 - _LEAST_LIT:
        return "nearly all of it is black"
    red, green, blue = lit.astype(np.int16).T
    value, least = lit.max(axis=1), lit.min(axis=1)
    chroma = value - least
    saturation = chroma / value
    glass = (least >= _GLASS_LEAST) & (saturation < _GLASS_SATURATION)
    coloured = (saturation > _COLOURED) & ~glass
    greenish = coloured & (green >= red) & (green >= blue)
    foreign = greenish | (saturation > _VIVID)
    enough_glass = glass.mean() >= _LEAST_GLASS
    if dark_ground >= _DARK_GROUND:
        # Blue next to black is no counterstain next to glass, and grey next to black no glass in the shade.
        foreign |= coloured & (green >= red)
        stain = (red > green) & (blue > green) & (saturation > _GLASS_SATURATION) & (saturation <= _VIVID)
        if np.mean((value < _FADED_VALUE) & ~stain) > _MOST_FADED:
            return "light that fades into black, as in fluorescence or dark field"
        if not enough_glass and _correlation(value, chroma) > _GLOW:
            return "the brighter the more coloured, as in fluorescence or an inverted picture"
    if enough_glass or foreign.mean() <= _MOST_FOREIGN:
        return None
    if greenish.mean() > _MOST_FOREIGN:
        return "green where stains are red or blue, as in an inverted picture"
    return "vivid colours on black, as in fluorescence"


def _correlation(one: npt.NDArray[np.uint8], other: npt.NDArray[np.uint8]) -> float:
    """Pearson's correlation; 0 where one hardly varies."""
    if min(one.std(), other.std()) < 1:
        return 0.0
    return float(np.corrcoef(one, other)[0, 1])
