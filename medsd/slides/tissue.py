"""Where the tissue of an H&E slide is: a mask at low resolution, and its share of tiles and of other grids.

Colours are judged at about 8 um a pixel, where nuclei and stroma have merged and a pen stroke is still wide. The limits
are our choice, set by eye on tiles and patches of several scanners at that scale; each says what it separates.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFilter
from scipy.ndimage import binary_fill_holes, maximum_filter
from skimage.filters import threshold_otsu
from skimage.morphology import closing, opening, remove_small_objects

if TYPE_CHECKING:
    from medsd.slides.slide import Slide

Bools = npt.NDArray[np.bool_]
Floats = npt.NDArray[np.float64]

_WORK_MPP = 8.0
_SMALLEST_SIDE = 64
_BLOCK_PX = 256

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

_CLOSE_UM = 32.0
_OPEN_UM = 16.0
_INK_RIM_UM = 40.0
_SMALLEST_TISSUE_UM2 = 10_000.0
_SMALLEST_INK_UM2 = 100_000.0
_LARGEST_HOLE_UM2 = 40_000.0
# In a tile smaller than these areas, an object counts if it fills this share of the tile.
_SMALLEST_OF_IMAGE = 0.05


@dataclass(frozen=True, eq=False)
class TissueMask:
    """A tissue mask whose top left corner is the origin of level 0.

    Attributes:
        mask: True is tissue, shape (h, w).
        level0_px: side of a mask pixel in level-0 pixels (need not be whole).
    """

    mask: Bools
    level0_px: float

    def share(self, x: npt.ArrayLike, y: npt.ArrayLike, side_px: float) -> Floats:
        """The share of tissue in each square tile, counting the mask's pixels as squares, to a millionth.

        Args:
            x, y: top-left corners in level-0 pixels, shape (n,).
            side_px: side of the tiles in level-0 pixels.

        Returns:
            shape (n,), 0 to 1; what lies outside the mask counts as no tissue.
        """
        left, top = np.asarray(x, np.float64), np.asarray(y, np.float64)
        x0, x1 = left / self.level0_px, (left + side_px) / self.level0_px
        y0, y1 = top / self.level0_px, (top + side_px) / self.level0_px
        tissue = self._area(x1, y1) - self._area(x0, y1) - self._area(x1, y0) + self._area(x0, y0)
        # Rounded, or a tile without tissue would have a share of 1e-17.
        return np.clip(np.round(tissue / (side_px / self.level0_px) ** 2, 6), 0.0, 1.0)

    def at(self, width: int, height: int, level0_px: float) -> npt.NDArray[np.float32]:
        """The tissue share of each pixel of another grid with the same origin.

        Args:
            width, height: size of that grid.
            level0_px: side of its pixels in level-0 pixels.

        Returns:
            shape (height, width), 0 to 1.
        """
        scale = level0_px / self.level0_px
        columns, rows = (np.arange(size + 1, dtype=np.float64) * scale for size in (width, height))
        corners = np.arange(self.mask.shape[1] + 1, dtype=np.float64)
        share = np.empty((height, width), np.float32)
        for row, (upper, lower) in enumerate(itertools.pairwise(rows)):
            first, last = math.floor(upper), math.ceil(lower)
            strip = self.mask[first:last]
            covered = np.minimum(np.arange(first, last) + 1, lower) - np.maximum(np.arange(first, last), upper)
            left_of = np.concatenate([[0.0], np.cumsum(covered[: len(strip)] @ strip)])
            share[row] = np.round(np.diff(np.interp(columns, corners, left_of)) / scale**2, 6)
        return np.clip(share, 0.0, 1.0)

    @cached_property
    def _integral(self) -> npt.NDArray[np.int64]:
        """Tissue pixels above and left of each pixel corner, shape (h + 1, w + 1) (summed-area table, Crow 1984)."""
        table = np.zeros((self.mask.shape[0] + 1, self.mask.shape[1] + 1), np.int64)
        np.cumsum(self.mask, axis=0, out=table[1:, 1:])
        np.cumsum(table[1:, 1:], axis=1, out=table[1:, 1:])
        return table

    def _area(self, x: Floats, y: Floats) -> Floats:
        """Tissue above and left of places in mask pixels; between corners the table is bilinear, hence exact."""
        height, width = self.mask.shape
        x, y = np.clip(x, 0, width), np.clip(y, 0, height)
        column, row = np.minimum(x.astype(np.int64), width - 1), np.minimum(y.astype(np.int64), height - 1)
        right, down = x - column, y - row
        table = self._integral
        upper = table[row, column] * (1 - right) + table[row, column + 1] * right
        lower = table[row + 1, column] * (1 - right) + table[row + 1, column + 1] * right
        area: Floats = upper * (1 - down) + lower * down
        return area


def find_tissue(slide: Slide, mpp: float = _WORK_MPP) -> TissueMask:
    """The tissue of a slide; an empty mask is a result, not an error.

    The slide is read in blocks, so memory holds the small picture and one block. Slides so small that their short side
    would have fewer than 64 pixels are read at a finer mpp (our choice).

    Args:
        slide: an open slide.
        mpp: micrometres per pixel of the mask.
    """
    width_px, height_px = slide.dimensions
    mpp = max(min(mpp, min(width_px, height_px) * slide.mpp / _SMALLEST_SIDE), slide.mpp)
    level0_px = mpp / slide.mpp
    width, height = math.ceil(width_px / level0_px - 1e-6), math.ceil(height_px / level0_px - 1e-6)
    image = np.empty((height, width, 3), np.uint8)
    for top in range(0, height, _BLOCK_PX):
        for left in range(0, width, _BLOCK_PX):
            block = image[top : top + _BLOCK_PX, left : left + _BLOCK_PX]
            place = round(left * level0_px), round(top * level0_px)
            block[:] = slide.read(*place, block.shape[1], block.shape[0], mpp)
    return TissueMask(tissue_from_rgb(image, mpp), level0_px)


def tissue_from_rgb(image: npt.NDArray[np.uint8], mpp: float) -> Bools:
    """The tissue of a bright-field H&E image.

    Otsu's threshold (1979) on saturation, kept between a floor and a ceiling, then smoothing of the outline. Not tissue
    are glass, dust, thin lines (coverslip edges), black frames and pen marks, also where ink covers tissue. Holes up to
    0.04 mm2 (fat cells, vessels) are filled. A picture without tissue gives an empty mask.

    Args:
        image: RGB, shape (h, w, 3).
        mpp: micrometres per pixel of the image.

    Returns:
        shape (h, w).
    """
    height, width = image.shape[:2]
    reduction = max(_WORK_MPP / mpp, 1.0)
    small = math.ceil(width / reduction), math.ceil(height / reduction)
    coarse = image if reduction < 2.0 else np.asarray(Image.fromarray(image).resize(small, Image.Resampling.BOX))
    mask = _tissue_at_work_scale(coarse, mpp * width / coarse.shape[1])
    if mask.shape == (height, width):
        return mask
    return np.asarray(Image.fromarray(mask).resize((width, height), Image.Resampling.NEAREST), np.bool_)


def _tissue_at_work_scale(image: npt.NDArray[np.uint8], mpp: float) -> Bools:
    smooth = np.asarray(Image.fromarray(image).filter(ImageFilter.GaussianBlur(0.75)))
    red, green, blue = (smooth[..., channel] for channel in range(3))
    value = np.maximum(np.maximum(red, green), blue)
    chroma = value - np.minimum(np.minimum(red, green), blue)
    saturation = np.divide(chroma, np.maximum(value, 1), dtype=np.float32)
    ink = _ink(smooth, value, chroma, saturation, mpp)
    # Haematoxylin and eosin absorb green more than red (99.95 % of stained pixels of 1,600 CAMELYON patches); green,
    # cyan and blue ink do not.
    clear = ~ink & (value > _BLACK_VALUE)
    tissue = clear & (red > green) & (saturation > _saturation_threshold(saturation[clear]))
    tissue = opening(closing(tissue, _disk(_CLOSE_UM, mpp), mode="ignore"), _disk(_OPEN_UM, mpp), mode="ignore")
    tissue = remove_small_objects(tissue, max_size=_pixels(_SMALLEST_TISSUE_UM2, mpp, tissue.size))
    # What touches the picture's edge is no hole: nobody knows how large it is.
    holes = binary_fill_holes(tissue) & ~tissue
    holes &= ~remove_small_objects(holes, max_size=round(_LARGEST_HOLE_UM2 / mpp**2))
    return np.asarray((tissue | holes) & ~ink, np.bool_)


def _ink(
    image: npt.NDArray[np.uint8],
    value: npt.NDArray[np.uint8],
    chroma: npt.NDArray[np.uint8],
    saturation: npt.NDArray[np.float32],
    mpp: float,
) -> Bools:
    """Strokes of green, blue, red and black pens with their blurred rim; marks smaller than strokes are left alone."""
    red, green, blue = (image[..., channel] for channel in range(3))
    cold = (red <= green) & (saturation > _SATURATION_CEILING)
    stained = value[(red > green) & (saturation > _SATURATION_CEILING) & (value > _BLACK_VALUE)]
    typical = float(np.median(stained)) if stained.size else 0.0
    dark = value <= max(_BLACK_VALUE, min(_INK_VALUE, _INK_TO_TISSUE * typical))
    # Where red is the largest channel, the hue is 60 (green - blue) / chroma degrees; 60 * 255 fits in 16 bits.
    degrees_chroma = 60 * (green.astype(np.int16) - blue)
    warm = (red == value) & (saturation > _RED_SATURATION)
    warm &= (degrees_chroma > _RED_HUE[0] * chroma.astype(np.int16)) & (degrees_chroma < _RED_HUE[1] * chroma)
    ink = remove_small_objects(cold | dark | warm, max_size=_pixels(_SMALLEST_INK_UM2, mpp, value.size))
    return np.asarray(maximum_filter(ink, size=2 * max(round(_INK_RIM_UM / mpp), 1) + 1), np.bool_)


def _saturation_threshold(saturation: npt.NDArray[np.float32]) -> float:
    """Otsu's threshold where glass and tissue are two modes, else the ceiling; always from floor to ceiling."""
    if saturation.size == 0:
        return _SATURATION_CEILING
    otsu = float(threshold_otsu(saturation))  # type: ignore[no-untyped-call]
    upper = saturation > otsu
    if upper.all() or not upper.any() or saturation[upper].mean() - saturation[~upper].mean() < _MODES_APART:
        return _SATURATION_CEILING
    return min(max(otsu, _SATURATION_FLOOR), _SATURATION_CEILING)


def _disk(diameter_um: float, mpp: float) -> Bools:
    radius = round(diameter_um / 2 / mpp)
    y, x = np.mgrid[-radius : radius + 1, -radius : radius + 1]
    return np.asarray(x**2 + y**2 <= radius**2, np.bool_)


def _pixels(area_um2: float, mpp: float, image_px: int) -> int:
    return round(min(area_um2 / mpp**2, _SMALLEST_OF_IMAGE * image_px))
