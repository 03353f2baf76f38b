"""The image that attributions compare with."""

from __future__ import annotations

import torch
from torch import Tensor

from medsd.errors import DatasetError


def baseline_images(x: Tensor, baseline: Tensor | None) -> Tensor:
    """A baseline for each image.

    Args:
        x: (B, C, H, W) images.
        baseline: (C, H, W) or (B, C, H, W) in the network's input space; None is zeros, the mean colour where inputs
            are normalised (arXiv 2404.02282's code).

    Returns:
        (B, C, H, W), type and device of `x`.

    Raises:
        DatasetError: another shape.
    """
    if baseline is None:
        return torch.zeros_like(x)
    if baseline.shape not in (x.shape, x.shape[1:]):
        raise DatasetError(f"baseline: shape {tuple(baseline.shape)}; give {tuple(x.shape[1:])} or {tuple(x.shape)}")
    return (baseline.clone() if baseline.is_inference() else baseline.detach()).to(x).expand_as(x)
