"""Images whose pixels are replaced in the order of a saliency map, and what a network says of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.checks import check_choice, check_number
from medsd.errors import DatasetError
from medsd.networks.blur import blurred
from medsd.networks.modes import evaluating
from medsd.saliency.method import check_images, check_logits

Baseline = Literal["zero", "mean", "blur"]
Resize = Literal["nearest", "bilinear"]

_LEAST_RANGE = 1e-7


def baseline_image(x: Tensor, kind: Baseline) -> Tensor:
    """What pixels are replaced by, an image in the shape of `x`.

    Args:
        x: (B, C, H, W) float images, as the network takes them.
        kind: "zero": 0, which is the mean colour where inputs are normalised; "mean": the mean of that image and
            channel; "blur": the image under RISE's kernel, see `blurred`.
    """
    check_images(x)
    check_choice("baseline", kind, get_args(Baseline))
    if kind == "zero":
        return torch.zeros_like(x)
    if kind == "mean":
        return x.mean(dim=(2, 3), keepdim=True).expand_as(x)
    return blurred(x)


def pixel_ranks(saliency: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The place of each pixel when sorted from the greatest value to the least, (B, H, W) int64, 0 the greatest.

    Equal pixels are ordered at random: a map that says nothing is a random one, and a binary mask does not favour the
    top of the image.

    Args:
        saliency: (B, H, W).
        generator: orders equal pixels, on the device of `saliency`; None is torch's own.
    """
    check_maps(saliency)
    flat = saliency.flatten(1)
    shuffled = torch.rand(flat.shape, device=flat.device, generator=generator).argsort(dim=1)
    order = shuffled.gather(1, flat.gather(1, shuffled).argsort(dim=1, descending=True, stable=True))
    return order.argsort(dim=1).view(saliency.shape)


@torch.no_grad()
def perturbed_logits(
    network: nn.Module,
    x: Tensor,
    substitute: Tensor,
    ranks: Tensor,
    counts: Sequence[int],
    batch_size: int = 32,
    read: Callable[[object, int], Tensor] = check_logits,
) -> Tensor:
    """Logits (B, len(counts), K) after the first `count` pixels of each image have become those of `substitute`.

    Args:
        network: gives logits (B, K), or what `read` takes; in eval mode for the length of the call.
        x, substitute: (B, C, H, W) float images, as the network takes them. Where one is channels-last the network
            gets channels-last images, which on CPUs is often twice as fast.
        ranks: (B, H, W), see `pixel_ranks`.
        counts: how many pixels are replaced, in all channels, one number a step.
        batch_size: images in one pass of the network; steps of several images share one. More pays on a GPU only.
        read: the network's output as (B, K), see `scoring.reader`.
    """
    check_number("batch_size", batch_size, "[1, inf)", whole=True)
    batch, _, height, width = x.shape
    if ranks.shape != (batch, height, width):
        raise DatasetError(f"saliency: shape {tuple(ranks.shape)}, images {tuple(x.shape)}; give a (H, W) map an image")
    steps = torch.as_tensor(counts, device=x.device)
    layout = _layout(x, substitute)
    total = batch * len(counts)
    logits = []
    with evaluating(network):
        for start in range(0, total, batch_size):
            item = torch.arange(start, min(start + batch_size, total), device=x.device)
            image, step = item // len(counts), item % len(counts)
            replaced = ranks[image] < steps[step, None, None]
            images = torch.where(replaced[:, None], substitute[image], x[image])
            logits.append(read(network(images.contiguous(memory_format=layout)), len(images)).float())
    return torch.cat(logits).view(batch, len(counts), -1)


def at_pixels(maps: Tensor, like: Tensor, resize: Resize = "nearest") -> Tensor:
    """Maps (B, h, w) of a layer at the size of images (B, C, H, W), (B, H, W); those of that size are left alone.

    No value leaves the range of its map.
    """
    check_maps(maps)
    if len(maps) != len(like):
        raise DatasetError(f"saliency: {len(maps)} maps of {len(like)} images; give one an image")
    if maps.shape[1:] == like.shape[2:]:
        return maps
    check_choice("resize", resize, get_args(Resize))
    resized = F.interpolate(maps[:, None], like.shape[2:], mode=resize)[:, 0]
    # Bilinear weights add up to 1 but for rounding.
    return resized.clamp(maps.amin(dim=(1, 2), keepdim=True), maps.amax(dim=(1, 2), keepdim=True))


def _layout(x: Tensor, substitute: Tensor) -> torch.memory_format:
    for images in (x, substitute):
        if images.is_contiguous(memory_format=torch.channels_last) and not images.is_contiguous():
            return torch.channels_last
    return torch.contiguous_format


def check_maps(maps: Tensor) -> None:
    """Raises DatasetError: maps that are not (B, H, W) float, hold no pixel, or are not finite everywhere."""
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        kind = maps.dtype if isinstance(maps, Tensor) else type(maps).__name__
        raise DatasetError(f"saliency: {kind}; give a tensor (B, H, W) of floats, of a mask `mask.float()`")
    if maps.ndim != 3 or not maps.shape[1] * maps.shape[2]:
        raise DatasetError(f"saliency: shape {tuple(maps.shape)}; give (B, H, W)")
    if not torch.isfinite(maps).all():
        raise DatasetError("saliency: not finite everywhere; leave such images out, or compute it in float32")


def unit_strength(maps: Tensor) -> Tensor:
    """Maps (B, H, W) over their greatest absolute value; all-zero ones stay.

    Gradients may be small enough for the bounds of published measures, which are absolute, to take them for nothing.
    """
    greatest = maps.abs().amax(dim=(1, 2), keepdim=True)
    return maps / torch.where(greatest > 0, greatest, 1.0)


def unit_range(maps: Tensor) -> Tensor:
    """(map - min) / (max - min) of each map, (B, H, W); 0 everywhere where max - min is within 1e-7 of the greatest.

    That little is what rounding leaves of a constant map, and a map's unit does not matter (both our choice:
    pytorch-grad-cam adds 1e-7 to max - min, which takes gradients in small units for nothing). How many maps were flat:
    `(unit_range(maps).amax(dim=(1, 2)) == 0).sum()`.

    Args:
        maps: (B, H, W), signed.
    """
    check_maps(maps)
    # In float64: max - min may be beyond the maps' own type.
    wide = unit_strength(maps.double())
    least, greatest = wide.amin(dim=(1, 2), keepdim=True), wide.amax(dim=(1, 2), keepdim=True)
    flat = greatest - least < _LEAST_RANGE
    return torch.where(flat, 0.0, (wide - least) / torch.where(flat, 1.0, greatest - least)).to(maps.dtype)


def check_region(maps: Tensor, region: Tensor) -> None:
    """Raises DatasetError: maps as in `check_maps`, or a region that is not bool and of their shape."""
    check_maps(maps)
    if maps.shape != region.shape or region.dtype != torch.bool:
        raise DatasetError(
            f"region: maps {tuple(maps.shape)} and region {tuple(region.shape)} of {region.dtype}; give a bool region "
            "in the shape of the maps"
        )
