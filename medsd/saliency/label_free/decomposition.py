"""The activations of a layer taken apart, each image for itself: exact SVD over the channels, or truncated Tucker."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from medsd.checks import check_number
from medsd.errors import ConfigError, DatasetError

Ranks = tuple[int, int, int] | Literal["half"] | None
"""Tucker ranks over channels, rows, columns. None is all of them, (min(C, H W), H, W); "half" is half the rows and
columns, rounded up, and all the channel vectors that these leave. The paper's ranks are not known: both are ours."""

LEAST_VALUE = 1e-7
"""Singular values below this share of the largest are rounding, and set to 0: the eigenvalues of a Gram matrix are
their squares, so in float64 rounding leaves up to 2e-8 where there is nothing (measured)."""

_CENTRING_ROUNDING = 1e-14
"""What centring leaves of a constant channel, as a share of the norm of the activations."""


@dataclass(frozen=True)
class Components:
    """One map a channel vector, the strongest first; those that are only rounding are 0.

    Attributes:
        maps: (B, r, H, W) float64, signed: the channels summed with the weights of channel vector u_j, sum_i u_ij F_i,
            which is s_j v_j for an SVD. The sign of each is arbitrary.
        values: (B, r) float64 singular values s_j; with Tucker the norms of the core's slices G[j], which need not
            fall strictly. The first gap s_1 / s_2 says how firmly the first vector, and with it EigenCAM and TSM, is
            determined.
    """

    maps: Tensor
    values: Tensor


def check_features(features: Tensor) -> None:
    """Raises DatasetError: not (B, C, H, W) of a floating type, empty, or not finite."""
    if features.ndim != 4 or not features.is_floating_point() or not features.numel():
        raise DatasetError(f"features: {tuple(features.shape)}, {features.dtype}; give (B, C, H, W) float, not empty")
    # nan is the least and the greatest; a fifteenth of the time of looking at every value.
    if not torch.isfinite(torch.stack(features.detach().aminmax())).all():
        raise DatasetError("features: not finite; check images and weights, or run the network in float32")


def decompose(features: Tensor, centred: bool = False) -> Components:
    """Singular vectors of each image's features as a matrix of channels by places, all min(C, H W) of them.

    By the eigenvectors of the smaller Gram matrix (C x C or H W x H W) in float64. All-zero features, and constant
    channels that are centred, give zeros.

    Args:
        features: (B, C, H, W) activations.
        centred: the mean over the places is taken from every channel first.
    """
    check_features(features)
    matrix = features.detach().double().flatten(2)
    floor = _CENTRING_ROUNDING * torch.linalg.vector_norm(matrix, dim=(1, 2))[:, None]
    if centred:
        matrix = matrix - matrix.mean(dim=2, keepdim=True)
    by_places = matrix.shape[2] <= matrix.shape[1]
    squares, vectors = torch.linalg.eigh(matrix.mT @ matrix if by_places else matrix @ matrix.mT)
    values, vectors = squares.flip(1).clamp(min=0).sqrt(), vectors.flip(2).mT
    maps = values[:, :, None] * vectors if by_places else vectors @ matrix
    kept = values > torch.maximum(LEAST_VALUE * values[:, :1], floor)
    maps = torch.where(kept[:, :, None], maps, 0.0).reshape(len(maps), -1, *features.shape[2:])
    return Components(maps, torch.where(kept, values, 0.0))


def tucker(features: Tensor, ranks: Ranks = None, n_iter_max: int = 100, tol: float = 1e-4) -> Components:
    """Channel vectors and core of the Tucker decomposition of each image's features, C x H x W, not centred.

    Truncated rows or columns: tensorly's HOOI (De Lathauwer, De Moor and Vandewalle 2000), in float64 on the CPU,
    started from the SVD. It runs on the min(C, H W) maps of `decompose` in place of the C channels, which is the same
    tensor in another orthonormal basis of the channels: the same answer, several times faster. With all rows and
    columns the channel vectors are the singular vectors, whatever the first rank, and no iteration is needed.

    Args:
        features: (B, C, H, W) activations.
        ranks: see `Ranks`.
        n_iter_max: iterations at most.
        tol: the iteration stops when the relative reconstruction error changes by less.
    """
    check_number("n_iter_max", n_iter_max, "[1, inf)", whole=True)
    check_number("tol", tol, "(0, inf)")
    full = decompose(features)
    _, _, height, width = full.maps.shape
    first, rows, columns = checked_ranks(ranks, features.shape)
    if (rows, columns) == (height, width):
        return Components(full.maps[:, :first], full.values[:, :first])
    parts = [_tucker_of(maps, (first, rows, columns), n_iter_max, tol) for maps in full.maps.cpu()]
    device = features.device
    return Components(*(torch.stack(part).to(device) for part in zip(*parts, strict=True)))


def checked_ranks(ranks: Ranks, shape: tuple[int, ...]) -> tuple[int, int, int]:
    """Ranks in numbers for features of shape (B, C, H, W).

    Raises:
        ConfigError: not three whole numbers in their range. A rank above the product of the other two belongs to
            vectors that carry nothing, and HOOI would fill them with random ones; all rows and columns are exempt.
    """
    _, channels, height, width = shape
    most = min(channels, height * width)
    if ranks is None:
        return most, height, width
    if ranks == "half":
        rows, columns = math.ceil(height / 2), math.ceil(width / 2)
        # Of few channels or a long strip even half is more than the vectors of the other two can fill.
        rows, columns = min(rows, most * columns), min(columns, most * rows)
        ranks = min(most, rows * columns), rows, columns
    if not isinstance(ranks, tuple | list) or len(ranks) != 3 or not all(type(rank) is int for rank in ranks):
        raise ConfigError(f"ranks={ranks!r}: use None, 'half' or three whole numbers (channels, rows, columns)")
    first, rows, columns = ranks
    if not (1 <= first <= most and 1 <= rows <= height and 1 <= columns <= width):
        raise ConfigError(f"ranks={ranks}: outside (1, 1, 1) to ({most}, {height}, {width}) of {channels} channels")
    within = first <= rows * columns and rows <= first * columns and columns <= first * rows
    if not within and (rows, columns) != (height, width):
        raise ConfigError(f"ranks={ranks}: none may exceed the product of the other two; lower the greatest")
    return first, rows, columns


def _tucker_of(maps: Tensor, ranks: tuple[int, int, int], n_iter_max: int, tol: float) -> tuple[Tensor, Tensor]:
    """Component maps (r1, H, W) and values (r1,) of one image's maps (r, H, W)."""
    import tensorly
    from tensorly.decomposition import tucker as hooi

    if not maps.any():  # HOOI would divide by the norm
        return maps.new_zeros((ranks[0], *maps.shape[1:])), maps.new_zeros(ranks[0])
    with tensorly.backend_context("numpy", local_threadsafe=True):
        core: Any
        core, factors = hooi(maps.numpy(), rank=ranks, n_iter_max=n_iter_max, tol=tol)
    weights, values = torch.from_numpy(factors[0]), torch.from_numpy(core).flatten(1).norm(dim=1)
    # HOOI fills what carries nothing with vectors of its own choice.
    kept = values > LEAST_VALUE * values.max()
    maps = torch.tensordot(weights, maps, dims=([0], [0]))
    return torch.where(kept[:, None, None], maps, 0.0), torch.where(kept, values, 0.0)
