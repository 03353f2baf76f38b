"""The two kinds of data that a bundle trains on: whole slides, and patches on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch

from medsd.bundle.config import boundary
from medsd.cohort.camelyon import find_slides
from medsd.cohort.dataset import Sample, TileDataset
from medsd.cohort.entry import SlideEntry
from medsd.cohort.index import TileGrid
from medsd.cohort.patches import PatchDataset, PatchTable, read_patch_table, split_groups
from medsd.cohort.prepare import PreparedSlides, load_prepared, prepare_slides
from medsd.errors import ConfigError
from medsd.evaluate.calibration import calibrate_on_patches, calibrate_on_slides
from medsd.heatmap.engine import Engine
from medsd.networks.weights import Calibration
from medsd.phantom import write_phantom_dataset
from medsd.progress import progress_bar
from medsd.slides.slide import open_slide
from medsd.slides.stain import StainProfile, profile_from_dict
from medsd.slides.stain.slide import StainNormaliser
from medsd.training.predict import predict

_PARTS = ("training", "validation", "testing")


class Items(Protocol):
    """A torch data set of samples with its columns: labels (n,) int8 and groups (n,) str."""

    labels: npt.NDArray[np.int8]
    groups: npt.NDArray[np.str_]

    def __len__(self) -> int: ...
    def __getitem__(self, item: int, /) -> Sample: ...


class Data(Protocol):
    """What the stages ask of a data set.

    Attributes:
        tile_px, mpp: size and scale of its tiles.
        stain_target: what the stain of its slides is normalised to, or None.
        description: the data in words, kept with the weights.
    """

    tile_px: int
    mpp: float
    stain_target: StainProfile | None

    @property
    def description(self) -> str: ...
    def fingerprint(self) -> str: ...
    def prepare(self) -> None: ...
    def part(self, name: str) -> Items: ...
    def calibrate(self, engine: Engine) -> Calibration: ...
    def jobs(self) -> list[SlideEntry]: ...
    def test_slides(self) -> Sequence[SlideEntry]: ...


@dataclass(frozen=True)
class SlideData:
    """A CAMELYON16-like folder; phantom slides are made when none is given. See `slide_data`."""

    dataset_dir: Path | None
    phantom_dir: Path
    phantom_slides: int
    phantom_size_px: int
    phantom_difficulty: float
    work_dir: Path
    grid: TileGrid
    validation_share: float
    seed: int
    cache: bool
    stain_target: StainProfile | None = None

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
        return f"{len(self._prepared.training)} slides of {self.dataset_dir.name}"

    def fingerprint(self) -> str:
        """A SHA-256 of which tiles with which labels play which part."""
        digest = hashlib.sha256(repr(self.stain_target).encode() if self.stain_target else b"")
        for part in _PARTS:
            index = self.part(part).index
            digest.update(f"{part} {index.tile_px} {index.mpp} {index.names}".encode())
            for column in (index.slide, index.x, index.y, index.label):
                digest.update(column.tobytes())
        return digest.hexdigest()

    def prepare(self) -> None:
        """Phantoms if no folder is given; then tissue, tiles and labels of every slide."""
        if self.dataset_dir is None:
            write_phantom_dataset(
                self.phantom_dir,
                self.phantom_slides,
                self.seed,
                self.phantom_size_px,
                difficulty=self.phantom_difficulty,
                progress=True,
            )
        prepare_slides(
            self._slides, self.work_dir, self.grid, self.validation_share, self.seed, progress_bar("prepare")
        )
        if self._normaliser is not None:  # here, so that loader workers find every fit and need no tiatoolbox
            index = self._prepared.index
            for number in progress_bar("stain")(np.unique(index.slide), len(np.unique(index.slide)), "slide"):
                with open_slide(index.paths[number], index.slide_mpp[number]) as slide:
                    self._normaliser.fit(slide)

    def part(self, name: str) -> TileDataset:
        """The labelled tiles of the part "training", "validation" or "testing"."""
        prepared = self._prepared
        return TileDataset(prepared.index.of_slides(getattr(prepared, name)), self.cache, self._normaliser)

    def calibrate(self, engine: Engine) -> Calibration:
        """Threshold and scale from the validation slides' maps."""
        prepared = self._prepared
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
        return None if self.stain_target is None else StainNormaliser(self.stain_target, self.work_dir / "stains")

    @cached_property
    def _slides(self) -> list[SlideEntry]:
        return find_slides(self.dataset_dir or self.phantom_dir)

    @cached_property
    def _prepared(self) -> PreparedSlides:
        return load_prepared(self._slides, self.work_dir, self.grid, self.validation_share, self.seed)


@dataclass(frozen=True)
class PatchData:
    """A folder of patches with `labels.csv`, split by group. See `patch_data`."""

    dataset_dir: Path
    group_column: str
    slides: tuple[SlideEntry, ...]
    tile_px: int
    mpp: float
    validation_share: float
    test_share: float
    seed: int
    stain_target: None = None

    @property
    def description(self) -> str:
        """The data in words."""
        rows = self._parts["training"]
        return f"{len(rows.paths)} patches of {self.dataset_dir.name}, {len(np.unique(rows.group))} groups"

    def fingerprint(self) -> str:
        """A SHA-256 of which patches with which labels play which part."""
        digest = hashlib.sha256(f"{self.tile_px} {self.mpp}".encode())
        for part in _PARTS:
            rows = self._parts[part]
            digest.update(f"{part} {[path.name for path in rows.paths]} {rows.label.tolist()}".encode())
        return digest.hexdigest()

    def prepare(self) -> None:
        """Read the table and check that every part has both classes."""
        _ = self._parts

    def part(self, name: str) -> PatchDataset:
        """The patches of the part "training", "validation" or "testing"."""
        return PatchDataset(self._parts[name], side_px=self.tile_px)

    def calibrate(self, engine: Engine) -> Calibration:
        """Threshold and scale from the validation patches."""
        validation = self.part("validation")
        probabilities = predict(engine.classifier, validation, temperature=engine.temperature)
        return calibrate_on_patches(engine, validation, validation.labels, probabilities)

    def jobs(self) -> list[SlideEntry]:
        """The slides given to be mapped."""
        return list(self.slides)

    def test_slides(self) -> Sequence[SlideEntry]:
        """None: patches have no slide labels."""
        return []

    @cached_property
    def _parts(self) -> dict[str, PatchTable]:
        table = read_patch_table(self.dataset_dir, self.group_column)
        sides = split_groups(table, (self.validation_share, self.test_share), self.seed)
        return {name: table.rows(side) for name, side in zip(_PARTS, sides, strict=True)}


@boundary
def slide_data(
    dataset_dir: str | None,
    phantom_dir: str,
    work_dir: str,
    tile_px: int,
    stride_px: int,
    mpp: float,
    phantom_slides: int = 10,
    phantom_size_px: int = 4096,
    phantom_difficulty: float = 0.3,
    min_tissue: float = 0.5,
    tumour_from: float = 0.5,
    validation_share: float = 0.25,
    seed: int = 0,
    cache: bool = False,
    stain_target: dict[str, Any] | None = None,
) -> SlideData:
    """Whole slides with annotations.

    Args:
        dataset_dir: CAMELYON16-like folder, or None for phantom slides.
        phantom_dir: where phantom slides are made, once, and kept.
        work_dir: where tile index and thumbnails are kept.
        tile_px, stride_px, mpp, min_tissue, tumour_from: the `TileGrid`.
        phantom_slides, phantom_size_px, phantom_difficulty: how many phantoms, of what side, how alike their nuclei.
        validation_share: share of the training slides held out, of each class.
        seed: chooses phantoms and split.
        cache: keep decoded tiles in memory.
        stain_target: numbers of the stain that slides are normalised to, as `medsd stain` writes them; None for none.
    """
    _check_grid(tile_px, mpp)
    return SlideData(
        dataset_dir=None if dataset_dir is None else Path(dataset_dir),
        phantom_dir=Path(phantom_dir),
        phantom_slides=phantom_slides,
        phantom_size_px=phantom_size_px,
        phantom_difficulty=phantom_difficulty,
        work_dir=Path(work_dir),
        grid=TileGrid(tile_px, stride_px, mpp, min_tissue, tumour_from),
        validation_share=validation_share,
        seed=seed,
        cache=cache,
        stain_target=None if stain_target is None else profile_from_dict(stain_target),
    )


@boundary
def patch_data(
    dataset_dir: str | None,
    tile_px: int,
    mpp: float,
    group_column: str = "stain_cluster",
    slides: Sequence[str] = (),
    validation_share: float = 0.15,
    test_share: float = 0.25,
    seed: int = 0,
    stain_target: dict[str, Any] | None = None,
) -> PatchData:
    """Patches on disk, as PatchCamelyon's.

    Args:
        dataset_dir: folder with `labels.csv` and the patches.
        tile_px: side that patches are cropped to around their centre, a multiple of the network's stride.
        mpp: micrometres per pixel of the patches.
        group_column: column of `labels.csv` whose groups are not split.
        slides: slide files that the heatmap stage maps.
        validation_share, test_share: shares of patches.
        seed: deals the groups.
        stain_target: must be None: a stain cannot be fitted well to a patch.
    """
    _check_grid(tile_px, mpp)
    if stain_target is not None:
        raise ConfigError("stain_target: patches are too small to fit a stain to; normalise their slides, or leave it")
    if dataset_dir is None:
        raise ConfigError("dataset_dir: not set; name the folder with labels.csv, --dataset_dir FOLDER")
    jobs = tuple(SlideEntry(Path(slide).stem, Path(slide)) for slide in slides)
    return PatchData(Path(dataset_dir), group_column, jobs, tile_px, mpp, validation_share, test_share, seed)


def _check_grid(tile_px: int, mpp: float) -> None:
    if tile_px < 1 or not mpp > 0:
        raise ConfigError(f"tile_px={tile_px}, mpp={mpp}: both must be positive")


def default_device() -> torch.device:
    """The first GPU, or the CPU."""
    return torch.device("cuda:0" if torch.cuda.is_available() else "cpu")
