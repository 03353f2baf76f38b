"""How alike two maps of the same image are: of two methods, or of a network and its randomised copy."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medsd.errors import DatasetError
from medsd.saliency.metrics.perturb import check_maps


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    """Spearman's correlation of the signed values, equal ones at their mean rank, (B,) in -1 to 1.

    nan where either map is constant, which ranks nothing.

    Args:
        first, second: (B, H, W).

    Raises:
        DatasetError: shapes differ, or maps that are not finite.
    """
    check_maps(first)
    check_maps(second)
    if first.shape != second.shape:
        raise DatasetError(
            f"agreement: maps of {tuple(first.shape)} and {tuple(second.shape)}; resize one to the other first"
        )
    return correlation(*(_mean_ranks(maps.flatten(1)) for maps in (first, second)))


def correlation(first: Tensor, second: Tensor) -> Tensor:
    """Pearson's of rows (B, n), (B,) float64 in -1 to 1; nan where either row is constant."""
    pair = [values.double() for values in (first, second)]
    constant = torch.stack([values.amin(dim=1) == values.amax(dim=1) for values in pair]).any(dim=0)
    a, b = (values - values.mean(dim=1, keepdim=True) for values in pair)
    found = (a * b).sum(dim=1) / (a.norm(dim=1) * b.norm(dim=1))
    return torch.where(constant, math.nan, found).clamp(-1, 1)


def _mean_ranks(values: Tensor) -> Tensor:
    """Ranks (B, n) float64 of values (B, n), equal ones at the mean of their places."""
    ordered = values.sort(dim=1).values
    below = torch.searchsorted(ordered, values.contiguous())
    not_above = torch.searchsorted(ordered, values.contiguous(), right=True)
    return (below + not_above).double() / 2
