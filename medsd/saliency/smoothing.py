"""Smooth Deep Saliency, variant B (arXiv 2404.02282): gradients without the checkerboard of strided convolutions."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.errors import ConfigError, NetworkError

Boundary = Literal["circular", "symmetric"]


@contextmanager
def backward_hook(network: nn.Module, boundary: Boundary = "circular") -> Iterator[None]:
    """Smooth the gradient that each stride-2 convolution passes to its input; the forward pass stays as it is.

    Args:
        network: any module; its `Conv2d` of stride 2 are treated, those of 1 x 1 shortcuts too, pooling is not
            (the authors' released code).
        boundary: "circular": the mean of the four copies shifted by 0 or 1 pixel with wrap-around, as released;
            it moves the gradient by half a pixel to the right and down at every strided convolution. "symmetric":
            the kernel [1, 2, 1] / 4 along each axis, mirrored at the borders, which keeps the place (our choice
            for slides, where maps must stay aligned); it has the same zero at the Nyquist frequency.

    Raises:
        ConfigError: no such boundary.
        NetworkError: the network has no stride-2 convolution.
    """
    if boundary not in ("circular", "symmetric"):
        raise ConfigError(f"boundary='{boundary}': use 'circular' or 'symmetric'")
    convolutions = strided_convolutions(network)
    if not convolutions:
        raise NetworkError("no convolution of stride 2, so there is nothing to smooth; use smoothing 'none'")
    smooth = _SmoothCircular if boundary == "circular" else _SmoothSymmetric

    def wrap(_module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (smooth.apply(inputs[0]), *inputs[1:])  # type: ignore[no-untyped-call]

    handles = [convolution.register_forward_pre_hook(wrap) for convolution in convolutions]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def strided_convolutions(network: nn.Module) -> list[nn.Conv2d]:
    """Every `Conv2d` of stride 2, in module order."""
    return [module for module in network.modules() if isinstance(module, nn.Conv2d) and module.stride[0] == 2]


class _SmoothCircular(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        gradient = gradients[0]
        rows = gradient + gradient.roll(1, dims=2)
        return (rows + rows.roll(1, dims=3)) / 4


class _SmoothSymmetric(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        # Repeating the border pixel mirrors the gradient about the border's edge.
        padded = F.pad(gradients[0], (1, 1, 1, 1), mode="replicate")
        rows = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
        return (rows[..., :-2] + 2 * rows[..., 1:-1] + rows[..., 2:]) / 16
