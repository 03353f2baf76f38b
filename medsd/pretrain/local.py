"""Local features: regions that two views share, found again in both feature maps and told apart (Med-MoCo).

The paper's equations are not public and its authors' code contradicts its text. Reading C, the default, is our choice
after DenseCL (arXiv 2011.09157) and PixPro (arXiv 2011.10043): what both views show is cut into cells, each is averaged
in either map in its own view's orientation, and the cells of an image are told from each other. Reading B is what
the code's names describe: squares at the left edge of maps averaged over channels, not aligned; their vectors are
normalised here, without which all similarities are the same to a thousandth.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from medsd.errors import ConfigError
from medsd.networks.moments import sum_over_processes

_SAMPLES = 2


@dataclass(frozen=True)
class ViewRegions:
    """The g x g shared cells in one view of each image.

    Attributes:
        boxes: (B, 4) float64, left, top, right, bottom of all cells together, in pixels of the view.
        order: (B, g * g) int64: where in the view's own row-major order stands each cell of the source's.
    """

    boxes: Tensor
    order: Tensor


@dataclass(frozen=True)
class SharedRegions:
    """The cells of both views, and whether an image has enough in common: `kept` (B,) bool."""

    first: ViewRegions
    second: ViewRegions
    kept: Tensor


def shared_regions(
    first_to_source: Tensor, second_to_source: Tensor, size_px: int, regions: int, least_overlap: float
) -> SharedRegions:
    """Cut what two views share into `regions` x `regions` cells.

    Args:
        first_to_source, second_to_source: (B, 2, 3) float64 of `Views`, without shear or oblique turns.
        size_px: side of the views.
        regions: cells along a side.
        least_overlap: share of the smaller view's area that both must show; what shows less is not kept, and its
            cells are those of the first view.
    """
    first, second = _extent(first_to_source, size_px), _extent(second_to_source, size_px)
    low, high = torch.maximum(first[:, 0], second[:, 0]), torch.minimum(first[:, 1], second[:, 1])
    shared = (high - low).clamp(min=0).prod(dim=1)
    smaller = torch.minimum(*((each[:, 1] - each[:, 0]).prod(dim=1) for each in (first, second)))
    kept = (shared >= least_overlap * smaller) & (shared > 0)
    box = torch.where(kept[:, None, None], torch.stack([low, high], dim=1), first)
    return SharedRegions(_in_view(box, first_to_source, regions), _in_view(box, second_to_source, regions), kept)


def region_vectors(maps: Tensor, view: ViewRegions, size_px: int, centre_px: float | None = None) -> Tensor:
    """Mean features of the shared cells (RoIAlign), in the order of the source: (B, R, C), with their graph.

    Args:
        maps: (B, C, h, w) of the views.
        view: the cells of that view.
        size_px: side of the views, h and w of which are taken to be whole strides.
        centre_px: where in the view map cell 0 looks (see `ReceptiveField`: 0.5 for ResNets at every depth, which a
            mirrored view makes a shift of nearly a whole cell); None where map cells tile the view evenly.
    """
    with torch.autocast(maps.device.type, enabled=False):
        maps = maps if maps.dtype == torch.float64 else maps.float()
        strides = torch.tensor([size_px / maps.shape[3], size_px / maps.shape[2]], dtype=torch.float64)
        centres = strides / 2 if centre_px is None else torch.full_like(strides, centre_px)
        strides, centres = (each.to(view.boxes.device).repeat(2) for each in (strides, centres))
        boxes = ((view.boxes - centres) / strides + 0.5).to(maps.device, maps.dtype, non_blocking=True)
        side = round(view.order.shape[1] ** 0.5)
        numbers = torch.arange(len(maps), device=maps.device, dtype=maps.dtype)
        cells = roi_align(
            maps, torch.cat([numbers[:, None], boxes], dim=1), (side, side), sampling_ratio=_SAMPLES, aligned=True
        )
        vectors: Tensor = cells.flatten(2).mT
        return vectors.gather(1, view.order[..., None].to(maps.device, non_blocking=True).expand_as(vectors))


def left_edge_vectors(maps: Tensor, regions: int) -> Tensor:
    """Reading B: squares of side c = min(h, w) // R down the left edge of the channels' mean map, (B, R, c * c).

    Each channel has unit length over its map before the mean.

    Raises:
        ConfigError: the map is too small for squares of 2 x 2 cells, whose normalised vectors would all be 1.
    """
    height, width = maps.shape[2:]
    side = min(height, width) // regions
    if side < 2:
        raise ConfigError(
            f"regions={regions}: reading 'b' needs maps of at least {2 * regions} x {2 * regions} cells, here "
            f"{height} x {width}; choose larger views, a lower local_layer or reading 'c'"
        )
    with torch.autocast(maps.device.type, enabled=False):
        maps = maps if maps.dtype == torch.float64 else maps.float()
        mean = F.normalize(maps.flatten(2), dim=2).mean(dim=1).view(-1, height, width)
        squares: Tensor = mean[:, : regions * side, :side].reshape(len(maps), regions, side * side)
        return squares


def region_contrast(first: Tensor, second: Tensor, kept: Tensor, temperature: float) -> Tensor:
    """Cross-entropy of finding each region of the first view in the second, among those of the same image.

    The mean vector of all regions of the batch is taken off (features after a ReLU share a large one), then vectors
    are of unit length. Statistics are those of all processes, and averaging the gradients over the processes gives
    that of one process with the whole batch.

    Args:
        first, second: (B, R, C) in the same order.
        kept: (B,) bool, the images that count.
        temperature: above 0, divides the similarities.

    Returns:
        A scalar in single precision whatever the autocast; 0, with its graph, where no image counts.
    """
    with torch.autocast(first.device.type, enabled=False):
        first, second = (each if each.dtype == torch.float64 else each.float() for each in (first, second))
        weights = kept.to(first.device, first.dtype, non_blocking=True)
        images, processes = sum_over_processes(torch.stack([weights.sum(), torch.ones_like(weights.sum())]))
        images = images.clamp(min=1)
        first, second = (_centred(each, weights, images) for each in (first, second))
        similarities = first @ second.mT / temperature
        target = torch.arange(first.shape[1], device=first.device).repeat(len(first))
        losses = F.cross_entropy(similarities.flatten(0, 1), target, reduction="none").view(len(first), -1)
        loss: Tensor = (weights * losses.mean(dim=1)).sum() * processes / images
        return loss


def _centred(vectors: Tensor, weights: Tensor, images: Tensor) -> Tensor:
    total = sum_over_processes((weights[:, None, None] * vectors).sum(dim=(0, 1)))
    return F.normalize(vectors - total / (images * vectors.shape[1]), dim=2)


def _extent(to_source: Tensor, size_px: int) -> Tensor:
    """(B, 2, 2): least and largest x, y in the source."""
    corners = torch.tensor([[0.0, size_px], [0, size_px], [1, 1]], dtype=to_source.dtype, device=to_source.device)
    placed = to_source @ corners
    return torch.stack([placed.amin(dim=2), placed.amax(dim=2)], dim=1)


def _in_view(box: Tensor, to_source: Tensor, regions: int) -> ViewRegions:
    """The cells of boxes (B, 2, 2) of the source, as a view shows them."""
    low, high = box[:, 0], box[:, 1]
    steps = (torch.arange(regions, dtype=box.dtype, device=box.device) + 0.5) / regions
    y, x = torch.meshgrid(steps, steps, indexing="ij")
    # Two corners, then the middles of all cells.
    shares = torch.cat([box.new_tensor([[0.0, 0], [1, 1]]), torch.stack([x, y], dim=2).flatten(0, 1)])
    places = low[:, None] + shares * (high - low)[:, None]
    inverse = torch.linalg.inv(to_source[:, :, :2])
    seen = (places - to_source[:, None, :, 2]) @ inverse.mT
    low, high = seen[:, :2].amin(dim=1), seen[:, :2].amax(dim=1)
    column, row = ((seen[:, 2:] - low[:, None]) / (high - low)[:, None] * regions).floor().long().unbind(dim=2)
    return ViewRegions(torch.cat([low, high], dim=1), row * regions + column)
