"""How alike two maps of the same image are: of two methods, or of a network and its randomised copy."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from medsd.errors import ConfigError, DatasetError
from medsd.saliency.metrics.confidence import unit_range
from medsd.saliency.metrics.perturb import check_maps, unit_strength

_LUMINANCE, _CONTRAST = 0.01**2, 0.03**2


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation of the signed values, equal ones at their mean rank, (B,) in -1 to 1.

    nan where either map is constant, which ranks nothing.

    Args:
        first, second: (B, H, W).

    Raises:
        DatasetError: shapes differ, or maps that are not finite.
    """
    _check(first, second)
    ranks = [_mean_ranks(maps.flatten(1)) for maps in (first, second)]
    centred = [values - values.mean(dim=1, keepdim=True) for values in ranks]
    product = (centred[0] * centred[1]).sum(dim=1)
    norm = centred[0].norm(dim=1) * centred[1].norm(dim=1)
    # 0 / 0 would be nan as well; written out because it is meant.
    return torch.where(norm > 0, product / norm, math.nan).clamp(-1, 1)


def structural_similarity(first: Tensor, second: Tensor, window_px: int = 7) -> Tensor:
    """SSIM (Wang et al. 2004) of the maps brought to 0 to 1 (`confidence.unit_range`), (B,), 1 where they are equal.

    As scikit-image has it by default: windows of equal weight that lie within the map, sample covariance. nan where
    either map is constant.

    Args:
        first, second: (B, H, W).
        window_px: side of the window, odd, at least 3; maps of deep layers may be smaller than 7.

    Raises:
        ConfigError: a window that is even, below 3, or does not fit.
        DatasetError: shapes differ, or maps that are not finite.
    """
    _check(first, second)
    sides = first.shape[1:]
    if window_px % 2 == 0 or not 3 <= window_px <= min(sides):
        raise ConfigError(f"window_px={window_px}: give an odd one of 3 or more that fits maps of {tuple(sides)} px")
    a, b = (unit_range(unit_strength(maps.double()))[:, None] for maps in (first, second))

    def mean(values: Tensor) -> Tensor:
        return F.avg_pool2d(values, window_px, stride=1)

    sample = window_px**2 / (window_px**2 - 1)
    mean_a, mean_b = mean(a), mean(b)
    variance = sample * (mean(a * a) - mean_a**2 + mean(b * b) - mean_b**2)
    covariance = sample * (mean(a * b) - mean_a * mean_b)
    luminance = (2 * mean_a * mean_b + _LUMINANCE) / (mean_a**2 + mean_b**2 + _LUMINANCE)
    structure = (2 * covariance + _CONTRAST) / (variance + _CONTRAST)
    similarity = (luminance * structure).mean(dim=(1, 2, 3))
    return similarity.where((a.amax(dim=(1, 2, 3)) > 0) & (b.amax(dim=(1, 2, 3)) > 0), math.nan)


def _mean_ranks(values: Tensor) -> Tensor:
    """Ranks (B, n) float64 of values (B, n), equal ones at the mean of their places."""
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values.contiguous())
    not_above = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + not_above).double() / 2


def _check(first: Tensor, second: Tensor) -> None:
    check_maps(first)
    check_maps(second)
    if first.shape != second.shape:
        raise DatasetError(
            f"agreement: maps of {tuple(first.shape)} and {tuple(second.shape)}; resize one to the other first"
        )
