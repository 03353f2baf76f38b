"""How well a map outlines a region when it is cut at the threshold that suits it best."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medsd.saliency.metrics.perturb import check_region


def best_iou(maps: Tensor, region: Tensor) -> Tensor:
    """Intersection over union of {map >= threshold} with the region at the best threshold, (B,); nan without a region.

    Exact: every value of the map is tried. Never below the region's share of the image (`pointing.area_share`), which
    is what a constant map gets and what to print beside it. The threshold is chosen with the region in hand, image by
    image, so this bounds what any fixed threshold can reach (our choice; MaxBoxAcc of Choe et al. 2020 chooses one
    threshold for all images).

    Args:
        maps: (B, H, W), signed.
        region: (B, H, W) bool.

    Raises:
        DatasetError: shapes differ, or maps that are not finite.
    """
    iou, _ = _iou_by_threshold(maps, region)
    return iou.amax(dim=1).where(region.flatten(1).any(dim=1), math.nan)


def best_threshold(maps: Tensor, region: Tensor) -> Tensor:
    """The threshold of `best_iou`, (B,) in the map's unit: the greatest of several; nan without a region.

    Raises:
        DatasetError: as `best_iou`.
    """
    iou, values = _iou_by_threshold(maps, region)
    # argmax may return any of several equal ones.
    first = (iou == iou.amax(dim=1, keepdim=True)).int().argmax(dim=1, keepdim=True)
    return values.gather(1, first)[:, 0].where(region.flatten(1).any(dim=1), math.nan)


def _iou_by_threshold(maps: Tensor, region: Tensor) -> tuple[Tensor, Tensor]:
    """IoU (B, n) at every pixel's value taken as threshold, -1 where that repeats, and those values, falling."""
    check_region(maps, region)
    values, order = maps.flatten(1).sort(dim=1, descending=True)
    inside = region.flatten(1)
    hits = inside.gather(1, order).cumsum(dim=1).double()
    taken = torch.arange(1, values.shape[1] + 1, device=maps.device)
    iou = hits / (taken + inside.sum(dim=1, keepdim=True) - hits)
    # A threshold takes all pixels of its value: only the last of equal ones is a cut.
    repeats = torch.zeros_like(inside)
    repeats[:, :-1] = values[:, :-1] == values[:, 1:]
    return iou.masked_fill(repeats, -1.0), values
