"""Label-free maps as functions of a layer's activations: features (B, C, H, W) in, maps (B, H, W) out, no network.

All compute in float64, each image for itself, and give maps before any normalisation. The layer decides the frame: a
map has the layer's height and width, x right, y down.
"""

from __future__ import annotations

import logging
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from medsd.checks import check_choice, check_flag
from medsd.saliency.label_free.decomposition import Components, Ranks, check_features, decompose, tucker
from medsd.saliency.metrics.perturb import unit_range

Variant = Literal["sign_fixed", "reference"]
"""EigenCAM with a sign of ours, or as released, with the sign that LAPACK happens to give."""

Weights = Literal["a", "b", "c"]
"""How the multivector maps weight m_j = |sum_i u_ij F_i| / C: "a" sum s_j m_j, "b" sum m_j, "c" sum s_j norm(m_j) with
norm to 0 .. 1. The paper's formula is not known to us; "a" is the literal reading of "all vectors and values"."""

LEAST_GAP = 1.05
"""A warning is logged below this s_1 / s_2: activations that change by 5 % of s_1 can then exchange the first two
vectors (Wedin 1972 bounds the turn by the change over s_1 - s_2), and the map with them. The number is our choice."""

_logger = logging.getLogger(__name__)


def eigencam(features: Tensor, variant: Variant = "sign_fixed") -> Tensor:
    """EigenCAM (Muhammad and Yeasin 2020, arXiv 2008.00299) as released in pytorch-grad-cam: the first principal map.

    The mean over the places is taken from every channel, and the map is the projection on the first singular vector,
    signed. A singular vector's sign is arbitrary. "sign_fixed" turns the map so that it rises where the activations are
    stronger: its product with the channel energy, summed, is not negative (our choice; where that is 0 the sign stays
    arbitrary). "reference" is pytorch-grad-cam's projection in the features' own precision, with the sign of numpy's
    LAPACK, which differs from build to build. Constant channels give zeros, to rounding in "reference".

    The rule and its rivals with ImageNet's SqueezeNet at fire4: on 56 images of purple or mauve nuclei (Data Science
    Bowl 2018) the map rose on the nuclei in all with ours and with "flip where |min| > |max|" (SegEigenCAM's), in none
    with "reference"; on 155 crops that are mostly tissue it rose on the tissue in 54 %, 42 % and 43 %.

    Args:
        features: (B, C, H, W) activations.

    Returns:
        (B, H, W) float64, signed; "reference": float32.

    Raises:
        DatasetError: not (B, C, H, W) float, empty, or not finite.
        ConfigError: another variant.
    """
    check_choice("variant", variant, get_args(Variant))
    if variant == "reference":
        return _eigencam_reference(features)
    maps = _first(decompose(features, centred=True))
    energy = channel_energy(features)
    return torch.where((maps * energy).sum(dim=(1, 2), keepdim=True) < 0, -maps, maps)


def multivec_eigencam(features: Tensor, centred: bool = True, weights: Weights = "a") -> Tensor:
    """Multivec-EigenCAM (Bouayed et al. 2024, arXiv 2410.23072): all singular vectors, each map's magnitude, summed.

    Whether the paper centres is not known; without centring this is MTSM at full ranks.

    Args:
        features: (B, C, H, W) activations.
        centred: the mean over the places is taken from every channel first, as EigenCAM does.
        weights: see `Weights`.

    Returns:
        (B, H, W) float64, not negative; zeros where there is nothing to take apart.

    Raises:
        DatasetError: not (B, C, H, W) float, empty, or not finite.
        ConfigError: other weights, or `centred` neither True nor False.
    """
    check_flag("centred", centred)
    return _weighted(decompose(features, centred), features.shape[1], weights)


def tsm(features: Tensor, ranks: Ranks = None, n_iter_max: int = 100, tol: float = 1e-4) -> Tensor:
    """TSM (Bouayed et al. 2024, arXiv 2410.23072): |sum_i w_i F_i| / C with the first Tucker channel vector w.

    At full ranks, the default, this is the magnitude of the uncentred EigenCAM projection; see `tucker` for the others.

    Args:
        features: (B, C, H, W) activations.
        ranks: see `Ranks`.
        n_iter_max: iterations of truncated Tucker, at most.
        tol: where they stop.

    Returns:
        (B, H, W) float64, not negative; zeros for zeros.

    Raises:
        DatasetError: not (B, C, H, W) float, empty, or not finite.
        ConfigError: ranks or options out of their range.
    """
    return _first(tucker(features, ranks, n_iter_max, tol)).abs() / features.shape[1]


def mtsm(
    features: Tensor, ranks: Ranks = None, weights: Weights = "a", n_iter_max: int = 100, tol: float = 1e-4
) -> Tensor:
    """MTSM (Bouayed et al. 2024, arXiv 2410.23072): TSM over all Tucker channel vectors, each map's magnitude, summed.

    Args:
        features: (B, C, H, W) activations.
        ranks: see `Ranks`.
        weights: see `Weights`.
        n_iter_max: iterations of truncated Tucker, at most.
        tol: where they stop.

    Returns:
        (B, H, W) float64, not negative; zeros for zeros.

    Raises:
        DatasetError: not (B, C, H, W) float, empty, or not finite.
        ConfigError: ranks, weights or options out of their range.
    """
    return _weighted(tucker(features, ranks, n_iter_max, tol), features.shape[1], weights)


def mean_map(features: Tensor) -> Tensor:
    """The mean of the channels, (B, H, W) float64, signed: what EigenCAM and TSM have to beat.

    Raises:
        DatasetError: not (B, C, H, W) float, empty, or not finite.
    """
    check_features(features)
    return features.detach().double().mean(dim=1)


def channel_energy(features: Tensor) -> Tensor:
    """The sum of the squared channels, (B, H, W) float64: C^2 sum_j m_j^2 over all vectors, what MTSM has to beat.

    Raises:
        DatasetError: not (B, C, H, W) float, empty, or not finite.
    """
    check_features(features)
    norms: Tensor = torch.linalg.vector_norm(features.detach(), dim=1, dtype=torch.float64)
    return norms.square()


def _first(components: Components) -> Tensor:
    """The first component's maps (B, H, W); images whose first vector is hardly determined are logged."""
    unsure = int((components.values[:, 1:2] * LEAST_GAP > components.values[:, :1]).sum())
    if unsure:
        _logger.warning(
            "%d of %d images: s_1 / s_2 below %g; the first vector turns with small changes, and the map with it",
            unsure,
            len(components.values),
            LEAST_GAP,
        )
    return components.maps[:, 0]


def _weighted(components: Components, channels: int, weights: Weights) -> Tensor:
    """The magnitudes of all components summed, (B, H, W)."""
    check_choice("weights", weights, get_args(Weights))
    magnitudes = components.maps.abs()
    values = components.values[:, :, None, None]
    if weights == "a":
        return (values * magnitudes).sum(dim=1) / channels
    if weights == "b":
        return magnitudes.sum(dim=1) / channels
    shapes = unit_range(magnitudes.flatten(0, 1))
    return (values * shapes.reshape_as(magnitudes)).sum(dim=1)


def _eigencam_reference(features: Tensor) -> Tensor:
    """pytorch-grad-cam's `get_2d_projection`, (B, H, W) float32; NaN is an error and not 0."""
    check_features(features)
    precision = torch.float64 if features.dtype == torch.float64 else torch.float32
    projections = []
    for image in features.detach().to("cpu", precision).flatten(2).numpy():
        matrix = image.T - image.T.mean(axis=0)
        # The thin SVD has the signs of the full one that the original asks for, without its C x C vectors.
        vector = np.linalg.svd(matrix, full_matrices=False)[2][0]
        projections.append(torch.from_numpy(matrix @ vector).float())
    return torch.stack(projections).reshape(len(features), *features.shape[2:]).to(features.device)
