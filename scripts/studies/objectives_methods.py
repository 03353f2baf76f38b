"""The objectives that the study of objectives compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from monai.transforms import MixUp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, one_hot

from medsd.objectives.saliency_decor import Mode, SaliencyDecor
from medsd.training.terms import Objective, Terms


@dataclass
class Mixup:
    """Cross-entropy of images mixed in pairs, each by a share from Beta(`alpha`, `alpha`) (Zhang et al., 2018)."""

    alpha: float = 0.2

    def __call__(
        self, network: nn.Module, x: Tensor, labels: Tensor, epoch: float, generator: torch.Generator | None = None
    ) -> Terms:
        """See `Objective`."""
        mix = MixUp(len(x), self.alpha)
        mix.set_random_state(int(torch.randint(2**31, (), generator=generator)))
        logits = network(mix(x))
        # It mixes images alone: a class is a channel of one pixel.
        shares = mix.apply(one_hot(labels, logits.shape[1]).float()[..., None, None]).flatten(1)
        loss = cross_entropy(logits, shares)
        return Terms(loss, {"cross_entropy": loss.detach()}, logits.detach())


def objective_of(method: str) -> Objective:
    """The objective of a method; one a training."""
    if method == "ce":
        return SaliencyDecor(0, 0)
    if method == "mixup":
        return Mixup()
    if method == "sgt":
        return SaliencyDecor(1, 0)
    if method == "decorrelation":
        return SaliencyDecor(0, 0.1)
    if method == "as-built":
        return SaliencyDecor(1, 0.1, masked_share=0.5, fill="noise", bn="shared", warm_epochs=0)
    # "saliencydecor", with the form of its decorrelation behind it, or the weight, or both.
    behind = method.split("-")[1:]
    mode: Mode = next((word for word in get_args(Mode) if word in behind), "cov")
    weight = next((float(word) for word in behind if word != mode), 0.1)
    return SaliencyDecor(1, weight, mode=mode)
