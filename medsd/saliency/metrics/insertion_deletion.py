"""Deletion and insertion (RISE, Petsiuk et al. 2018): the class's probability as pixels go or come by saliency."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medsd.checks import check_number
from medsd.saliency.method import Target
from medsd.saliency.metrics.perturb import Baseline, baseline_image, perturbed_logits, pixel_ranks
from medsd.saliency.metrics.scoring import Score, reader, scores


def deletion_curve(
    network: nn.Module,
    x: Tensor,
    labels: Target,
    saliency: Tensor,
    baseline: Baseline = "zero",
    step_px: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 32,
    score: Score = "probability",
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
        baseline: what pixels become; "zero" as released.
        step_px: pixels a step; max(H * W // 100, 1) when None. Released: the side of the image, which is 224 steps;
            Smooth Deep Saliency (arXiv 2404.02282): 1,792 of 224 x 224, 28 steps.
        generator: orders pixels of equal saliency, on the device of `x`; None is torch's own.
        batch_size: images in one pass; more pays on a GPU only. On CPUs channels-last images are up to twice as fast.
        score: "similarity" for encoders without classes: the cosine with the embedding of the image as it is (our
            choice).

    Raises:
        ConfigError: `step_px` below 1, no such baseline or score, or a class that the network does not have.
        DatasetError: maps that are not finite or not of the images' size.
        NetworkError: the network's output does not fit the score.
    """
    ranks = pixel_ranks(saliency, generator)
    rows = _rows(network, x, baseline_image(x, baseline), ranks, step_px, batch_size, score)
    return scores(rows, rows[:, 0], labels, score)


def insertion_curve(
    network: nn.Module,
    x: Tensor,
    labels: Target,
    saliency: Tensor,
    baseline: Baseline = "blur",
    step_px: int | None = None,
    generator: torch.Generator | None = None,
    batch_size: int = 32,
    score: Score = "probability",
) -> Tensor:
    """Probability of the class, (B, steps + 1), as the most salient pixels come back first; a high area is good.

    Arguments as in `deletion_curve`; "blur" is the released baseline.

    Raises:
        ConfigError, DatasetError, NetworkError: as `deletion_curve`.
    """
    ranks = pixel_ranks(saliency, generator)
    rows = _rows(network, baseline_image(x, baseline), x, ranks, step_px, batch_size, score)
    return scores(rows, rows[:, -1], labels, score)


def curve_area(curve: Tensor) -> Tensor:
    """(B,): area under curves (B, steps + 1) by trapezoids over a width of 1, every step as wide as the next."""
    return torch.trapezoid(curve, dim=1) / (curve.shape[1] - 1)


def _rows(
    network: nn.Module, start: Tensor, end: Tensor, ranks: Tensor, step_px: int | None, batch_size: int, score: Score
) -> Tensor:
    """The network's outputs (B, steps + 1, K) from `start`, no pixel replaced, to `end`, all of them."""
    pixels = start.shape[2] * start.shape[3]
    step = max(pixels // 100, 1) if step_px is None else step_px
    check_number("step_px", step, "[1, inf)", whole=True)
    counts = [*range(0, pixels, step), pixels]
    return perturbed_logits(network, start, end, ranks, counts, batch_size, reader(score))
