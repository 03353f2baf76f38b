"""What the study of objectives trains on: patches and biopsies, in folds of whole groups."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
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
        return _read(_table(name, folder), part)
    return masked_items(folder, part, GRADES, _OTHER_GRADES)


def _table(name: str, folder: Path) -> PatchTable:
    if name == "pcam":
        return read_patch_table(folder, "stain_cluster")
    return read_patch_table(folder, "patient", GRADES, _OTHER_GRADES)


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
    kept, held, test = _sides(items.labels, items.groups, repeat, fold)
    fit = items.of(kept)
    if part.more is not None:
        more = _read(read_patch_table(data / part.more, "id"), part)
        held_out = np.ones(len(items.labels), bool)
        held_out[kept] = False
        pixels = (side.images.permute(0, 2, 3, 1).numpy() for side in (more, items))
        more = more.of(np.flatnonzero(may_train(*pixels, held_out)))
        fit = Items(
            torch.cat([fit.images, more.images]),
            np.concatenate([fit.labels, more.labels]),
            np.concatenate([fit.groups, np.char.add(f"{part.more} ", more.groups)]),
        )
    return fit, items.of(held), items.of(test)


@lru_cache
def ratio_dealt(name: str, part: Part, data: Path, repeat: int, fold: int) -> float:
    """Items tested on over items trained on, of what a repeat and its folds deal: no further patch is."""
    table = _table(name, data / part.folder)
    return ratio_of_sides(table.label, table.group, repeat, fold)


def ratio_of_sides(labels: npt.NDArray[np.int8], groups: npt.NDArray[np.str_], repeat: int, fold: int) -> float:
    """The same of labels and groups that are at hand."""
    kept, _, test = _sides(labels, groups, repeat, fold)
    return len(test) / len(kept)


_Rows = npt.NDArray[np.intp]


def _sides(
    labels: npt.NDArray[np.int8], groups: npt.NDArray[np.str_], repeat: int, fold: int
) -> tuple[_Rows, _Rows, _Rows]:
    """Rows of the training, calibration and test sides."""
    rest, test = _folds(labels, groups, FOLDS, repeat)[fold]
    kept, held = _folds(labels[rest], groups[rest], 4, repeat)[0]
    return rest[kept], rest[held], test


def _folds(
    labels: npt.NDArray[np.int8], names: npt.NDArray[np.str_], count: int, seed: int
) -> list[tuple[_Rows, _Rows]]:
    """Rows of either side of each fold: whole groups in an order of the seed, each to the fold that lacks it most.

    scikit-learn's `StratifiedGroupKFold` deals the same folds whatever its seed, unless groups tie.
    """
    groups, which = np.unique(names, return_inverse=True)
    shares = np.zeros((len(groups), 2))
    for label in (0, 1):
        shares[:, label] = np.bincount(which[labels == label], minlength=len(groups))
    shares /= shares.sum(axis=0)
    held, fold_of = np.zeros((count, 2)), np.zeros(len(groups), int)
    for group in np.random.default_rng((seed, count)).permutation(len(groups)):
        fold_of[group] = np.square(held + shares[group]).sum(axis=1).argmin()
        # What lies in the fold counts once it is there.
        held[fold_of[group]] += shares[group]
    rows = fold_of[which]
    return [(np.flatnonzero(rows != fold), np.flatnonzero(rows == fold)) for fold in range(count)]
