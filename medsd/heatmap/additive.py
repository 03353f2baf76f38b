"""Maps that add up: the detail of one layer, corrected so that each square sums to what is known of it exactly."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage
from torch import Tensor

from medsd.heatmap.value_map import Floats

# Each round leaves at most three quarters of what is missing, of smooth residuals far less.
_ROUNDS = 8


def conserve(detail: Floats, sums: Floats, side: int) -> Floats:
    """`detail` with a smooth correction, after which every square of `side` pixels sums to its entry of `sums`.

    Smooth areal interpolation that keeps volumes, after Tobler 1979 (pycnophylactic): what the squares lack is spread
    bilinearly, again for what that leaves, and the small rest evenly within each square. The rounds are our choice.

    Args:
        detail: (h, w) float32; NaN is not seen.
        sums: (ceil(h / side), ceil(w / side)) float32: what the seen pixels of each square are to sum to; NaN where
            nobody knows, and the square becomes NaN.
        side: of a square, in pixels.

    Returns:
        (h, w) float32.

    Example:
        >>> spread = conserve(np.zeros((4, 4), np.float32), np.array([[1, 1], [1, 5]], np.float32), 2)
        >>> [round(float(square.sum()), 5) for square in (spread[:2, :2], spread[2:, 2:])]
        [1.0, 5.0]
    """
    height, width = detail.shape
    rows, columns = sums.shape
    # A last square may reach beyond the map.
    padded = F.pad(torch.from_numpy(detail), (0, columns * side - width, 0, rows * side - height), value=torch.nan)
    wanted = torch.from_numpy(sums).double()
    known = ~padded.isnan() & _spread_evenly(~wanted.isnan(), side)
    values = torch.where(known, padded, 0.0).double()
    count = _square_sums(known.double(), side)
    per_pixel = 1 / count.clamp_min(1)
    lacking = torch.where(count > 0, wanted.nan_to_num() - _square_sums(values, side), 0.0)
    held = (count > 0).double()
    for _ in range(_ROUNDS):
        # Squares that are not seen are no zeros: their neighbours' share counts for them.
        correction = known * _bilinear(lacking * per_pixel, side) / _bilinear(held, side).clamp_min(1e-12)
        values += correction
        lacking = lacking - _square_sums(correction, side)
    values += known * _spread_evenly(lacking * per_pixel, side)
    out: Floats = torch.where(known, values, torch.nan)[:height, :width].float().numpy()
    return out


def blurred(values: Floats, deviation: float) -> Floats:
    """Values (h, w) spread by a Gaussian over the pixels that are seen (not NaN), so that their sum stays.

    Args:
        values: a map.
        deviation: in map pixels; 0 changes nothing.
    """
    if not deviation:
        return values
    seen = np.isfinite(values)
    reached = ndimage.gaussian_filter(seen.astype(np.float64), deviation, mode="constant")
    shares = np.divide(values, reached, out=np.zeros(values.shape), where=seen)
    spread: Floats = np.where(seen, ndimage.gaussian_filter(shares, deviation, mode="constant"), np.nan)
    return spread.astype(np.float32)


def change_of_sums(exact: Floats, changed: Floats, side: int) -> float | None:
    """Mean absolute change of the sums over squares of `side` pixels, over their mean absolute value."""
    side = min(side, *exact.shape)
    squares = [
        np.lib.stride_tricks.sliding_window_view(values, (side, side))[::side, ::side].sum(axis=(2, 3))
        for values in (exact, changed)
    ]
    size = np.nanmean(np.abs(squares[0])) if np.isfinite(squares[0]).any() else 0.0
    return float(np.nanmean(np.abs(squares[1] - squares[0])) / size) if size else None


def _square_sums(values: Tensor, side: int) -> Tensor:
    rows, columns = values.shape
    return values.view(rows // side, side, columns // side, side).sum(dim=(1, 3))


def _spread_evenly(values: Tensor, side: int) -> Tensor:
    return values.repeat_interleave(side, 0).repeat_interleave(side, 1)


def _bilinear(values: Tensor, side: int) -> Tensor:
    return F.interpolate(values[None, None], scale_factor=side, mode="bilinear", align_corners=False)[0, 0]
