"""The eight symmetries of the square: tissue has no up or down, and a network's answer should know of none.

A network whose answers are means over them, by test-time augmentation, is called symmetric here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

SYMMETRIES = range(8)
"""A number k below 4 is k quarter turns counter-clockwise; k + 4 is the same, then mirrored left to right."""


def turned(images: Tensor, symmetry: int) -> Tensor:
    """Images or maps (..., H, W) under one of `SYMMETRIES`, under 0 themselves; odd quarter turns swap their sides."""
    found = images.rot90(symmetry % 4, dims=(-2, -1)) if symmetry % 4 else images
    found = found.flip(-1) if symmetry >= 4 else found
    if images.ndim == 4 and images.is_contiguous(memory_format=torch.channels_last):
        found = found.contiguous(memory_format=torch.channels_last)  # else convolutions are slower
    return found


def turned_back(maps: Tensor, symmetry: int) -> Tensor:
    """What was found on turned images, (..., h, w), as it lies on those before the turn."""
    maps = maps.flip(-1) if symmetry >= 4 else maps
    return maps.rot90(-(symmetry % 4), dims=(-2, -1)) if symmetry % 4 else maps


def mean_answer(
    run: Callable[[Tensor], tuple[Tensor, Tensor]], images: Tensor, symmetric: bool
) -> tuple[Tensor, Tensor]:
    """Logits (B, K) and maps (B, ..., h, w) of images (B, C, H, W), where symmetric the means over `SYMMETRIES`."""
    numbers = SYMMETRIES if symmetric else range(1)
    logits, maps = zip(*(run(turned(images, number)) for number in numbers), strict=True)
    upright_maps = [turned_back(each, number) for number, each in zip(numbers, maps, strict=True)]
    return torch.stack(logits).mean(dim=0), torch.stack(upright_maps).mean(dim=0)


class MayBeSymmetric:
    """A network that answers in eval mode by the mean over `SYMMETRIES` where `test_time_augmentation` is True."""

    test_time_augmentation: bool = False


def is_symmetric(network: nn.Module) -> bool:
    """Whether a network answers by the mean over `SYMMETRIES` in eval mode."""
    return isinstance(network, MayBeSymmetric) and network.test_time_augmentation


@contextmanager
def upright(network: nn.Module) -> Iterator[None]:
    """Inside the block a symmetric network answers to images as they are: for what looks into one pass of it."""
    if not isinstance(network, MayBeSymmetric) or not network.test_time_augmentation:
        yield
        return
    network.test_time_augmentation = False
    try:
        yield
    finally:
        network.test_time_augmentation = True
