"""Images whose training masks come from a classifier's evidence, for `configs/weak_labels.json`."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import Dataset

from medsd.bundle.masks import MaskData
from medsd.cohort.learnt import Sources
from medsd.errors import ConfigError, DatasetError, WeightsError
from medsd.files import atomic_path
from medsd.heatmap.legend import ADDITIVE
from medsd.heatmap.model import MapModel, MapRequest, load_map_model
from medsd.networks.modes import usable_device
from medsd.networks.weights import load_classifier
from medsd.progress import progress_bar
from medsd.record import read_record, write_record
from medsd.segment.items import MaskedItems, MaskedSample, Numbers
from medsd.segment.weak import IGNORED, Evidence, WeakLabelling

logger = logging.getLogger(__name__)

_MASKS, _RECORD = "weak_masks.npz", "weak_masks.json"


class WeakItems(Dataset[MaskedSample]):
    """Images with masks of evidence in the place of their own, which are not looked at.

    Draws are even over units, and in each over images with any sure pixel of the class and without.

    Args:
        items: the images.
        masks: (n, S, S) class numbers.
    """

    def __init__(self, items: MaskedItems, masks: Numbers) -> None:
        self._items, self.masks = items, masks
        self.units, self.patients = items.units, items.patients
        having = (masks == 1).any(axis=(1, 2))
        self.groups: npt.NDArray[np.str_] = np.array(
            [f"{unit} {'sure' if sure else 'not'}" for unit, sure in zip(self.patients, having, strict=True)], str
        )

    def __len__(self) -> int:
        return len(self.masks)

    def __getitem__(self, item: int) -> MaskedSample:
        return {"image": self._items[item]["image"], "label": torch.from_numpy(self.masks[item][None].copy())}

    def place(self, item: int) -> str:
        """The file of an item, and where in it."""
        return self._items.place(item)


@dataclass(frozen=True)
class WeaklyLabelled:
    """Data whose training masks are made of a classifier's evidence; validation and test masks are its own.

    Attributes:
        data: the images, with masks for validation and testing.
        classifier: a calibrated classifier of two classes, as the stage `finetune` leaves it.
        work_dir: where the masks are kept.
        labelling: how evidence becomes masks.
        device: where the classifier runs.

    Raises:
        ConfigError: no classifier, or data of more than two classes.
        WeightsError: weights that cannot be used, or whose maps do not add up.
    """

    data: MaskData
    classifier: str | None
    work_dir: str
    labelling: WeakLabelling
    device: torch.device

    def __post_init__(self) -> None:
        if self.classifier is None:
            raise ConfigError("classifier: not set; name the weights of a tile classifier, --classifier FILE")
        if len(self.data.classes) != 2:
            raise ConfigError(f"classes={list(self.data.classes)}: a classifier's evidence tells two apart; name two")

    @property
    def classes(self) -> Sequence[str]:
        return self.data.classes

    @property
    def item(self) -> str:
        return self.data.item

    @property
    def unit(self) -> str:
        return self.data.unit

    @property
    def mpp(self) -> float | None:
        return self.data.mpp

    @property
    def side_px(self) -> int:
        return self.data.side_px

    @property
    def length(self) -> str:
        return self.data.length

    @property
    def description(self) -> str:
        return f"evidence of {Path(str(self.classifier)).name}, no masks; {self.data.description}"

    def prepare(self) -> None:
        """What the data prepare, then the masks."""
        self.data.prepare()
        masks = self._masks
        shares = [float((masks == value).mean()) for value in (1, 0, IGNORED)]
        words = len(masks), self.data.item, *(100 * share for share in shares)
        logger.info("weak masks of %d %ss: %.1f %% sure of the class, %.1f %% of none, %.1f %% neither", *words)
        if not shares[0] or not shares[1]:
            raise DatasetError(
                f"sure={self.labelling.sure:g}: the classifier is sure of {'no' if not shares[0] else 'every'} pixel; "
                "lower it, or use another classifier"
            )

    def part(self, name: str) -> MaskedItems:
        items = self.data.part(name)
        return WeakItems(items, self._masks) if name == "training" else items

    def fingerprint(self) -> str:
        """A SHA-256 of the images, their parts, and what the masks are made with."""
        return hashlib.sha256(repr(sorted(self._recipe.items())).encode()).hexdigest()

    def sources(self, part: str) -> Sources:
        """Its own; what the classifier learnt from goes with the training masks, which are of its making."""
        own, card = self.data.sources(part), self._model.card
        return own if part != "training" or card is None else {**own, "classifier": frozenset(card.learnt_from)}

    def spacing(self, items: MaskedItems, item: int) -> tuple[float, ...] | None:
        return self.data.spacing(items, item)

    def judged(self, items: MaskedItems, item: int, found: Tensor) -> tuple[Tensor, Tensor]:
        return self.data.judged(items, item, found)

    @cached_property
    def _model(self) -> MapModel:
        load_classifier(str(self.classifier))  # or a line that says what the file is instead
        model = load_map_model(str(self.classifier), MapRequest(), usable_device(self.device))
        if model.card is None or len(model.card.classes) != 2 or model.engine.settings.methods[0] != ADDITIVE:
            raise WeightsError(
                f"{self.classifier}: weak masks want a classifier of two classes whose maps add up ('{ADDITIVE}'); use "
                "one of bundles/camelyon.json"
            )
        if self.mpp is not None and not np.isclose(self.mpp, model.engine.mpp, rtol=0.1):
            mpp = model.engine.mpp
            raise ConfigError(f"mpp={self.mpp:g}: {self.classifier} takes {mpp:g} um per pixel; set mpp to that")
        return model

    @cached_property
    def _recipe(self) -> dict[str, Any]:
        return {
            "data": self.data.fingerprint(),
            "weights_sha256": self._model.sha256,
            "labelling": asdict(self.labelling),
        }

    @cached_property
    def _masks(self) -> Numbers:
        folder = Path(self.work_dir)
        if read_record(folder / _RECORD, self._recipe) is not None:
            with np.load(folder / _MASKS, allow_pickle=False) as kept:
                return cast(Numbers, kept["masks"])
        evidence, items = Evidence(self._model.engine), self.data.part("training")
        masks = np.empty((len(items), self.side_px, self.side_px), np.uint8)
        for number in progress_bar("weak masks")(range(len(items)), len(items), self.data.item):
            image = items[number]["image"].permute(1, 2, 0).numpy()
            masks[number] = self.labelling.mask(image, evidence(image))
        with atomic_path(folder / _MASKS) as temporary:
            np.savez_compressed(temporary, masks=masks)
        write_record(folder / _RECORD, self._recipe, [_MASKS])
        return masks
