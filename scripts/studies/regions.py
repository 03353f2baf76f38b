"""What the saliency study explains: regions of phantom slides with tumour in part, patches, photographs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medsd.cohort.patches import PatchDataset, read_patch_table, split_groups
from medsd.files import atomic_path
from medsd.phantom.slides import PhantomSpec, draw_phantom

REGION_PX = 128
# Slides to explain; the default bundle's phantoms have seed 0.
SLIDES = range(1000, 1008)
# Raised whenever a part holds other pixels, so that kept results are never mixed.
VERSION = 1
_PLACES = 8
_SHARES = (0.1, 0.6)


@dataclass(frozen=True)
class Images:
    """Images to explain.

    Attributes:
        images: (n, 3, H, W) uint8.
        groups: (n,) what is resampled together, such as the slide.
        labels: (n,) int64, or None where nobody says.
        masks: (n, H, W) bool, where the tumour is; None where nobody knows.
    """

    images: Tensor
    groups: npt.NDArray[np.int64]
    labels: Tensor | None = None
    masks: Tensor | None = None

    def some(self, count: int) -> Images:
        """That many of them, evenly spread."""
        rows = torch.linspace(0, len(self.images) - 1, count).round().long()
        labels, masks = (None if part is None else part[rows] for part in (self.labels, self.masks))
        return Images(self.images[rows], self.groups[rows.numpy()], labels, masks)


def phantom_regions(cache: Path, slides: Sequence[int] = SLIDES) -> Images:
    """Regions of 128 um of slides with tumour, 10 to 60 % of each is tumour; eight a slide, none overlapping."""
    drawn = [_regions(cache, slide) for slide in slides]
    images, masks = (np.concatenate([part[number] for part in drawn]) for number in (0, 1))
    groups = np.repeat(np.asarray(slides), [len(part[0]) for part in drawn])
    return Images(
        torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(),
        groups,
        torch.ones(len(images), dtype=torch.int64),
        torch.from_numpy(masks),
    )


def held_out_patches(folder: Path, count: int) -> Images:
    """Whole PatchCamelyon patches (96 px) of the test clusters of `configs/pcam.json`, as many of each class."""
    table = read_patch_table(folder, "stain_cluster")
    rows = table.rows(split_groups(table, (0.15, 0.25), 0)[2])
    order = np.random.default_rng(0).permutation(len(rows.paths))
    chosen = np.zeros(len(order), bool)
    for label in (0, 1):
        chosen[order[rows.label[order] == label][: count // 2]] = True
    dataset = PatchDataset(rows.rows(chosen), 96)
    images = torch.stack([dataset[row]["image"] for row in range(len(dataset))])
    clusters = np.unique(dataset.groups, return_inverse=True)[1]
    return Images(images, clusters, torch.from_numpy(dataset.labels.astype(np.int64)))


def _phantom(seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    """A slide at 1 um per pixel, as the default bundle reads it: the mean of 2 x 2 level-0 pixels."""
    phantom = draw_phantom(PhantomSpec(seed, tumour=True))
    side = phantom.image.shape[0] // 2
    image = phantom.image.reshape(side, 2, side, 2, 3).mean(axis=(1, 3)).round().astype(np.uint8)
    return image, phantom.mask[::2, ::2].astype(bool)


def _regions(cache: Path, seed: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.bool_]]:
    path = cache / f"regions-{VERSION}-{seed}.npz"
    if not path.is_file():
        image, mask = _phantom(seed)
        corners = _corners(image, mask, np.random.default_rng(seed))
        windows = [np.s_[y : y + REGION_PX, x : x + REGION_PX] for y, x in corners]
        with atomic_path(path) as temporary, open(temporary, "wb") as handle:
            np.savez(
                handle,
                images=np.stack([image[window] for window in windows]),
                masks=np.stack([mask[window] for window in windows]),
            )
    with np.load(path, allow_pickle=False) as content:
        return content["images"], content["masks"]


def _corners(
    image: npt.NDArray[np.uint8], mask: npt.NDArray[np.bool_], random: np.random.Generator
) -> list[tuple[int, int]]:
    """Top left corners of regions in tissue, part of which is tumour, far enough apart not to overlap."""
    glass = image.min(axis=2) > 225
    found: list[tuple[int, int]] = []
    last = mask.shape[0] - REGION_PX
    for y, x in random.integers(0, last, (20_000, 2)):
        window = np.s_[y : y + REGION_PX, x : x + REGION_PX]
        share = mask[window].mean()
        apart = all(max(abs(y - top), abs(x - left)) >= REGION_PX for top, left in found)
        if apart and _SHARES[0] <= share <= _SHARES[1] and glass[window].mean() < 0.1:
            found.append((int(y), int(x)))
        if len(found) == _PLACES:
            break
    return found
