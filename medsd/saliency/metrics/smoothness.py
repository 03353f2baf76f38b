"""How smooth attributions are before their channels are averaged: variation, and the checkerboard of stride 2.

Attributions are (B, C, h, w), signed; a map is `maps[:, None]`. Raises DatasetError: they are not, or not finite.
"""

from __future__ import annotations

import torch
from torch import Tensor

from medsd.errors import DatasetError
from medsd.saliency.metrics.perturb import check_maps

_LEAST_MAGNITUDE = 1e-6


def normalised_variation(attributions: Tensor) -> Tensor:
    """Total variation of channels of mean 0 and mean magnitude 1, (B,): 0 constant, 2.8 white noise, 4 a checkerboard.

    Smooth Deep Saliency (Herdt et al., arXiv 2404.02282, as its released code has it): each channel less its mean,
    over max(mean |value|, 1e-6); then sum |vertical differences| + sum |horizontal differences| over C h w.
    `concentration.total_variation` is another measure: of one map, which is not centred (an offset lowers it), and per
    pair of pixels rather than per pixel (about half as much). A channel much smaller than 1e-6 counts as constant.
    """
    _check(attributions)
    values = attributions.double()
    values = values - values.mean(dim=(2, 3), keepdim=True)
    values = values / values.abs().mean(dim=(2, 3), keepdim=True).clamp(min=_LEAST_MAGNITUDE)
    down, across = values.diff(dim=2).abs(), values.diff(dim=3).abs()
    return (down.sum(dim=(1, 2, 3)) + across.sum(dim=(1, 2, 3))) / values[0].numel()


def nyquist_energy(attributions: Tensor) -> Tensor:
    """Share of the energy that alternates from pixel to pixel along rows or columns, (B,) in 0 to 1; 0 where all is 0.

    The energy is |FFT|^2 over all channels, the constant part included; the share is that of row h / 2 and column
    w / 2, where a stride of 2 leaves its checkerboard. The measure is our choice (the paper shows the pattern, it does
    not measure it so). An odd side has no such row: its last row or column is left out; a side of 1 cannot alternate.
    """
    _check(attributions)
    height, width = (side - side % 2 if side > 1 else 1 for side in attributions.shape[2:])
    values = attributions[:, :, :height, :width].double()
    # Divided by the greatest first, so that the squares of tiny maps do not vanish.
    greatest = values.abs().amax(dim=(1, 2, 3), keepdim=True)
    energy = torch.fft.fft2(values / torch.where(greatest > 0, greatest, 1.0)).abs().square().sum(dim=1)
    alternating = torch.zeros(height, width, dtype=torch.bool, device=values.device)
    if height > 1:
        alternating[height // 2] = True
    if width > 1:
        alternating[:, width // 2] = True
    total = energy.sum(dim=(1, 2))
    return torch.where(total > 0, (energy * alternating).sum(dim=(1, 2)) / total, 0.0)


def _check(attributions: Tensor) -> None:
    if attributions.ndim != 4:
        raise DatasetError(
            f"attributions: shape {tuple(attributions.shape)}; give (B, C, h, w), of maps (B, h, w) `maps[:, None]`"
        )
    check_maps(attributions.flatten(1, 2))
