"""How much a classifier's features say: correlation, effective rank, dead channels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medsd.pretrain.collapse import (
    checked_features,
    constant_channels,
    effective_rank,
    living_channels,
    mean_abs_correlation,
)


@dataclass(frozen=True)
class FeatureHealth:
    """Redundancy of features over a data set; nan where nothing varies.

    Attributes:
        mean_abs_correlation: mean |correlation| of two different channels, 0 to 1, dead ones left out; nan for fewer
            than two.
        correlation_by_chance: what N independent samples of independent normal channels show on average, about
            sqrt(2 / (pi N)): `mean_abs_correlation` of held-out samples can hardly be less, so take the whole test
            set. nan for two samples or where nothing varies.
        effective_rank: exp of the entropy of the covariance's eigenvalues, 1 to d: the number of directions in use.
        top_eigenvalue_share: share of the variance in the first direction, 0 to 1.
        dead_channels: channels that hardly vary; a network can lower the correlation by letting channels die.
    """

    mean_abs_correlation: float
    correlation_by_chance: float
    effective_rank: float
    top_eigenvalue_share: float
    dead_channels: int


def feature_health(features: Tensor | npt.NDArray[np.floating]) -> FeatureHealth:
    """Measures of features (N, d), N >= 2, of one process, computed in float64.

    Dead channels are those that `medsd.pretrain.collapse.living_channels` leaves out; effective rank as there, of the
    covariance's eigenvalues. Features are taken as they are, not of unit length as in `spectrum`.

    Raises:
        DatasetError: fewer than two samples, or features that are not finite.

    Example:
        >>> feature_health(np.array([[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]])).mean_abs_correlation  # one says the other
        1.0
    """
    values = checked_features(features)
    mean, covariance = values.mean(dim=0), torch.cov(values.T).reshape(values.shape[1], -1)
    variances = covariance.diagonal()
    living = living_channels(mean, variances)
    dead = len(variances) - len(living)
    if constant_channels(mean, variances).all():
        return FeatureHealth(math.nan, math.nan, math.nan, math.nan, dead)
    eigenvalues = torch.linalg.eigvalsh(covariance).clamp(min=0)
    return FeatureHealth(
        mean_abs_correlation=mean_abs_correlation(covariance, living),
        correlation_by_chance=_correlation_by_chance(len(values)),
        effective_rank=float(effective_rank(eigenvalues)),
        top_eigenvalue_share=float(eigenvalues.max() / eigenvalues.sum()),
        dead_channels=dead,
    )


def _correlation_by_chance(samples: int) -> float:
    """E|r| of independent normal samples, whose r^2 is Beta(1/2, (N - 2) / 2); nan for two, whose |r| is always 1."""
    if samples < 3:
        return math.nan
    return math.exp(math.lgamma((samples - 1) / 2) - math.lgamma(samples / 2)) / math.sqrt(math.pi)
