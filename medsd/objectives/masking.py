"""Masking of the pixels that matter least, as in Saliency Guided Training (arXiv 2111.14338, released code)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from medsd.errors import ConfigError
from medsd.networks.modes import evaluating

Ranking = Literal["absolute", "signed"]
Fill = Literal["uniform", "mean"]
SaliencyPass = Literal["eval", "shared"]


def pixel_scores(network: nn.Module, x: Tensor, labels: Tensor, ranking: Ranking) -> Tensor:
    """How much each pixel matters to the logit of its image's true class.

    The gradient is taken in eval mode and without a parameter graph: no parameter gradient and no BatchNorm buffer
    is touched. It is that of the logit, free of any scale that a half-precision loss may carry.

    Args:
        network: offers `features(x)` (B, d) and `head`.
        x: (B, C, H, W) float images.
        labels: (B,) class numbers.
        ranking: see `scores_of`.

    Returns:
        (B, H, W), detached.
    """
    x = x.detach().clone().requires_grad_()
    trained = [parameter for parameter in network.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        with evaluating(network), torch.enable_grad():
            logits = network.head(network.features(x))  # type: ignore[operator]
            (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), x)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return scores_of(gradient, ranking)


def scores_of(gradient: Tensor, ranking: Ranking) -> Tensor:
    """Scores (B, H, W) of an input gradient (B, C, H, W): its mean over channels, "absolute" or as it is ("signed").

    The order, mean first, is the released code's; so is the signed ranking, its default. Its text asks for small
    gradients, which is the absolute one.
    """
    score = gradient.mean(dim=1)
    return score.abs() if ranking == "absolute" else score


def mask_lowest(x: Tensor, scores: Tensor, share: float, fill: Fill, generator: torch.Generator | None) -> Tensor:
    """Replace in every image the same number of pixels, those of the lowest scores, in all channels.

    Args:
        x: (B, C, H, W) images.
        scores: (B, H, W).
        share: share of pixels replaced, floor(share * H * W) of them.
        fill: "uniform": noise between the least and greatest value of that image and channel; "mean": their mean.
        generator: draws the noise, on the device of `x`.

    Returns:
        (B, C, H, W), detached.

    Raises:
        ConfigError: the share lies outside 0 to 1, or leaves no pixel to mask although it is not 0.
    """
    batch, channels, height, width = x.shape
    count = int(share * height * width) if 0 <= share < 1 else 0
    if share != 0 and count == 0:
        raise ConfigError(f"masked_share={share}: must be 0, or mask at least 1 of {height} x {width} pixels, below 1")
    flat = x.detach().flatten(2)
    lowest = scores.flatten(1).topk(count, dim=1, largest=False, sorted=False).indices
    index = lowest[:, None, :].expand(batch, channels, count)
    if fill == "mean":
        values = flat.mean(dim=2, keepdim=True).expand(batch, channels, count)
    else:
        low, high = flat.amin(dim=2, keepdim=True), flat.amax(dim=2, keepdim=True)
        noise = torch.rand((batch, channels, count), device=x.device, dtype=x.dtype, generator=generator)
        values = low + (high - low) * noise
    return flat.scatter(2, index, values).view_as(x)
