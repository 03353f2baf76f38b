"""Augmentation of whole batches on the device they are on."""

from __future__ import annotations

import torch
from torch import Tensor

from medsd.networks.symmetry import SYMMETRIES, turned


def augment(images: Tensor, generator: torch.Generator, stain: float = 0.1) -> Tensor:
    """Turn, mirror and restain every image of a batch on its own.

    Tissue has no up or down, so the eight symmetries of the square are drawn evenly. Stains differ between
    laboratories in strength and hue: optical densities of each channel are scaled by 1 + u, u uniform in
    [-stain, stain] (our choice; a stand-in for stain augmentation in stain space).

    Args:
        images: (B, 3, S, S) uint8, square.
        generator: draws the changes, on the CPU.
        stain: half width of the change of optical density.

    Returns:
        (B, 3, S, S) uint8.
    """
    return restain(turn(images, symmetries(len(images), generator)), generator, stain)


def symmetries(batch: int, generator: torch.Generator) -> Tensor:
    """Symmetries of the square (B,) for `turn`, drawn evenly on the CPU."""
    return torch.randint(len(SYMMETRIES), (batch,), generator=generator)


def restain(images: Tensor, generator: torch.Generator, stain: float) -> Tensor:
    """Images (B, 3, H, W) uint8 with the optical density of each channel scaled, see `augment`."""
    gain = 1 + stain * (2 * torch.rand((len(images), 3, 1, 1), generator=generator) - 1)
    transmitted = (images.to(torch.float32) + 1) / 256
    return (transmitted.pow(gain.to(images.device, non_blocking=True)) * 256 - 1).round().clamp(0, 255).to(torch.uint8)


def turn(images: Tensor, symmetry: Tensor) -> Tensor:
    """Images (B, C, S, S), each under the one of `SYMMETRIES` that its number (B,) says: new ones of the same kind."""
    found = images.clone()
    for number in SYMMETRIES:
        # A mask on a GPU would have to be waited for.
        chosen = (symmetry == number).nonzero()[:, 0].to(images.device, non_blocking=True)
        found[chosen] = turned(images[chosen], number)
    return found
