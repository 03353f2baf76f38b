"""Patches on disk with labels."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from medsd.checks import check_number
from medsd.classes import CLASSES, checked_classes, target_number
from medsd.cohort.apart import may_train
from medsd.cohort.entry import SlideEntry
from medsd.cohort.learnt import Sources, group_sources
from medsd.cohort.manifest import find_slides_at
from medsd.cohort.patches import PatchDataset, PatchTable, check_scale, read_patch_table, split_groups
from medsd.cohort.split import PARTS
from medsd.errors import ConfigError, DatasetError
from medsd.evaluate.calibration import calibrate_on_patches, class_shares, with_reference
from medsd.heatmap.engine import Engine
from medsd.networks.calibrated import Calibration
from medsd.networks.memory import freed_memory_kept
from medsd.pretrain.images import UnlabelledImages
from medsd.slides.mpp import check_tile
from medsd.slides.readers.base import RGB
from medsd.training.predict import predict_logits

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class PatchData:
    """Patches on disk, as PatchCamelyon's, split by group.

    Attributes:
        dataset_dir: folder with `labels.csv` (or `index.csv`) and the patches, see `read_patch_table`.
        tile_px: side that patches are cropped to around their centre, a multiple of the network's stride.
        mpp: micrometres per pixel of the patches.
        group_column: column of `labels.csv` whose groups are not split.
        slides: slide files that the heatmap stage maps.
        validation_share, test_share: shares of patches.
        seed: deals the groups.
        stain_target: must be None: a stain cannot be fitted well to a patch.
        tissue: what is on the patches, in words, for the weights' card.
        classes: names in the order of the labels.
        left_out: labels whose patches are left out.
        scale: by which patches are made larger (2) or smaller (0.5) before they are cropped, see `check_scale`; `mpp`
            is theirs afterwards.
        more_dirs: further folders with labels, whose groups nobody knows. Their patches are trained on, but for those
            of a place or a stain that is validated or tested on, see `may_train`.
        stratified: deal the groups class by class, see `split_groups`.
        target: name of the class that is mapped and scored against the others; None for the second.

    Raises:
        ConfigError: a value out of its range, or classes or target cannot be.
    """

    dataset_dir: str | None
    tile_px: int
    mpp: float
    group_column: str = "stain_cluster"
    slides: Sequence[str] = ()
    validation_share: float = 0.15
    test_share: float = 0.25
    seed: int = 0
    stain_target: None = None
    tissue: str = ""
    classes: Sequence[str] = CLASSES
    left_out: Sequence[str] = ()
    scale: float = 1
    more_dirs: Sequence[str] = ()
    stratified: bool = False
    target: str | None = None

    def __post_init__(self) -> None:
        if self.stain_target is not None:
            raise ConfigError(
                "stain_target: patches are too small to fit a stain to; normalise their slides, or leave it"
            )
        if self.dataset_dir is None:
            raise ConfigError("dataset_dir: not set; name the folder with labels.csv, --dataset_dir FOLDER")
        check_tile(self.tile_px, self.mpp)
        check_number("validation_share", self.validation_share, "(0, 1)")
        check_number("test_share", self.test_share, "(0, 1)")
        check_scale(self.scale)
        object.__setattr__(self, "classes", checked_classes(self.classes))
        target_number(self.classes, self.target)

    @property
    def description(self) -> str:
        """The data in words."""
        rows, folder = self._parts["training"], Path(str(self.dataset_dir))
        own = np.array([folder in path.parents for path in rows.paths])
        words = f"{own.sum()} patches of {folder.name}, {len(np.unique(rows.group[own]))} groups"
        return words if own.all() else f"{words}, and {(~own).sum()} of {', '.join(self._more_names)}"

    def fingerprint(self) -> str:
        """A SHA-256 of which patches with which labels play which part."""
        told = f" {self.scale:g}" if self.scale != 1 else ""
        digest = hashlib.sha256(f"{self.tile_px} {self.mpp}{told}".encode())
        for part in PARTS:
            rows = self._parts[part]
            digest.update(f"{part} {rows.files()} {rows.label.tolist()}".encode())
        return digest.hexdigest()

    def prepare(self) -> None:
        """Read the table and check that every part has both classes."""
        _ = self._parts

    def part(self, name: str) -> PatchDataset:
        """The patches of the part "training", "validation" or "testing"."""
        return PatchDataset(self._parts[name], self.tile_px, self.scale)

    def sources(self, part: str) -> Sources:
        """The groups of a part, see `medsd.cohort.learnt`."""
        return group_sources(self.group_column, self._parts[part].group.tolist(), Path(str(self.dataset_dir)).name)

    def unlabelled(self, part: str) -> UnlabelledImages:
        """The patches of the part "training" or "validation", whatever their labels."""
        return UnlabelledImages(self.part(part))

    def tissue_shares(self) -> tuple[float, ...]:
        """Each class's share of the validation patches; none if it is 0."""
        return class_shares(self.part("validation").labels, len(self.classes))

    @freed_memory_kept()
    def calibrate(self, engine: Engine) -> Calibration:
        """Threshold and scales from the validation patches, see `with_reference`."""
        validation = self.part("validation")
        engine = with_reference(engine, validation)
        probabilities = engine.probability(torch.from_numpy(predict_logits(engine.classifier, validation))).numpy()
        return calibrate_on_patches(engine, validation, validation.labels == engine.target, probabilities)

    def jobs(self) -> list[SlideEntry]:
        """The slides given to be mapped."""
        return find_slides_at(self.slides) if self.slides else []

    def test_slides(self) -> Sequence[SlideEntry]:
        """None: patches have no slide labels."""
        return []

    @cached_property
    def _parts(self) -> dict[str, PatchTable]:
        table = self._table(str(self.dataset_dir), self.group_column, "dataset_dir")
        missing = [name for number, name in enumerate(self.classes) if number not in table.label]
        if missing:
            raise DatasetError(
                f"{self.dataset_dir}: no patch is of the class {' or '.join(missing)}; take it out of classes"
            )
        shares, source = (self.validation_share, self.test_share), f"{self.dataset_dir}: {self.group_column}"
        sides = split_groups(table, shares, self.seed, self.stratified, source, self.classes)
        parts = {name: table.rows(side) for name, side in zip(PARTS, sides, strict=True)}
        for folder, name in zip(self.more_dirs, self._more_names, strict=True):
            more = self._table(folder, None, "more_dirs")
            pixels, grouped = _pixels(more), _pixels(table)
            if pixels.shape[1:] != grouped.shape[1:]:
                raise DatasetError(
                    f"{folder}: patches of {pixels.shape[2]} x {pixels.shape[1]} px, those of {self.dataset_dir} have "
                    f"{grouped.shape[2]} x {grouped.shape[1]}; more_dirs must hold patches of one size with them"
                )
            chosen = may_train(pixels, grouped, ~sides[0])
            logger.info("%s: %d of %d patches are trained on", folder, chosen.sum(), len(chosen))
            kept = more.rows(chosen)
            parts["training"] = parts["training"].joined(replace(kept, group=np.char.add(f"{name} ", kept.group)))
        return parts

    @property
    def _more_names(self) -> list[str]:
        return [Path(folder).name for folder in self.more_dirs]

    def _table(self, folder: str, group_column: str | None, key: str) -> PatchTable:
        return read_patch_table(folder, group_column, self.classes, self.left_out, key)


def _pixels(table: PatchTable) -> RGB:
    """(n, H, W, 3) of whole patches, all of one size."""
    images = [table.pixels(row) for row in range(len(table.paths))]
    if len({image.shape for image in images}) > 1:
        raise DatasetError(f"{table.paths[0].parent}: patches of several sizes; with more_dirs all must be of one")
    return np.stack(images)
