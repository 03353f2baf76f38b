"""Label-free maps of a slide as a whole: one decomposition, one sign and one scale, from features gathered in parts.

What the methods of `medsd.saliency.label_free` take from the singular vectors of an image's features (channels by
places) follows from the channels' Gram matrix, and that is a sum over places: so a slide needs no more memory than one
of its parts. Truncated Tucker ranks, which mix places, are not to be had this way.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from medsd.heatmap.value_map import Floats
from medsd.saliency.label_free.decomposition import LEAST_VALUE
from medsd.saliency.label_free.maps import LEAST_GAP

_CENTRED = ("eigencam", "multivec_eigencam")
_FIRST = ("eigencam", "tsm")
LABEL_FREE = (*_CENTRED, "tsm", "mtsm", "mtsm_b", "mean_map", "channel_energy")

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Components:
    """Mean (C,) that is taken off, vectors (C, r) and values (r,) of features, the greatest first; float64."""

    mean: Tensor
    vectors: Tensor
    values: Tensor


def slide_maps(methods: Iterable[str], parts: Sequence[tuple[Tensor, Tensor]]) -> dict[str, list[Floats]]:
    """Each method's maps (h, w) of all parts, in their order.

    Args:
        methods: of `LABEL_FREE`.
        parts: features (C, h, w) and bool (h, w), the places that count (the tissue); gone through
            twice, so that a sequence may read its items each time.

    Example:
        >>> features = torch.rand(8, 6, 6)
        >>> halves = [(half, torch.ones(6, 3, dtype=torch.bool)) for half in features.split(3, dim=2)]
        >>> [part.shape for part in slide_maps(["eigencam"], halves)["eigencam"]]
        [(6, 3), (6, 3)]
    """
    methods = list(methods)
    gram, total, count = torch.zeros(()), torch.zeros(()), 0
    for features, inside in parts:
        places = features[:, inside].double()
        gram, total, count = gram + (places @ places.T).cpu(), total + places.sum(dim=1).cpu(), count + places.shape[1]
    if not count:
        return {name: [torch.zeros(inside.shape).numpy() for _, inside in parts] for name in methods}
    found = {name: _decomposed(gram, total, count, name in _CENTRED) for name in methods}
    for name in _FIRST:
        if name in found and len(found[name].values) > 1 and found[name].values[1] * LEAST_GAP > found[name].values[0]:
            logger.warning("%s: s_1 / s_2 below %g; the map turns with small changes", name, LEAST_GAP)
    maps: dict[str, list[Floats]] = {name: [] for name in methods}
    rise = 0.0
    for features, inside in parts:
        values = features.double()
        for name in methods:
            drawn = _projected(name, values, found[name])
            if name == "eigencam":
                rise += float((drawn * values.square().sum(dim=0))[inside].sum())
            maps[name].append(drawn.float().cpu().numpy())
    if rise < 0:  # the sign rule of `label_free.eigencam`
        maps["eigencam"] = [-part for part in maps["eigencam"]]
    return maps


def _decomposed(gram: Tensor, total: Tensor, count: int, centred: bool) -> _Components:
    mean = total / count if centred else torch.zeros_like(total)
    squares, vectors = torch.linalg.eigh(gram - count * torch.outer(mean, mean))
    values = squares.flip(0).clamp_min(0).sqrt()
    kept = values > LEAST_VALUE * values.max()
    return _Components(mean, vectors.flip(1)[:, kept], values[kept])


def _projected(name: str, features: Tensor, found: _Components) -> Tensor:
    """A method's map (h, w) of features (C, h, w), float64."""
    drawn: Tensor
    if name == "mean_map":
        return features.mean(dim=0)
    if name == "channel_energy":
        return features.square().sum(dim=0)
    mean, vectors, values = (part.to(features.device) for part in (found.mean, found.vectors, found.values))
    if not len(values):
        return torch.zeros_like(features[0])
    if name in _FIRST:
        drawn = torch.tensordot(vectors[:, 0], features - mean[:, None, None], dims=1)
        return drawn if name == "eigencam" else drawn.abs() / len(features)
    weights = torch.ones_like(values) if name == "mtsm_b" else values
    drawn = torch.tensordot(vectors.T, features - mean[:, None, None], dims=1).abs()
    drawn = torch.tensordot(weights, drawn, dims=1) / len(features)
    return drawn
