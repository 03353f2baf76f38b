"""Networks that look trained, and what they look at."""

from __future__ import annotations

from typing import TypeVar

import numpy as np
import torch

from medsd.networks.classifier import TileClassifier
from medsd.slides.tissue import TissueMask

Network = TypeVar("Network", bound=torch.nn.Module)


def spread(network: Network) -> Network:
    """BatchNorms that spread the activations as after training.

    Fresh ones make every activation alike, and timm starts residual branches at zero, which would hide most of the
    receptive field.
    """
    generator = torch.Generator().manual_seed(1)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data = 0.5 + torch.rand(module.num_features, generator=generator)
            module.running_mean.copy_(0.2 * torch.randn(module.num_features, generator=generator))
            module.running_var.copy_(0.5 + torch.rand(module.num_features, generator=generator))
    return network.eval()


def trained_looking(encoder: str, classes: tuple[str, ...] = ("normal", "tumour"), seed: int = 0) -> TileClassifier:
    torch.manual_seed(seed)
    return spread(TileClassifier(encoder, classes))


def all_tissue(slide) -> TissueMask:
    width, height = slide.dimensions
    return TissueMask(np.ones((height // 8 + 1, width // 8 + 1), bool), 8.0)


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
