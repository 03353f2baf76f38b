"""Whole slides with annotations, or the phantoms that stand in for them, as tiles."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np

from medsd.checks import check_number
from medsd.classes import CLASSES, checked_classes, folded, target_number
from medsd.cohort.camelyon import find_slides
from medsd.cohort.dataset import TileDataset
from medsd.cohort.entry import SlideEntry
from medsd.cohort.index import TileGrid
from medsd.cohort.kept import TABLE
from medsd.cohort.learnt import Sources, slide_sources
from medsd.cohort.manifest import manifest_at, read_manifest
from medsd.cohort.prepare import PreparedSlides, load_prepared, prepare_slides
from medsd.cohort.split import PARTS, with_parts
from medsd.cohort.tiling import INDEX, Tiling, find_tiles, tiled_slides
from medsd.errors import ConfigError, DatasetError
from medsd.evaluate.calibration import calibrate_on_slides, class_shares, with_reference
from medsd.heatmap.engine import Engine
from medsd.networks.calibrated import Calibration
from medsd.networks.memory import freed_memory_kept
from medsd.phantom import write_phantom_dataset
from medsd.pretrain.images import UnlabelledImages
from medsd.progress import progress_bar
from medsd.slides.slide import open_slide
from medsd.slides.stain import StainProfile, profile_from_dict, profile_from_file
from medsd.slides.stain.slide import StainNormaliser


@dataclass(frozen=True)
class Phantoms:
    """The drawn slides that stand in where there are no real ones; see `write_phantom_dataset`.

    Attributes:
        folder: where they are made, once, and kept.
        slides, size_px, difficulty, seed: how many, of what side, how alike their nuclei, and which.
    """

    folder: str
    slides: int = 10
    size_px: int = 4096
    difficulty: float = 0.3
    seed: int = 0

    def write(self) -> None:
        """Draw those that are not there yet."""
        write_phantom_dataset(
            self.folder, self.slides, self.seed, self.size_px, difficulty=self.difficulty, progress=True
        )


@dataclass(frozen=True)
class SlideData:
    """Whole slides with annotations.

    Attributes:
        dataset_dir: a manifest or a folder with one (`slides.csv`, see `read_manifest`), a folder that `medsd tiles`
            wrote, whose tiles are taken, a CAMELYON16-like folder, or None for phantom slides.
        phantoms: the phantom slides.
        work_dir: where tile index and thumbnails are kept.
        grid: how tiles are cut.
        validation_share: share of the training patients (or slides) held out, of each class.
        seed: chooses the split.
        cache: keep decoded tiles in memory.
        stain_target: the stain that slides are normalised to: the file that `medsd stain` wrote, or its numbers; None
            for none.
        tissue: what is on the slides, in words, for the weights' card.
        test_share: share of the patients (or slides) for testing, where the data set does not say.
        classes: names of the classes, that of normal tissue first; labels of a manifest and outlines have these.
        target: name of the class that is mapped and scored against the others; None for the second.
        outlined_in_full: whether outlines hold all of every class but the first: tissue outside is of the first then,
            else it has no label, and what is outlined as the first class is of it. Tiles of `medsd tiles` keep theirs.

    Raises:
        ConfigError: a number out of its range, the stain target is none, or classes or target cannot be.
    """

    dataset_dir: str | None
    phantoms: Phantoms
    work_dir: str
    grid: TileGrid
    validation_share: float = 0.25
    seed: int = 0
    cache: bool = False
    stain_target: StainProfile | None = None
    tissue: str = ""
    test_share: float = 0.25
    classes: Sequence[str] = CLASSES
    target: str | None = None
    outlined_in_full: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "classes", checked_classes(self.classes))
        target_number(self.classes, self.target)
        check_number("validation_share", self.validation_share, "(0, 1)")
        check_number("test_share", self.test_share, "(0, 1)")
        given: object = self.stain_target
        if isinstance(given, str):
            object.__setattr__(self, "stain_target", profile_from_file(given))
        elif given is not None and not is_dataclass(given):
            object.__setattr__(self, "stain_target", profile_from_dict(cast(Mapping[str, Any], given)))

    @property
    def tile_px(self) -> int:
        """Side of a tile in pixels at `mpp`."""
        return self.grid.tile_px

    @property
    def mpp(self) -> float:
        """Micrometres per pixel of a tile."""
        return self.grid.mpp

    @property
    def description(self) -> str:
        """The data in words."""
        if self.dataset_dir is None:
            return f"{len(self._prepared.training)} phantom slides (drawn, not tissue)"
        return f"{len(self._prepared.training)} slides of {Path(self.dataset_dir).name}"

    def fingerprint(self) -> str:
        """A SHA-256 of which tiles with which labels play which part."""
        digest = hashlib.sha256(repr(self.stain_target).encode() if self.stain_target else b"")
        if len(self.classes) > 2:
            digest.update(repr(self.classes).encode())
        for part in PARTS:
            index = self.part(part).index
            digest.update(f"{part} {index.tile_px} {index.mpp} {index.names}".encode())
            for column in (index.slide, index.x, index.y, index.label):
                digest.update(column.tobytes())
        return digest.hexdigest()

    def prepare(self) -> None:
        """Phantoms if no folder is given; then tissue, tiles and labels of every slide."""
        if self.dataset_dir is None:
            self.phantoms.write()
        if self._tiled is None:
            prepare_slides(
                self._slides, self.work_dir, self._tiling, self.validation_share, self.seed, progress_bar("prepare")
            )
        self._prepared.tell()
        if self._normaliser is not None:  # here, so that loader workers find every fit and need no tiatoolbox
            index = self._prepared.index
            for number in progress_bar("stain")(np.unique(index.slide), len(np.unique(index.slide)), "slide"):
                with open_slide(index.paths[number], index.slide_mpp[number]) as slide:
                    self._normaliser.fit(slide)

    def part(self, name: str) -> TileDataset:
        """The labelled tiles of the part "training", "validation" or "testing"."""
        prepared = self._prepared
        found = TileDataset(prepared.index.of_slides(getattr(prepared, name)), self.cache, self._normaliser)
        for number, word in enumerate(self.classes):
            if name != "testing" and not (found.labels == number).any():
                raise DatasetError(
                    f"{name}: no tile of class '{word}'; outline some (see {self._tiles_at / TABLE}), or "
                    "change parts or the seed"
                )
        return found

    def sources(self, part: str) -> Sources:
        """The slides of a part, see `medsd.cohort.learnt`."""
        return slide_sources(map(self._prepared.entry, getattr(self._prepared, part)))

    def unlabelled(self, part: str) -> UnlabelledImages:
        """All tiles of the part "training" or "validation", those too that no label can be given to."""
        index = self._prepared.index
        chosen = np.isin(np.array(index.names)[index.slide], getattr(self._prepared, part))
        return UnlabelledImages(TileDataset(index.rows(chosen), self.cache, self._normaliser))

    def tissue_shares(self) -> tuple[float, ...]:
        """Each class's share of the labelled tiles of validation slides that are outlined in full; none if it is 0."""
        prepared = self._prepared
        known = [name for name in prepared.validation if prepared.entry(name).exhaustive]
        return class_shares(prepared.index.of_slides(known).label, len(self.classes))

    def calibrate(self, engine: Engine) -> Calibration:
        """Threshold, cut-off and scales from the validation slides' maps, see `with_reference`."""
        prepared = self._prepared
        with freed_memory_kept():
            engine = with_reference(engine, self.part("validation"))
        slides = [prepared.entry(name) for name in prepared.validation]
        return calibrate_on_slides(engine, slides, progress_bar("calibrate"), self._normaliser)

    def jobs(self) -> list[SlideEntry]:
        """The test slides, to be mapped."""
        return list(self.test_slides())

    def test_slides(self) -> Sequence[SlideEntry]:
        """The test slides, those without tissue too."""
        return [slide for slide in self._slides if slide.part == "testing"]

    @cached_property
    def _normaliser(self) -> StainNormaliser | None:
        return None if self.stain_target is None else StainNormaliser(self.stain_target, Path(self.work_dir) / "stains")

    @cached_property
    def _slides(self) -> list[SlideEntry]:
        place = Path(self.dataset_dir or self.phantoms.folder)
        table = manifest_at(place)
        if self._tiled is not None:
            slides = self._tiled[0]
        elif table is not None:
            slides = read_manifest(table, classes=self.classes)
        elif len(self.classes) > 2:
            raise ConfigError(
                f"classes={list(self.classes)}: {place} is laid out like CAMELYON16, which has two; give a manifest"
            )
        else:
            slides = find_slides(place)
        if not self.outlined_in_full and self._tiled is None:
            slides = [replace(slide, exhaustive=slide.annotation is None) for slide in slides]
        return with_parts(slides, self.test_share, self.seed, self.classes)

    @cached_property
    def _tiled(self) -> tuple[list[SlideEntry], Tiling] | None:
        """Slides and settings of a folder that `medsd tiles` wrote."""
        if self.dataset_dir is None or not (Path(self.dataset_dir) / INDEX).is_file():
            return None
        slides, tiling = tiled_slides(self.dataset_dir)
        cut = tiling.grid
        if (cut.tile_px, cut.mpp) != (self.grid.tile_px, self.grid.mpp):
            raise ConfigError(
                f"{self.dataset_dir}: holds tiles of {cut.tile_px} px at {cut.mpp:g} um; "
                f"set --tile_px {cut.tile_px} --mpp {cut.mpp:g}"
            )
        if tuple(map(folded, tiling.classes)) != tuple(map(folded, self.classes)):
            raise ConfigError(
                f"{self.dataset_dir}: holds tiles of the classes {', '.join(tiling.classes)}; set "
                f'--classes "{list(tiling.classes)}"'
            )
        if find_tiles(slides, self.dataset_dir, tiling) is None:
            raise DatasetError(f"{self.dataset_dir}: holds tiles of slides that changed since; run medsd tiles again")
        return slides, tiling

    @cached_property
    def _prepared(self) -> PreparedSlides:
        tiling = self._tiling if self._tiled is None else self._tiled[1]
        return load_prepared(self._slides, self._tiles_at, tiling, self.validation_share, self.seed)

    @property
    def _tiling(self) -> Tiling:
        return Tiling(self.grid, classes=self.classes)

    @property
    def _tiles_at(self) -> Path:
        return Path(self.work_dir if self._tiled is None else str(self.dataset_dir))
