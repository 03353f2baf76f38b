"""A network of two convolutions, batches for it, and the decorrelation term by hand."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from medsd.objectives.decorrelation import decorrelation_loss


class ConvNet(nn.Module):
    def __init__(self, batch_norm: bool = True) -> None:
        super().__init__()
        norm: nn.Module = nn.BatchNorm2d(6) if batch_norm else nn.Identity()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), norm, nn.Tanh(), nn.Conv2d(6, 8, 3, 1, 1), nn.Tanh())
        self.head = nn.Linear(8, 3)

    def features(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.body(x).mean(dim=(2, 3))
        return pooled


def network(batch_norm: bool = True) -> ConvNet:
    torch.manual_seed(0)
    return ConvNet(batch_norm).double()


def data(batch: int = 6, seed: int = 1) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 3, 8, 8, dtype=torch.float64, generator=draw)
    return x, torch.randint(3, (batch,), generator=draw)


def relative(features: Tensor, first: Tensor, mode: Any = "cov") -> Tensor:
    """L_dec(F / s) / L_0, both of the first batch's features."""
    scale = first.var(dim=0).mean().sqrt().detach()
    return decorrelation_loss(features / scale, mode) / decorrelation_loss(first / scale, mode).detach()
