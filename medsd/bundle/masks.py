"""The three kinds of data that `bundles/segmentation.json` trains on: slides with outlines, folders, CT volumes."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medsd.bundle.data import Phantoms
from medsd.checks import check_number
from medsd.classes import checked_classes
from medsd.cohort.camelyon import find_slides
from medsd.cohort.entry import SlideEntry
from medsd.cohort.index import TileGrid, TileIndex
from medsd.cohort.manifest import read_manifest
from medsd.cohort.tiling import Tiling, prepared_tiles, tile_slides
from medsd.errors import ConfigError, DatasetError
from medsd.pretrain.volumes import SliceSettings
from medsd.progress import progress_bar
from medsd.segment.folder import MaskedImages, MaskTable, check_masks, read_mask_table
from medsd.segment.items import PARTS, MaskedItems, deal_parts, fraction_of
from medsd.segment.masks import Kind, MaskCoding
from medsd.segment.tiles import MaskedTiles, OutlinedClasses, outlined_classes
from medsd.segment.volumes import MaskedSlices, find_volumes, from_square, prepare_labelled

logger = logging.getLogger(__name__)


class MaskData(Protocol):
    """What the stages of a segmentation ask of a data set."""

    classes: Sequence[str]

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

    def spacing(self, items: MaskedItems, item: int) -> tuple[float, ...] | None:
        """Between pixels of an item's unit along its axes, in `length`s; None where the unit is seen in parts."""
        ...

    def judged(self, items: MaskedItems, item: int, found: Tensor) -> tuple[Tensor, Tensor]:
        """Prediction (S, S) of an item, and its mask, as they are compared."""
        ...


def _as_they_are(items: MaskedItems, item: int, found: Tensor) -> tuple[Tensor, Tensor]:
    return found, items[item]["label"][0]


def _fingerprint(data: MaskFolder | OutlinedSlides | LabelledVolumes) -> str:
    digest = hashlib.sha256()
    for part in PARTS:
        digest.update(f"{part} {data.part(part).fingerprint()}".encode())
    return digest.hexdigest()


def _check_shares(data: MaskFolder | OutlinedSlides | LabelledVolumes) -> None:
    checked_classes(data.classes)
    check_number("label_fraction", data.label_fraction, "(0, 1]", hint="1 takes all training masks")
    check_number("validation_share", data.validation_share, "(0, 1)")


def _learnt_from(
    rows: npt.NDArray[np.bool_], patients: npt.NDArray[np.str_], fraction: float, seed: int
) -> npt.NDArray[np.bool_]:
    """Of training rows those whose masks are learnt from; said where they are not all."""
    chosen = rows.copy()
    chosen[rows] = fraction_of(patients[rows], fraction, seed)
    if fraction < 1:
        counts = chosen.sum(), rows.sum(), len(np.unique(patients[chosen])), len(np.unique(patients[rows]))
        logger.info("label_fraction=%g: %d of %d training items, of %d of %d patients", fraction, *counts)
    return chosen


@dataclass(frozen=True)
class MaskFolder:
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
        validation_share, test_share: of the images, where the table has no column `part`.
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
        _check_shares(self)
        check_number("test_share", self.test_share, "(0, 1)")
        check_number("side_px", self.side_px, "[32, inf)", whole=True)
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

    def fingerprint(self) -> str:
        return _fingerprint(self)

    def spacing(self, items: MaskedItems, item: int) -> tuple[float, ...] | None:
        return (self.mpp or 1.0,) * 2

    def judged(self, items: MaskedItems, item: int, found: Tensor) -> tuple[Tensor, Tensor]:
        return _as_they_are(items, item, found)

    def _rows(self, part: str) -> npt.NDArray[np.bool_]:
        rows: npt.NDArray[np.bool_] = self._dealt == part
        return self._taken if part == "training" else rows

    @cached_property
    def _coding(self) -> MaskCoding:
        return MaskCoding(tuple(self.classes), self.mask_kind, self.mask_values)

    @cached_property
    def _table(self) -> MaskTable:
        return read_mask_table(str(self.dataset_dir), self.group_column, self.labels)

    @cached_property
    def _dealt(self) -> npt.NDArray[np.str_]:
        shares = self.validation_share, self.test_share
        return deal_parts(self._table.patient, self._table.part, shares, self.seed)

    @cached_property
    def _taken(self) -> npt.NDArray[np.bool_]:
        return _learnt_from(self._dealt == "training", self._table.patient, self.label_fraction, self.seed)


@dataclass(frozen=True)
class OutlinedSlides:
    """Whole slides whose outlines become masks as tiles are read, several classes by name; see `outlined_classes`.

    A slide without outlines is background if it is labelled normal; otherwise nobody knows, and it is left out with a
    warning, as is one whose outlines are not exhaustive.

    Attributes:
        dataset_dir: a manifest or a folder with one (`slides.csv`), a CAMELYON16-like folder, or None for phantoms.
        phantoms: the phantom slides.
        work_dir: where tile index and thumbnails are kept.
        grid: how tiles are cut.
        classes: names, the background's first: ASAP's groups, QuPath's classes.
        label_fraction: of the training tiles, whole patients, those whose masks are learnt from.
        validation_share, test_share: of the patients (or slides), where the data set does not say.
        seed: deals the patients.
        cache: keep decoded tiles in memory.

    Raises:
        ConfigError: a value out of its range.
    """

    item: ClassVar[str] = "tile"
    unit: ClassVar[str] = "slide"

    dataset_dir: str | None
    phantoms: Phantoms
    work_dir: str
    grid: TileGrid
    classes: Sequence[str] = ("background", "tumour")
    label_fraction: float = 1.0
    validation_share: float = 0.3
    test_share: float = 0.25
    seed: int = 0
    cache: bool = False

    def __post_init__(self) -> None:
        _check_shares(self)
        check_number("test_share", self.test_share, "(0, 1)")

    @property
    def mpp(self) -> float:
        return self.grid.mpp

    @property
    def side_px(self) -> int:
        return self.grid.tile_px

    @property
    def length(self) -> str:
        return "um"

    @property
    def description(self) -> str:
        slides = len(set(self.part("training").units.tolist()))
        if self.dataset_dir is None:
            return f"{slides} phantom slides (drawn, not tissue)"
        return f"outlines of {slides} slides of {Path(self.dataset_dir).name}"

    def prepare(self) -> None:
        """Phantoms if no folder is given; tissue and tiles of every slide; outlines read."""
        if self.dataset_dir is None:
            self.phantoms.write()
        tiled = tile_slides(self._slides, self.work_dir, Tiling(self.grid), progress=progress_bar("prepare"))
        failed = [row for row in tiled.slides if row.status == "failed"]
        if failed:
            logger.warning(
                "%d of %d slides failed and play no part: %s",
                *(len(failed), len(tiled.slides), ", ".join(row.slide for row in failed)),
            )
        for part in PARTS:
            items = self.part(part)
            outlined = (items.shares > 0).sum()
            logger.info(
                "%s: %d tiles of %d slides, %d with anything outlined, %.1f %% of their area",
                *(part, len(items), len(set(items.units.tolist())), outlined, 100 * items.shares.mean()),
            )
            if not outlined:
                raise DatasetError(f"{part}: nothing is outlined on any tile; check annotations, classes and mpp")

    def part(self, name: str) -> MaskedTiles:
        chosen = self._taken if name == "training" else self._dealt == name
        patients = {slide.name: slide.patient for slide in self._slides}
        return MaskedTiles(self._index.rows(chosen), self._outlines, patients, self.cache)

    def fingerprint(self) -> str:
        return _fingerprint(self)

    def spacing(self, items: MaskedItems, item: int) -> tuple[float, ...] | None:
        return None

    def judged(self, items: MaskedItems, item: int, found: Tensor) -> tuple[Tensor, Tensor]:
        return _as_they_are(items, item, found)

    @cached_property
    def _all(self) -> list[SlideEntry]:
        place = Path(self.dataset_dir or self.phantoms.folder)
        table = place / "slides.csv" if place.is_dir() else place
        if table.suffix.lower() == ".csv" and table.is_file():
            return read_manifest(table, classes=tuple(self.classes))
        return find_slides(place)

    @cached_property
    def _known(self) -> list[SlideEntry]:
        known = [slide for slide in self._all if (slide.annotation and slide.exhaustive) or slide.label == 0]
        unknown = [slide for slide in self._all if slide not in known]
        if unknown:
            logger.warning(
                "%d of %d slides are left out: outside their outlines, if any, background is not known, the first: %s",
                *(len(unknown), len(self._all), unknown[0].path),
            )
        if not known:
            raise DatasetError(f"{self.dataset_dir}: no slide has outlines; name them in the manifest's 'annotation'")
        return known

    @cached_property
    def _slides(self) -> list[SlideEntry]:
        # Tiling would read the outlines as tumour alone.
        return [replace(slide, annotation=None, label=None) for slide in self._known]

    @cached_property
    def _outlines(self) -> dict[str, OutlinedClasses]:
        return {slide.name: outlined_classes(slide, tuple(self.classes)) for slide in self._known}

    @cached_property
    def _index(self) -> TileIndex:
        return prepared_tiles(self._slides, self.work_dir, Tiling(self.grid), str(self.dataset_dir or self.work_dir))

    @cached_property
    def _of_tile(self) -> npt.NDArray[np.str_]:
        """The patient of each tile, or its slide where nobody says."""
        patient = {slide.name: slide.patient or slide.name for slide in self._known}
        return np.array([patient[name] for name in self._index.names], str)[self._index.slide]

    @cached_property
    def _dealt(self) -> npt.NDArray[np.str_]:
        names = np.array(self._index.names)[self._index.slide]
        part = {slide.name: slide.part for slide in self._known}
        outlined = {slide.name: slide.annotation is not None for slide in self._known}
        by_patient: dict[str, bool] = {}
        for patient, name in zip(self._of_tile.tolist(), names.tolist(), strict=True):
            by_patient[patient] = by_patient.get(patient, False) or outlined[name]
        strata = np.array([str(by_patient[patient]) for patient in self._of_tile.tolist()])
        given = np.array([part[name] for name in names.tolist()], "<U10")
        return deal_parts(self._of_tile, given, (self.validation_share, self.test_share), self.seed, strata)

    @cached_property
    def _taken(self) -> npt.NDArray[np.bool_]:
        return _learnt_from(self._dealt == "training", self._of_tile, self.label_fraction, self.seed)


@dataclass(frozen=True)
class LabelledVolumes:
    """CT volumes with labels of organs (NIfTI), as slices; see `medsd.segment.volumes`. A volume is a patient.

    Attributes:
        dataset_dir: the folder, see `find_volumes`.
        work_dir: where slices are kept.
        slices: how a volume becomes images.
        classes: names of the organs that are asked for, the background's first.
        values: their numbers in the labels, the background's first; other organs become background.
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
        _check_shares(self)
        if not self.test_cases:
            raise ConfigError("test_cases: empty; name the numbers of the cases to test on")
        MaskCoding(tuple(self.classes), values=tuple(self.values))

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

    def part(self, name: str) -> MaskedSlices:
        chosen = self._taken if name == "training" else self._dealt == name
        files = [path for path, kept in zip(self._files, chosen, strict=True) if kept]
        return MaskedSlices(files, foreground_only=name == "training")

    def fingerprint(self) -> str:
        return _fingerprint(self)

    def spacing(self, items: MaskedItems, item: int) -> tuple[float, ...] | None:
        assert isinstance(items, MaskedSlices)
        return items.spacing(item)

    def judged(self, items: MaskedItems, item: int, found: Tensor) -> tuple[Tensor, Tensor]:
        assert isinstance(items, MaskedSlices)
        mask = torch.from_numpy(items.label(item))
        return from_square(found, *mask.shape), mask

    @cached_property
    def _files(self) -> list[Path]:
        coding = MaskCoding(tuple(self.classes), values=tuple(self.values))
        volumes = find_volumes(str(self.dataset_dir))
        return prepare_labelled(volumes, self.work_dir, self.slices, coding, progress_bar("slices"))

    @cached_property
    def _dealt(self) -> npt.NDArray[np.str_]:
        names = np.array([path.stem for path in self._files])
        numbers = {int(digits) for name in names if (digits := "".join(filter(str.isdigit, name)))}
        missing = [case for case in self.test_cases if case not in numbers]
        if missing:
            raise DatasetError(f"{self.dataset_dir}: no case {missing[0]} of test_cases; it has {sorted(numbers)}")
        tested = [int("".join(filter(str.isdigit, name)) or -1) in set(self.test_cases) for name in names]
        return deal_parts(names, np.where(tested, "testing", ""), (self.validation_share, 0.5), self.seed)

    @cached_property
    def _taken(self) -> npt.NDArray[np.bool_]:
        names = np.array([path.stem for path in self._files])
        return _learnt_from(self._dealt == "training", names, self.label_fraction, self.seed)
