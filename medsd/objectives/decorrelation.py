"""Penalties on correlated features (SaliencyDecor, arXiv 2604.25315; the exact form is not public)."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from medsd.checks import check_choice
from medsd.errors import TrainingError
from medsd.networks.moments import feature_moments, first_of_processes, group_channels, sum_over_processes
from medsd.networks.whitening import inverse_root

Mode = Literal["cov", "zca", "corr"]
_HINGE_WEIGHT = 0.1


def decorrelation_loss(
    features: Tensor,
    mode: Mode = "cov",
    group_size: int | None = None,
    generator: torch.Generator | None = None,
    eps: float = 1e-3,
) -> Tensor:
    """How far a batch's features are from decorrelated, averaged over groups of channels.

    The paper's abstract asks for near-orthogonal features and a digest names ZCA whitening; the forms are readings
    of that, the constants our choice. S is the covariance and R the correlation of the d channels of a group:

    - "cov": ||S - I||_F^2 / d. Its gradient is analytic and no channel dies. It is at least (d - B + 1) / d when
      B <= d, and least at variances somewhat below 1, since sampling adds about (d - 1) v^2 / (B - 1).
    - "zca": mean squared distance of the centred features from their own ZCA-whitened selves, (S + eps I)^(-1/2)
      times them, which take no gradient. Directions of a group that the batch does not span count nothing, so
      groups are best at most half the batch.
    - "corr": mean R_ij^2 off the diagonal, free of scale, plus 0.1 times the mean hinge relu(1 - sqrt(S_ii + 1e-4)):
      without it channels die, since what does not vary does not correlate.

    Channels are shuffled anew at each call so that all pairs meet in time (Shuffled-DBN, Hua et al., ICCV 2021).
    The statistics are those of all processes (see `feature_moments`), and so are the groups, drawn by the first.

    Args:
        features: (B, d) pooled features, B >= 2 over all processes.
        mode: the form.
        group_size: channels in a group, 2 to d, sizes made even; None takes all d together, see `default_group_size`.
        generator: draws the groups; None draws from torch's own. Not used without groups.
        eps: regularises "zca".

    Returns:
        A scalar, float32, or float64 for such features, whatever the autocast.

    Raises:
        ConfigError: `mode`, `group_size` or `eps` is not as described.
        TrainingError: features not (B, d), fewer than two samples in all, or "zca" of features that are not finite.
    """
    check_choice("mode", mode, get_args(Mode))
    if features.ndim != 2:
        raise TrainingError(f"features {tuple(features.shape)}: decorrelation is of pooled ones, (B, d); pool them")
    groups = _draw_groups(features, group_size, generator)
    return torch.stack([_group_loss(features[:, group], mode, eps) for group in groups]).mean()


def default_group_size(batch: int, dim: int) -> int | None:
    """Group size for `batch` samples (of all processes) of `dim` channels: half the batch, None from 2 `dim` on.

    The rule of thumb of Shuffled-DBN, ceil(2 dim / batch) groups; never below 2, where nothing could correlate.
    """
    return None if batch >= 2 * dim else max(2, batch // 2)


def _draw_groups(features: Tensor, group_size: int | None, generator: torch.Generator | None) -> tuple[Tensor, ...]:
    dim = features.shape[1]
    if group_size is None:
        return group_channels(torch.arange(dim, device=features.device), None)
    device = None if generator is None else generator.device
    order = torch.randperm(dim, generator=generator, device=device).to(features.device)
    # Each process may have a generator of its own (for masking), yet all must take the same groups.
    return group_channels(first_of_processes(order), group_size)


def _group_loss(features: Tensor, mode: Mode, eps: float) -> Tensor:
    moments = feature_moments(features)
    if mode == "zca":
        return _whitening_distance(features - moments.mean, moments.covariance, moments.count, eps)
    return _identity_distance(moments.covariance) if mode == "cov" else _correlation(moments.covariance)


def _identity_distance(covariance: Tensor) -> Tensor:
    dim = len(covariance)
    identity = torch.eye(dim, device=covariance.device, dtype=covariance.dtype)
    return (covariance - identity).square().sum() / dim


def _whitening_distance(centred: Tensor, covariance: Tensor, count: int, eps: float) -> Tensor:
    with torch.no_grad(), torch.autocast(centred.device.type, enabled=False):
        whitened = centred @ inverse_root(covariance, eps)
    return sum_over_processes((centred - whitened).square().sum()) / (count * len(covariance))


def _correlation(covariance: Tensor) -> Tensor:
    dim, variances = len(covariance), covariance.diagonal()
    scale = (variances + 1e-5).rsqrt()
    squares = (covariance * scale * scale[:, None]).square()
    pairs = max(dim * (dim - 1), 1)  # uneven groups may leave a channel alone
    hinge = (1 - (variances + 1e-4).sqrt()).relu().mean()
    return (squares.sum() - squares.diagonal().sum()) / pairs + _HINGE_WEIGHT * hinge
