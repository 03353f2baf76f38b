"""How much a classifier's features say: correlation, effective rank, dead channels."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medsd.errors import DatasetError

_DEAD_SHARE = 1e-3
_FLOAT32_ROUNDING = 1e-6


@dataclass(frozen=True)
class FeatureHealth:
    """Redundancy of features over a data set; nan where nothing varies.

    Attributes:
        mean_abs_correlation: mean |correlation| of two different channels, 0 to 1, dead ones left out; N independent
            normal samples give sqrt(2 / (pi N)) by chance, so take the whole test set. nan for fewer than two.
        effective_rank: exp of the entropy of the covariance's eigenvalues, 1 to d: the number of directions in use.
        top_eigenvalue_share: share of the variance in the first direction, 0 to 1.
        dead_channels: channels that hardly vary; a network can lower the correlation by letting channels die.
    """

    mean_abs_correlation: float
    effective_rank: float
    top_eigenvalue_share: float
    dead_channels: int


def feature_health(features: Tensor | npt.NDArray[np.floating]) -> FeatureHealth:
    """Measures of features (N, d), N >= 2, of one process, computed in float64.

    A channel is dead when its variance is below 1e-3 of the channels' mean variance, so that networks whose features
    differ in scale compare, or its deviation is below 1e-6 of its mean, the rounding of float32 (our choice).
    Effective rank: Roy and Vetterli, EUSIPCO 2007, of the covariance's eigenvalues where they take singular values.

    Raises:
        DatasetError: fewer than two samples, or features that are not finite.

    Example:
        >>> feature_health(np.array([[0.0, 0.0], [1.0, 2.0], [2.0, 4.0]])).mean_abs_correlation  # one says the other
        1.0
    """
    values = torch.as_tensor(features).detach().to("cpu", torch.float64).numpy()
    if values.ndim != 2 or len(values) < 2:
        raise DatasetError(f"features: shape {values.shape}; give (N, d) of at least 2 samples")
    if not np.isfinite(values).all():
        raise DatasetError("features: not all are finite; check the weights and compute them in float32")
    mean = values.mean(axis=0)
    centred = values - mean
    covariance = centred.T @ centred / (len(values) - 1)
    variances = covariance.diagonal()
    constant = variances <= (_FLOAT32_ROUNDING * mean) ** 2
    alive = np.flatnonzero((variances >= _DEAD_SHARE * variances.mean()) & ~constant)
    dead = len(variances) - len(alive)
    if constant.all():
        return FeatureHealth(math.nan, math.nan, math.nan, dead)
    correlation = math.nan
    if len(alive) > 1:
        deviations = np.sqrt(variances[alive])
        among = np.abs(covariance[np.ix_(alive, alive)] / np.outer(deviations, deviations))
        correlation = float((among.sum() - among.trace()) / (len(alive) * (len(alive) - 1)))
    shares = np.linalg.eigvalsh(covariance).clip(0)
    shares = shares[shares > 0] / shares.sum()
    return FeatureHealth(
        mean_abs_correlation=correlation,
        effective_rank=float(np.exp(-(shares * np.log(shares)).sum())),
        top_eigenvalue_share=float(shares.max()),
        dead_channels=dead,
    )
