"""The blur that hides what is to be hidden from a network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_KERNEL_PX, _SIGMA_PX = 11, 5.0


def blurred(x: Tensor) -> Tensor:
    """Images (B, C, H, W) under RISE's kernel (released code of Petsiuk et al. 2018).

    It is 11 px a side, of sigma 5 px, reflected into its square; outside the image are zeros, the mean colour where
    inputs are normalised.
    """
    from scipy.ndimage import gaussian_filter

    point = torch.zeros(_KERNEL_PX, _KERNEL_PX, dtype=torch.float64)
    point[_KERNEL_PX // 2, _KERNEL_PX // 2] = 1
    kernel = torch.from_numpy(gaussian_filter(point.numpy(), _SIGMA_PX)).to(x)
    channels = x.shape[1]
    return F.conv2d(x, kernel.expand(channels, 1, -1, -1), padding=_KERNEL_PX // 2, groups=channels)
