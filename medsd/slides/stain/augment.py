"""Stain augmentation in stain space, of whole batches on the device they are on."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from medsd.checks import check_number

RUIFROK = ((0.65, 0.70, 0.29), (0.07, 0.99, 0.11))
"""Haematoxylin and eosin of Ruifrok and Johnston (2001): optical densities of red, green and blue."""

# The additive part grows in between these mean optical densities: glass has none, stain all of it (our choice).
_GLASS_DENSITY, _STAIN_DENSITY = 0.1, 0.2


@dataclass(frozen=True)
class StainAugment:
    """Gives every image of a batch other concentrations of haematoxylin and eosin.

    Each concentration is multiplied by a factor and has a shift added, both uniform around 1 and 0, drawn for each
    image and stain (Tellez et al. 2018; tiatoolbox's `StainAugmentor`). Unlike there, what the two stains do not
    explain stays, so no change is the identity, and glass is passed over smoothly instead of by a mask, so that blank
    and one-colour images need no special case.

    Args:
        strength: half width of the factor, 0 to below 1.
        shift: half width of the shift, in optical density (natural logarithm); the strong setting of tiatoolbox is
            0.4 and 0.2.

    Raises:
        ConfigError: a value is out of its range.
    """

    strength: float = 0.2
    shift: float = 0.05

    def __post_init__(self) -> None:
        check_number("strength", self.strength, "[0, 1)")
        check_number("shift", self.shift, "[0, 1]")

    def __call__(self, images: Tensor, generator: torch.Generator, stains: Tensor | None = None) -> Tensor:
        """Other stains for each image.

        Args:
            images: (B, 3, H, W) uint8.
            generator: draws the changes, on the CPU.
            stains: (2, 3), or (B, 2, 3) where slides have their own (`TwoStains`); None for Ruifrok's.

        Returns:
            (B, 3, H, W) uint8, new.
        """
        draws = 2 * torch.rand((2, images.shape[0], 2), generator=generator) - 1
        factors, shifts = 1 + self.strength * draws[0], self.shift * draws[1]
        return restain(images, torch.tensor(RUIFROK) if stains is None else stains, factors, shifts)


def restain(images: Tensor, stains: Tensor, factors: Tensor, shifts: Tensor) -> Tensor:
    """Multiply the concentrations of the stains by factors, then add shifts where there is stain.

    Args:
        images: (B, 3, H, W) uint8.
        stains: (2, 3) or (B, 2, 3), optical densities of red, green and blue of a unit of each stain.
        factors, shifts: (B, 2), on the device of `stains`: a GPU takes long to solve what is as small as these.

    Returns:
        (B, 3, H, W) uint8, new.
    """
    stains, factors, shifts = (values.to(torch.float32) for values in (stains, factors, shifts))
    density = -(images.to(torch.float32).clamp_(min=1) / 255).log_().flatten(2)
    # density_out = density + shift @ stains + (density @ pinv(stains)) * (factor - 1) @ stains, as columns.
    mixing = torch.linalg.pinv(stains) @ ((factors - 1)[..., None] * stains)
    offset = (shifts[:, None] @ stains).transpose(1, 2)
    mixing, offset = (values.to(images.device, non_blocking=True) for values in (mixing, offset))
    weight = (density.mean(dim=1, keepdim=True) - _GLASS_DENSITY) / (_STAIN_DENSITY - _GLASS_DENSITY)
    changed = density + mixing.transpose(1, 2) @ density + weight.clamp_(0, 1) * offset
    light: Tensor = changed.neg_().exp_().mul_(255).round_().clamp_(0, 255)
    return light.to(torch.uint8).view_as(images)
