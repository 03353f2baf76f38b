"""Smooth Deep Saliency (arXiv 2404.02282): networks whose strided modules leave no checkerboard in the gradient.

Its three variants are context managers: inside the block every gradient of the network is smooth, whoever asks for it
(captum too). They may be nested, and both then apply. What `torch.compile` compiled runs uncompiled inside the block,
in the whole process, since compiled code may not see hooks. Hooks sit on the network itself: one thread at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from medsd.errors import NetworkError
from medsd.networks.modes import uncompiled
from medsd.saliency.smooth.bilinear import Surrogate
from medsd.saliency.smooth.box import Boundary, Box
from medsd.saliency.smooth.points import Also, strided_points


@contextmanager
def backward_hook(network: nn.Module, boundary: Boundary = "circular", also: Sequence[Also] = ()) -> Iterator[None]:
    """Variant B: smooth the gradient that each strided module passes to its input; the forward pass stays as it is.

    Nothing is trained and the outputs are the network's own. Gradients no longer add up: methods that promise
    completeness (DeepLift, integrated gradients) lose it.

    Args:
        network: any module; which of its modules are treated: `strided_points`.
        boundary: see `Box`; "circular" as released, "symmetric" where maps must stay in place.
        also: kinds of modules beside convolutions of stride 2, see `strided_points`.

    Raises:
        ConfigError: no such boundary or kind.
        NetworkError: the network has no such module.

    Example:
        >>> from torchvision.models import resnet18
        >>> from medsd.saliency.registry import make_method
        >>> network = resnet18()
        >>> with backward_hook(network):
        ...     maps = make_method("deeplift", network, "layer2")(torch.zeros(1, 3, 64, 64), target=1)
        >>> maps.shape
        torch.Size([1, 8, 8])
    """
    with ExitStack() as stack:
        for point in strided_points(network, also):
            stack.callback(point.before(Box(point.stride, boundary).smooth_gradient).remove)
        stack.enter_context(uncompiled())
        yield


@contextmanager
def forward_hook(
    network: nn.Module, boundary: Boundary = "circular", also: Sequence[Also] = (), stem: bool = False
) -> Iterator[None]:
    """Variant C: average each strided module's output over its input's shifts; the network becomes another one.

    The gradient that a convolution passes on is variant B's (moved back by stride - 1 pixels where the boundary is
    circular), but of other activations: the maps are smooth and less faithful. For a convolution the mean over the
    shifts is the output for the smoothed input, at once.

    Args:
        network, boundary, also: as in `backward_hook`.
        stem: treat the network's first strided convolution too; left out as released, its total variation script
            takes it.

    Raises:
        ConfigError: no such boundary or kind.
        NetworkError: the network has no such module.
    """
    points = [point for point in strided_points(network, also) if stem or not point.stem]
    if not points:
        raise NetworkError("no strided module but the stem, so there is nothing to smooth; use stem=True")
    with ExitStack() as stack:
        for point in points:
            box = Box(point.stride, boundary)
            if isinstance(point.module, nn.MaxPool2d):
                stack.callback(point.after(partial(_mean_over_shifts, point.module, box)).remove)
            else:  # linear, so the mean goes inside
                stack.callback(point.before(box).remove)
        stack.enter_context(uncompiled())
        yield


@contextmanager
def surrogate(network: nn.Module, surrogate: Surrogate) -> Iterator[None]:
    """Variant A: replace the outputs of strided modules by those of trained surrogates; the stem's stays.

    The modules still run, for the size of their outputs: a sixth of what a surrogate of a 3 x 3 convolution costs.

    Args:
        network: the one that the surrogate was trained for; it becomes another one inside the block.
        surrogate: what `train_surrogate` gives.

    Raises:
        NetworkError: the surrogate is another network's, or the stem is the only strided module.
    """
    points = [point for point in surrogate.points_of(network) if not point.stem]
    if not points:
        raise NetworkError("no strided module but the stem, which is never replaced; use backward_hook")
    with ExitStack() as stack:
        for point in points:
            stack.callback(point.after(partial(_replaced, surrogate, point.name)).remove)
        stack.enter_context(uncompiled())
        yield


def _mean_over_shifts(module: nn.MaxPool2d, box: Box, x: Tensor, output: Tensor) -> Tensor:
    # Not module(...), which would run this hook again.
    outputs = (weight * module.forward(copy) for weight, copy in box.copies(x))
    return sum(outputs, torch.zeros_like(output))


def _replaced(surrogate: Surrogate, name: str, x: Tensor, output: Tensor) -> Tensor:
    replaced: Tensor = surrogate(name, x, output.shape[2:])
    return replaced
