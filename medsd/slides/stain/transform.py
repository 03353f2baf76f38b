"""Stain normalisation of pixels: each pixel on its own, so blocks and tiles of a slide join without a seam.

The formulas are tiatoolbox's, in single precision and with one rounding at the end (tiatoolbox truncates, so that its
white is 254).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import numpy as np
import numpy.typing as npt

from medsd.slides.readers.base import RGB

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]

# Pixels at work at once: their intermediate results stay in a core's cache.
_STRIP_PX = 2**14

# sRGB (IEC 61966-2-1) to CIE XYZ divided by its white, D65, as OpenCV has it.
_XYZ_OF_RGB = np.array([[0.412453, 0.357580, 0.180423], [0.212671, 0.715160, 0.072169], [0.019334, 0.119193, 0.950227]])
_XYZ_OF_RGB /= np.array([[0.950456], [1.0], [1.088754]])
# L, a, b (with L + 16 for L) from the cube roots of X, Y, Z: row vectors times this.
_LAB_OF_ROOT = np.array([[0.0, 500, 0], [116, -500, 200], [0, 0, -200]])
_DARK = 6 / 29
# Steps of light: the error stays below 0.05 in L, a and b, and below 0.1 of a grey level.
_STEPS = 2**14

# Distances from white (see below): clean and dusty glass has up to 30 (grey 225), the palest stroma more than 60.
GLASS, _STAINED = 30, 60


def distance_from_white(pixels: RGB) -> npt.NDArray[np.int16]:
    """255 less the smallest channel, and the spread of the channels, added (our choice): (n, 3) to (n,), 0 to 510."""
    red, green, blue = np.ascontiguousarray(pixels.T)
    smallest = np.minimum(np.minimum(red, green), blue).astype(np.int16)
    largest = np.maximum(np.maximum(red, green), blue).astype(np.int16)
    distance: npt.NDArray[np.int16] = 255 + largest - 2 * smallest
    return distance


class StainTransform(ABC):
    """Changes what is stained and leaves glass as it is, with a smooth passage between (our choice).

    A grey that no stain explains would else be strengthened like a stain, or given the tint that the mean of the
    tissue is moved by; tiatoolbox does so.
    """

    def __call__(self, pixels: RGB) -> RGB:
        """uint8 RGB pixels, any shape (..., 3), to new ones of the same shape."""
        flat = pixels.reshape(-1, 3)
        result = np.empty_like(flat)
        for start in range(0, len(flat), _STRIP_PX):
            strip, changed = flat[start : start + _STRIP_PX], result[start : start + _STRIP_PX]
            distance = distance_from_white(strip)
            if distance.max() <= GLASS:
                changed[:] = strip
                continue
            changed[:] = self._change(strip)
            pale = np.flatnonzero(distance < _STAINED)
            share = np.clip((distance[pale] - GLASS) / np.float32(_STAINED - GLASS), 0, 1)[:, None]
            kept = strip.take(pale, axis=0)
            changed[pale] = kept + share * (changed.take(pale, axis=0) - kept.astype(np.float32)) + np.float32(0.5)
        return result.reshape(pixels.shape)

    @abstractmethod
    def _change(self, strip: RGB) -> RGB | Floats:
        """Pixels (n, 3) as if all were stained; floats are truncated."""


class TwoStainTransform(StainTransform):
    """Concentrations under one pair of stain vectors, scaled, shown under another (Macenko 2009, eq. 3 and 4).

    What neither stain explains is dropped, as tiatoolbox does.

    Args:
        source, target: (2, 3) optical densities of red, green and blue of a unit of haematoxylin and of eosin.
        gain: (2,) by which the concentrations are multiplied.
    """

    def __init__(self, source: Doubles, target: Doubles, gain: Doubles) -> None:
        # od_out = od_in @ mixing, hence out = 255 exp(-od_in @ mixing): for each channel a product of three factors,
        # each a function of one input channel. Those of red and green come from one table.
        mixing = np.linalg.pinv(source) @ (gain[:, None] * target)
        density = -np.log(np.maximum(np.arange(256), 1) / 255)
        red, green, blue = (-density[:, None] * row for row in mixing)
        # Limited, or two stains that are much alike could make it infinity times zero for black.
        self._red_green = 255 * _exp(red[:, None] + green[None]).reshape(-1, 3)
        self._blue = _exp(blue)

    def _change(self, strip: RGB) -> Floats:
        place = strip[:, 0].astype(np.intp)
        place <<= 8
        place |= strip[:, 1]
        light = self._red_green.take(place, axis=0)
        light *= self._blue.take(strip[:, 2], axis=0)
        light += 0.5
        return np.minimum(light, 255.0, out=light)


class LabTransform(StainTransform):
    """L*a*b* values scaled and shifted (Reinhard 2001); not rounded to 8 bits in between, as tiatoolbox does.

    Args:
        gain, shift: (3,) of L, a and b.
    """

    def __init__(self, gain: Doubles, shift: Doubles) -> None:
        level = np.arange(256) / 255
        self._linear = np.where(level <= 0.04045, level / 12.92, ((level + 0.055) / 1.055) ** 2.4).astype(np.float32)
        # Tables go by the square root of light: steps are then fine in the dark, where the curves are steep.
        light = np.linspace(0, 1, _STEPS + 1) ** 2
        cube_root = np.where(light > _DARK**3, np.cbrt(light), light / (3 * _DARK**2) + 4 / 29)
        self._cube_root = cube_root.astype(np.float32)
        gamma = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
        self._gamma = np.rint(255 * gamma).astype(np.uint8)
        # L*a*b* is linear in the cube roots of XYZ, so the whole change is one matrix on them.
        to_root = np.linalg.inv(_LAB_OF_ROOT)
        self._mixing = (_LAB_OF_ROOT @ np.diag(gain) @ to_root).astype(np.float32)
        self._offset = ((shift - 16 * (gain - 1) * [1, 0, 0]) @ to_root).astype(np.float32)
        self._to_xyz = _XYZ_OF_RGB.T.astype(np.float32)
        self._to_rgb = np.linalg.inv(_XYZ_OF_RGB.T).astype(np.float32)

    def _change(self, strip: RGB) -> RGB:
        root = self._cube_root.take(_table_place(self._linear.take(strip) @ self._to_xyz)) @ self._mixing
        root += self._offset
        # The root of Y tells L, kept within 0 to 100; a and b are differences of roots and stay.
        root += np.clip(root[:, 1:2], 4 / 29, 1) - root[:, 1:2]
        pixels: RGB = self._gamma.take(_table_place(_cubed(root) @ self._to_rgb))
        return pixels


def _exp(values: Doubles) -> Floats:
    return np.exp(np.clip(values, -40, 40)).astype(np.float32)


def _table_place(light: Floats) -> npt.NDArray[np.intp]:
    """Where light of 0 to 1 (what lies outside is brought there) stands in the tables."""
    np.sqrt(np.clip(light, 0, 1, out=light), out=light)
    light *= _STEPS
    light += 0.5
    return light.astype(np.intp)


def _cubed(root: Floats) -> Floats:
    """XYZ of its cube root as CIE L*a*b* has it: a straight line in the dark."""
    xyz = root * root
    xyz *= root
    dark = root < _DARK
    if dark.any():
        xyz[dark] = (root[dark] - np.float32(4 / 29)) * np.float32(3 * _DARK**2)
    return xyz
