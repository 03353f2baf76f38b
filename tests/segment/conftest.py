"""Encoders whose every tensor differs from a new one's."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from medsd.networks.classifier import create_encoder


@pytest.fixture(scope="session")
def trained_encoder() -> Callable[[str], nn.Module]:
    """`trained_encoder(name)`: a timm encoder in eval mode, all weights and running statistics drawn anew."""

    def make(name: str) -> nn.Module:
        encoder, _ = create_encoder(name, pretrained=False)
        generator = torch.Generator().manual_seed(7)
        for tensor in encoder.state_dict().values():
            if tensor.is_floating_point():
                noise = torch.rand(tensor.shape, generator=generator)
                tensor.mul_(0.5 + noise) if tensor.ndim > 1 else tensor.copy_(0.5 + noise)
        return encoder.eval()

    return make
