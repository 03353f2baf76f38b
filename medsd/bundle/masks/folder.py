"""Images and masks in a folder, listed by a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from medsd.bundle.masks.base import SplitByPatient
from medsd.checks import check_number
from medsd.cohort.learnt import Sources, group_sources
from medsd.cohort.split import PARTS
from medsd.errors import ConfigError
from medsd.progress import progress_bar
from medsd.segment.folder import TABLE, MaskedImages, MaskTable, check_masks, read_mask_table
from medsd.segment.items import MaskedItems, deal_parts
from medsd.segment.masks import Kind, MaskCoding
from medsd.slides.mpp import check_mpp


@dataclass(frozen=True)
class MaskFolder(SplitByPatient):
    """Images and masks that a table lists, see `read_mask_table`, split by patient.

    Attributes:
        dataset_dir: the folder.
        classes: names, the background's first.
        side_px: side of the square around the centre that images are cropped to.
        group_column: of patients, slides or organs: what must not be split.
        labels: rows of these labels alone; empty for all.
        mask_kind, mask_values: what the masks' values mean, see `MaskCoding`.
        mpp: micrometres per pixel; None where it is not known: distances are then in pixels.
        label_fraction: of the training images, whole patients, those whose masks are learnt from.
        validation_share, test_share: of the images that are not tested on, and of all, whole patients, where the table
            has no column `part`.
        seed: deals the patients.

    Raises:
        ConfigError: `dataset_dir` is None, or a value out of its range.
    """

    item: ClassVar[str] = "image"
    unit: ClassVar[str] = "image"

    dataset_dir: str | None
    classes: Sequence[str]
    side_px: int
    group_column: str = "patient"
    labels: Sequence[str] = ()
    mask_kind: Kind = "semantic"
    mask_values: Sequence[int] | None = None
    mpp: float | None = None
    label_fraction: float = 1.0
    validation_share: float = 0.15
    test_share: float = 0.3
    seed: int = 0

    def __post_init__(self) -> None:
        if self.dataset_dir is None:
            raise ConfigError("dataset_dir: not set; name the folder with index.csv, --dataset_dir FOLDER")
        super().__post_init__()
        check_number("test_share", self.test_share, "(0, 1)")
        check_number("side_px", self.side_px, "[32, inf)", whole=True)
        if self.mpp is not None:
            check_mpp("mpp", self.mpp)
        _ = self._coding

    @property
    def length(self) -> str:
        return "px" if self.mpp is None else "um"

    @property
    def description(self) -> str:
        rows = self.part("training").table
        return f"{len(rows)} masks of {Path(str(self.dataset_dir)).name}, {len(np.unique(rows.patient))} patients"

    def prepare(self) -> None:
        """Read every image and mask once; see `check_masks`."""
        for part in PARTS:
            check_masks(self.part(part), part, progress_bar("masks"))

    def part(self, name: str) -> MaskedImages:
        return MaskedImages(self._table.rows(self._rows(name)), self._coding, self.side_px)

    def sources(self, part: str) -> Sources:
        folder = Path(str(self.dataset_dir)).name
        return group_sources(self.group_column, self._patients[self._rows(part)].tolist(), folder)

    def spacing(self, items: MaskedItems, item: int) -> tuple[float, ...] | None:
        return (self.mpp or 1.0,) * 2

    @property
    def _patients(self) -> npt.NDArray[np.str_]:
        return self._table.patient

    @cached_property
    def _coding(self) -> MaskCoding:
        return MaskCoding(tuple(self.classes), self.mask_kind, self.mask_values)

    @cached_property
    def _table(self) -> MaskTable:
        return read_mask_table(str(self.dataset_dir), self.group_column, self.labels)

    @cached_property
    def _dealt(self) -> npt.NDArray[np.str_]:
        shares = self.validation_share, self.test_share
        source = f"{Path(str(self.dataset_dir)) / TABLE}: column 'part'"
        return deal_parts(self._patients, self._table.part, shares, self.seed, source=source)
