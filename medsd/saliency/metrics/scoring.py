"""How images are changed, and what a network's answer to them is worth, with classes or without."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.checks import check_choice
from medsd.errors import NetworkError
from medsd.networks.modes import evaluating
from medsd.saliency.method import Target, check_logits, targets_of
from medsd.saliency.metrics.perturb import Baseline, baseline_image

Score = Literal["probability", "similarity"]
"""What is asked of a network about a changed image: the class's probability, or, of encoders without classes, how
like the image's own its embedding is: their cosine, 0 where it is negative (our choice)."""


@dataclass(frozen=True)
class Perturbation:
    """How pixels are replaced in the order of a map, and what is asked of the network then.

    Attributes:
        baseline: what pixels become; None is what each measure's released code has: "zero" for deletion, "blur" for
            insertion, "mean" for masking.
        step_px: pixels a step of deletion and insertion; max(H * W // 100, 1) when None. Released: the side of the
            image, which is 224 steps; Smooth Deep Saliency (arXiv 2404.02282): 1,792 of 224 x 224, 28 steps.
        generator: orders pixels of equal saliency, on the device of the images; None is torch's own.
        batch_size: images in one pass; more pays on a GPU only. On CPUs channels-last images are up to twice as fast.
        score: of deletion and insertion; masking asks for the class.
    """

    baseline: Baseline | None = None
    step_px: int | None = None
    generator: torch.Generator | None = None
    batch_size: int = 32
    score: Score = "probability"

    def replacement(self, x: Tensor, released: Baseline) -> Tensor:
        """What the pixels of images become, in the shape of `x`."""
        return baseline_image(x, released if self.baseline is None else self.baseline)


PLAIN = Perturbation()


def reader(score: Score) -> Callable[[object, int], Tensor]:
    """What turns a network's output for B images into rows (B, K) for `scores`: `check_logits`, or `embedding`."""
    check_choice("score", score, get_args(Score))
    return check_logits if score == "probability" else embedding


def embedding(output: object, batch: int) -> Tensor:
    """Embeddings (B, D) of a network's output for a batch of B, (B, D) or a map (B, D, h, w), which is averaged."""
    if not isinstance(output, Tensor) or output.ndim not in (2, 4) or len(output) != batch:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise NetworkError(
            f"the network's output for {batch} images is {shape}; similarity needs embeddings (B, D) or (B, D, h, w)"
        )
    rows = output if output.ndim == 2 else output.mean(dim=(2, 3))
    if not torch.isfinite(rows).all():
        raise NetworkError("the network's embeddings are not finite; check its weights, or run it in float32")
    return rows


def scores(rows: Tensor, clean: Tensor, target: Target, score: Score) -> Tensor:
    """What changed images are worth, (B, S), see `Score`.

    Args:
        rows: (B, S, K), what `reader(score)` gives of the changed images.
        clean: (B, K), of the images as they are.
        target: classes; None is the one predicted for the image as it is. Unused by "similarity".
    """
    if score == "probability":
        check_several(clean)
        labels = targets_of(clean, target)
        return rows.softmax(dim=2).gather(2, labels[:, None, None].expand(-1, rows.shape[1], 1))[..., 0]
    if not clean.any(dim=1).all():
        raise NetworkError("similarity: the embedding of an image is 0; check the network's weights")
    return F.cosine_similarity(rows, clean[:, None], dim=2).clamp(min=0)


def check_several(logits: Tensor) -> None:
    """Raises NetworkError: one logit (B, 1), whose softmax is always 1."""
    if logits.shape[1] < 2:
        raise NetworkError("the network has one logit, whose softmax is always 1; wrap it to give two, 0 and the logit")


def held_target(network: nn.Module, x: Tensor, target: Target) -> Target:
    """The classes that stay the same while images or weights change: those given, else the network's for `x`.

    None where the network's output is not one row an image, so that there are no classes: methods that explain one
    refuse such a network themselves.
    """
    if target is not None:
        return target
    with torch.no_grad(), evaluating(network):
        output = network(x)
    if not isinstance(output, Tensor) or output.ndim < 2 or output.shape[2:].numel() != 1:
        return None
    return targets_of(check_logits(output, len(x)), None)
