"""Deletion and insertion (RISE, Petsiuk et al. 2018): the class's probability as pixels go or come by saliency."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medsd.checks import check_number
from medsd.saliency.method import Target
from medsd.saliency.metrics.perturb import perturbed_logits, pixel_ranks
from medsd.saliency.metrics.scoring import PLAIN, Perturbation, reader, scores


def deletion_curve(
    network: nn.Module, x: Tensor, labels: Target, saliency: Tensor, how: Perturbation = PLAIN
) -> Tensor:
    """Probability of the class, (B, steps + 1), as the most salient pixels are replaced first; a low area is good.

    The released code asks for the predicted class, here `labels=None`.

    Args:
        network: gives logits (B, K), for "similarity" embeddings (B, D) or (B, D, h, w); in eval mode for the length
            of the call.
        x: (B, C, H, W) float images, as the network takes them.
        labels: (B,) class numbers, one for all, or None: the class predicted for each image as it is. Not looked at
            by "similarity".
        saliency: (B, H, W), ranked by its signed value.
        how: baseline, steps and score.

    Raises:
        ConfigError: `step_px` below 1, no such baseline or score, or a class that the network does not have.
        DatasetError: images that are not (B, C, H, W) float, or maps that are not finite or not of their size.
        NetworkError: the network's output does not fit the score.

    Example:
        >>> from torchvision.models import resnet18
        >>> images, maps = torch.zeros(1, 3, 64, 64), torch.rand(1, 64, 64)
        >>> deletion_curve(resnet18(), images, None, maps, Perturbation("mean", step_px=1024)).shape
        torch.Size([1, 5])
    """
    rows = _rows(network, x, how.replacement(x, "zero"), saliency, how)
    return scores(rows, rows[:, 0], labels, how.score)


def insertion_curve(
    network: nn.Module, x: Tensor, labels: Target, saliency: Tensor, how: Perturbation = PLAIN
) -> Tensor:
    """Probability of the class, (B, steps + 1), as the most salient pixels come back first; a high area is good.

    Arguments and errors as `deletion_curve`.
    """
    rows = _rows(network, how.replacement(x, "blur"), x, saliency, how)
    return scores(rows, rows[:, -1], labels, how.score)


def curve_area(curve: Tensor) -> Tensor:
    """(B,): area under curves (B, steps + 1) by trapezoids over a width of 1, every step as wide as the next."""
    return torch.trapezoid(curve, dim=1) / (curve.shape[1] - 1)


def _rows(network: nn.Module, start: Tensor, end: Tensor, saliency: Tensor, how: Perturbation) -> Tensor:
    """The network's outputs (B, steps + 1, K) from `start`, no pixel replaced, to `end`, all of them."""
    pixels = start.shape[2] * start.shape[3]
    step = max(pixels // 100, 1) if how.step_px is None else how.step_px
    check_number("step_px", step, "[1, inf)", whole=True)
    counts, ranks = [*range(0, pixels, step), pixels], pixel_ranks(saliency, how.generator)
    return perturbed_logits(network, start, end, ranks, counts, how.batch_size, reader(how.score))
