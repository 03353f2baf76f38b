"""What the study of pre-training learns from, is probed on and decodes masks of: each side's groups whole."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from medsd.cohort.patches import PatchDataset, PatchTable, read_patch_table, split_groups
from medsd.evaluate.probes import Labelled
from medsd.pretrain.images import read_images
from medsd.tables import read_table

# Raised whenever a side holds other pixels, so that kept results are never mixed.
VERSION = 2
EBHI_PX = 112
_NUCLEI_PX = 128
_LABELS = {"normal": 0, "adenocarcinoma": 1}
# Of clusters for validation and test, and of stretches or patients for test.
_SHARES, _TEST_SHARE = (0.15, 0.25), 0.4


@dataclass(frozen=True)
class Images:
    """Images (n, 3, S, S) uint8 with labels (n,), -1 unknown, masks (n, S, S) uint8 or None, and groups (n,)."""

    pixels: torch.Tensor
    labels: npt.NDArray[np.int64]
    groups: npt.NDArray[Any]
    masks: torch.Tensor | None = None

    def of(self, rows: npt.NDArray[np.bool_]) -> Images:
        """The chosen rows."""
        index = torch.from_numpy(np.flatnonzero(rows))
        masks = None if self.masks is None else self.masks[index]
        return Images(self.pixels[index], self.labels[rows], self.groups[rows], masks)

    def labelled(self, features: npt.NDArray[np.floating]) -> Labelled:
        """What a probe takes, of items with a label."""
        known = self.labels >= 0
        return Labelled(features[known], self.labels[known], self.groups[known])


@dataclass(frozen=True)
class Sides:
    """`unlabelled` is pre-trained on; probes and decoders are fitted on `training` and scored on `testing`.

    `validation` chooses between variants, where there is one.
    """

    unlabelled: torch.Tensor
    training: Images
    testing: Images
    masked_training: Images
    masked_testing: Images
    validation: Images | None = None


def sides_of(data: str, source: Path, kept: Path, seed: int) -> Sides:
    """The sides that the seed deals; decoded pixels are kept in a folder."""
    return {"pcam": _pcam, "ebhi": _ebhi}[data](source, kept, seed)


@lru_cache
def ratios_of(data: str, source: Path, seed: int) -> dict[str, float]:
    """By side, items tested on over items trained on, of what the seed deals: no patch of unknown cluster is."""
    if data == "ebhi":
        table = read_table(source / "ebhi_seg" / "index.csv", ("label", "patient"))
        test, known = _dealt(table["patient"].to_numpy(str), seed), table["label"].isin(_LABELS).to_numpy()
        return {"testing": _ratio(test & known, ~test & known), "masks": _ratio(test, ~test)}
    patches = read_patch_table(source / "pcam_patches", "stain_cluster")
    training, validation, testing = split_groups(patches, _SHARES, seed)
    test = _dealt(read_table(source / "nuinsseg" / "index.csv", ("run",))["run"].to_numpy(str), seed)
    found = {"testing": _ratio(testing, training), "validation": _ratio(validation, training)}
    return found | {"masks": _ratio(test, ~test)}


def _ratio(tested: npt.NDArray[np.bool_], trained: npt.NDArray[np.bool_]) -> float:
    return float(tested.sum() / trained.sum())


def _pcam(source: Path, kept: Path, seed: int) -> Sides:
    """Patches by stain cluster, with the patches of no cluster to pre-train on; nuclei of NuInsSeg by organ."""
    table = read_patch_table(source / "pcam_patches", "stain_cluster")
    training, validation, testing = split_groups(table, _SHARES, seed)
    patches = Images(_patches(table, kept / "pcam.npy"), table.label.astype(np.int64), table.group)
    more = read_images([source / "pcam_more", source / "pcam_unlabelled"])
    unlabelled = torch.cat([patches.of(training).pixels, _patches(more, kept / "pcam_more.npy")])
    nuclei = _nuclei(source / "nuinsseg", kept)
    test = _dealt(nuclei.groups, seed)
    masked = nuclei.of(~test), nuclei.of(test)
    return Sides(unlabelled, patches.of(training), patches.of(testing), *masked, patches.of(validation))


def _ebhi(source: Path, kept: Path, seed: int) -> Sides:
    """Biopsies by patient: grades normal and adenocarcinoma are told apart, glands and lesions found."""
    table = read_table(source / "ebhi_seg" / "index.csv", ("file", "mask", "label", "patient"))
    images = Images(
        _squares(source / "ebhi_seg", table["file"], kept / "ebhi.npy", EBHI_PX),
        np.array([_LABELS.get(label, -1) for label in table["label"]], np.int64),
        table["patient"].to_numpy(str),
        _squares(source / "ebhi_seg", table["mask"], kept / "ebhi_masks.npy", EBHI_PX),
    )
    test = _dealt(images.groups, seed)
    training, testing = images.of(~test), images.of(test)
    return Sides(training.pixels, training, testing, training, testing)


def _nuclei(source: Path, kept: Path) -> Images:
    table = read_table(source / "index.csv", ("file", "mask", "run"))
    pixels = _squares(source, table["file"], kept / "nuclei.npy", None)
    masks = _squares(source, table["mask"], kept / "nuclei_masks.npy", None)
    return Images(pixels, np.full(len(table), -1), table["run"].to_numpy(str), masks)


def _dealt(groups: npt.NDArray[Any], seed: int) -> npt.NDArray[np.bool_]:
    """Rows of the test side: whole groups, until it holds its share."""
    side = np.zeros(len(groups), bool)
    for group in np.random.default_rng((seed, 3)).permutation(np.unique(groups)):
        if side.mean() >= _TEST_SHARE:
            break
        side |= groups == group
    return side


def _patches(table: PatchTable, kept: Path) -> torch.Tensor:
    if not kept.is_file():
        dataset = PatchDataset(table)
        np.save(kept, torch.stack([dataset[row]["image"] for row in range(len(dataset))]).numpy())
    return torch.from_numpy(np.load(kept))


def _squares(folder: Path, files: Any, kept: Path, side_px: int | None) -> torch.Tensor:
    """Images (n, 3, S, S) or masks (n, S, S): made smaller as a whole, or the middle of 128 px as it is."""
    if not kept.is_file():
        np.save(kept, np.stack([_square(folder / file, side_px) for file in files]))
    return torch.from_numpy(np.load(kept))


def _square(path: Path, side_px: int | None) -> npt.NDArray[np.uint8]:
    with Image.open(path) as image:
        is_mask = image.mode in ("1", "L")
        if side_px is None:
            left, top = ((side - _NUCLEI_PX) // 2 for side in image.size)
            image = image.crop((left, top, left + _NUCLEI_PX, top + _NUCLEI_PX))
        else:
            image = image.convert("L" if is_mask else "RGB").resize((side_px, side_px), Image.Resampling.BOX)
        if is_mask:
            return (np.asarray(image.convert("L")) > 127).astype(np.uint8)
        return np.asarray(image.convert("RGB")).transpose(2, 0, 1)
