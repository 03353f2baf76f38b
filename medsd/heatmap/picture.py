"""A map over the picture of a slide, at any place and scale."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from medsd.drawing import pale
from medsd.heatmap.scale import OPACITY, ColourScale
from medsd.heatmap.value_map import Floats, ValueMap

Doubles = npt.NDArray[np.float64]


def tinted(
    pixels: npt.NDArray[np.uint8],
    value_map: ValueMap,
    scale: ColourScale,
    x: Doubles,
    y: Doubles,
    opacity: float = OPACITY,
) -> npt.NDArray[np.uint8]:
    """A slide's pixels (h, w, 3) in light grey, and the map's colours over them; faded where the map has not seen them.

    A place without colour would else look the same whether it was judged or not.

    Args:
        pixels: RGB.
        value_map, scale: of the map.
        x, y: (w,), (h,) level-0 places of the pixels' centres.
        opacity: of the strongest colour, 0 to 1.
    """
    values, grey = interpolated(value_map, x, y), pale(pixels)
    grey = np.where(np.isnan(values)[..., None], np.rint(opacity * 255 + (1 - opacity) * grey), grey).astype(np.uint8)
    return scale.over(grey, values, opacity)


def interpolated(value_map: ValueMap, x: Doubles, y: Doubles) -> Floats:
    """Values (len(y), len(x)) at the places of a grid, bilinear between the centres of the map pixels that are seen.

    NaN where the map pixel that holds a place is not seen.

    Args:
        value_map: the map.
        x, y: level-0 pixels, of the columns and the rows.

    Example:
        >>> drawn = ValueMap(np.array([[0.0, 1.0, np.nan]], np.float32), 10.0, 2.5, "saliency", "tumour", "drawn", "")
        >>> interpolated(drawn, np.array([5.0, 10.0, 19.0, 21.0]), np.array([5.0]))
        array([[0. , 0.5, 1. , nan]], dtype=float32)
    """
    axes = zip((y, x), value_map.values.shape, strict=True)
    rows, columns = (_Axis(places / value_map.level0_px, size) for places, size in axes)
    values = value_map.values[rows.window, columns.window]
    seen = np.isfinite(values)
    total = rows.mean(columns.mean(np.where(seen, values, 0.0).astype(np.float64).T).T)
    weight = rows.mean(columns.mean(seen.astype(np.float64).T).T)
    held = np.ix_(rows.inside, columns.inside)
    here = np.zeros(total.shape, bool)
    here[held] = seen[np.ix_(rows.holder[rows.inside], columns.holder[columns.inside])]
    out: Floats = np.divide(total, weight, out=np.full(total.shape, np.nan), where=here).astype(np.float32)
    return out


class _Axis:
    """Where places, in map pixels, lie among `size` map pixels along one axis.

    Attributes:
        window: the map pixels that have a share in any place.
        holder: number in the window of the map pixel that holds each place.
        inside: (n,) bool: the places on the map.
    """

    def __init__(self, places: Doubles, size: int) -> None:
        low = np.floor(places - 0.5).astype(np.int64)
        self._share = places - 0.5 - low
        pair = np.stack([low, low + 1]).clip(0, size - 1)
        first = int(pair.min())
        self.window = slice(first, int(pair.max()) + 1)
        self._pair = pair - first
        self.inside = (places >= 0) & (places < size)
        self.holder = np.floor(places).astype(np.int64) - first

    def mean(self, field: Doubles) -> Doubles:
        """The field (window, ...) at the places (n, ...)."""
        share = self._share[:, np.newaxis]
        mean: Doubles = (1 - share) * field[self._pair[0]] + share * field[self._pair[1]]
        return mean
