"""What the study of objectives trains on: patches and biopsies, in folds of whole groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from medsd.cohort.apart import may_train
from medsd.cohort.patches import PatchDataset, PatchTable, read_patch_table
from medsd.tables import read_table

FOLDS = 3
GRADES = ("normal", "adenocarcinoma")
_OTHER_GRADES = ("polyp", "low_grade_in", "high_grade_in", "serrated_adenoma")


@dataclass(frozen=True)
class Part:
    """What a part trains on, and how: every method in the same way."""

    folder: str
    side_px: int
    scale: float
    samples: int
    epochs: int = 10
    more: str | None = None
    lr: float = 3e-4
    head_lr: float = 3e-4
    layer_decay: float = 0.65
    frozen: tuple[str, ...] = ("batchnorm",)
    batch_size: int = 32
    weight_decay: float = 0.01
    stain: float = 0.2


@dataclass(frozen=True)
class Items:
    """Images (n, 3, S, S) uint8 with labels (n,), groups (n,), and masks (n, S, S) bool or None."""

    images: torch.Tensor
    labels: npt.NDArray[np.int8]
    groups: npt.NDArray[np.str_]
    masks: npt.NDArray[np.bool_] | None = None

    def of(self, rows: npt.NDArray[np.intp]) -> Items:
        """The chosen rows."""
        masks = None if self.masks is None else self.masks[rows]
        return Items(self.images[rows], self.labels[rows], self.groups[rows], masks)


def items_of(name: str, part: Part, data: Path) -> Items:
    """All items of a part that have a group."""
    folder = data / part.folder
    if name == "pcam":
        return _read(read_patch_table(folder, "stain_cluster"), part)
    return masked_items(folder, part, GRADES, _OTHER_GRADES)


def masked_items(folder: Path, part: Part, grades: Sequence[str], left_out: Sequence[str]) -> Items:
    """Biopsies of these grades, whose place in the list is their label, with the masks of their glands."""
    table = read_patch_table(folder, "patient", grades, left_out)
    names = read_table(folder / "index.csv", ("file", "mask")).set_index("file")["mask"]
    found = [names[path.relative_to(folder).as_posix()] for path in table.paths]
    return replace(_read(table, part), masks=np.stack([_mask(folder / name, part) for name in found]))


def _read(table: PatchTable, part: Part) -> Items:
    dataset = PatchDataset(table, part.side_px, part.scale)
    images = torch.stack([dataset[row]["image"] for row in range(len(dataset))])
    return Items(images, table.label, table.group)


def _mask(path: Path, part: Part) -> npt.NDArray[np.bool_]:
    with Image.open(path) as image:
        small = np.asarray(image.convert("L").reduce(round(1 / part.scale))) > 127
    top, left = ((side - part.side_px) // 2 for side in small.shape)
    return small[top : top + part.side_px, left : left + part.side_px]


def split(items: Items, part: Part, data: Path, repeat: int, fold: int) -> tuple[Items, Items, Items]:
    """Training, calibration and test sides of whole groups; with the further patches that may be trained on."""
    rest, test = _folds(items, FOLDS, repeat)[fold]
    kept, held = _folds(items.of(rest), 4, repeat)[0]
    fit = items.of(rest[kept])
    if part.more is not None:
        more = _read(read_patch_table(data / part.more, "id"), part)
        held_out = np.ones(len(items.labels), bool)
        held_out[rest[kept]] = False
        pixels = (side.images.permute(0, 2, 3, 1).numpy() for side in (more, items))
        more = more.of(np.flatnonzero(may_train(*pixels, held_out)))
        fit = Items(
            torch.cat([fit.images, more.images]),
            np.concatenate([fit.labels, more.labels]),
            np.concatenate([fit.groups, np.char.add(f"{part.more} ", more.groups)]),
        )
    return fit, items.of(rest[held]), items.of(test)


def _folds(items: Items, count: int, seed: int) -> list[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]]]:
    """Rows of either side of each fold: whole groups in an order of the seed, each to the fold that lacks it most.

    scikit-learn's `StratifiedGroupKFold` deals the same folds whatever its seed, unless groups tie.
    """
    groups, which = np.unique(items.groups, return_inverse=True)
    shares = np.zeros((len(groups), 2))
    for label in (0, 1):
        shares[:, label] = np.bincount(which[items.labels == label], minlength=len(groups))
    shares /= shares.sum(axis=0)
    held, fold_of = np.zeros((count, 2)), np.zeros(len(groups), int)
    for group in np.random.default_rng((seed, count)).permutation(len(groups)):
        fold_of[group] = np.square(held + shares[group]).sum(axis=1).argmin()
        # What lies in the fold counts once it is there.
        held[fold_of[group]] += shares[group]
    rows = fold_of[which]
    return [(np.flatnonzero(rows != fold), np.flatnonzero(rows == fold)) for fold in range(count)]
