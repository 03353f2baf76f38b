"""The linear decoder of masks: what can be read off an encoder's maps by a weighted sum of their channels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearDecoder(nn.Module):
    """Logits of an image's pixels, linear in its map: a 1 x 1 convolution, then bilinear upsampling.

    The two commute, so that the few cells are convolved and not the many pixels. Channels are standardised first, by
    moments that are kept; weights start at 0.

    Args:
        mean, deviation: (d,) of the training maps' channels, see `channel_moments`; constant ones are left out.
        classes: K, with the background.
    """

    mean: Tensor
    scale: Tensor

    def __init__(self, mean: Tensor, deviation: Tensor, classes: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros_like(mean)[:, None, None])
        self.register_buffer("scale", torch.ones_like(mean)[:, None, None])
        self.standardise(mean, deviation)
        self.convolution = nn.Conv2d(len(mean), classes, 1, device="meta").to_empty(device=mean.device)
        nn.init.zeros_(self.convolution.weight)
        nn.init.zeros_(self.convolution.bias)  # type: ignore[arg-type]

    def standardise(self, mean: Tensor, deviation: Tensor) -> None:
        """Take channels' moments (d,) from now on."""
        varies = deviation > 1e-6 * mean.abs()
        self.mean.copy_(mean[:, None, None])
        self.scale.copy_(torch.where(varies, 1 / deviation, 0.0)[:, None, None])

    def forward(self, maps: Tensor, size: tuple[int, int]) -> Tensor:
        """Logits (B, K, *size) of maps (B, d, h, w)."""
        logits = self.convolution((maps.float() - self.mean) * self.scale)
        return F.interpolate(logits, size, mode="bilinear", align_corners=False)


def channel_moments(parts: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and deviation (d,) of the channels of maps (n, d, h, w) in parts, without a copy of all in single precision.

    Example:
        >>> mean, deviation = channel_moments([torch.zeros(1, 2, 4, 4), torch.ones(1, 2, 4, 4)])
        >>> mean.tolist(), deviation.tolist()
        ([0.5, 0.5], [0.5, 0.5])
    """
    count = sum(part.numel() for part in parts) / parts[0].shape[1]
    mean = torch.stack([part.double().sum(dim=(0, 2, 3)) for part in parts]).sum(dim=0) / count
    squares = [(part.double() - mean[:, None, None]).square().sum(dim=(0, 2, 3)) for part in parts]
    deviation = (torch.stack(squares).sum(dim=0) / count).sqrt()
    return mean.float(), deviation.float()
