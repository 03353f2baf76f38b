"""The stage that trains surrogates of a trained classifier's strided modules."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from medsd.bundle.config import boundary
from medsd.bundle.data import Data
from medsd.cohort.dataset import Sample, SlideGroupedSampler
from medsd.errors import ConfigError, WeightsError
from medsd.evaluate.scores import auc
from medsd.evaluate.summary import as_json
from medsd.evaluate.temperature import softmax
from medsd.explain.surrogates import SurrogateCard, load_surrogate, save_surrogate
from medsd.files import write_json
from medsd.networks.classifier import Classifier
from medsd.networks.weights import load_classifier
from medsd.progress import progress_bar
from medsd.saliency import smooth
from medsd.training.predict import collect

logger = logging.getLogger(__name__)

SURROGATE, SURROGATE_SCORES = "surrogate.safetensors", "surrogate.json"


@dataclass(frozen=True)
class SurrogateScores:
    """What the surrogates cost, on validation tiles.

    Attributes:
        items: number of tiles.
        patch_auc, accuracy: of the classifier as it is.
        surrogate_patch_auc, surrogate_accuracy: of the classifier with surrogates in place, all at once.
        softmax_change: mean over the tiles of the sum over the classes of the probabilities' absolute change, 0 to 2.
        points: error of each surrogate by the module's name.
        loss: of each epoch, on training tiles.
    """

    items: int
    patch_auc: float
    accuracy: float
    surrogate_patch_auc: float
    surrogate_accuracy: float
    softmax_change: float
    points: dict[str, smooth.PointError]
    loss: tuple[float, ...]


@boundary
def surrogate(
    data: Data,
    output_dir: str,
    device: torch.device,
    epochs: int = 10,
    batch_size: int = 64,
    lr: float = 1e-3,
    samples: int = 4096,
    seed: int = 0,
    also: Sequence[smooth.Also] = (),
    channels_last: bool = False,
    workers: int = 0,
) -> None:
    """Stage surrogate: train on training tiles, score on validation tiles, write both beside the weights.

    `surrogate.safetensors` is kept as it is where it belongs to the same weights and settings.

    Args:
        epochs, lr, also, channels_last: see `smooth.train_surrogate`.
        batch_size: tiles at once.
        samples: tiles of an epoch, half of them tumour and as many of each slide; no more validation tiles than that
            are scored.
        seed: draws starting weights and tiles.
        workers: processes that read tiles.
    """
    if not 1 <= batch_size <= samples:
        raise ConfigError(f"batch_size={batch_size}: must lie in 1 to samples={samples}")
    folder = Path(output_dir)
    network, card, digest = load_classifier(folder / "model.safetensors", device)
    if card.data_sha256 != data.fingerprint():
        raise WeightsError(
            f"{folder / 'model.safetensors'}: trained on another split of the data; run the stage 'finetune' for it"
        )
    settings: dict[str, Any] = {"epochs": epochs, "batch_size": batch_size, "lr": lr, "samples": samples}
    settings |= {"seed": seed, "also": list(also)}
    if _is_written(folder, digest, settings):
        return
    training, validation = data.part("training"), data.part("validation")
    drawn = SlideGroupedSampler(training.labels, training.groups, samples, seed=seed)
    kept = np.sort(np.random.default_rng(seed).permutation(len(validation))[:samples])
    subset = Subset(cast(Dataset[Sample], validation), kept.tolist())
    held_out = Batches(network, subset, batch_size, workers=workers)
    trained, report = smooth.train_surrogate(
        network,
        Batches(network, cast(Dataset[Sample], training), batch_size, drawn, workers),
        epochs,
        lr,
        held_out,
        also,
        seed,
        channels_last,
        progress_bar("surrogate"),
    )
    scores = score_surrogate(network, trained, held_out.loader, report)
    content = as_json(scores)
    relative = {name: error["relative_l1"] for name, error in content["points"].items()}
    written = SurrogateCard(card.encoder, digest, trained.channels, trained.also, relative, settings)
    save_surrogate(folder / SURROGATE, trained, written)
    write_json(folder / SURROGATE_SCORES, {"weights_sha256": digest, "settings": settings, **content})
    logger.info(
        "surrogates: accuracy %.3f with them, %.3f without; relative L1 %s",
        scores.surrogate_accuracy,
        scores.accuracy,
        ", ".join(f"{error.relative_l1:.2f}" for error in report.points.values()),
    )


class Batches:
    """Tiles as a classifier's input: (B, 3, tile_px, tile_px) float32 on its device, anew each time it is gone through.

    Args:
        network: normalises them.
        tiles: uint8, as read.
        batch_size: tiles at once.
        drawn: which tiles, another draw each time; None takes all in order.
        workers: processes that read.
    """

    def __init__(
        self,
        network: Classifier,
        tiles: Dataset[Sample],
        batch_size: int,
        drawn: SlideGroupedSampler | None = None,
        workers: int = 0,
    ) -> None:
        self.network, self.drawn = network, drawn
        self.loader = DataLoader(tiles, batch_size, sampler=cast(Sampler[int], drawn), num_workers=workers)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.loader:
            yield self.network.normalise(batch["image"].to(self.network.device))
        if self.drawn is not None:
            self.drawn.set_epoch(self.drawn.epoch + 1)


def score_surrogate(
    network: Classifier, trained: smooth.Surrogate, loader: DataLoader[Sample], report: smooth.SurrogateReport
) -> SurrogateScores:
    """What surrogates cost a classifier, on the tiles of a loader."""
    logits, labels = collect(network, loader)
    with smooth.surrogate(network, trained):
        replaced, _ = collect(network, loader)
    return SurrogateScores(
        items=len(labels),
        patch_auc=auc(labels, logits[:, 1] - logits[:, 0]),
        accuracy=float((logits.argmax(axis=1) == labels).mean()),
        surrogate_patch_auc=auc(labels, replaced[:, 1] - replaced[:, 0]),
        surrogate_accuracy=float((replaced.argmax(axis=1) == labels).mean()),
        softmax_change=float(np.abs(softmax(replaced) - softmax(logits)).sum(axis=1).mean()),
        points=report.points,
        loss=report.loss,
    )


def _is_written(folder: Path, weights_sha256: str, settings: dict[str, Any]) -> bool:
    """Whether the folder holds surrogates of these weights, trained with these settings, and their scores."""
    if not ((folder / SURROGATE).is_file() and (folder / SURROGATE_SCORES).is_file()):
        return False
    try:
        _, card = load_surrogate(folder / SURROGATE, weights_sha256)
        scores = json.loads((folder / SURROGATE_SCORES).read_text("utf-8"))
    except (WeightsError, ValueError):
        return False  # of other weights, an earlier version or damaged: written anew
    # The scores are written last, and may be those of another training that ended between the two.
    kept = (scores.get("weights_sha256"), scores.get("settings")) if isinstance(scores, dict) else None
    return card.settings == settings and kept == (weights_sha256, settings)
