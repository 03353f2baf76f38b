"""Does the part of the image that a map keeps carry the class? Average drop, increase, coherency, complexity, ADCC.

An image times its map: the tensor that the network takes, where 0 is the mean colour, times the map in 0 to 1, as the
codes of ADCC (Poppi et al. 2021, arXiv 2104.10252) and pytorch-grad-cam do it. So the maps here are "shares": bring
one there with `unit_range`, then with `perturb.at_pixels` to the size of the images.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from medsd.errors import DatasetError
from medsd.networks.modes import evaluating
from medsd.saliency.method import Method, Target
from medsd.saliency.metrics.perturb import Resize, at_pixels, check_maps
from medsd.saliency.metrics.scoring import Score, held_target, reader, scores

_LEAST_RANGE = 1e-7


@dataclass(frozen=True)
class Adcc:
    """The ADCC of each image and what it is made of, each (B,).

    Attributes:
        adcc: harmonic mean of coherency, 1 - complexity and 1 - average drop; 0 where one of these is 0.
        average_drop, increase, coherency, complexity: see the functions of that name.
    """

    adcc: Tensor
    average_drop: Tensor
    increase: Tensor
    coherency: Tensor
    complexity: Tensor


def unit_range(maps: Tensor) -> Tensor:
    """(map - min) / (max - min + 1e-7) of each map, (B, H, W); 0 everywhere where max - min is below 1e-7.

    The bound is pytorch-grad-cam's, the zeros are our choice. How many maps were flat:
    `(unit_range(maps).amax(dim=(1, 2)) == 0).sum()`. A map in a unit so small that its range is below 1e-5 comes out
    visibly below 1; scale it first.

    Args:
        maps: (B, H, W), signed.

    Raises:
        DatasetError: the maps are not (B, H, W) or not finite.
    """
    check_maps(maps)
    least, greatest = maps.aminmax(dim=2)
    least, greatest = least.amin(dim=1)[:, None, None], greatest.amax(dim=1)[:, None, None]
    extent = greatest - least
    return torch.where(extent < _LEAST_RANGE, 0.0, (maps - least) / (extent + _LEAST_RANGE))


def average_drop(
    network: nn.Module, x: Tensor, shares: Tensor, target: Target = None, score: Score = "probability"
) -> Tensor:
    """max(0, y - o) / y, (B,) in 0 to 1, low is good: y the class's probability, o that of the image times its map.

    0 where y is 0 (nothing to lose). Grad-CAM++ (Chattopadhay et al. 2018), per image as in ADCC's code.

    Args:
        network: gives logits (B, K), for "similarity" embeddings (B, D) or (B, D, h, w); in eval mode for the length
            of the call.
        x: (B, C, H, W) float images, as the network takes them.
        shares: (B, H, W) in 0 to 1.
        target: class numbers; None is the class predicted for each image. Not looked at by "similarity".
        score: "similarity" for encoders without classes: o is the cosine with the image's own embedding, y is 1 (our
            choice).

    Raises:
        ConfigError: a target outside the classes, or no such score.
        DatasetError: shares that are not in 0 to 1, or not of the images' size.
        NetworkError: the network's output does not fit the score.
    """
    before, after = _confidences(network, x, shares, target, score)
    return _drop(before, after)


def increase(
    network: nn.Module, x: Tensor, shares: Tensor, target: Target = None, score: Score = "probability"
) -> Tensor:
    """Whether the image times its map has more of the class than the image, (B,): 1 or 0; the mean is the rate.

    Increase in confidence (Chattopadhay et al. 2018). No cosine exceeds 1, so by "similarity" it is always 0.
    Arguments and errors as in `average_drop`.
    """
    before, after = _confidences(network, x, shares, target, score)
    return _increase(before, after, score)


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
        DatasetError: shares that are not in 0 to 1, or not of the images' size.
        NetworkError: as the method.
    """
    kept = _times(x, shares)
    again = method(kept, held_target(method.network, x, target))
    # Pearson's correlation does not see offset and scale, but resizing comes after the unit range, as for `shares`.
    again = at_pixels(unit_range(again), x, resize)
    pair = [maps.flatten(1).double() for maps in (shares, again)]
    centred = [values - values.mean(dim=1, keepdim=True) for values in pair]
    norm = centred[0].norm(dim=1) * centred[1].norm(dim=1)
    constant = torch.stack([values.amin(dim=1) == values.amax(dim=1) for values in pair]).any(dim=0)
    correlation = (centred[0] * centred[1]).sum(dim=1) / torch.where(constant, 1.0, norm)
    return torch.where(constant, 0.0, (1 + correlation.clamp(-1, 1)) / 2)


def complexity(shares: Tensor) -> Tensor:
    """Mean of the map, (B,) in 0 to 1, low is good: 1 shows everything, 0 nothing. ADCC's code.

    Raises:
        DatasetError: shares that are not (B, H, W) in 0 to 1.
    """
    _check_shares(shares)
    return shares.double().mean(dim=(1, 2))


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
        score: as in `average_drop`.
        resize: how maps in 0 to 1 come to the size of the images; not stated by the papers, bilinear in their codes.

    Raises:
        ConfigError, DatasetError, NetworkError: as the parts.
    """
    target = held_target(network if score == "probability" else method.network, x, target)
    given = method(x, target) if maps is None else maps
    shares = at_pixels(unit_range(given), x, resize)
    before, after = _confidences(network, x, shares, target, score)
    drop, coherent, shown = _drop(before, after), coherency(method, x, shares, target, resize), complexity(shares)
    terms = torch.stack([coherent.double(), 1 - shown, 1 - drop.double()])
    nothing = (terms <= 0).any(dim=0)
    harmonic = 3 / torch.where(nothing, 1.0, terms).reciprocal().sum(dim=0)
    return Adcc(torch.where(nothing, 0.0, harmonic), drop, _increase(before, after, score), coherent, shown)


def _drop(before: Tensor, after: Tensor) -> Tensor:
    return torch.where(before > 0, (before - after).clamp(min=0) / torch.where(before > 0, before, 1.0), 0.0)


def _increase(before: Tensor, after: Tensor, score: Score) -> Tensor:
    # Rounding may leave cosines a little on either side of 1.
    return torch.zeros_like(before) if score == "similarity" else (after > before).to(before)


@torch.no_grad()
def _confidences(network: nn.Module, x: Tensor, shares: Tensor, target: Target, score: Score) -> tuple[Tensor, Tensor]:
    """(B,) and (B,): the score of the images and of the images times their maps."""
    read, kept = reader(score), _times(x, shares)
    with evaluating(network):
        clean, changed = (read(network(images), len(x)).float() for images in (x, kept))
    before, after = scores(torch.stack([clean, changed], dim=1), clean, target, score).unbind(dim=1)
    return before, after


def _times(x: Tensor, shares: Tensor) -> Tensor:
    _check_shares(shares)
    if shares.shape != (len(x), *x.shape[2:]):
        raise DatasetError(f"shares: shape {tuple(shares.shape)}, images {tuple(x.shape)}; use `perturb.at_pixels`")
    return x * shares[:, None].to(x)


def _check_shares(shares: Tensor) -> None:
    check_maps(shares)
    if shares.amin() < 0 or shares.amax() > 1:
        raise DatasetError(
            f"shares: from {float(shares.amin()):.3g} to {float(shares.amax()):.3g}, not in 0 to 1; use `unit_range`"
        )
