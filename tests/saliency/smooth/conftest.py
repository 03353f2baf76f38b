"""Networks and measures that the tests of smoothing share."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn


def _input_gradient(module: nn.Module, x: Tensor, upstream: Tensor | None = None) -> Tensor:
    x = x.clone().requires_grad_()
    output = module(x)
    (gradient,) = torch.autograd.grad(output, x, torch.ones_like(output) if upstream is None else upstream)
    return gradient


@pytest.fixture(scope="session")
def input_gradient() -> Callable[..., Tensor]:
    """The gradient of a module's output (times `upstream`, or summed) with respect to x."""
    return _input_gradient


@pytest.fixture(scope="session")
def nyquist_share() -> Callable[[Tensor], float]:
    """The share of (B, C, n, n)'s energy that alternates from pixel to pixel along an axis."""

    def share(gradient: Tensor) -> float:
        energy = torch.fft.fft2(gradient).abs().square().sum(dim=(0, 1))
        half = energy.shape[0] // 2
        return float((energy[half].sum() + energy[:, half].sum() - energy[half, half]) / energy.sum())

    return share


@contextmanager
def _released_hooks(network: nn.Module) -> Iterator[None]:
    def smooth(_module: nn.Module, gradients: tuple[Tensor, ...], _outputs: object) -> tuple[Tensor, ...]:
        copies = [gradients[0].roll((a, b), dims=(2, 3)) for a in (0, 1) for b in (0, 1)]
        return (sum(copies) / 4,)

    handles = [
        module.register_full_backward_hook(smooth)
        for module in network.modules()
        if isinstance(module, nn.Conv2d) and module.stride[0] == 2
    ]
    yield
    for handle in handles:
        handle.remove()


@pytest.fixture(scope="session")
def released_hooks() -> Callable[[nn.Module], object]:
    """Variant B in torch's own words: the mean of four rolled copies, as a full backward hook."""
    return _released_hooks


class Residual(nn.Module):
    """A block of stride 2 with a 1 x 1 shortcut, as a ResNet's."""

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, 2, 1, bias=False)
        self.norm = nn.BatchNorm2d(channels_out)
        self.relu1 = nn.ReLU()
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1)
        self.downsample = nn.Conv2d(channels_in, channels_out, 1, 2)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.relu2(self.conv2(self.relu1(self.norm(self.conv1(x)))) + self.downsample(x))


@pytest.fixture
def small_resnet() -> nn.Module:
    """Stem of stride 2 ("0"), max pooling ("2"), a residual block of stride 2 ("3"); two logits; float64, eval."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = nn.Sequential(
            nn.Conv2d(3, 6, 7, 2, 3),
            nn.ReLU(),
            nn.MaxPool2d(3, 2, 1),
            Residual(6, 8),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(8, 2),
        )
        network[3].norm.running_var.uniform_(0.5, 2)
    return network.double().eval()


@pytest.fixture
def smooth_images() -> Callable[[int], list[Tensor]]:
    """Batches (8, 3, 32, 32) float64 of waves of low frequency."""

    def batches(number: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(1)
        coarse = torch.randn(number, 8, 3, 5, 5, generator=generator, dtype=torch.float64)
        return [torch.nn.functional.interpolate(part, size=32, mode="bicubic") for part in coarse]

    return batches
