"""Data to pre-train on that nobody labelled: whole slides, folders of images, CT volumes."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from medsd.checks import check_number
from medsd.cohort.dataset import TileDataset
from medsd.cohort.entry import SlideEntry
from medsd.cohort.index import TileGrid, TileIndex
from medsd.cohort.manifest import find_cohort
from medsd.cohort.patches import PatchDataset, PatchTable
from medsd.cohort.tiling import Tiling, prepared_tiles, tile_slides
from medsd.errors import ConfigError, DatasetError
from medsd.pretrain.images import UnlabelledImages, hold_out, read_images
from medsd.pretrain.volumes import SUFFIXES, SliceDataset, SliceSettings, prepare_volumes
from medsd.progress import progress_bar


@dataclass(frozen=True)
class UnlabelledSlides:
    """The tissue of whole slides; a slide is a group.

    Attributes:
        dataset_dir: folder that is searched for slides, or a manifest, see `find_cohort`.
        work_dir: where tile index and thumbnails are kept.
        grid: how tiles are cut.
        held_out: share of the tiles, of whole slides, that is measured on and not trained on.
        seed: draws the held-out slides.

    Raises:
        ConfigError: `dataset_dir` is None, or the share is out of its range.
    """

    dataset_dir: str | None
    work_dir: str
    grid: TileGrid
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("held_out", self.held_out, "(0, 1)")
        if self.dataset_dir is None:
            raise ConfigError("dataset_dir: not set; name a folder of slides or a manifest, --dataset_dir FOLDER")

    @property
    def description(self) -> str:
        """The data in words."""
        return f"{len(np.unique(self._index.slide))} slides of {Path(str(self.dataset_dir)).name}"

    def prepare(self) -> None:
        """Tissue and tiles of every slide."""
        tile_slides(self._slides, self.work_dir, Tiling(self.grid), progress=progress_bar("prepare"))

    def unlabelled(self, part: str) -> UnlabelledImages:
        """The tiles of the part "training", or those held out, "validation"."""
        tiles = TileDataset(self._index)
        held_out = hold_out(tiles.groups, self.held_out, self.seed)
        return UnlabelledImages(TileDataset(self._index.rows(_of_part(held_out, part))))

    @cached_property
    def _slides(self) -> list[SlideEntry]:
        return find_cohort(str(self.dataset_dir), leave_out=self.work_dir)

    @cached_property
    def _index(self) -> TileIndex:
        return prepared_tiles(self._slides, self.work_dir, Tiling(self.grid), str(self.dataset_dir))


@dataclass(frozen=True)
class UnlabelledFolders:
    """Images in folders, with tables that name their groups or without, see `read_images`.

    Attributes:
        image_dirs: the folders.
        side_px: side of the square around the centre that images are cropped to.
        group_columns: which column of a table is the group, see `read_images`.
        held_out: share of the images, of whole groups, that is measured on and not trained on.
        seed: draws the held-out groups.

    Raises:
        ConfigError: no folder, or the share is out of its range.
    """

    image_dirs: Sequence[str]
    side_px: int
    group_columns: Sequence[str] = ()
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("held_out", self.held_out, "(0, 1)")
        if not self.image_dirs:
            raise ConfigError("image_dirs: empty; name folders of images, --image_dirs \"['FOLDER']\"")

    @property
    def description(self) -> str:
        """The data in words."""
        return f"{len(self._table.paths)} images of {', '.join(Path(folder).name for folder in self.image_dirs)}"

    def prepare(self) -> None:
        """Find the images."""
        _ = self._table

    def unlabelled(self, part: str) -> UnlabelledImages:
        """The images of the part "training", or those held out, "validation"."""
        held_out = hold_out(self._table.group, self.held_out, self.seed)
        return UnlabelledImages(PatchDataset(self._table.rows(_of_part(held_out, part)), self.side_px))

    @cached_property
    def _table(self) -> PatchTable:
        return read_images(self.image_dirs, self.group_columns)


@dataclass(frozen=True)
class CtVolumes:
    """Axial slices of the CT volumes (NIfTI) below a folder; a volume is a group.

    Attributes:
        dataset_dir: the folder.
        work_dir: where slices are kept; no volumes are looked for in it.
        slices: how a volume becomes images.
        held_out: share of the volumes that is measured on and not trained on.
        seed: draws the held-out volumes.

    Raises:
        ConfigError: `dataset_dir` is None, or the share is out of its range.
    """

    dataset_dir: str | None
    work_dir: str
    slices: SliceSettings
    held_out: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_number("held_out", self.held_out, "(0, 1)")
        if self.dataset_dir is None:
            raise ConfigError("dataset_dir: not set; name the folder of the volumes (.nii.gz), --dataset_dir FOLDER")

    @property
    def description(self) -> str:
        """The data in words."""
        return f"{len(self._files)} CT volumes of {Path(str(self.dataset_dir)).name}"

    def prepare(self) -> None:
        """Slices of every volume that has none yet."""
        _ = self._files

    def unlabelled(self, part: str) -> UnlabelledImages:
        """The slices of the part "training", or those held out, "validation"."""
        names = np.array([path.stem for path in self._files])
        held_out = hold_out(names, self.held_out, self.seed)
        return UnlabelledImages(SliceDataset([self._files[i] for i in np.flatnonzero(_of_part(held_out, part))]))

    @cached_property
    def _files(self) -> list[Path]:
        folder = Path(str(self.dataset_dir))
        own = os.path.realpath(self.work_dir)  # slices look like volumes
        volumes = [
            path
            for path in sorted(folder.rglob("*"))
            if path.name.endswith(SUFFIXES)
            and path.name[0] != "."
            and not Path(os.path.realpath(path)).is_relative_to(own)
        ]
        if not volumes:
            raise DatasetError(f"{folder}: no volumes ({', '.join(SUFFIXES)}); check dataset_dir")
        return prepare_volumes(volumes, self.work_dir, self.slices, progress_bar("slices"))


def _of_part(held_out: npt.NDArray[np.bool_], part: str) -> npt.NDArray[np.bool_]:
    return {"training": ~held_out, "validation": held_out}[part]
