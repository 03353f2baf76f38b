"""What the stages of a segmentation ask of a data set, and what is alike in all that are split by patient."""

from __future__ import annotations

import hashlib
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from medsd.checks import check_number
from medsd.classes import checked_classes
from medsd.cohort.learnt import Sources, group_sources
from medsd.cohort.split import PARTS
from medsd.segment.items import MaskedItems, fraction_of

logger = logging.getLogger(__name__)


class MaskData(Protocol):
    """What the stages of a segmentation ask of a data set."""

    @property
    def classes(self) -> Sequence[str]:
        """Their names, the background's first."""
        ...

    @property
    def item(self) -> str:
        """A word for an image."""
        ...

    @property
    def unit(self) -> str:
        """A word for what images are scored together as."""
        ...

    @property
    def mpp(self) -> float | None:
        """Micrometres per pixel; None where it is not known."""
        ...

    @property
    def side_px(self) -> int:
        """Side of the images."""
        ...

    @property
    def length(self) -> str:
        """What distances are measured in."""
        ...

    @property
    def description(self) -> str:
        """The data in words."""
        ...

    def prepare(self) -> None:
        """Read everything once, and make what is to be read later."""
        ...

    def part(self, name: str) -> MaskedItems:
        """The items of the part "training" (those that are learnt from), "validation" or "testing"."""
        ...

    def fingerprint(self) -> str:
        """A SHA-256 of which items with which masks play which part."""
        ...

    def sources(self, part: str) -> Sources:
        """The slides, patients or volumes of a part, see `medsd.cohort.learnt`."""
        ...

    def spacing(self, items: MaskedItems, item: int) -> tuple[float, ...] | None:
        """Between pixels of an item's unit along its axes, in `length`s; None where the unit is seen in parts."""
        ...

    def judged(self, items: MaskedItems, item: int, found: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction (S, S) of an item, and its mask, as they are compared."""
        ...


class FingerprintedItems(MaskedItems, Protocol):
    """Items that know which images with which masks they are."""

    def fingerprint(self) -> str:
        """A SHA-256 of them."""
        ...


class SplitByPatient(ABC):
    """Masks whose patients are dealt to the parts; of those for training, a fraction is learnt from.

    A kind of data is a frozen dataclass with these fields, which says whose each item is and which part it is in.
    """

    classes: Sequence[str]
    label_fraction: float
    validation_share: float
    seed: int

    def __post_init__(self) -> None:
        checked_classes(self.classes)
        check_number("label_fraction", self.label_fraction, "(0, 1]", hint="1 takes all training masks")
        check_number("validation_share", self.validation_share, "(0, 1)")

    @abstractmethod
    def part(self, name: str) -> FingerprintedItems:
        """See `MaskData`."""

    @property
    @abstractmethod
    def _patients(self) -> npt.NDArray[np.str_]:
        """(n,) whose each item is."""

    @property
    @abstractmethod
    def _dealt(self) -> npt.NDArray[np.str_]:
        """(n,) the part of each item."""

    @property
    def _strata(self) -> npt.NDArray[np.str_] | None:
        """(n,) what each part, and a fraction of the training part, has its share of; None for nothing."""
        return None

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for part in PARTS:
            digest.update(f"{part} {self.part(part).fingerprint()}".encode())
        return digest.hexdigest()

    def sources(self, part: str) -> Sources:
        return group_sources("patient", self._patients[self._rows(part)].tolist(), "")

    def spacing(self, items: MaskedItems, item: int) -> tuple[float, ...] | None:
        return None

    def judged(self, items: MaskedItems, item: int, found: Tensor) -> tuple[Tensor, Tensor]:
        return found, items[item]["label"][0]

    def _rows(self, part: str) -> npt.NDArray[np.bool_]:
        """(n,) the items of a part; of the training part those whose masks are learnt from."""
        if part == "training":
            return self._learnt_from
        rows: npt.NDArray[np.bool_] = self._dealt == part
        return rows

    @cached_property
    def _learnt_from(self) -> npt.NDArray[np.bool_]:
        """Said where they are not all."""
        patients = self._patients
        rows: npt.NDArray[np.bool_] = self._dealt == "training"
        chosen = rows.copy()
        strata = None if self._strata is None else self._strata[rows]
        chosen[rows] = fraction_of(patients[rows], self.label_fraction, self.seed, strata)
        if self.label_fraction < 1:
            counts = chosen.sum(), rows.sum(), len(np.unique(patients[chosen])), len(np.unique(patients[rows]))
            logger.info(
                "label_fraction=%g: %d of %d training items, of %d of %d patients", self.label_fraction, *counts
            )
        return chosen
