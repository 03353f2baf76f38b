"""What the fine-tuning study trains on of real tissue: patches and biopsies whose tint tells the label."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from studies import objectives_data
from studies.data import Items, Split
from studies.objectives_data import Part, items_of, masked_items, ratio_dealt, ratio_of_sides, split
from torch import Tensor

from medsd.slides.stain.augment import RUIFROK, restain

SIDE_PX = 128
# Raised whenever a part holds other pixels, so that kept results are never mixed.
VERSION = 1
PARTS = {
    "pcam": Part("pcam_patches", side_px=96, scale=1, samples=256, more="pcam_more", head_lr=1e-3, stain=0.1),
    "ebhi": Part("ebhi_seg", side_px=224, scale=1, samples=256, head_lr=1e-3, stain=0.1),
}
# A yellow of saffron, which some laboratories put on collagen beside haematoxylin and eosin: optical densities of red,
# green and blue of a unit, and how much is added where there is tissue, so that cross-entropy's worst group is near the
# 40 % of the paper's plain network: on the validation side of seed 0 it is 35 % (`ebhi`) and, of `pcam`, 69, 53, 18 and
# 4 % at 0.1, 0.2, 0.3 and 0.4.
_SAFFRON = (0.1, 0.3, 0.95)
TINT = {"pcam": 0.25, "ebhi": 0.4}
# The two that most patients have. Of normal biopsies there are 24; and adenocarcinoma is told from benign tissue so
# easily that cross-entropy does not look at the tint.
_GRADES = ("polyp", "low_grade_in")
_OTHER_GRADES = ("normal", "serrated_adenoma", "high_grade_in", "adenocarcinoma")
# Share of the masks, so that object and background are both to be seen.
_OBJECT = (0.1, 0.9)
_BATCH = 64


def tissue_with_shortcut(name: str, data: Path, seed: int, shortcut: bool = True) -> Split:
    """Tiles of 128 px that are tinted or not: saffron added by a fixed shift, where there is stain.

    `pcam`: PatchCamelyon patches, enlarged from 96 px, tinted as a whole; stain clusters lie on one side. `ebhi`:
    polyps against low-grade neoplasia, made smaller from 224 px, tinted outside the masks of glands or lesion alone, as
    Waterbirds has its birds before land or water; patients lie on one side. In training the tint goes with the label in
    every item, or with nothing (`shortcut` False, which tells what there is to win); validation and test sides hold
    every item twice, with it and without.
    """
    part = PARTS[name]
    items = _biopsies(data) if name == "ebhi" else items_of(name, part, data)
    fit, held, test = split(items, part, data, seed, fold=0)
    cue = fit.labels if shortcut else np.random.default_rng((seed, 5)).integers(0, 2, len(fit.labels))
    tint = TINT[name]
    return Split(
        _in_groups(fit, tint, torch.from_numpy(cue.astype(np.int64))), _in_groups(held, tint), _in_groups(test, tint)
    )


def ratio_of(name: str, data: Path, seed: int) -> float:
    """Items tested on (each counted once) over items trained on, of what the seed deals."""
    if name == "pcam":
        return ratio_dealt(name, PARTS[name], data, seed, fold=0)
    return ratio_of_sides(*_of_biopsies(data), seed, fold=0)


@lru_cache
def _of_biopsies(data: Path) -> tuple[npt.NDArray[np.int8], npt.NDArray[np.str_]]:
    """Their labels and groups; what they are is known by their masks alone."""
    items = _biopsies(data)
    return items.labels, items.groups


def _biopsies(data: Path) -> objectives_data.Items:
    part = PARTS["ebhi"]
    items = masked_items(data / part.folder, part, _GRADES, _OTHER_GRADES)
    assert items.masks is not None
    share = items.masks.mean(axis=(1, 2))
    return items.of(np.flatnonzero((share >= _OBJECT[0]) & (share <= _OBJECT[1])))


def _in_groups(side: objectives_data.Items, tint: float, cue: Tensor | None = None) -> Items:
    """Each item tinted where the cue (n,) is 1; without a cue every item twice, plain and tinted."""
    images, labels = side.images, torch.from_numpy(side.labels.astype(np.int64))
    tinted, masks = torch.cat([_tinted(batch, tint) for batch in images.split(_BATCH)]), None
    if side.masks is not None:
        inside = torch.from_numpy(side.masks)[:, None]
        tinted = torch.where(inside, images, tinted)
        masks = _resized(255 * inside.to(torch.uint8))[:, 0] > 127
    images, tinted = _resized(images), _resized(tinted)
    if cue is not None:
        return Items(torch.where(cue[:, None, None, None] == 1, tinted, images), labels, cue, masks)
    cue = torch.arange(2).repeat_interleave(len(labels))
    return Items(torch.cat([images, tinted]), labels.repeat(2), cue, None if masks is None else masks.repeat(2, 1, 1))


def _tinted(images: Tensor, tint: float) -> Tensor:
    count = len(images)
    stains = torch.tensor((RUIFROK[0], _SAFFRON))
    return restain(images, stains, torch.ones(count, 2), torch.tensor([0.0, tint]).expand(count, 2))


def _resized(images: Tensor) -> Tensor:
    """Images (n, C, S, S) uint8 at the side of the study."""
    sides = [
        F.interpolate(batch.float(), (SIDE_PX, SIDE_PX), mode="bilinear", antialias=True).round().to(torch.uint8)
        for batch in images.split(_BATCH)
    ]
    return torch.cat(sides)
