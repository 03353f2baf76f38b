"""Evaluation mode and uncompiled code for the length of a block, and training that leaves frozen stages alone."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
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


def uncompiled() -> AbstractContextManager[object]:
    """Inside the block, what `torch.compile` compiled runs uncompiled, in the whole process: hooks are seen."""
    # Asking for it takes seconds the first time, and nothing is compiled without that module.
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


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
