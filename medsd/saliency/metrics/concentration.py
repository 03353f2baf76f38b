"""How concentrated and how smooth maps are, whatever their scale; a map that is 0 everywhere counts as constant.

Maps are (B, H, W). Raises DatasetError: they are not, or not finite.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medsd.saliency.metrics.perturb import check_maps


def gini_index(maps: Tensor) -> Tensor:
    """The Gini index of |map|, (B,): 0 where constant, (n - 1) / n where one of n pixels holds everything.

    As a measure of sparsity: Hurley and Rickard 2009 (arXiv 0811.4706).
    """
    shares = _shares(maps).sort(dim=1).values
    count = shares.shape[1]
    weight = 2 * torch.arange(1, count + 1, device=maps.device) - count - 1
    return (shares * weight).sum(dim=1) / count


def normalised_entropy(maps: Tensor) -> Tensor:
    """Entropy of |map| / sum |map| over the logarithm of the number of pixels, (B,): 1 constant, 0 one pixel.

    A map of a single pixel is constant.
    """
    shares = _shares(maps)
    count = shares.shape[1]
    if count == 1:
        return torch.ones_like(shares[:, 0])
    entropy: Tensor = torch.special.entr(shares).sum(dim=1)
    return (entropy / math.log(count)).clamp(max=1)


def total_variation(maps: Tensor) -> Tensor:
    """Mean |difference| of pixels that share an edge, over the mean |map|, (B,): 0 where constant.

    Anisotropic total variation (Rudin, Osher and Fatemi 1992 is the isotropic one), made free of size and scale (our
    choice). The differences are those of the map as given, signed or absolute.
    """
    check_maps(maps)
    maps = maps.double()
    down, across = maps.diff(dim=1).abs().flatten(1), maps.diff(dim=2).abs().flatten(1)
    pairs = max(down.shape[1] + across.shape[1], 1)
    magnitude = maps.abs().mean(dim=(1, 2))
    variation = (down.sum(dim=1) + across.sum(dim=1)) / pairs
    return torch.where(magnitude > 0, variation / magnitude, 0.0)


def _shares(maps: Tensor) -> Tensor:
    """|map| as shares of its sum, (B, n) float64; equal ones where all is 0."""
    check_maps(maps)
    values = maps.abs().flatten(1).double()
    # Divided by the greatest first, so that tiny and huge maps keep their digits.
    greatest = values.amax(dim=1, keepdim=True)
    values = torch.where(greatest > 0, values / greatest, 1.0)
    return values / values.sum(dim=1, keepdim=True)
