"""Smooth Deep Saliency, variant A (arXiv 2404.02282): small networks that stand in for strided modules."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from medsd.errors import NetworkError
from medsd.saliency.smooth.points import Also, Point, strided_points


class PointSurrogate(nn.Module):
    """3 x 3 convolution, bilinear interpolation to the output's size, 3 x 3 convolution; linear, with biases.

    The kernel of the module it stands in for plays no part. Interpolation by an exact factor of 2 is the mean of 2 x 2
    pixels, so its gradient has no checkerboard.
    """

    def __init__(self, channels_in: int, channels_out: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.second = nn.Conv2d(channels_out, channels_out, 3, padding=1)

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        """(B, channels_in, h, w) to (B, channels_out, *size)."""
        resized = F.interpolate(self.first(x), size=size, mode="bilinear", align_corners=False, antialias=False)
        output: Tensor = self.second(resized)
        return output


class Surrogate(nn.Module):
    """A `PointSurrogate` for each strided module of one network, see `train_surrogate`.

    Args:
        channels: of the input and output of each module, by its name in the network, in module order.
        also: kinds of modules beside convolutions of stride 2, see `strided_points`.
    """

    def __init__(self, channels: Mapping[str, tuple[int, int]], also: Sequence[Also] = ()) -> None:
        super().__init__()
        self.channels, self.also = dict(channels), tuple(also)
        self.points = nn.ModuleDict({_key(name): PointSurrogate(*pair) for name, pair in channels.items()})

    def forward(self, name: str, x: Tensor, size: tuple[int, int]) -> Tensor:
        """What stands in for the output, of `size` (h, w), of the module `name` for its input x."""
        if x.shape[1] != self.channels[name][0]:
            raise NetworkError(
                f"surrogate of '{name}': made for {self.channels[name][0]} channels, here are {x.shape[1]}; "
                "train one for this network"
            )
        output: Tensor = self.points[_key(name)](x, size)
        return output

    def points_of(self, network: nn.Module) -> tuple[Point, ...]:
        """The modules of a network that these surrogates stand in for, the stem too."""
        points = strided_points(network, self.also)
        for name in self.channels.keys() ^ {point.name for point in points}:
            side = "the network has no such strided module" if name in self.channels else "the surrogate lacks it"
            raise NetworkError(f"surrogate: '{name}': {side}; train one for this network")
        for point in points:
            made, module = self.channels[point.name], point.module
            if isinstance(module, nn.Conv2d) and made != (module.in_channels, module.out_channels):
                raise NetworkError(
                    f"surrogate of '{point.name}': made for {made} channels, the network has "
                    f"{(module.in_channels, module.out_channels)}; train one for this network"
                )
        return points


def _key(name: str) -> str:
    # torch allows no dots there, and no empty name (of a network that is itself a convolution).
    return name.replace(".", "/") or "/"
