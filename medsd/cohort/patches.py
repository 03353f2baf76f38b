"""A folder of patches with a table of labels, such as PatchCamelyon."""

from __future__ import annotations

import hashlib
import logging
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
from PIL import ExifTags, Image, ImageOps, JpegImagePlugin
from torch.utils.data import Dataset

from medsd.checks import check_number
from medsd.cohort.dataset import Sample, as_sample
from medsd.cohort.entry import PATIENT, check_patients
from medsd.errors import ConfigError, DatasetError
from medsd.slides.readers.base import RGB
from medsd.slides.readers.damage import DAMAGED
from medsd.slides.readers.picture import MODES, bits_a_colour
from medsd.slides.readers.vendor import on_white
from medsd.tables import read_table

logger = logging.getLogger(__name__)

# Pillow would try every decoder it has, whatever the file's name says: Ghostscript for one.
_FORMATS = ("PNG", "TIFF", "WEBP", "JPEG")
_MOST_PX = 4096 * 4096
SUFFIXES = (".png", ".tif", ".tiff", ".webp", ".jpg", ".jpeg")


@dataclass(frozen=True)
class PatchTable:
    """Patches on disk, one row a patch in every column.

    Attributes:
        paths: the patches' files.
        label: (n,) int8 class numbers, mostly 1 tumour, 0 normal.
        group: (n,) str, what must not be split (stain cluster, slide).
    """

    paths: tuple[Path, ...]
    label: npt.NDArray[np.int8]
    group: npt.NDArray[np.str_]

    def rows(self, chosen: npt.NDArray[np.bool_]) -> PatchTable:
        """The table with the chosen rows only."""
        paths = tuple(path for path, keep in zip(self.paths, chosen, strict=True) if keep)
        return PatchTable(paths, self.label[chosen], self.group[chosen])

    def joined(self, other: PatchTable) -> PatchTable:
        """This table's rows, then the other's."""
        label, group = (
            np.concatenate([getattr(table, name) for table in (self, other)]) for name in ("label", "group")
        )
        return PatchTable(self.paths + other.paths, label, group)

    def files(self) -> list[tuple[str, int]]:
        """Name and bytes of each patch's file: copies elsewhere are the same patches, others of the names are not.

        Raises:
            DatasetError: a file that is no longer there.
        """
        try:
            return [(path.name, path.stat().st_size) for path in self.paths]
        except OSError as error:
            raise DatasetError(f"{error.filename}: {error.strerror}; put the patch back") from error

    def pixels(self, row: int) -> RGB:
        """The patch of a row as RGB pixels (height, width, 3).

        Raises:
            DatasetError: it cannot be decoded, or has more than 4,096 x 4,096 px.
        """
        return read_patch(self.paths[row])


def read_patch(path: Path) -> RGB:
    """A patch as RGB pixels (height, width, 3), upright, transparency on white: as `medsd explain` shows it.

    Raises:
        DatasetError: it cannot be decoded, is not of 8 bits a colour, or has more than 4,096 x 4,096 px.
    """
    return read_turned(path)[0]


def read_turned(path: Path) -> tuple[RGB, int]:
    """What `read_patch` gives, and the EXIF orientation (1 is upright) by which it was turned for that."""
    try:
        with open(path, "rb") as file, Image.open(file, formats=_FORMATS) as image:
            file.seek(0)
            start = file.read(32)
            if image.width * image.height > _MOST_PX:
                raise DatasetError(f"{path}: {image.width} x {image.height} px, no patch; cut it")
            if image.mode not in MODES or bits_a_colour(image, start) > 8:
                raise DatasetError(f"{path}: not 8 bits a colour; save it as 8-bit RGB")
            # A JPEG shows its first picture in every viewer.
            if not isinstance(image, JpegImagePlugin.JpegImageFile) and getattr(image, "is_animated", False):
                raise DatasetError(f"{path}: has several pages; save the one that is meant as a file of its own")
            turn = stated_turn(image)
            upright = ImageOps.exif_transpose(image)
            return on_white(upright) if upright.has_transparency_data else np.array(upright.convert("RGB")), turn
    except DAMAGED as error:
        raise DatasetError(f"{path}: cannot be read as an image ({error}); copy it again") from error


def stated_turn(image: Image.Image) -> int:
    """The EXIF orientation of a picture, 1 (upright) to 8; to be asked before decoding, which turns TIFFs."""
    turn = image.getexif().get(ExifTags.Base.Orientation, 1)
    return turn if turn in range(1, 9) else 1


def read_patch_table(
    folder: str | Path,
    group_column: str | None,
    classes: Sequence[str] = ("normal", "tumour"),
    left_out: Sequence[str] = (),
    key: str = "dataset_dir",
) -> PatchTable:
    """Read `labels.csv` (columns `id`, `label`, and the one named) and find each patch's file below `folder`.

    Without `labels.csv` it is `index.csv`, with the column `file`, the patch's path in the folder, in the place of
    `id`, which is the file's name without its ending. A column `part` is not read, and that is said.

    Args:
        folder: holds the table, and the patches at any depth.
        group_column: of what must not be split; None where nobody knows it: each patch is a group of its own.
        classes: their names in the order of the labels, which are these names or numbers from 0 on.
        left_out: labels whose rows are left out.
        key: what messages call the folder.

    Raises:
        DatasetError: no folder or table, a missing column, an unknown label, a patch without a file, in two files
            or in two rows; the message names the row.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder; set {key} to one with labels.csv and patches")
    table, column = folder / "labels.csv", "id"
    if not table.is_file() and (folder / "index.csv").is_file():
        table, column = folder / "index.csv", "file"
    wanted = [column, "label", *([] if group_column is None else [group_column.lower()])]
    if not table.is_file():
        raise DatasetError(f"{table}: missing; it must have the columns {', '.join(wanted)}")
    rows = read_table(table, wanted)
    if "part" in rows:
        logger.warning("%s: the column 'part' is not read; which patches are trained or tested on is dealt", table)
    rows = rows[~rows["label"].isin(list(left_out))]
    if rows.empty:
        raise DatasetError(f"{table}: no rows; it must list patches")
    group = rows[wanted[-1] if group_column else column]
    numbers = {name: number for number, name in enumerate(classes)}
    if not any(name.isdigit() for name in classes):  # grades are names, not places
        numbers |= {str(number): number for number in range(len(classes))}
    for number, label in rows["label"].items():
        place = f"{table}: row {number}"
        if label not in numbers:
            raise DatasetError(
                f"{place}: label '{label}' unknown; use {' or '.join(filter(str.isdigit, numbers))}, or a class "
                f"({', '.join(classes)})"
            )
        if not group[number]:
            raise DatasetError(f"{place}: {group_column} is empty; give every patch a group")
    if wanted[-1] == PATIENT:
        check_patients((f"{table}: row {number}", name) for number, name in group.items())
    chosen = patches_of(table, rows[column])
    return PatchTable(chosen, rows["label"].map(numbers).to_numpy(np.int8), group.to_numpy(str))


def patch_files(folder: Path) -> list[Path]:
    """The images at any depth of a folder, in the order of their paths."""
    return [path for path in sorted(folder.rglob("*")) if path.suffix.lower() in SUFFIXES and path.name[0] != "."]


def patches_of(table: Path, names: pd.Series) -> tuple[Path, ...]:
    """The file of every row of a table, below the table's folder.

    Args:
        table: the table's file.
        names: by the number of the row; in a column "file" paths in the folder, in one "id" names without ending.

    Raises:
        DatasetError: a row without a file, or a file in two rows, or two files of one name; the message names the row.
    """
    folder = table.parent
    files: dict[str, list[Path]] = {}
    for path in patch_files(folder):
        files.setdefault(path.relative_to(folder).as_posix() if names.name == "file" else path.stem, []).append(path)
    chosen: dict[Path, Any] = {}
    for number, name in names.items():
        place = f"{table}: row {number}"
        if name not in files:
            word = _meant(name, folder, str(names.name))
            hint = f"; did you mean '{word}'?" if word in files else "; add the file or delete the row"
            raise DatasetError(f"{place}: no patch named '{name}' below {folder}{hint}")
        if len(files[name]) > 1:
            raise DatasetError(f"{place}: '{name}' is both {files[name][0]} and {files[name][1]}; delete one")
        if files[name][0] in chosen:
            raise DatasetError(f"{place}: '{name}' is also in row {chosen[files[name][0]]}; keep one")
        chosen[files[name][0]] = number
    return tuple(chosen)


def _meant(name: str, folder: Path, column: str) -> str:
    """A name without an ending (of the column `id`), with its folders as in `folder`, not as on Windows."""
    place = Path(os.path.relpath(folder / name.replace("\\", "/"), folder))
    return place.as_posix() if column == "file" else place.stem


class PatchDataset(Dataset[Sample]):
    """Patches as {"image": (3, height, width) uint8, "label": int64}.

    Args:
        table: the patches.
        side_px: side of the centred square that patches are cropped to; None leaves them whole.
        scale: patches are made larger by this whole number first (bilinear), or smaller where it is one over a whole
            number (0.5 halves them), each pixel the mean of a square of them; see `check_scale`.

    Raises (when an item is read):
        DatasetError: a patch cannot be decoded, or is smaller than `side_px`.
    """

    def __init__(self, table: PatchTable, side_px: int | None = None, scale: float = 1) -> None:
        self.table = table
        self.side_px, self.scale = side_px, scale
        self.labels = table.label
        self.groups = table.group

    def __len__(self) -> int:
        return len(self.table.paths)

    def __getitem__(self, item: int) -> Sample:
        path, pixels = self.table.paths[item], scaled(self.table.pixels(item), self.scale)
        if self.side_px is not None:
            height, width = pixels.shape[:2]
            if min(height, width) < self.side_px:
                told = f" (scale={self.scale:g})" if self.scale != 1 else ""
                raise DatasetError(
                    f"{path}: {width} x {height} px{told} is smaller than tile_px={self.side_px}; lower tile_px"
                )
            top, left = (height - self.side_px) // 2, (width - self.side_px) // 2
            pixels = pixels[top : top + self.side_px, left : left + self.side_px]
        return as_sample(pixels, self.labels[item])

    def place(self, item: int) -> str:
        """The file of an item."""
        return str(self.table.paths[item])

    def fingerprint(self) -> str:
        """A SHA-256 of which patches these are, whatever their labels."""
        told = f" {self.scale:g}" if self.scale != 1 else ""
        return hashlib.sha256(f"{self.side_px}{told} {self.table.files()}".encode()).hexdigest()


def check_scale(scale: float) -> None:
    """Raises ConfigError: a scale that is neither a whole number nor one over a whole number."""
    check_number("scale", scale, "(0, 16]")
    if not any(math.isclose(each, round(each)) for each in (scale, 1 / scale)):
        raise ConfigError(f"scale={scale}: must be a whole number, such as 2, or one over a whole number, such as 0.5")


def scaled(pixels: RGB, scale: float) -> RGB:
    """Pixels (height, width, 3) made larger or smaller, see `check_scale`."""
    image = Image.fromarray(pixels)
    if scale > 1:
        return np.array(image.resize([side * round(scale) for side in image.size], Image.Resampling.BILINEAR))
    return np.array(image.reduce(round(1 / scale))) if scale < 1 else pixels


def split_groups(
    table: PatchTable,
    shares: tuple[float, float],
    seed: int,
    stratified: bool = False,
    source: str = "labels.csv",
    classes: Sequence[str] = ("normal", "tumour"),
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
    """Training, validation and test rows; every group lies on one side.

    Groups are shuffled by the seed, then dealt to the validation and test sides until each holds its share of rows.

    Args:
        table: the patches.
        shares: shares of rows for validation and test.
        seed: shuffles the groups.
        stratified: deal the groups of each class in turn, the rarest class first; a side takes a group that brings it
            nearer to its share of the rows of that class.
        source: what messages say the groups are of, such as a folder and its column.
        classes: their names in the order of the labels.

    Raises:
        DatasetError: too few groups, of all or of a class, or a side that lacks a class.
    """
    groups, labels = np.unique(table.group), np.unique(table.label)
    if len(groups) < 3:
        raise DatasetError(f"{source}: {len(groups)} group(s); at least 3 are needed to split by group")
    for label in labels:
        held = len(np.unique(table.group[table.label == label]))
        if held < 3:
            raise DatasetError(
                f"{source}: class {classes[label]} is in {held} group(s); at least 3 are needed to split by group"
            )
    order = [str(groups[i]) for i in np.random.default_rng(seed).permutation(len(groups))]
    validation, test = (_stratified if stratified else _dealt)(table, order, shares)
    training = ~validation & ~test
    for side, word in ((training, "training"), (validation, "validation"), (test, "test")):
        lacking = [name for number, name in enumerate(classes) if number not in table.label[side]]
        if lacking:
            raise DatasetError(f"{source}: the {word} side lacks {', '.join(lacking)}; change the seed or the shares")
    return training, validation, test


Sides = list[npt.NDArray[np.bool_]]


def _dealt(table: PatchTable, order: list[str], shares: tuple[float, float]) -> Sides:
    sides = []
    for share in shares:
        side = np.zeros(len(table.group), bool)
        while side.mean() < share and len(order) > 1:
            side |= table.group == order.pop()
        sides.append(side)
    return sides


def _stratified(table: PatchTable, order: list[str], shares: tuple[float, float]) -> Sides:
    sides = [np.zeros(len(table.group), bool) for _ in shares]
    labels, counts = np.unique(table.label, return_counts=True)
    for label in labels[np.argsort(counts, kind="stable")]:
        rows = table.label == label
        left = [group for group in order if (rows & (table.group == group)).any()]
        order = [group for group in order if group not in left]
        for side, share in zip(sides, shares, strict=True):
            for group in list(left):
                larger = side | (table.group == group)
                if abs(larger[rows].mean() - share) < abs(side[rows].mean() - share):
                    side |= larger
                    left.remove(group)
    return sides
