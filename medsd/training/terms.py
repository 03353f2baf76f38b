"""What a training objective is to the step that runs it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Terms:
    """The loss of one batch.

    Attributes:
        total: the weighted sum to call backward on, a scalar with the graph.
        parts: its parts and what is worth watching beside it, by name, scalars without graph; `cross_entropy` is one.
        logits: (B, classes) of the clean images, without graph.
    """

    total: Tensor
    parts: Mapping[str, Tensor]
    logits: Tensor


class Objective(Protocol):
    """A loss that runs the network itself."""

    def __call__(
        self, network: nn.Module, x: Tensor, labels: Tensor, epoch: float, generator: torch.Generator | None = None
    ) -> Terms:
        """The loss of one batch.

        Args:
            network: in training mode, in which it is left.
            x: (B, C, H, W) float images, as the network takes them.
            labels: (B,) int64 class numbers.
            epoch: epochs done so far, fractions allowed; drives schedules.
            generator: draws what is random, on the device of `x`.
        """
        ...


class ObjectiveLoss(nn.Module):
    """An objective with its network, as one module: what `DistributedDataParallel` is to wrap.

    An objective runs the network several times a step, while DistributedDataParallel wants one forward pass for a
    backward pass; of a network that it wraps alone the gradients would not be those of all processes.

    Example:
        >>> import torch
        >>> from medsd.networks.classifier import TileClassifier
        >>> from medsd.objectives.saliency_decor import SaliencyDecor
        >>> loss = ObjectiveLoss(TileClassifier("resnet10t").train(), SaliencyDecor())  # of several: DDP(loss)
        >>> terms = loss(torch.rand(4, 3, 32, 32), torch.tensor([0, 1, 1, 0]), epoch=0)
        >>> terms.total.backward()
    """

    def __init__(self, network: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.network, self.objective = network, objective

    def forward(self, x: Tensor, labels: Tensor, epoch: float, generator: torch.Generator | None = None) -> Terms:
        """The objective's terms; arguments as of `Objective`."""
        return self.objective(self.network, x, labels, epoch, generator)


@runtime_checkable
class Growing(Protocol):
    """An objective whose terms are not all there from the first step on.

    One whose networks are of use before, though they have not learnt by all of it, may say so by
    `usable_from(network)`, the first epoch of which that holds; without, it is that of `complete_from`.
    """

    def complete_from(self, network: nn.Module) -> int:
        """The first epoch, counted from 1, whose network has learnt by all of it."""
        ...
