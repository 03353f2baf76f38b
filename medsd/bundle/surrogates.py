"""The stage that trains surrogates of a trained classifier's strided modules."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler, Subset

from medsd.bundle.data import Data
from medsd.bundle.stages import WEIGHTS, load_own
from medsd.checks import check_number
from medsd.classes import target_number
from medsd.cohort.dataset import Sample, SlideGroupedSampler
from medsd.evaluate.scores import auc
from medsd.evaluate.temperature import softmax
from medsd.explain.surrogates import SurrogateCard, save_surrogate
from medsd.files import as_json, sha256_of
from medsd.networks.classifier import Classifier
from medsd.progress import progress_bar
from medsd.record import read_record, write_record
from medsd.saliency import smooth
from medsd.saliency.method import evidence
from medsd.training.predict import collect

logger = logging.getLogger(__name__)

SURROGATE, SURROGATE_SCORES = "surrogate.safetensors", "surrogate.json"


@dataclass(frozen=True)
class SurrogateTraining:
    """How surrogates are trained.

    Attributes:
        epochs, lr, also, channels_last: see `smooth.train_surrogate`.
        batch_size: tiles at once.
        samples: tiles of an epoch, as many of each class and of each slide; no more validation tiles than that
            are scored.
        seed: draws starting weights and tiles.

    Raises:
        ConfigError: a batch larger than an epoch.
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-3
    samples: int = 4096
    seed: int = 0
    also: Sequence[smooth.Also] = ()
    channels_last: bool = False

    def __post_init__(self) -> None:
        hint = f"an epoch has surrogate_samples={self.samples}"
        check_number("surrogate_batch_size", self.batch_size, f"[1, {self.samples}]", whole=True, hint=hint)


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


def surrogate(data: Data, output_dir: str, device: torch.device, settings: SurrogateTraining, workers: int = 0) -> None:
    """Stage surrogate: train on training tiles, score on validation tiles, write both beside the weights.

    `surrogate.safetensors` is kept as it is where it belongs to the same weights and settings.

    Args:
        workers: processes that read tiles.
    """
    folder = Path(output_dir)
    network, card, digest = load_own(data, folder / WEIGHTS, device)
    recipe: dict[str, Any] = {"weights_sha256": digest, "settings": asdict(settings)}
    done = read_record(folder / SURROGATE_SCORES, recipe)
    if done is not None and done["sha256"] == sha256_of(folder / SURROGATE):
        return
    training, validation = data.part("training"), data.part("validation")
    drawn = SlideGroupedSampler(training.labels, training.groups, settings.samples, seed=settings.seed)
    kept = np.sort(np.random.default_rng(settings.seed).permutation(len(validation))[: settings.samples])
    subset = Subset(cast(Dataset[Sample], validation), kept.tolist())
    held_out = Batches(network, subset, settings.batch_size, workers=workers)
    trained, report = smooth.train_surrogate(
        network,
        Batches(network, cast(Dataset[Sample], training), settings.batch_size, drawn, workers),
        settings.epochs,
        settings.lr,
        held_out,
        settings.also,
        settings.seed,
        settings.channels_last,
        progress_bar("surrogate"),
    )
    scores = as_json(score_surrogate(network, trained, held_out.loader, report))
    relative = {name: error["relative_l1"] for name, error in scores["points"].items()}
    written = SurrogateCard(card.encoder, digest, trained.channels, trained.also, relative, recipe["settings"])
    save_surrogate(folder / SURROGATE, trained, written)
    write_record(folder / SURROGATE_SCORES, recipe, [SURROGATE], sha256=sha256_of(folder / SURROGATE), **scores)
    logger.info(
        "surrogates: accuracy %.3f with them, %.3f without; relative L1 %s",
        scores["surrogate_accuracy"],
        scores["accuracy"],
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
    target = target_number(network.classes, None)

    def area(values: npt.NDArray[np.float32]) -> float:
        return auc(labels == target, evidence(torch.from_numpy(values))[:, target].numpy())

    return SurrogateScores(
        items=len(labels),
        patch_auc=area(logits),
        accuracy=float((logits.argmax(axis=1) == labels).mean()),
        surrogate_patch_auc=area(replaced),
        surrogate_accuracy=float((replaced.argmax(axis=1) == labels).mean()),
        softmax_change=float(np.abs(softmax(replaced) - softmax(logits)).sum(axis=1).mean()),
        points=report.points,
        loss=report.loss,
    )
