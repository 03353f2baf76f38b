"""Dimensional collapse: how many directions features use (Jing et al., arXiv 2110.09348), and how they spread."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from medsd.errors import DatasetError

_DEAD_SHARE = 1e-3
_FLOAT32_ROUNDING = 1e-6
_IN_USE = 1e-6
_COLLAPSED = 0.1


@dataclass(frozen=True)
class Spectrum:
    """The directions that features of unit length use; nan where nothing varies.

    MONAI's `EmbeddingCollapseMetric`, beside it, takes features as they are and gives scores of 0 to 1, 1 for
    collapsed. `effective_rank_score` is 1 - r / min(N - 1, d) with r the effective rank of the singular values of the
    centred features, square roots of the covariance's, so that r is larger than the one here. Likeness of class
    centroids, rank within classes and separation (silhouette) need labels, domain shift a second set; `aggregate` is
    the worst of what could be computed.

    Attributes:
        singular_values: (d,) float64 of the covariance, largest first.
        samples: N that they are from.
        effective_rank: exp of the entropy of the singular values' shares, 1 to d.
        participation_ratio: (sum s)^2 / sum s^2, 1 to d.
        directions: how many are above 1e-6 of the first.
        mean_abs_correlation: mean |correlation| of two different channels, dead ones left out (see
            `living_channels`), 0 to 1.
    """

    singular_values: Tensor
    samples: int
    effective_rank: float
    participation_ratio: float
    directions: int
    mean_abs_correlation: float


def spectrum(features: Tensor | npt.NDArray[np.floating]) -> Spectrum:
    """The singular spectrum of features (N, d), each vector of unit length first, computed in float64 on the CPU.

    Take N of at least 5 d (our choice): N - 1 directions at most are seen, and unequal ones even where there are none.

    Raises:
        DatasetError: fewer than two samples, or features that are not finite.

    Example:
        >>> spectrum(np.array([[1.0, 0], [0, 1], [-1, 0], [0, -1]])).effective_rank
        2.0
    """
    values = F.normalize(checked_features(features), dim=1)
    covariance, mean = torch.cov(values.T).reshape(values.shape[1], -1), values.mean(dim=0)
    if constant_channels(mean, covariance.diagonal()).all():
        covariance = torch.zeros_like(covariance)  # what is left is rounding
    singular = torch.linalg.eigvalsh(covariance).flip(0).clamp(min=0)
    return Spectrum(
        singular_values=singular,
        samples=len(values),
        effective_rank=float(effective_rank(singular)),
        participation_ratio=float(singular.sum().square() / singular.square().sum()),
        directions=int((singular > _IN_USE * singular[0]).sum()),
        mean_abs_correlation=mean_abs_correlation(covariance, living_channels(mean, covariance.diagonal())),
    )


def collapse_warning(found: Spectrum, what: str = "features", before: float | None = None) -> str | None:
    """A line for the log where the effective rank is below a tenth of the dimensions, else None.

    The dimensions are those that can be seen, N - 1 where that is less than d (our choice).

    Args:
        found: the spectrum.
        what: what it is of, in words.
        before: the effective rank an epoch earlier, None where nobody knows; while it rises, the remedy is time.
    """
    dim = min(len(found.singular_values), found.samples - 1)
    if found.effective_rank >= _COLLAPSED * dim:
        return None
    if math.isnan(found.effective_rank):
        return f"{what}: collapsed, all are the same; lower the learning rate (lr) or start from given weights"
    used = f"{found.effective_rank:.1f} of {dim} directions are in use (effective rank), less than a tenth"
    if before is not None and found.effective_rank > before:
        return (
            f"{what}: {used}, and still rising, from {before:.1f} an epoch before; train longer (pretrain_epochs, "
            "pretrain_samples) or start from given weights"
        )
    return (
        f"{what}: collapsing, {used}; compare other values of decorrelation, local and temperature, or start from "
        "given weights"
    )


def alignment(first: Tensor, second: Tensor) -> float:
    """Mean squared distance of two views' features (N, d), of unit length first: 0 to 4, 0 where views agree.

    Wang and Isola, ICML 2020 (arXiv 2005.10242), alpha = 2.
    """
    first, second = (F.normalize(each.detach().double(), dim=1) for each in (first, second))
    return float((first - second).square().sum(dim=1).mean())


def uniformity(features: Tensor) -> float:
    """Log of the mean Gaussian potential exp(-2 |x - y|^2) of pairs of features (N, d), N >= 2, of unit length first.

    0 where all are the same; the lower the more evenly they are spread over the sphere, at least -8. Wang and Isola,
    t = 2. The pairs are held at once: 10,000 samples take 200 MB.
    """
    distances = torch.pdist(F.normalize(features.detach().float(), dim=1))
    return float((-2 * distances.square()).exp().double().mean().log())


def effective_rank(values: Tensor) -> Tensor:
    """Exp of the entropy of the shares of `values` (d,), none below 0: a scalar of 1 to d, nan where all are 0.

    Roy and Vetterli, EUSIPCO 2007; of the covariance's singular values here.
    """
    entropy: Tensor = torch.special.entr(values / values.sum()).sum()
    return entropy.exp()


def mean_abs_correlation(covariance: Tensor, channels: Tensor) -> float:
    """Mean |correlation| of two different ones of the channels (their numbers); nan for fewer than two."""
    count = len(channels)
    if count < 2:
        return math.nan
    deviations = covariance.diagonal()[channels].sqrt()
    among = (covariance[channels][:, channels] / torch.outer(deviations, deviations)).abs()
    return float((among.sum() - among.trace()) / (count * (count - 1)))


def living_channels(mean: Tensor, variances: Tensor) -> Tensor:
    """Numbers of the channels that are neither constant nor below 1e-3 of the channels' mean variance (our choice).

    The threshold is relative so that networks whose features differ in scale compare.
    """
    living = (variances >= _DEAD_SHARE * variances.mean()) & ~constant_channels(mean, variances)
    return living.nonzero().flatten()


def constant_channels(mean: Tensor, variances: Tensor) -> Tensor:
    """Which channels' deviation is below 1e-6 of their mean, the rounding of float32: (d,) bool."""
    return variances <= (_FLOAT32_ROUNDING * mean).square()


def checked_features(features: Tensor | npt.NDArray[np.floating]) -> Tensor:
    """Features (N, d) in float64 on the CPU, without graph.

    Raises:
        DatasetError: fewer than two samples, or features that are not finite.
    """
    values = torch.as_tensor(features).detach().to("cpu", torch.float64)
    if values.ndim != 2 or len(values) < 2:
        raise DatasetError(f"features: shape {tuple(values.shape)}; give (N, d) of at least 2 samples")
    if not values.isfinite().all():
        raise DatasetError("features: not all are finite; check the weights and compute them in float32")
    return values
