"""Does the part of the image that a map keeps carry the class? Average drop, increase, coherency, complexity, ADCC.

An image times its map: the tensor that the network takes, where 0 is the mean colour, times the map in 0 to 1, as the
codes of ADCC (Poppi et al. 2021, arXiv 2104.10252) and pytorch-grad-cam do it. So the maps here are "shares": bring
one there with `perturb.unit_range`, then with `perturb.at_pixels` to the size of the images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medsd.errors import DatasetError
from medsd.networks.modes import evaluating
from medsd.saliency.method import Method, Target, check_images
from medsd.saliency.metrics.agreement import correlation
from medsd.saliency.metrics.perturb import Resize, at_pixels, check_maps, unit_range
from medsd.saliency.metrics.scoring import Score, held_target, reader, scores


@dataclass(frozen=True)
class Adcc:
    """The ADCC of each image and what it is made of, each (B,).

    Attributes:
        adcc: harmonic mean of coherency, 1 - complexity and 1 - average drop; 0 where one of these is 0.
        average_drop, increase: see `drop_and_increase`.
        coherency: see the function.
        complexity: mean of the map in 0 to 1, low is good: 1 shows everything, 0 nothing.
    """

    adcc: Tensor
    average_drop: Tensor
    increase: Tensor
    coherency: Tensor
    complexity: Tensor


@torch.no_grad()
def drop_and_increase(
    network: nn.Module, x: Tensor, shares: Tensor, target: Target = None, score: Score = "probability"
) -> tuple[Tensor, Tensor]:
    """What an image loses and whether it gains when it is multiplied by its map: average drop and increase, each (B,).

    Drop: max(0, y - o) / y in 0 to 1, low is good; y the class's probability, o that of the image times its map, 0
    where y is 0 (nothing to lose). Increase: 1 where o > y, else 0; the mean is the rate. Grad-CAM++ (Chattopadhay et
    al. 2018), per image as in ADCC's code.

    Args:
        network: gives logits (B, K), for "similarity" embeddings (B, D) or (B, D, h, w); in eval mode for the length
            of the call.
        x: (B, C, H, W) float images, as the network takes them.
        shares: (B, H, W) in 0 to 1.
        target: class numbers; None is the class predicted for each image. Not looked at by "similarity".
        score: "similarity" for encoders without classes: o is the cosine with the image's own embedding, y is 1 (our
            choice), which no cosine exceeds.

    Raises:
        ConfigError: a target outside the classes, or no such score.
        DatasetError: images that are not (B, C, H, W) float, shares that are not in 0 to 1, or not of their size.
        NetworkError: the network's output does not fit the score.
    """
    read, kept = reader(score), _times(x, shares)
    with evaluating(network):
        clean, changed = (read(network(images), len(x)).float() for images in (x, kept))
    before, after = scores(torch.stack([clean, changed], dim=1), clean, target, score).unbind(dim=1)
    drop = torch.where(before > 0, (before - after).clamp(min=0) / torch.where(before > 0, before, 1.0), 0.0)
    # Rounding may leave cosines a little on either side of 1.
    return drop, torch.zeros_like(before) if score == "similarity" else (after > before).to(before)


def coherency(method: Method, x: Tensor, shares: Tensor, target: Target = None, resize: Resize = "bilinear") -> Tensor:
    """(1 + r) / 2, (B,) in 0 to 1: r is Pearson's correlation of the map with the map of the image times it.

    0 where either map is constant, for which r does not exist (our choice; ADCC's code: 0 where a map holds nan).

    Args:
        method: explains the image times its map, for the same class.
        x: (B, C, H, W) float images, as the network takes them.
        shares: (B, H, W) in 0 to 1, the method's map of `x`.
        target: class numbers; None is the class that the method's network predicts for `x`.
        resize: how the second map comes to the size of the images.

    Raises:
        ConfigError: a target outside the classes, or no such way to resize.
        DatasetError: images that are not (B, C, H, W) float, shares that are not in 0 to 1, or not of their size.
        NetworkError: as the method.
    """
    kept = _times(x, shares)
    again = method(kept, held_target(method.network, x, target))
    # Pearson's correlation does not see offset and scale, but resizing comes after the unit range, as for `shares`.
    again = at_pixels(unit_range(again), x, resize)
    return ((1 + correlation(shares.flatten(1), again.flatten(1))) / 2).nan_to_num(0.0)


def adcc(
    network: nn.Module,
    method: Method,
    x: Tensor,
    target: Target = None,
    maps: Tensor | None = None,
    score: Score = "probability",
    resize: Resize = "bilinear",
) -> Adcc:
    """Average Drop, Coherency and Complexity in one number an image, high is good (Poppi et al. 2021).

    3 / (1 / coherency + 1 / (1 - complexity) + 1 / (1 - average drop)), and 0 where a term is 0 (the released code
    divides by 0, or gives 0 for a coherency of 0). Print it beside that of maps that know nothing, such as a Gaussian
    in the middle of the image: a small bright spot anywhere has a low complexity.

    Args:
        network: whose answers count; often, not always, the method's own.
        method: called on `x` where no maps are given, and on the images times their maps.
        x: (B, C, H, W) float images, as the networks take them.
        target: class numbers, the same for all parts; None is the class that `network` predicts for `x`, and with
            "similarity", the one that the method's network predicts where it has classes.
        maps: (B, h, w), the method's of `x`, signed and not normalised.
        score: as in `drop_and_increase`.
        resize: how maps in 0 to 1 come to the size of the images; not stated by the papers, bilinear in their codes.

    Raises:
        ConfigError, DatasetError, NetworkError: as the parts.
    """
    check_images(x)
    target = held_target(network if score == "probability" else method.network, x, target)
    given = method(x, target) if maps is None else maps
    shares = at_pixels(unit_range(given), x, resize)
    drop, increase = drop_and_increase(network, x, shares, target, score)
    coherent, shown = coherency(method, x, shares, target, resize), shares.double().mean(dim=(1, 2))
    terms = torch.stack([coherent.double(), 1 - shown, 1 - drop.double()])
    nothing = (terms <= 0).any(dim=0)
    harmonic = 3 / torch.where(nothing, 1.0, terms).reciprocal().sum(dim=0)
    return Adcc(torch.where(nothing, 0.0, harmonic), drop, increase, coherent, shown)


def _times(x: Tensor, shares: Tensor) -> Tensor:
    check_images(x)
    check_maps(shares)
    if shares.amin() < 0 or shares.amax() > 1:
        found = f"from {float(shares.amin()):.3g} to {float(shares.amax()):.3g}"
        raise DatasetError(f"shares: {found}, not in 0 to 1; use `unit_range`")
    if shares.shape != (len(x), *x.shape[2:]):
        raise DatasetError(f"shares: shape {tuple(shares.shape)}, images {tuple(x.shape)}; use `perturb.at_pixels`")
    return x * shares[:, None].to(x)
