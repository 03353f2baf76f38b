"""Which patches of another folder may be trained on: none of a place, or of a stain, that is held out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from medsd.slides.readers.base import RGB, Bools

Floats = npt.NDArray[np.float64]

_GRID, _BLOCK, _LEAST_DEVIATION = 16, 8, 4.0
_NEIGHBOURS, _LEAST_TISSUE = 5, 50
_TISSUE_DENSITY = 0.45


def may_train(more: RGB, grouped: RGB, held_out: Bools) -> Bools:
    """Which of the patches without a group may be trained on, beside grouped ones of which some are held out.

    Left out are patches of a place that is held out: they share pixels with a patch held out, or with one that does,
    and so on. Pixels are compared in blocks of 8 px every 16 px, as patches lie to each other in PatchCamelyon; what
    overlaps by another offset, or was resampled, is not found. Left out, too, are patches with a held-out patch among
    the five grouped ones that are nearest in stain (see `stain_signature`): a stand-in for slides that nobody knows.
    Of PatchCamelyon's 15 stain clusters it finds 95 % of the patches whose cluster is held out (our choice).

    Args:
        more: (n, H, W, 3), of no group.
        grouped: (m, H, W, 3), in the same scale.
        held_out: (m,).

    Returns:
        (n,).
    """
    from scipy.spatial import KDTree

    place = _places(np.concatenate([grouped, more]))
    same_place = np.isin(place[len(grouped) :], place[: len(grouped)][held_out])
    known, asked = stain_signature(grouped), stain_signature(more)
    scale = np.maximum(known.std(axis=0), 1e-9)
    nearest = KDTree(known / scale).query(asked / scale, min(_NEIGHBOURS, len(known)))[1].reshape(len(more), -1)
    like: Bools = held_out[nearest].any(axis=1)
    return ~(same_place | like)


def stain_signature(images: RGB) -> Floats:
    """What stain and scanner leave in a patch, (n, 9): optical densities of the glass, and the tissue's hue and spread.

    Args:
        images: (n, H, W, 3).
    """
    return np.stack([_signature(image) for image in images])


def _signature(image: RGB) -> Floats:
    density = -np.log((image.reshape(-1, 3).astype(np.float64) + 1) / 256)
    tissue = density[density.sum(axis=1) > _TISSUE_DENSITY]
    tissue = tissue if len(tissue) >= _LEAST_TISSUE else density
    mean = tissue.mean(axis=0)
    spread = np.linalg.eigh(np.cov(tissue.T))[1][:, -1]
    hue, glass = mean / max(float(np.linalg.norm(mean)), 1e-9), np.percentile(density, 2, axis=0)
    return np.concatenate([glass, hue, spread * np.copysign(1.0, spread.sum())])


def _places(images: RGB) -> npt.NDArray[np.int32]:
    """A number a patch (n,), the same for patches that blocks of pixels join."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    numbers: dict[bytes, int] = {}
    patches, blocks = [], []
    for patch, image in enumerate(images):
        for top in range(0, image.shape[0] - _BLOCK + 1, _GRID):
            for left in range(0, image.shape[1] - _BLOCK + 1, _GRID):
                block = image[top : top + _BLOCK, left : left + _BLOCK]
                if block.std() > _LEAST_DEVIATION:  # glass is alike everywhere
                    patches.append(patch)
                    blocks.append(len(images) + numbers.setdefault(block.tobytes(), len(numbers)))
    nodes = len(images) + len(numbers)
    joined = coo_array((np.ones(len(patches), np.int8), (patches, blocks)), shape=(nodes, nodes))
    place: npt.NDArray[np.int32] = connected_components(joined, directed=False)[1][: len(images)]
    return place
