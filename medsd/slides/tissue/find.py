"""Where the tissue of a slide is: a mask at low resolution, and its share of tiles and of other grids."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from medsd.checks import check_choice
from medsd.errors import NotBrightFieldError
from medsd.slides.readers.base import Bools
from medsd.slides.slide import Slide, read_blocks
from medsd.slides.tissue.brightfield import what_else
from medsd.slides.tissue.saturation import WORK_MPP, coarsen, tissue_from_rgb

Floats = npt.NDArray[np.float64]

# Ways to find tissue: medsd's own (`tissue_from_rgb`), and tiatoolbox's OtsuTissueMasker and MorphologicalMasker.
METHODS = ("saturation", "tiatoolbox-otsu", "tiatoolbox-morphological")

_SMALLEST_SIDE = 64


@dataclass(frozen=True, eq=False)
class TissueMask:
    """A tissue mask whose top left corner is the origin of level 0.

    Attributes:
        mask: True is tissue, shape (h, w).
        level0_px: side of a mask pixel in level-0 pixels (need not be whole).
        unseen: share of the mask's area that could not be decoded, 0 to 1; it is no tissue.
    """

    mask: Bools
    level0_px: float
    unseen: float = 0.0

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


def find_tissue(slide: Slide, mpp: float = WORK_MPP, method: str = METHODS[0], force: bool = False) -> TissueMask:
    """The tissue of a slide; an empty mask is a result, not an error.

    The slide is read in blocks, so memory holds the small picture and one block. Slides so small that their short side
    would have fewer than 64 pixels are read at a finer mpp (our choice).

    Args:
        slide: an open slide.
        mpp: micrometres per pixel of the mask.
        method: one of `METHODS`.
        force: look for tissue also where the slide is no stained tissue on bright glass.

    Raises:
        ConfigError: no such method.
        NotBrightFieldError: fluorescence, dark field or inverted colours, or nearly all black.

    Example:
        >>> from medsd.slides.slide import open_slide
        >>> with open_slide("slide.tif") as slide:
        ...     tissue = find_tissue(slide)
        >>> tissue.share(x=[0, 500], y=[0, 500], side_px=64)  # of two tiles: glass, and the middle of the slide
        array([0., 1.])
    """
    check_choice("method", method, METHODS)
    width_px, height_px = slide.dimensions
    mpp = max(min(mpp, min(width_px, height_px) * slide.mpp / _SMALLEST_SIDE), slide.mpp)
    level0_px = mpp / slide.mpp
    size = math.ceil(width_px / level0_px - 1e-6), math.ceil(height_px / level0_px - 1e-6)
    image, seen = read_blocks(slide, *size, mpp)
    looks = None if force else what_else(*coarsen(image, mpp, seen))
    if looks is not None:
        raise NotBrightFieldError(
            f"{slide.path}: not stained tissue on bright glass ({looks}); convert the slide, or force the tissue step"
            " (force=True, medsd tiles --force-tissue)"
        )
    if method == "saturation":
        mask = tissue_from_rgb(image, mpp, seen)
    else:
        from medsd.slides.tissue.maskers import masked_by_tiatoolbox

        mask = masked_by_tiatoolbox(image, mpp, seen, morphology=method == "tiatoolbox-morphological")
    return TissueMask(mask, level0_px, 0.0 if seen is None else 1 - float(seen.mean()))
