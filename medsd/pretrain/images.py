"""Images without their labels, each with the group whose images are no negatives of it: slides, clusters, volumes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypedDict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from medsd.cohort.dataset import Sample
from medsd.cohort.patches import SUFFIXES, PatchTable, patch_files, patches_of
from medsd.errors import DatasetError
from medsd.tables import read_table

logger = logging.getLogger(__name__)

FOLDER = "folder"
_TABLES = ("labels.csv", "index.csv")
_KEYS = ("id", "file")
_IN_A_ROW = 64


class Images(Protocol):
    """A data set of images: `TileDataset`, `PatchDataset`, `SliceDataset`."""

    groups: npt.NDArray[np.str_]

    def __len__(self) -> int: ...

    def __getitem__(self, item: int) -> Sample: ...

    def place(self, item: int) -> str:
        """The file of an item, and where in it."""
        ...

    def fingerprint(self) -> str:
        """A SHA-256 of which items these are."""
        ...


class Unlabelled(TypedDict):
    """An image (3, height, width) uint8 and the number of its group, int64 scalar."""

    image: Tensor
    group: Tensor


class UnlabelledImages(Dataset[Unlabelled]):
    """The images of a data set as {"image": (3, height, width) uint8, "group": int64}; their labels are not read.

    An image of one colour has nothing to tell it from others of that colour. It is left out, with a warning that names
    the file, and the next one takes its place.

    Args:
        images: the data set.

    Raises (when an item is read):
        DatasetError: 64 images in a row are of one colour.
    """

    def __init__(self, images: Images) -> None:
        self.images, self.groups = images, images.groups
        self._codes = np.unique(images.groups, return_inverse=True)[1]
        # Shared, since worker processes start anew each epoch.
        self._told = torch.zeros(len(images), dtype=torch.bool).share_memory_()  # type: ignore[no-untyped-call]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> Unlabelled:
        for number in range(item, item + _IN_A_ROW):
            number %= len(self)
            image = self.images[number]["image"]
            if (image != image[:, :1, :1]).any():
                return {"image": image, "group": torch.tensor(int(self._codes[number]))}
            if not self._told[number]:
                self._told[number] = True
                logger.warning("%s: one colour throughout; left out, the next one takes its place", self.place(number))
        raise DatasetError(f"{self.place(item)}: {_IN_A_ROW} images from here on are of one colour each")

    def place(self, item: int) -> str:
        """The file of an item, and where in it."""
        return self.images.place(item)

    def fingerprint(self) -> str:
        """A SHA-256 of which items these are."""
        return self.images.fingerprint()


def read_images(folders: Sequence[str | Path], group_columns: Sequence[str] = ()) -> PatchTable:
    """All images below some folders, with the groups that their tables name; no label is read (all are -1).

    A folder may hold a table `labels.csv` or `index.csv` with the column `id` (file names without ending) or `file`
    (paths in the folder) and others, as in `medsd.cohort.patches.read_patch_table`; with a table, its images are those
    that it lists, and no masks beside them.

    Args:
        folders: searched with all that is below them.
        group_columns: of each table the first that it has is the group; images of different folders with the same
            column and value are of one group. "folder" stands for the folder that an image lies in. Empty: every image
            is a group of its own.

    Raises:
        DatasetError: no such folder, no image, a row without a file or group, a file in two rows or below two of the
            folders, or a table without any of the columns.
    """
    paths: list[Path] = []
    groups: list[str] = []
    for folder in map(Path, folders):
        if not folder.is_dir():
            raise DatasetError(f"{folder}: no such folder of images; check image_dirs")
        table = next((folder / name for name in _TABLES if (folder / name).is_file()), None)
        of_folder = _listed(table, group_columns) if table else _found(folder, group_columns)
        if not of_folder:
            raise DatasetError(f"{folder}: no images ({', '.join(SUFFIXES)}); check image_dirs")
        paths += of_folder
        groups += of_folder.values()
    seen: set[Path] = set()
    for path in paths:
        if path.resolve() in seen:  # trained on and held out, and its own negative
            raise DatasetError(f"{path}: below two of the folders; name each folder once in image_dirs")
        seen.add(path.resolve())
    return PatchTable(tuple(paths), np.full(len(paths), -1, np.int8), np.array(groups))


def _found(folder: Path, group_columns: Sequence[str]) -> dict[Path, str]:
    return {path: str(path.parent if FOLDER in group_columns else path) for path in patch_files(folder)}


def _listed(table: Path, group_columns: Sequence[str]) -> dict[Path, str]:
    rows = read_table(table)
    key = next((name for name in _KEYS if name in rows), None)
    if key is None:
        raise DatasetError(f"{table}: no column {' or '.join(_KEYS)}; the first row names the columns")
    wanted = [name.lower() for name in group_columns]
    column = next((name for name in wanted if name in rows or name == FOLDER), None)
    if wanted and column is None:
        raise DatasetError(f"{table}: no column {' or '.join(wanted)}; check group_columns")
    listed = {}
    for number, path in zip(rows.index, patches_of(table, rows[key]), strict=True):
        if column in rows and not rows[column][number]:
            raise DatasetError(f"{table}: row {number}: {column} is empty; give every image a group")
        in_table = f"{column}: {rows[column][number]}" if column in rows else ""
        listed[path] = in_table or str(path.parent if column == FOLDER else path)
    return listed


def hold_out(groups: npt.NDArray[np.str_], share: float, seed: int) -> npt.NDArray[np.bool_]:
    """Which items are held out: whole groups, drawn by the seed until they hold their share of the items.

    Raises:
        DatasetError: fewer than two groups.
    """
    names, sizes = np.unique(groups, return_counts=True)
    if len(names) < 2:
        raise DatasetError(f"{len(names)} group(s) of images; at least 2 are needed, one to hold out")
    order = np.random.default_rng(seed).permutation(len(names))
    count = int(np.searchsorted(np.cumsum(sizes[order]), share * len(groups))) + 1
    return np.isin(groups, names[order[: min(count, len(names) - 1)]])
