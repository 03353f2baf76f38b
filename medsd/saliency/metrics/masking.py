"""Accuracy under masking: do the pixels that a map names decide the class?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from medsd.checks import check_number, whole_number
from medsd.errors import ConfigError
from medsd.saliency.method import targets_of
from medsd.saliency.metrics.perturb import check_maps, perturbed_logits, pixel_ranks
from medsd.saliency.metrics.scoring import PLAIN, Perturbation, check_several

SHARES = tuple(step / 10 for step in range(10))


@dataclass(frozen=True)
class MaskingCurve:
    """What is left of each image's class as more of its pixels are masked.

    Attributes:
        shares: (S,) shares of the pixels masked, rising.
        correct: (B, S): 1 where the class is still right, 0 where not; a mean over draws lies between.
        probability: (B, S) of the true class.
    """

    shares: Tensor
    correct: Tensor
    probability: Tensor

    @property
    def area(self) -> Tensor:
        """(B,): area under `correct` by trapezoids, over the width of `shares`: 1 is right to the end, 0 never."""
        return torch.trapezoid(self.correct, self.shares, dim=1) / (self.shares[-1] - self.shares[0])


def masking_curve(
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    saliency: Tensor,
    how: Perturbation = PLAIN,
    shares: Sequence[float] = SHARES,
) -> MaskingCurve:
    """Mask the pixels of the greatest |saliency|, floor(share * H * W) of them in all channels, without retraining.

    A lower `area` is a more faithful map, but only beside `random_masking_curve`: a network that is robust to masking
    (Saliency Guided Training masks its training images) has a high area with any map. After Ismail et al. 2021
    (arXiv 2111.14338, released code); area over the width, and images drawn rather than summed up, are our choice.

    Args:
        network: gives logits (B, K); in eval mode for the length of the call.
        x: (B, C, H, W) float images, as the network takes them.
        labels: (B,) class numbers.
        saliency: (B, H, W), signed; ranked by its absolute value.
        how: what masked pixels become ("mean" is the released code's for colour images) and their order.
        shares: rising, at least two, in 0 to 1.

    Raises:
        ConfigError: shares that do not rise within 0 to 1, or labels outside the classes.
        DatasetError: images that are not (B, C, H, W) float, or maps that are not finite or not of their size.
        NetworkError: the output is no logits (B, K), or a single one.
    """
    for share in shares:
        check_number("shares", share, "[0, 1]")
    if len(shares) < 2 or any(low >= high for low, high in pairwise(shares)):
        raise ConfigError(f"shares={tuple(shares)}: give at least two that rise within 0 to 1")
    substitute = how.replacement(x, "mean")
    pixels = x.shape[2] * x.shape[3]
    counts = [whole_number(share, pixels) for share in shares]
    check_maps(saliency)
    ranks = pixel_ranks(saliency.abs(), how.generator)
    logits = perturbed_logits(network, x, substitute, ranks, counts, how.batch_size)
    check_several(logits[:, 0])
    labels = targets_of(logits[:, 0], labels)
    correct = (logits.argmax(dim=2) == labels[:, None]).float()
    target = labels[:, None, None].expand(-1, len(counts), 1)
    probability = logits.softmax(dim=2).gather(2, target)[..., 0]
    return MaskingCurve(torch.tensor(shares, device=x.device), correct, probability)


def random_masking_curve(
    network: nn.Module,
    x: Tensor,
    labels: Tensor,
    draws: int = 5,
    how: Perturbation = PLAIN,
    shares: Sequence[float] = SHARES,
) -> MaskingCurve:
    """The control: the same procedure with pixels in random order, the mean of several draws.

    The gap `random.area - curve.area` is what a map knows; 0 is nothing.

    Args:
        draws: random orders an image, at least 1; others as in `masking_curve`.

    Raises:
        ConfigError: `draws` below 1, or as `masking_curve`.
    """
    check_number("draws", draws, "[1, inf)", whole=True)
    # A map of equal pixels is ranked at random.
    nothing = x.new_zeros(x.shape[0], *x.shape[2:])
    curves = [masking_curve(network, x, labels, nothing, how, shares) for _ in range(draws)]
    return MaskingCurve(
        curves[0].shares,
        torch.stack([curve.correct for curve in curves]).mean(dim=0),
        torch.stack([curve.probability for curve in curves]).mean(dim=0),
    )
