"""Penalties on correlated features (SaliencyDecor, arXiv 2604.25315; the exact form is not public)."""

from __future__ import annotations

import torch
from torch import Tensor

from medsd.errors import TrainingError


def covariance_penalty(features: Tensor) -> Tensor:
    """Distance of the features' covariance from the identity: ||S - I||_F^2 / d, mode `cov`.

    The paper's abstract asks for near-orthogonal features; this form is our choice among the readings: its
    gradient is analytic and no channel dies. Computed in float32 whatever the autocast.

    Args:
        features: (B, d) pooled features, B >= 2.

    Returns:
        A scalar; at least (d - B + 1) / d when B <= d.

    Raises:
        TrainingError: fewer than two samples.
    """
    batch, dim = features.shape
    if batch < 2:
        raise TrainingError(f"batch_size={batch}: decorrelation needs at least 2 samples a batch; raise batch_size")
    with torch.autocast(features.device.type, enabled=False):
        centred = features.float() if features.dtype in (torch.float16, torch.bfloat16) else features
        centred = centred - centred.mean(dim=0)
        covariance = centred.T @ centred / (batch - 1)
        identity = torch.eye(dim, device=covariance.device, dtype=covariance.dtype)
        return (covariance - identity).square().sum() / dim
