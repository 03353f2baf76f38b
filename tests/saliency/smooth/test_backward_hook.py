"""Smooth Deep Saliency, variant B, against torch's own hooks and the known answers of the method."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.errors import ConfigError, NetworkError
from medsd.networks.classifier import TileClassifier
from medsd.saliency.smooth import Boundary, backward_hook, strided_points

Gradient = Callable[..., Tensor]
Hooks = Callable[[nn.Module], AbstractContextManager[None]]
Share = Callable[[Tensor], float]


def convolution(kernel: int, channels: int = 1) -> nn.Conv2d:
    torch.manual_seed(kernel)
    return nn.Conv2d(channels, channels, kernel, 2, kernel // 2, bias=False).double()


@pytest.fixture(scope="module")
def resnet() -> nn.Module:
    torch.manual_seed(0)
    network = TileClassifier("resnet10t").encoder.double().eval()
    for parameter in network.parameters():
        if parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.2, 0.8)
    return network


def test_circular_equals_torchs_full_backward_hook(
    input_gradient: Gradient, released_hooks: Hooks, resnet: nn.Module
) -> None:
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    plain = input_gradient(resnet, x)
    with released_hooks(resnet):
        expected = input_gradient(resnet, x)
    with backward_hook(resnet):
        smoothed = input_gradient(resnet, x)
    torch.testing.assert_close(smoothed, expected, rtol=0, atol=1e-13 * float(expected.abs().max()))
    assert (smoothed - plain).abs().max() > 0.1 * plain.abs().max()


def test_which_convolutions_are_treated() -> None:
    points = strided_points(TileClassifier("resnet18").encoder)
    expected = ["conv1"]
    for stage in (2, 3, 4):
        expected += [f"layer{stage}.0.conv1", f"layer{stage}.0.downsample.0"]
    assert [point.name for point in points] == expected
    assert [point.stem for point in points] == [True, *[False] * 6]


@pytest.mark.parametrize("boundary", get_args(Boundary))
def test_forward_and_parameter_gradients_of_a_convolution_are_unchanged(boundary: Boundary) -> None:
    layer, x = convolution(3), torch.randn(1, 1, 16, 16, dtype=torch.float64)
    plain = layer(x)
    expected = torch.autograd.grad(plain.square().sum(), layer.weight)[0]
    with backward_hook(layer, boundary):
        smoothed = layer(x)
        gradient = torch.autograd.grad(smoothed.square().sum(), layer.weight)[0]
    assert torch.equal(smoothed, plain)
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("boundary", get_args(Boundary))
def test_forward_of_a_network_is_unchanged(resnet: nn.Module, boundary: Boundary) -> None:
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        plain = resnet(x)
        with backward_hook(resnet, boundary):
            assert torch.equal(resnet(x), plain)


@pytest.mark.parametrize(("kernel", "block"), [(1, [[1, 0], [0, 0]]), (3, [[1, 2], [2, 4]]), (7, [[9, 12], [12, 16]])])
def test_the_checkerboard_and_its_removal(input_gradient: Gradient, kernel: int, block: list[list[int]]) -> None:
    layer = convolution(kernel)
    nn.init.ones_(layer.weight)
    x = torch.zeros(1, 1, 32, 32, dtype=torch.float64)
    inner = slice(12, 20)
    expected = torch.tensor(block, dtype=torch.float64).repeat(4, 4)
    assert torch.equal(input_gradient(layer, x)[0, 0, inner, inner], expected)
    for boundary in get_args(Boundary):
        with backward_hook(layer, boundary):
            smoothed = input_gradient(layer, x)[0, 0, inner, inner]
        assert torch.equal(smoothed, torch.full_like(smoothed, kernel**2 / 4)), boundary


def test_nothing_is_left_at_the_nyquist_frequency(input_gradient: Gradient, nyquist_share: Share) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(8, 8, 3, 2, 1, bias=False, padding_mode="circular").double()
    x = torch.zeros(1, 8, 32, 32, dtype=torch.float64)
    assert nyquist_share(input_gradient(layer, x)) > 0.3
    with backward_hook(layer, "circular"):
        smoothed = input_gradient(layer, x)
    assert nyquist_share(smoothed) < 1e-30
    interior = layer.weight.sum(dim=(0, 2, 3)).view(1, 8, 1, 1).expand_as(smoothed) / 4
    torch.testing.assert_close(smoothed, interior, rtol=1e-12, atol=1e-14)
    with backward_hook(layer, "symmetric"):  # away from the mirrored borders
        smoothed = input_gradient(layer, x)
    torch.testing.assert_close(smoothed[..., 1:-1, 1:-1], interior[..., 1:-1, 1:-1], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("axis", [2, 3])
def test_symmetric_kernel_is_zero_at_the_nyquist_frequency(input_gradient: Gradient, axis: int) -> None:
    """A gradient alternating along one axis is wiped out, mirrored borders included."""
    identity = _Strided()
    sign = torch.tensor([1.0, -1.0], dtype=torch.float64).repeat(8)
    upstream = (sign.view(1, 1, 16, 1) if axis == 2 else sign.view(1, 1, 1, 16)).expand(1, 1, 16, 16)
    for boundary in get_args(Boundary):
        with backward_hook(identity, boundary):
            gradient = input_gradient(identity, torch.zeros(1, 1, 16, 16, dtype=torch.float64), upstream)
        inner = gradient[..., 1:-1, 1:-1] if boundary == "symmetric" else gradient
        assert inner.abs().max() == 0


class _Strided(nn.Conv2d):
    """Counts as a strided convolution and passes its input on, so that any gradient can be fed to the smoothing."""

    def __init__(self) -> None:
        super().__init__(1, 1, 1, 2)

    def forward(self, x: Tensor) -> Tensor:
        return x * 1


def centroid(gradient: Tensor) -> tuple[float, float]:
    height, width = gradient.shape[2:]
    weight = gradient[0, 0] / gradient.sum()
    rows, columns = torch.arange(height).double(), torch.arange(width).double()
    return float((weight.sum(1) * rows).sum()), float((weight.sum(0) * columns).sum())


def test_symmetric_keeps_the_place_where_circular_moves_it_by_half_a_pixel(input_gradient: Gradient) -> None:
    identity, x = _Strided(), torch.zeros(1, 1, 20, 24, dtype=torch.float64)
    upstream = torch.zeros_like(x)
    upstream[0, 0, 5:9, 10:17] = torch.rand(4, 7, dtype=torch.float64)
    row, column = centroid(upstream)
    with backward_hook(identity, "symmetric"):
        assert centroid(input_gradient(identity, x, upstream)) == pytest.approx((row, column), abs=1e-12)
    with backward_hook(identity, "circular"):
        assert centroid(input_gradient(identity, x, upstream)) == pytest.approx((row + 0.5, column + 0.5), abs=1e-12)


def test_symmetric_mirrors_at_the_border_and_loses_nothing(input_gradient: Gradient) -> None:
    identity = _Strided()
    upstream = torch.rand(1, 1, 5, 7, dtype=torch.float64)
    taps = torch.tensor([1.0, 2.0, 1.0], dtype=torch.float64) / 4
    mirrored = torch.nn.functional.pad(upstream, (1, 1, 1, 1), mode="replicate")
    expected = F.conv2d(mirrored, (taps[:, None] * taps)[None, None])
    with backward_hook(identity, "symmetric"):
        smoothed = input_gradient(identity, torch.zeros_like(upstream), upstream)
        constant = input_gradient(identity, torch.zeros_like(upstream), torch.ones_like(upstream))
    torch.testing.assert_close(smoothed, expected, rtol=0, atol=1e-15)
    torch.testing.assert_close(smoothed.sum(), upstream.sum(), rtol=1e-12, atol=0)
    assert torch.equal(constant, torch.ones_like(upstream))


def test_other_branches_that_share_the_input_are_not_smoothed(input_gradient: Gradient) -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = convolution(3)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(x).sum() + (x * weights).sum()

    weights = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    block, x = Residual(), torch.randn(1, 1, 8, 8, dtype=torch.float64)
    with backward_hook(block):
        both = input_gradient(block, x)
        alone = input_gradient(block.conv, x)
    torch.testing.assert_close(both, alone + weights, rtol=0, atol=1e-14)


@pytest.mark.parametrize("fails", [False, True])
def test_hooks_are_gone_afterwards(resnet: nn.Module, fails: bool) -> None:
    try:
        with backward_hook(resnet, "symmetric"):
            assert any(module._forward_pre_hooks for module in resnet.modules())
            if fails:
                raise ValueError
    except ValueError:
        assert fails
    assert not any(module._forward_pre_hooks for module in resnet.modules())


def test_networks_and_boundaries_that_do_not_fit_are_refused() -> None:
    with pytest.raises(NetworkError, match="no convolution of stride 2"), backward_hook(nn.Conv2d(3, 3, 3)):
        pass
    with pytest.raises(NetworkError, match="smoothing 'none'"), backward_hook(nn.Conv2d(3, 3, 4, 4)):
        pass
    with pytest.raises(ConfigError, match="boundary='reflect'"), backward_hook(convolution(3), "reflect"):  # type: ignore[arg-type]
        pass
