"""Evaluation mode for the length of a block, and training mode that leaves frozen stages alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode inside the block; afterwards every module is as it was (frozen BatchNorms stay frozen)."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def training(network: nn.Module) -> None:
    """Put the network into training mode, its frozen parts into eval mode.

    A part is frozen when it has parameters and none of them requires a gradient. All of it goes into eval mode (our
    choice): its BatchNorms keep their running statistics and use them, its dropout is off, so that it stays the very
    function it was.
    """
    network.train()
    for module in network.modules():
        parameters = list(module.parameters())
        if parameters and not any(parameter.requires_grad for parameter in parameters):
            module.eval()
