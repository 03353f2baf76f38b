"""Do maps point at the region they should? Always print the region's share of the area beside it: it is chance.

Whole-slide maps have places that were not seen and a tissue mask: `medsd.evaluate.scores.inside_share` is the same
measure for one such map, in numpy and without torch; here are batches of whole images.

Maps are (B, H, W), signed, regions (B, H, W) bool. Raises DatasetError: shapes differ, or maps that are not finite.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from medsd.saliency.metrics.perturb import check_region

_LEAST_ENERGY = 1e-7


def energy_pointing(maps: Tensor, region: Tensor) -> Tensor:
    """Share of the positive saliency that lies in the region, (B,) in 0 to 1; nan where that saliency sums below 1e-7.

    The energy-based pointing game (Wang et al. 2020, Score-CAM), with the clamp at 0 and the bound of the code of
    Rao et al. 2023 (Model-Guidance), which counts such maps as 0 or leaves them out: left out here.
    """
    check_region(maps, region)
    positive = maps.clamp(min=0).double()
    total = positive.sum(dim=(1, 2))
    inside = (positive * region).sum(dim=(1, 2))
    return torch.where(total < _LEAST_ENERGY, math.nan, inside / total)


def pointing_game(maps: Tensor, region: Tensor) -> Tensor:
    """Whether the greatest value lies in the region, (B,): 1 or 0; nan for maps without a positive value.

    The pointing game (Zhang et al. 2018, Excitation Backprop) without its tolerance of 15 px. Of several pixels with
    that value their share inside counts, so that a binary mask is not judged by the order of its pixels (our choice).
    """
    check_region(maps, region)
    greatest = maps.amax(dim=(1, 2), keepdim=True)
    at = maps == greatest
    hit = (at & region).sum(dim=(1, 2)).double() / at.sum(dim=(1, 2))
    return torch.where(greatest[:, 0, 0] > 0, hit, math.nan)


def area_share(region: Tensor) -> Tensor:
    """The region's share of the image, (B,), of a region (B, H, W) bool: what a constant map scores in both games."""
    return region.double().mean(dim=(1, 2))


def best_iou(maps: Tensor, region: Tensor) -> Tensor:
    """Intersection over union of {map >= threshold} with the region at the best threshold, (B,); nan without a region.

    Exact: every value of the map is tried. Never below the region's share of the image (`area_share`), which
    is what a constant map gets and what to print beside it. The threshold is chosen with the region in hand, image by
    image, so this bounds what any fixed threshold can reach (our choice; MaxBoxAcc of Choe et al. 2020 chooses one
    threshold for all images).
    """
    check_region(maps, region)
    values, order = maps.flatten(1).sort(dim=1, descending=True)
    inside = region.flatten(1)
    hits = inside.gather(1, order).cumsum(dim=1).double()
    taken = torch.arange(1, values.shape[1] + 1, device=maps.device)
    iou = hits / (taken + inside.sum(dim=1, keepdim=True) - hits)
    # A threshold takes all pixels of its value: only the last of equal ones is a cut.
    repeats = torch.zeros_like(inside)
    repeats[:, :-1] = values[:, :-1] == values[:, 1:]
    return iou.masked_fill(repeats, -1.0).amax(dim=1).where(inside.any(dim=1), math.nan)
