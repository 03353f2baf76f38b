"""Images and masks in a folder, listed by a table.

file,mask,patient,label
images/a.png,masks/a.png,p1,adenoma
images/b.png,masks/b.png,p2,normal
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from medsd.checks import check_number
from medsd.cohort.entry import PATIENT, check_patients
from medsd.cohort.manifest import PART_OF_WORD
from medsd.cohort.patches import SUFFIXES, read_turned
from medsd.errors import DatasetError, nearest
from medsd.progress import Progress, no_progress
from medsd.segment.items import MaskedSample, as_masked_sample
from medsd.segment.masks import MaskCoding, read_mask
from medsd.slides.readers.base import RGB
from medsd.tables import read_table

logger = logging.getLogger(__name__)

TABLE = "index.csv"


@dataclass(frozen=True)
class MaskTable:
    """Images with masks on disk, one row a pair in every column.

    Attributes:
        folder: holds the table.
        images, masks: their files.
        patient: (n,) str, what must not be split.
        label: (n,) str, empty where the table has no such column.
        part: (n,) str, "training", "validation", "testing", or empty where the table does not say.
    """

    folder: Path
    images: tuple[Path, ...]
    masks: tuple[Path, ...]
    patient: npt.NDArray[np.str_]
    label: npt.NDArray[np.str_]
    part: npt.NDArray[np.str_]

    def __len__(self) -> int:
        return len(self.images)

    def rows(self, chosen: npt.NDArray[np.bool_]) -> MaskTable:
        """The table with the chosen rows only."""
        images, masks = (tuple(np.array(paths, object)[chosen].tolist()) for paths in (self.images, self.masks))
        return MaskTable(self.folder, images, masks, self.patient[chosen], self.label[chosen], self.part[chosen])


def read_mask_table(
    folder: str | Path, group_column: str = "patient", labels: Sequence[str] = (), key: str = "dataset_dir"
) -> MaskTable:
    """Read `index.csv`: `file` and `mask`, paths in the folder, a column of patients, and perhaps `label` and `part`.

    Images in the folder that no row names are counted in a warning.

    Args:
        folder: holds the table and the files.
        group_column: of patients, or slides, or organs: what must not be split.
        labels: rows of these labels alone; empty for all.
        key: what messages call the folder.

    Raises:
        DatasetError: no folder or table, a missing column, a file that is not there, a row without patient, an image or
            mask in two rows, an unknown part or label; the message names row and column.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder; set {key} to one with {TABLE}, images and masks")
    table, column = folder / TABLE, group_column.lower()
    rows = read_table(table, ("file", "mask", column, *(("label",) if labels else ())))
    if rows.empty:
        raise DatasetError(f"{table}: no rows; it must list images and masks")
    if labels:
        known = sorted(set(rows["label"]))
        for label in labels:
            if label not in known:
                raise DatasetError(f"{table}: no row has the label '{label}'{nearest(label, known)}; check labels")
        rows = rows[rows["label"].isin(list(labels))]
    if column == PATIENT:
        check_patients((f"{table}: row {number}", name) for number, name in rows[column].items())
    root, seen = folder.resolve(), dict[Path, int]()
    for number in rows.index:
        for name in ("file", "mask"):
            if not rows[name][number]:
                raise DatasetError(f"{table}: row {number}: the column '{name}' is empty; name a file in the folder")
            path = _placed(folder, rows[name][number])
            if not path.resolve().is_relative_to(root) or not path.is_file():
                hint = "; write folders with '/'" if "\\" in path.name else "; mend the row"
                raise DatasetError(f"{table}: row {number}: no file {path} in the folder (column '{name}'){hint}")
            if seen.get(path) == number:
                raise DatasetError(f"{table}: row {number}: {path.name} is its own mask; name another in column 'mask'")
            if path in seen:
                raise DatasetError(f"{table}: row {number}: {path.name} is also in row {seen[path]}; keep one")
            seen[path] = number
        if not rows[column][number]:
            raise DatasetError(f"{table}: row {number}: {group_column} is empty; give every image one")
        if "part" in rows and rows["part"][number].lower() not in ("", *PART_OF_WORD):
            known = sorted(PART_OF_WORD)
            raise DatasetError(f"{table}: row {number}: part '{rows['part'][number]}' unknown; use {', '.join(known)}")
    there = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.name[0] != ".")
    unlisted = sum(path not in seen for path in there)
    if unlisted and not labels:
        logger.warning("%s: %d pictures in the folder are in no row and are left out", table, unlisted)
    columns = {name: rows[name].to_numpy(str) if name in rows else np.full(len(rows), "") for name in ("label", "part")}
    part = np.array([PART_OF_WORD.get(word.lower(), "") for word in columns["part"]], "<U10")
    images, masks = (tuple(_placed(folder, path) for path in rows[name]) for name in ("file", "mask"))
    return MaskTable(folder, images, masks, rows[column].to_numpy(str), columns["label"], part)


def _placed(folder: Path, name: str) -> Path:
    """The file that a cell names, one path for all ways to write it."""
    return folder / os.path.relpath(folder / name, folder)


class MaskedImages(Dataset[MaskedSample]):
    """The pairs of a table as {"image": (3, S, S) uint8, "label": (1, S, S) uint8}, the square around the centre.

    Args:
        table: the pairs.
        coding: what the masks' values mean.
        side_px: S, a side of the square.
        key: what messages call that.

    Raises (when an item is read):
        DatasetError: an image or mask cannot be read, they differ in size, or are smaller than the square.

    Example:
        >>> from PIL import Image
        >>> Image.new("RGB", (40, 32)).save("a.png"), Image.new("L", (40, 32), 1).save("b.png")
        (None, None)
        >>> _ = Path("index.csv").write_text("file,mask,patient\\na.png,b.png,p1\\n")
        >>> items = MaskedImages(read_mask_table("."), MaskCoding(("background", "gland")), side_px=32)
        >>> items[0]["image"].shape, items[0]["label"].unique().tolist()
        (torch.Size([3, 32, 32]), [1])
    """

    def __init__(self, table: MaskTable, coding: MaskCoding, side_px: int, key: str = "side_px") -> None:
        check_number(key, side_px, "[8, inf)", whole=True)
        self.table, self.coding, self.side_px, self.key = table, coding, side_px, key
        self.groups = self.patients = table.patient
        # By their places in the folder, so that tables mean the same where run or folder were moved.
        self.units: npt.NDArray[np.str_] = np.array(
            [path.relative_to(table.folder).as_posix() for path in table.images]
        )

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, item: int) -> MaskedSample:
        return as_masked_sample(*self.pixels(item))

    def pixels(self, item: int) -> tuple[RGB, npt.NDArray[np.uint8]]:
        """Pixels (S, S, 3) and class numbers (S, S)."""
        pixels, mask = self.whole(item)
        return self.cropped(pixels), self.cropped(mask)

    def cropped(self, array: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """The square (S, S, ...) in the middle of an array (height, width, ...)."""
        top, left = ((length - self.side_px) // 2 for length in array.shape[:2])
        return array[top : top + self.side_px, left : left + self.side_px]

    def whole(self, item: int) -> tuple[RGB, npt.NDArray[np.uint8]]:
        """Pixels (height, width, 3) and class numbers (height, width) of the whole image, which holds the square."""
        path = self.table.images[item]
        pixels, turn = read_turned(path)
        height, width = pixels.shape[:2]
        mask = read_mask(self.table.masks[item], self.coding, height, width, turn)
        if min(height, width) < self.side_px:
            raise DatasetError(f"{path}: {width} x {height} px is smaller than {self.key}={self.side_px}; lower it")
        return pixels, mask

    def place(self, item: int) -> str:
        """The image of an item."""
        return str(self.table.images[item])

    def fingerprint(self) -> str:
        """A SHA-256 of which pairs these are, with their sizes in bytes."""
        files = [(path.name, path.stat().st_size) for path in (*self.table.images, *self.table.masks)]
        return hashlib.sha256(f"{self.side_px} {self.coding} {files}".encode()).hexdigest()


def check_masks(items: MaskedImages, words: str, progress: Progress = no_progress) -> npt.NDArray[np.int64]:
    """Read every pair once and tell what is in the masks: nothing is trained on a data set that is half readable.

    Images of which only the middle is used are counted in a warning.

    Args:
        items: the pairs.
        words: what messages call them, such as "training".
        progress: shows the items.

    Returns:
        Pixels (n, K) of each class in the squares.

    Raises:
        DatasetError: an item cannot be read, or no mask has anything but background.
    """
    classes = items.coding.classes
    counts, sizes = np.zeros((len(items), len(classes)), np.int64), np.zeros(len(items), np.int64)
    for item in progress(range(len(items)), len(items), "mask"):
        mask = items.whole(item)[1]
        counts[item], sizes[item] = np.bincount(items.cropped(mask).ravel(), minlength=len(classes)), mask.size
    _tell_cropped(items, sizes, words)
    empty = np.flatnonzero(counts[:, 1:].sum(axis=1) == 0)
    if len(empty) == len(items):
        raise DatasetError(f"{words}: all {len(items)} masks are empty; check the column 'mask' and mask_values")
    if len(empty):
        logger.warning(
            "%s: %d of %d masks are empty and are taken as background, the first: %s",
            words,
            len(empty),
            len(items),
            items.place(int(empty[0])),
        )
    for name, count in zip(classes, counts.sum(axis=0), strict=True):
        if not count:
            logger.warning("%s: no pixel of the class '%s' in any mask; check classes and mask_values", words, name)
    shares = ", ".join(
        f"{name} {share:.1%}" for name, share in zip(classes, counts.sum(axis=0) / counts.sum(), strict=True)
    )
    patients = len(np.unique(items.patients))
    logger.info("%s: %d images of %d patients; pixels: %s", words, len(items), patients, shares)
    return counts


def _tell_cropped(items: MaskedImages, sizes: npt.NDArray[np.int64], words: str) -> None:
    """Warn of images whose pixels (n,) are more than those of the square."""
    used = items.side_px**2
    larger = np.flatnonzero(sizes > used)
    if len(larger):
        logger.warning(
            "%s: %d of %d images are larger than side_px=%d, the first: %s; only the square in their middle, %.1f %% "
            "of their pixels, is learnt from and scored; raise side_px, or cut them into tiles",
            *(words, len(larger), len(items), items.side_px, items.place(int(larger[0]))),
            100 * used * len(larger) / sizes[larger].sum(),
        )
