"""CT volumes with labels of organs, slice by slice."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medsd.bundle.masks.base import SplitByPatient
from medsd.cohort.split import PARTS
from medsd.errors import ConfigError, DatasetError
from medsd.pretrain.volumes import SliceSettings
from medsd.progress import progress_bar
from medsd.segment.items import MaskedItems, deal_parts
from medsd.segment.masks import MaskCoding
from medsd.segment.volumes import MaskedSlices, find_volumes, from_square, prepare_labelled

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LabelledVolumes(SplitByPatient):
    """CT volumes with labels of organs (NIfTI), as slices; see `medsd.segment.volumes`. A volume is a patient.

    Attributes:
        dataset_dir: the folder, see `find_volumes`.
        work_dir: where slices are kept.
        slices: how a volume becomes images.
        classes: names of the organs that are asked for, the background's first.
        values: their numbers in the labels, the background's first; other organs become background. Messages call them
            `organs`, which is their key in `configs/btcv.json`.
        test_cases: the cases that are tested on, as numbers; the others are trained and validated on.
        label_fraction: of the training slices, whole volumes, those whose labels are learnt from.
        validation_share: of the volumes that are not tested on.
        seed: deals these volumes.

    Raises:
        ConfigError: `dataset_dir` is None, or a value out of its range.
    """

    item: ClassVar[str] = "slice"
    unit: ClassVar[str] = "volume"

    dataset_dir: str | None
    work_dir: str
    slices: SliceSettings
    classes: Sequence[str]
    values: Sequence[int]
    test_cases: Sequence[int]
    label_fraction: float = 1.0
    validation_share: float = 0.17
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dataset_dir is None:
            raise ConfigError(
                "dataset_dir: not set; name the folder of img*.nii.gz and label*.nii.gz, --dataset_dir FOLDER"
            )
        super().__post_init__()
        if not self.test_cases:
            raise ConfigError("test_cases: empty; name the numbers of the cases to test on")
        _ = self._coding

    @property
    def mpp(self) -> None:
        return None

    @property
    def side_px(self) -> int:
        return self.slices.side_px

    @property
    def length(self) -> str:
        return "mm"

    @property
    def description(self) -> str:
        return f"{len(self.part('training').files)} CT volumes of {Path(str(self.dataset_dir)).name}"

    def prepare(self) -> None:
        """Slices and labels of every volume."""
        for part in PARTS:
            items = self.part(part)
            logger.info("%s: %d slices of volumes %s", part, len(items), ", ".join(path.stem for path in items.files))
            for number in sorted(set(range(len(self.classes))) - items.seen()):
                logger.warning(
                    "%s: no voxel of its volumes is '%s', %d in the labels; check organs",
                    *(part, self.classes[number], self.values[number]),
                )

    def part(self, name: str) -> MaskedSlices:
        files = [path for path, kept in zip(self._files, self._rows(name), strict=True) if kept]
        return MaskedSlices(files, foreground_only=name == "training")

    def spacing(self, items: MaskedItems, item: int) -> tuple[float, ...] | None:
        assert isinstance(items, MaskedSlices)
        return items.spacing(item)

    def judged(self, items: MaskedItems, item: int, found: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(items, MaskedSlices)
        mask = torch.from_numpy(items.label(item))
        return from_square(found, *mask.shape), mask

    @cached_property
    def _coding(self) -> MaskCoding:
        return MaskCoding(tuple(self.classes), values=tuple(self.values), key="organs")

    @cached_property
    def _files(self) -> list[Path]:
        volumes = find_volumes(str(self.dataset_dir))
        self._tested([each.name for each in volumes])  # before minutes are spent on them
        return prepare_labelled(volumes, self.work_dir, self.slices, self._coding, progress_bar("slices"))

    @cached_property
    def _patients(self) -> npt.NDArray[np.str_]:
        return np.array([path.stem for path in self._files])

    @cached_property
    def _dealt(self) -> npt.NDArray[np.str_]:
        given = np.where(self._tested(self._patients.tolist()), "testing", "")
        source = f"{self.dataset_dir}: test_cases"
        return deal_parts(self._patients, given, (self.validation_share, 0.5), self.seed, source=source)

    def _tested(self, names: Sequence[str]) -> list[bool]:
        """Whether each case, by its name, is tested on; raises DatasetError: a test case that is not there."""
        numbers = [int("".join(filter(str.isdigit, name)) or -1) for name in names]
        missing = [case for case in self.test_cases if case not in numbers]
        if missing:
            known = sorted(number for number in numbers if number >= 0)
            raise DatasetError(f"{self.dataset_dir}: no case {missing[0]} of test_cases; it has {known}")
        return [number in self.test_cases for number in numbers]
