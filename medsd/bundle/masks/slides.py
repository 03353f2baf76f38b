"""Whole slides with outlines, tile by tile."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import numpy.typing as npt

from medsd.bundle.data import Phantoms
from medsd.bundle.masks.base import SplitByPatient
from medsd.checks import check_number
from medsd.cohort.camelyon import find_slides
from medsd.cohort.entry import SlideEntry
from medsd.cohort.index import TileGrid, TileIndex
from medsd.cohort.learnt import Sources, slide_sources
from medsd.cohort.manifest import manifest_at, read_manifest
from medsd.cohort.split import PARTS
from medsd.cohort.tiling import Tiling, prepared_tiles, tile_slides
from medsd.errors import DatasetError
from medsd.progress import progress_bar
from medsd.segment.items import deal_parts
from medsd.segment.tiles import MaskedTiles, OutlinedClasses, outlined_classes

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class OutlinedSlides(SplitByPatient):
    """Whole slides whose outlines become masks as tiles are read, several classes by name; see `outlined_classes`.

    A slide without outlines is background if it is labelled normal; otherwise nobody knows, and it is left out with a
    warning, as is one whose outlines are not exhaustive.

    Attributes:
        dataset_dir: a manifest or a folder with one (`slides.csv`), a CAMELYON16-like folder, or None for phantoms.
        phantoms: the phantom slides.
        work_dir: where tile index and thumbnails are kept.
        grid: how tiles are cut.
        classes: names, the background's first: ASAP's groups, QuPath's classes.
        label_fraction: of the training tiles, whole patients, those whose masks are learnt from; at least one patient
            with outlines, and one without, where there are any.
        validation_share, test_share: of the tiles that are not tested on, and of all, whole patients (or slides), where
            the data set does not say.
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
        super().__post_init__()
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
            for name in self.classes[1:]:
                if not any(self._outlines[slide].areas[name].area for slide in set(items.units.tolist())):
                    logger.warning(
                        "%s: nothing is outlined as the class '%s' on any slide of %s; check classes, and the groups "
                        "of the outlines",
                        *(part, name, self._place),
                    )

    def part(self, name: str) -> MaskedTiles:
        patients = {slide.name: slide.patient for slide in self._slides}
        return MaskedTiles(self._index.rows(self._rows(name)), self._outlines, patients, self.cache)

    def sources(self, part: str) -> Sources:
        names = set(self.part(part).units.tolist())
        return slide_sources(slide for slide in self._known if slide.name in names)

    @property
    def _place(self) -> Path:
        return Path(self.dataset_dir or self.phantoms.folder)

    @cached_property
    def _all(self) -> list[SlideEntry]:
        table = manifest_at(self._place)
        return find_slides(self._place) if table is None else read_manifest(table, classes=tuple(self.classes))

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
    def _patients(self) -> npt.NDArray[np.str_]:
        """The patient of each tile, or its slide where nobody says."""
        patient = {slide.name: slide.patient or slide.name for slide in self._known}
        return np.array([patient[name] for name in self._index.names], str)[self._index.slide]

    @cached_property
    def _strata(self) -> npt.NDArray[np.str_]:
        """Whether anything is outlined on a slide of the tile's patient: one per cent may be a single patient."""
        names = np.array(self._index.names)[self._index.slide]
        outlined = {slide.name: slide.annotation is not None for slide in self._known}
        by_patient: dict[str, bool] = {}
        for patient, name in zip(self._patients.tolist(), names.tolist(), strict=True):
            by_patient[patient] = by_patient.get(patient, False) or outlined[name]
        return np.array([str(by_patient[patient]) for patient in self._patients.tolist()])

    @cached_property
    def _dealt(self) -> npt.NDArray[np.str_]:
        part = np.array([slide.part for slide in self._known], "<U10")
        number = {slide.name: row for row, slide in enumerate(self._known)}
        given = part[[number[name] for name in self._index.names]][self._index.slide]
        shares = self.validation_share, self.test_share
        table = manifest_at(self._place)
        source = f"{self._place}: training and testing" if table is None else f"{table}: column 'part'"
        return deal_parts(self._patients, given, shares, self.seed, self._strata, source)
