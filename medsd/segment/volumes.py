"""Axial slices of CT volumes with labels of organs (NIfTI), scored as the volumes that they are of."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from medsd.checks import check_number
from medsd.errors import DatasetError
from medsd.files import atomic_path, sha256_of
from medsd.pretrain.volumes import SUFFIXES, SliceSettings, grey_slices, load_slices, read_volume
from medsd.progress import Progress, no_progress
from medsd.record import identity, read_record, write_record
from medsd.segment.items import MaskedSample, Numbers, as_masked_sample
from medsd.segment.masks import MaskCoding

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledVolume:
    """A CT volume and the labels of its voxels, both NIfTI, or bare arrays (`.npy`) as in `medsd.pretrain.volumes`."""

    name: str
    volume: Path
    labels: Path


def find_volumes(folder: str | Path, images: str = "img", labels: str = "label") -> list[LabelledVolume]:
    """The pairs below a folder, `img0001.nii.gz` and `label0001.nii.gz` as in BTCV, in the order of their names.

    Args:
        folder: searched with all that is below it.
        images, labels: what the files' names begin with; what follows is the case.

    Raises:
        DatasetError: no such folder, no volume, a volume without labels or labels without a volume, or two of a name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(
            f"{folder}: no such folder; set dataset_dir to one with {images}*.nii.gz and {labels}*.nii.gz"
        )
    found: dict[str, dict[str, Path]] = {images: {}, labels: {}}
    for path in sorted(folder.rglob("*")):
        for word, files in found.items():
            if path.name.endswith(SUFFIXES) and path.name.startswith(word):
                case = path.name.partition(".")[0].removeprefix(word)
                if case in files:
                    raise DatasetError(f"{path}: a second file of case '{case}', beside {files[case]}; keep one")
                files[case] = path
    for word, other in ((images, labels), (labels, images)):
        alone = sorted(found[word].keys() - found[other].keys())
        if alone:
            raise DatasetError(
                f"{found[word][alone[0]]}: no {other}{alone[0]}.nii.gz below {folder}; add it, or move this away"
            )
    if not found[images]:
        raise DatasetError(f"{folder}: no volumes named {images}*.nii.gz; check dataset_dir")
    return [LabelledVolume(case, path, found[labels][case]) for case, path in found[images].items()]


def prepare_labelled(
    volumes: Sequence[LabelledVolume],
    folder: str | Path,
    settings: SliceSettings,
    coding: MaskCoding,
    progress: Progress = no_progress,
) -> list[Path]:
    """Write each volume's slices and class numbers, once; volumes whose record says so are done.

    All slices are kept, air too, in their order: a volume is scored whole. Labels keep their size.

    Args:
        volumes: the pairs.
        folder: gets `<case>.npy` (n, side_px, side_px) uint8, `<case>_labels.npy` (n, height, width) uint8 and
            `<case>.json`.
        settings: window and side; with `every` above 1 the slices between are left out of images and labels alike.
        coding: what the labels' values mean; values that it does not name are the background.
        progress: shows the volumes.

    Returns:
        The slices' files, in the order of the volumes.

    Raises:
        DatasetError: a volume or its labels cannot be read, or differ in shape or place: nothing is left out.
    """
    made = []
    for each in progress(list(volumes), len(volumes), "volume"):
        target = Path(folder) / f"{each.name}.npy"
        recipe: dict[str, Any] = {
            "volume": identity(each.volume),
            "labels": identity(each.labels),
            "slices": asdict(settings),
            "coding": asdict(coding),
        }
        if read_record(target.with_suffix(".json"), recipe) is None:
            values, affine = read_volume(each.volume)
            labels, affine_of_labels = read_volume(each.labels)
            if values.shape != labels.shape:
                raise DatasetError(
                    f"{each.labels}: labels {labels.shape} of a volume {values.shape} ({each.volume.name}); give those "
                    "of this volume"
                )
            spacing = np.linalg.norm(affine[:3, :3], axis=0)
            # As far as a corner may lie from that of the volume; bare arrays say nothing of their place.
            apart = np.abs(affine - affine_of_labels)[:3] @ (*values.shape, 1)
            if ".npy" not in (each.volume.suffix, each.labels.suffix) and apart.max() > spacing.min() / 2:
                raise DatasetError(
                    f"{each.labels}: these labels lie elsewhere than their volume ({each.volume.name}), by up to "
                    f"{apart.max():.2g} mm; save them with its affine"
                )
            numbers = _numbers(labels, coding, each.labels)[:, :, :: settings.every].transpose(2, 1, 0)
            outputs = {target: grey_slices(values, settings), _labels_of(target): np.ascontiguousarray(numbers)}
            for path, array in outputs.items():
                with atomic_path(path) as temporary:
                    np.save(temporary, array)
            write_record(
                target.with_suffix(".json"),
                recipe,
                [path.name for path in outputs],
                spacing_mm=(spacing * (1, 1, settings.every))[::-1].tolist(),
            )
        made.append(target)
    return made


def _numbers(labels: npt.NDArray[np.floating], coding: MaskCoding, path: Path) -> Numbers:
    """Class numbers of voxels; organs that are not asked for are background."""
    if not np.isfinite(labels).all() or (labels != np.rint(labels)).any() or labels.min() < 0:
        raise DatasetError(f"{path}: values that are no numbers of organs; give the labels, not the volume")
    numbers = np.zeros(labels.shape, np.uint8)
    for number, value in enumerate(coding.values or range(len(coding.classes))):
        numbers[labels == value] = number
    return numbers


class MaskedSlices(Dataset[MaskedSample]):
    """Slices that `prepare_labelled` wrote, as {"image": (3, S, S) uint8, "label": (1, S, S) uint8}; S is `side_px`.

    A volume is a group, a unit and a patient.

    Args:
        files: the volumes' slices.
        foreground_only: leave out slices without anything but background, which a training does.

    Raises:
        DatasetError: a file is not there or damaged, or no slice is left.
    """

    def __init__(self, files: Sequence[str | Path], foreground_only: bool = False) -> None:
        self.files = tuple(map(Path, files))
        numbers = []
        for path in self.files:
            labels = load_slices(_labels_of(path))
            chosen = labels.any(axis=(1, 2)) if foreground_only else np.ones(len(labels), bool)
            numbers.append(np.flatnonzero(chosen))
        self._volume = np.repeat(np.arange(len(numbers)), [len(each) for each in numbers])
        self._slice = np.concatenate(numbers)
        if not len(self._slice):
            raise DatasetError(f"{self.files[0]}: no slice of {len(self.files)} volumes has an organ; check organs")
        names: npt.NDArray[np.str_] = np.array([path.stem for path in self.files])
        self.groups = self.units = self.patients = names[self._volume]

    def __len__(self) -> int:
        return len(self._volume)

    def __getitem__(self, item: int) -> MaskedSample:
        grey = self._of(item, load_slices)
        mask = to_square(torch.from_numpy(self.label(item)), grey.shape[0])
        return as_masked_sample(np.repeat(grey[..., None], 3, axis=2), mask.numpy())

    def seen(self) -> set[int]:
        """The class numbers that its volumes hold."""
        layers = (layer for path in self.files for layer in load_slices(_labels_of(path)))
        return {int(number) for layer in layers for number in np.flatnonzero(np.bincount(layer.ravel()))}

    def label(self, item: int) -> Numbers:
        """Class numbers (height, width) of a slice, at the volume's own size."""
        labels: Numbers = np.array(load_slices(_labels_of(self.files[self._volume[item]]))[self._slice[item]])
        return labels

    def spacing(self, item: int) -> tuple[float, ...]:
        """Millimetres between voxels of an item's volume, along z, y and x."""
        record = read_record(self.files[self._volume[item]].with_suffix(".json"))
        if record is None:
            raise DatasetError(f"{self.files[self._volume[item]]}: not whole; run the stage 'prepare' again")
        return tuple(float(step) for step in record["spacing_mm"])

    def place(self, item: int) -> str:
        """The file of an item, and where in it."""
        return f"{self.files[self._volume[item]]}: slice {self._slice[item]}"

    def fingerprint(self) -> str:
        """A SHA-256 of which slices of which volumes these are, and of what they and their labels hold."""
        digest = hashlib.sha256(self._slice.tobytes())
        for path in self.files:
            digest.update(f"{path.stem} {sha256_of(path)} {sha256_of(_labels_of(path))}".encode())
        return digest.hexdigest()

    def _of(self, item: int, load: Any) -> npt.NDArray[np.uint8]:
        grey: npt.NDArray[np.uint8] = np.array(load(self.files[self._volume[item]])[self._slice[item]])
        return grey


def to_square(numbers: Tensor, side_px: int) -> Tensor:
    """Class numbers (height, width) as images go: padded to a square by background, then brought to `side_px`."""
    height, width = numbers.shape
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    padded = F.pad(numbers, (left, side - width - left, top, side - height - top))
    return _nearest(padded, side_px)


def from_square(numbers: Tensor, height: int, width: int) -> Tensor:
    """The way back: class numbers (S, S) at the volume's own size (height, width), by nearest neighbour."""
    check_number("height", min(height, width), "[1, inf)", whole=True)
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    return _nearest(numbers, side)[top : top + height, left : left + width]


def _nearest(numbers: Tensor, side_px: int) -> Tensor:
    found = F.interpolate(numbers[None, None].float(), (side_px, side_px), mode="nearest-exact")
    return found[0, 0].to(torch.uint8)


def _labels_of(path: Path) -> Path:
    return path.with_name(f"{path.stem}_labels.npy")
