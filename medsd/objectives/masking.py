"""Masking of the pixels that matter least, as in Saliency Guided Training (arXiv 2111.14338, released code)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.checks import whole_number
from medsd.errors import ConfigError, NetworkError
from medsd.networks.blur import blurred
from medsd.networks.modes import evaluating

Ranking = Literal["absolute", "signed"]
Fill = Literal["mean", "noise", "blur"]
SaliencyPass = Literal["eval", "shared"]

_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)


def pixel_scores(network: nn.Module, x: Tensor, labels: Tensor, ranking: Ranking) -> Tensor:
    """How much each pixel matters to the logit of its image's true class.

    The gradient is taken in eval mode and without a parameter graph: no parameter gradient and no BatchNorm buffer
    is touched. It is that of the logit, free of any scale that a half-precision loss may carry, and of float32 within
    autocast, too (our choice): the order of the smallest gradients is what half precision loses first.

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
        with evaluating(network), torch.enable_grad(), torch.autocast(x.device.type, enabled=False):
            _, logits = classified(network, x)
            (gradient,) = torch.autograd.grad(logits.gather(1, labels[:, None]).sum(), x)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)
    return scores_of(gradient, ranking)


def classified(network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """Features, (B, d) where they are to be decorrelated, and logits (B, classes) of images (B, C, H, W).

    Raises:
        NetworkError: the network has no `features` and `head` of that kind.
    """
    name = type(network).__name__
    head, features_of = (getattr(network, part, None) for part in ("head", "features"))
    if not isinstance(head, nn.Module) or not callable(features_of):
        alone = "; of several processes wrap not the network but medsd.training.terms.ObjectiveLoss(network, objective)"
        raise NetworkError(
            f"{name}: the objective runs its features(x), (B, d), and its head; give it a module that has both"
            f"{alone if isinstance(network, _WRAPPERS) else ''}"
        )
    features = features_of(x)
    logits = head(features)
    if logits.ndim != 2 or logits.shape[1] < 2:
        raise NetworkError(
            f"{name}: features {tuple(features.shape)}, logits {tuple(logits.shape)}; the objective needs logits (B, "
            "classes) of two or more: pool the features, and let a head of one logit give 0 and it"
        )
    return features, logits


def scores_of(gradient: Tensor, ranking: Ranking) -> Tensor:
    """Scores (B, H, W) of an input gradient (B, C, H, W): its mean over channels, "absolute" or as it is ("signed").

    The order, mean first, is the released code's; so is the signed ranking, its default. Its text asks for small
    gradients, which is the absolute one.
    """
    score = gradient.mean(dim=1)
    return score.abs() if ranking == "absolute" else score


def mask_lowest(
    x: Tensor, scores: Tensor, share: float, fill: Fill, generator: torch.Generator | None, block_px: int = 1
) -> Tensor:
    """Replace in every image the same number of pixels, or of blocks of them, those of the lowest scores.

    Args:
        x: (B, C, H, W) images.
        scores: (B, H, W).
        share: share of pixels (blocks) replaced, in all channels, floor(share * their number) of them.
        fill: what they become: "mean", that of the image and channel; "noise", drawn evenly between the least and the
            greatest value of the image and channel (the released code); "blur", the image `blurred` (our choice).
        generator: draws the noise, on the device of `x`.
        block_px: side of the blocks, whose scores are the means of their pixels; those at the right and lower edge may
            be smaller (our choice; the released code masks pixels).

    Returns:
        (B, C, H, W), detached.

    Raises:
        ConfigError: see `masked_count`.
    """
    height, width = x.shape[2:]
    count = masked_count(share, height, width, block_px)
    blocks = _block_means(scores, block_px)
    lowest = blocks.flatten(1).topk(count, dim=1, largest=False, sorted=False).indices
    chosen = torch.zeros_like(blocks, dtype=torch.bool).flatten(1).scatter(1, lowest, True).view_as(blocks)
    pixels = chosen.repeat_interleave(block_px, dim=1).repeat_interleave(block_px, dim=2)[:, :height, :width]
    x = x.detach()
    return torch.where(pixels[:, None], _filling(x, fill, generator), x)


def masked_count(share: float, height: int, width: int, block_px: int = 1) -> int:
    """How many pixels of an image, or blocks of them, are masked.

    Raises:
        ConfigError: the share lies outside 0 to 1, or leaves nothing to mask although it is not 0.
    """
    rows, columns = -(-height // block_px), -(-width // block_px)
    count = whole_number(share, rows * columns) if 0 <= share < 1 else 0
    if share != 0 and count == 0:
        what, fix = ("pixels", "") if block_px == 1 else (f"blocks of {block_px} px", "; raise it or lower block_px")
        raise ConfigError(
            f"masked_share={share}: must be 0, or mask at least 1 of {rows} x {columns} {what}, below 1{fix}"
        )
    return count


def _block_means(scores: Tensor, block_px: int) -> Tensor:
    if block_px == 1:
        return scores
    height, width = scores.shape[1:]
    # Padded to whole blocks; what is added counts for nothing in the mean.
    size = (0, -width % block_px, 0, -height % block_px)
    sums, seen = (
        F.avg_pool2d(F.pad(values, size), block_px) for values in (scores[:, None], torch.ones_like(scores)[:, None])
    )
    return (sums / seen)[:, 0]


def _filling(x: Tensor, fill: Fill, generator: torch.Generator | None) -> Tensor:
    if fill == "blur":
        return blurred(x)
    if fill == "mean":
        return x.mean(dim=(2, 3), keepdim=True)
    low, high = x.amin(dim=(2, 3), keepdim=True), x.amax(dim=(2, 3), keepdim=True)
    # Drawn in the order of the axes, whatever the layout in memory.
    noise = torch.rand(x.shape, device=x.device, dtype=x.dtype, generator=generator)
    return low + (high - low) * noise
