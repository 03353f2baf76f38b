"""The stage probe: what the pre-trained encoder's features say of labels, beside those of the encoder it started as."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ignite.distributed as idist
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset

from medsd.bundle.data import Data, PatchData, SlideData
from medsd.bundle.masked import MaskedFolder
from medsd.bundle.pretraining import ENCODER, start_in_words
from medsd.checks import check_number
from medsd.cohort.dataset import Sample
from medsd.errors import ConfigError
from medsd.evaluate.mask_probe import MaskScores
from medsd.evaluate.probes import Labelled, ProbeScores, features_of, knn_probe, linear_probe, score_probe, standardise
from medsd.evaluate.scores import Floats
from medsd.networks.classifier import Normalise
from medsd.networks.memory import freed_memory_kept
from medsd.networks.modes import usable_device
from medsd.networks.start import load_encoder
from medsd.pretrain.collapse import spectrum
from medsd.pretrain.start import EncoderStart, settle
from medsd.progress import progress_bar
from medsd.tables import write_table

logger = logging.getLogger(__name__)

PROBE, MASKS = "probe.csv", "probe_masks.csv"
_BATCH = 64
_PROBES: dict[str, Callable[..., Floats]] = {"linear": linear_probe, "k-NN": knn_probe}


@freed_memory_kept()
def probe(
    data: object,
    start: EncoderStart,
    output_dir: str,
    device: torch.device,
    masked: MaskedFolder | None = None,
    items: int = 4096,
    workers: int = 0,
    seed: int = 0,
) -> None:
    """Stage probe: `probe.csv`, a row an encoder and probe, and one line in the log; `probe_masks.csv` of masks.

    Probes learn on training and validation items, their strength chosen on groups held out of them, and are scored on
    test items, see `medsd.evaluate.probes`. Each is given features as they are and whitened, which tells whether
    whitening while pre-training did more than a probe can do itself; the effective rank of the test features stands
    beside. BatchNorms of random weights take their statistics from the items that probes learn on. Of several
    processes the first does it.

    Args:
        data: with labels: `SlideData` or `PatchData`.
        start: the encoder before its pre-training.
        output_dir: holds `encoder.safetensors`.
        masked: images whose masks are decoded from the frozen maps, None for none.
        items: the most that are learnt from, and scored, drawn by the seed.
        workers: processes that read.

    Raises:
        ConfigError: data without labels.
        DatasetError: too few groups of a class to hold some out.
        WeightsError: no pre-trained encoder.
    """
    if idist.get_rank() > 0:
        return
    check_number("probe_items", items, "[1, inf)", whole=True)
    if not isinstance(data, SlideData | PatchData):
        raise ConfigError(
            "labelled_dir: not set, and the stage 'probe' needs labels; name a folder with labels.csv and patches, "
            "--labelled_dir FOLDER"
        )
    device = usable_device(device)
    trained = start.encoder_alone()
    normalise = start.normalise().to(device)
    load_encoder(trained, Path(output_dir) / ENCODER, normalise)
    parts = [_Part(data, names, items, workers, seed) for names in (("training", "validation"), ("testing",))]
    rows: list[dict[str, Any]] = []
    told = []
    of_masks: list[dict[str, Any]] = []
    before = start.encoder_alone().to(device).eval()
    if start.is_random:
        settle(before, parts[0].images(), normalise)
    for name, encoder in ((ENCODER, trained.to(device).eval()), (start_in_words(start), before)):
        if masked is not None:
            of_masks.append(
                {"encoder": name, "layer": masked.layer or "last", **_mask_cells(masked.scores(encoder, normalise))}
            )
        train, test = (part.through(encoder, normalise) for part in parts)
        of_encoder = [{"encoder": name, **row} for row in _scored(train, test)]
        told.append("{auc:.3f} ({auc_low:.3f} to {auc_high:.3f}) of {encoder}".format(**of_encoder[0]))
        rows += of_encoder
    write_table(Path(output_dir) / PROBE, rows)
    if of_masks:
        write_table(Path(output_dir) / MASKS, of_masks)
    logger.info(
        "linear probe, AUC on %d test items in %d groups: %s", rows[0]["items"], rows[0]["groups"], ", ".join(told)
    )


@dataclass(frozen=True)
class _Part:
    """Some of the labelled items of a data set's parts."""

    data: Data
    names: tuple[str, ...]
    items: int
    workers: int
    seed: int

    def images(self) -> Iterator[Tensor]:
        """Batches of them (B, 3, H, W) uint8."""
        joined: Dataset[Sample] = ConcatDataset(self._parts())
        loader = DataLoader(Subset(joined, self._chosen().tolist()), _BATCH, num_workers=self.workers)
        for batch in progress_bar("probe")(loader, len(loader), "batch"):
            yield batch["image"]

    def through(self, encoder: nn.Module, normalise: Normalise) -> Labelled:
        """The features that the encoder gives of them."""
        parts, chosen = self._parts(), self._chosen()
        labels, groups = (np.concatenate([getattr(part, name) for part in parts]) for name in ("labels", "groups"))
        features = features_of(encoder, self.images(), normalise=normalise)
        return Labelled(features, labels[chosen].astype(np.int64), groups[chosen])

    def _parts(self) -> list[Any]:
        return [self.data.part(name) for name in self.names]

    def _chosen(self) -> npt.NDArray[np.int64]:
        items = sum(len(part) for part in self._parts())
        return np.sort(np.random.default_rng(self.seed).permutation(items)[: self.items])


def _scored(train: Labelled, test: Labelled) -> Iterator[dict[str, Any]]:
    for whiten in (False, True):
        seen = standardise(train.features, whiten=True)(test.features) if whiten else test.features
        rank = spectrum(seen).effective_rank
        for name, scores_of in _PROBES.items():
            scores = score_probe(test.labels, scores_of(train, test.features, whiten=whiten), test.groups)
            yield {"probe": name, "whitened": whiten, **_cells(scores), "effective_rank": rank}


def _mask_cells(scores: MaskScores) -> dict[str, float]:
    dice, oracle = scores.dice, scores.oracle
    cells = {"stride": scores.stride, "dice": dice.value, "dice_low": dice.low, "dice_high": dice.high}
    return {**cells, "oracle": oracle.value, "images": scores.images, "groups": scores.groups}


def _cells(scores: ProbeScores) -> dict[str, float]:
    cells: dict[str, float] = {}
    for name in ("auc", "accuracy"):
        interval = getattr(scores, name)
        cells |= {name: interval.value, f"{name}_low": interval.low, f"{name}_high": interval.high}
    return {**cells, "items": scores.items, "groups": scores.groups}
