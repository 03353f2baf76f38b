"""Axial slices of CT volumes (NIfTI) as grey images for pre-training; Med-MoCo's own setting is AbdomenCT-1K."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch.utils.data import Dataset

from medsd.checks import check_number
from medsd.cohort.dataset import Sample, as_sample
from medsd.errors import ConfigError, DatasetError
from medsd.files import atomic_path, printable, sha256_of
from medsd.progress import Progress, no_progress
from medsd.record import identity, read_record, write_record
from medsd.slides.readers.damage import DAMAGED

logger = logging.getLogger(__name__)

SUFFIXES = (".nii", ".nii.gz", ".npy")
"""NIfTI, and bare arrays (x, y, z) of Hounsfield units that lie left, posterior, superior."""


@dataclass(frozen=True)
class SliceSettings:
    """How a volume becomes images.

    Attributes:
        window: Hounsfield units that become 0 and 255; what lies beyond is clipped. (-125, 275) shows the abdomen's
            soft tissue (TransUNet, arXiv 2102.04306).
        every: takes the first axial slice and then each `every`-th: neighbours are near-duplicates.
        side_px: slices of another size are padded to squares with the window's lower end and resampled to this side.

    Raises:
        ConfigError: a value is out of its range.
    """

    window: tuple[float, float] = (-125.0, 275.0)
    every: int = 3
    side_px: int = 512

    def __post_init__(self) -> None:
        ends = self.window if isinstance(self.window, list | tuple) else ()
        if len(ends) != 2 or not all(isinstance(end, int | float) for end in ends) or not ends[0] < ends[1]:
            raise ConfigError(f"window={self.window}: give two Hounsfield units, the lower first, such as -125, 275")
        check_number("every", self.every, "[1, inf)", whole=True)
        check_number("side_px", self.side_px, "[8, inf)", whole=True)


def slices_of(path: str | Path, settings: SliceSettings) -> npt.NDArray[np.uint8]:
    """Axial slices (n, side_px, side_px) of a volume as seen from below: left of the patient to the right, back down.

    Slices of one colour in the window, such as air above the patient, are left out.

    Raises:
        DatasetError: the file cannot be read, is no volume, or holds nothing in the window.
        ConfigError: nibabel is not installed.
    """
    grey = _windowed(read_volume(Path(path))[0], settings)
    grey = grey[(grey != grey[:, :1, :1]).any(axis=(1, 2))]
    if not len(grey):
        low, high = settings.window
        raise DatasetError(f"{path}: no slice has anything between {low:g} and {high:g} HU; is it CT?")
    return _squares(grey, settings.side_px)


def grey_slices(volume: npt.NDArray[np.floating], settings: SliceSettings) -> npt.NDArray[np.uint8]:
    """Slices (n, side_px, side_px) of a volume (x, y, z) as `slices_of` gives them, those of one colour too."""
    return _squares(_windowed(volume, settings), settings.side_px)


def _windowed(volume: npt.NDArray[np.floating], settings: SliceSettings) -> npt.NDArray[np.uint8]:
    low, high = settings.window
    chosen = volume[:, :, :: settings.every].transpose(2, 1, 0).astype(np.float32)
    grey: npt.NDArray[np.uint8] = ((chosen - low) / (high - low) * 255).round().clip(0, 255).astype(np.uint8)
    return grey


def read_volume(path: Path) -> tuple[npt.NDArray[np.floating], npt.NDArray[np.float64]]:
    """Values (x, y, z) that run left, posterior, superior, and the affine (4, 4) from voxels to mm (1 of bare arrays).

    Raises:
        DatasetError: the file cannot be read, or is no volume of finite numbers.
        ConfigError: nibabel is not installed.
    """
    from monai.transforms import LoadImage, Orientation

    bare = path.suffix == ".npy"
    if not bare and find_spec("nibabel") is None:
        raise ConfigError(f"{path}: reading NIfTI needs nibabel; install medsd with the extra 'ct'")
    reader = "NumpyReader" if bare else "NibabelReader"
    try:
        image = LoadImage(reader, image_only=True, ensure_channel_first=True)(path)
        array: Any = image if bare else Orientation(axcodes="LPS")(image)
        affine = np.eye(4) if bare else np.asarray(array.affine, np.float64)
    except DAMAGED as error:
        reason = printable(str(error).strip().partition("\n")[0])[:200]  # MONAI goes on about libraries to install
        raise DatasetError(f"{path}: cannot be read as a volume ({reason}); copy it again") from error
    values: npt.NDArray[np.floating] = np.asarray(array[0])
    if len(array) > 1:
        raise DatasetError(f"{path}: {len(array)} volumes in one file (times or channels); give a CT volume")
    if values.ndim != 3 or not np.isfinite(values).all():
        raise DatasetError(f"{path}: shape {values.shape}, all finite: {np.isfinite(values).all()}; give a CT volume")
    return values, affine


def _squares(slices: npt.NDArray[np.uint8], side_px: int) -> npt.NDArray[np.uint8]:
    height, width = slices.shape[1:]
    if (height, width) == (side_px, side_px):
        return slices
    side = max(height, width)
    top, left = (side - height) // 2, (side - width) // 2
    padded = np.zeros((len(slices), side, side), np.uint8)
    padded[:, top : top + height, left : left + width] = slices
    resampled = F.interpolate(torch.from_numpy(padded)[:, None], (side_px, side_px), mode="bilinear", antialias=True)
    return resampled[:, 0].numpy()


def prepare_volumes(
    paths: Sequence[str | Path],
    folder: str | Path,
    settings: SliceSettings,
    progress: Progress = no_progress,
) -> list[Path]:
    """Write the slices of each volume to `folder/<name>.npy`, beside a record; volumes that are done are kept.

    Returns:
        The files, in the order of the volumes; a volume that cannot be read is left out, with a warning that says why.

    Raises:
        DatasetError: two volumes of one name (nothing is written then), or none can be read.
        OutputError: a file cannot be written.
    """
    volumes: dict[str, Path] = {}
    for path in map(Path, paths):
        stem = path.name.removesuffix(".gz").rpartition(".")[0]
        if stem in volumes:
            raise DatasetError(f"{path}: {volumes[stem]} has the name {stem}, too; rename one, or move it elsewhere")
        volumes[stem] = path
    made: list[Path] = []
    for stem, path in progress(list(volumes.items()), len(volumes), "volume"):
        target = Path(folder) / f"{stem}.npy"
        try:
            recipe: dict[str, Any] = {"volume": identity(path), "slices": asdict(settings)}
            if read_record(target.with_suffix(".json"), recipe) is None:
                slices = slices_of(path, settings)
                with atomic_path(target) as temporary:
                    np.save(temporary, slices)
                write_record(target.with_suffix(".json"), recipe, [target.name], slices=len(slices))
        except (DatasetError, OSError) as error:
            logger.warning("%s; left out", error)
        else:
            made.append(target)
    if not made:
        raise DatasetError(f"{folder}: no volume could be read; look at the warnings")
    return made


class SliceDataset(Dataset[Sample]):
    """Slices that `prepare_volumes` wrote, as {"image": (3, side_px, side_px) uint8, "label": -1}; a volume is a group.

    Args:
        files: the volumes' slices.

    Raises:
        DatasetError: a file is not there or damaged.
    """

    def __init__(self, files: Sequence[str | Path]) -> None:
        self.files = tuple(map(Path, files))
        counts = [len(load_slices(path)) for path in self.files]
        self._volume = np.repeat(np.arange(len(counts)), counts)
        self._slice = np.concatenate([np.arange(count) for count in counts])
        self.groups: npt.NDArray[np.str_] = np.array([path.stem for path in self.files])[self._volume]

    def __len__(self) -> int:
        return len(self._volume)

    def __getitem__(self, item: int) -> Sample:
        grey = load_slices(self.files[self._volume[item]])[self._slice[item]]
        return as_sample(np.repeat(grey[..., None], 3, axis=2), np.int64(-1))

    def place(self, item: int) -> str:
        """The file of an item, and where in it."""
        return f"{self.files[self._volume[item]]}: slice {self._slice[item]}"

    def fingerprint(self) -> str:
        """A SHA-256 of the volumes' names and slices: copies of the same volumes are the same."""
        digest = hashlib.sha256()
        for path in self.files:
            digest.update(f"{path.stem} {sha256_of(path)}".encode())
        return digest.hexdigest()


def load_slices(path: Path) -> npt.NDArray[np.uint8]:
    """Slices (n, height, width) from their file, which stays on disk.

    Raises:
        DatasetError: it is not there or damaged.
    """
    try:
        slices: npt.NDArray[np.uint8] = np.load(path, mmap_mode="r")
    except (OSError, ValueError, EOFError) as error:
        raise DatasetError(f"{path}: not there or damaged ({error}); run the stage 'prepare' again") from error
    return slices
