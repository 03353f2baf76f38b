"""The box that takes the checkerboard of a stride away: as wide as the stride, so zero at each of its harmonics."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from medsd.checks import check_choice

Boundary = Literal["circular", "symmetric"]


@dataclass(frozen=True)
class Box:
    """The smoothing operator S of a strided module, applied as `box(x)` to (B, C, h, w).

    Attributes:
        stride: of the module, along rows and columns; an axis of stride 1 is left alone.
        boundary: "circular": the mean of the copies shifted by 0 to stride - 1 pixels with wrap-around, for stride 2
            what the authors released; it moves what it smooths by (stride - 1) / 2 pixels to the right and down.
            "symmetric": keeps the place, mirrored at the borders' edges, and loses nothing there (our choice for
            slides, where maps must stay aligned): the same mean, centred; an even one has no centre and is taken over
            two neighbours again, [1, 2, 1] / 4 for stride 2 and [1, 2, 2, 2, 1] / 8 for stride 4. Both are zero at
            every frequency k / stride, and the symmetric one is its own adjoint.

    Raises:
        ConfigError: no such boundary.
    """

    stride: tuple[int, int]
    boundary: Boundary

    def __post_init__(self) -> None:
        check_choice("boundary", self.boundary, get_args(Boundary))

    def __call__(self, x: Tensor) -> Tensor:
        """The smoothed x, of the same shape."""
        total = 1
        for axis, stride in zip((2, 3), self.stride, strict=True):
            weights = self._weights(stride)
            total *= sum(weights)
            first, *others = self._shifted(x, axis, len(weights))
            for weight, copy in zip(weights[1:], others, strict=True):
                first = torch.add(first, copy, alpha=weight)  # the weight of the first is 1
            x = first
        return x / total

    def copies(self, x: Tensor) -> Iterator[tuple[float, Tensor]]:
        """The shifted copies of x whose weighted sum is the smoothed x, each with its weight; the weights sum to 1."""
        down, across = (self._weights(stride) for stride in self.stride)
        total = sum(down) * sum(across)
        for row_weight, rows in zip(down, self._shifted(x, 2, len(down)), strict=True):
            for column_weight, copy in zip(across, self._shifted(rows, 3, len(across)), strict=True):
                yield row_weight * column_weight / total, copy

    def smooth_gradient(self, x: Tensor) -> Tensor:
        """x, whose gradient will be smoothed."""
        smoothed: Tensor = SmoothedGradient.apply(x, self)  # type: ignore[no-untyped-call]
        return smoothed

    def _weights(self, stride: int) -> list[int]:
        if self.boundary == "symmetric" and stride % 2 == 0:
            return [1, *[2] * (stride - 1), 1]
        return [1] * stride

    def _shifted(self, x: Tensor, axis: int, number: int) -> list[Tensor]:
        if number == 1:
            return [x]
        if self.boundary == "circular":
            return [x.roll(shift, axis) for shift in range(number)]
        length, reach = x.shape[axis], number // 2
        place = torch.arange(-reach, length + reach, device=x.device) % (2 * length)
        padded = x.index_select(axis, place.minimum(2 * length - 1 - place))
        return [padded.narrow(axis, shift, length) for shift in range(number)]


class SmoothedGradient(torch.autograd.Function):
    """The identity, whose gradient is smoothed by a box: `SmoothedGradient.apply(x, box)`."""

    generate_vmap_rule = True  # with setup_context apart, torch.func's grad and vmap work too

    @staticmethod
    def forward(x: Tensor, box: Box) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.box = inputs[1]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.box(gradients[0]), None
