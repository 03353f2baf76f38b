"""Deletion and insertion (RISE, Petsiuk et al. 2018): the class's probability as pixels go or come by saliency."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medsd.errors import ConfigError
from medsd.saliency.metrics.perturb import Baseline, baseline_image, perturbed_logits, pixel_ranks


def deletion_curve(
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    saliency: Tensor,
    baseline: Baseline = "zero",
    step_px: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Probability of the class, (B, steps + 1), as the most salient pixels are replaced first; a low area is good.

    The released code asks for the predicted class; here it is the label's (our choice), give the predicted ones for
    the former.

    Args:
        network: gives logits (B, K); in eval mode for the length of the call.
        x: (B, C, H, W) float images, as the network takes them.
        labels: (B,) class numbers.
        saliency: (B, H, W), ranked by its signed value.
        baseline: what pixels become; "zero" as released.
        step_px: pixels a step; max(H * W // 100, 1) when None. Released: the side of the image, which is 224 steps.
        generator: orders pixels of equal saliency, on the device of `x`.
        batch_size: images in one pass.

    Raises:
        ConfigError: `step_px` below 1, or no such baseline.
        DatasetError: maps that are not finite or not of the images' size.
    """
    ranks = pixel_ranks(saliency, generator)
    return _curve(network, x, baseline_image(x, baseline), labels, ranks, step_px, batch_size)


def insertion_curve(
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    saliency: Tensor,
    baseline: Baseline = "blur",
    step_px: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 256,
) -> Tensor:
    """Probability of the class, (B, steps + 1), as the most salient pixels come back first; a high area is good.

    Arguments as in `deletion_curve`; "blur" is the released baseline.

    Raises:
        ConfigError, DatasetError: as `deletion_curve`.
    """
    ranks = pixel_ranks(saliency, generator)
    return _curve(network, baseline_image(x, baseline), x, labels, ranks, step_px, batch_size)


def curve_area(curve: Tensor) -> Tensor:
    """(B,): area under curves (B, steps + 1) by trapezoids over a width of 1, every step as wide as the next."""
    return torch.trapezoid(curve, dim=1) / (curve.shape[1] - 1)


def _curve(
    network: nn.Module, start: Tensor, end: Tensor, labels: Tensor, ranks: Tensor, step_px: int | None, batch_size: int
) -> Tensor:
    pixels = start.shape[2] * start.shape[3]
    step = max(pixels // 100, 1) if step_px is None else step_px
    if step < 1:
        raise ConfigError(f"step_px={step_px}: must be 1 or more")
    counts = [*range(0, pixels, step), pixels]
    logits = perturbed_logits(network, start, end, ranks, counts, batch_size)
    return logits.softmax(dim=2).gather(2, labels[:, None, None].expand(-1, len(counts), 1))[..., 0]
