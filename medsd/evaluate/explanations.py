"""How far a classifier's explanations can be trusted, measured on held-out tiles with their labels."""

from __future__ import annotations

from collections.abc import Callable, Sequence, Sized
from dataclasses import dataclass
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from medsd.cohort.dataset import Sample
from medsd.errors import ConfigError, DatasetError
from medsd.evaluate.features import FeatureHealth, feature_health
from medsd.evaluate.scores import Floats, Interval, bootstrap_mean
from medsd.evaluate.tile_maps import PerTile, device_of, measure_maps
from medsd.networks.classifier import Classifier
from medsd.networks.modes import evaluating
from medsd.progress import Progress, no_progress
from medsd.saliency.metrics.masking import SHARES
from medsd.saliency.metrics.perturb import Baseline

Region = Callable[[int], npt.NDArray[np.bool_]]

_MAP_BATCH = 32
_MEANS = ("masking_area", "gap", "deletion", "insertion", "magnitude", "total_variation", "gini", "entropy")


@dataclass(frozen=True)
class ExplanationSettings:
    """What the scores rest on (numbers: our choice); runs to be compared must share all but seed and batch size.

    Attributes:
        items: tiles that maps are made of, as many of each class as the data allow.
        draws: random orders a tile of the masking control.
        fill: what masked pixels become.
        steps: steps of deletion and insertion.
        batch_size: images in one pass.
        seed: chooses tiles, random orders and resamples.
        target: the class whose regions are pointed at.
    """

    items: int = 128
    draws: int = 3
    fill: Baseline = "mean"
    steps: int = 20
    batch_size: int = 32
    seed: int = 0
    target: int = 1

    def __post_init__(self) -> None:
        for name in ("items", "draws", "steps", "batch_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be 1 or more")


@dataclass(frozen=True)
class MapScores:
    """Scores of one kind of map: means over tiles, with 95 % bootstrap intervals.

    Attributes:
        masking_area: area of accuracy under masking of the most salient pixels; lower is more faithful.
        gap: area of the random control less that, tile by tile; higher is more faithful, 0 knows nothing.
        deletion, insertion: areas of the true class's probability (RISE); lower and higher are better.
        magnitude: mean |map|, with its scale.
        total_variation: see there; lower is smoother.
        gini, entropy: see `medsd.saliency.metrics.concentration`; higher and lower are more concentrated.
        pointing: share of the saliency inside the region, of tiles that have one; nan without any.
        pointing_game: how often the greatest value lies inside; nan without any. For both, a map without a positive
            value points at nothing and counts 0.
        accuracy, probability: of the true class, after masking of each of `Explanations.shares`.
    """

    masking_area: Interval
    gap: Interval
    deletion: Interval
    insertion: Interval
    magnitude: Interval
    total_variation: Interval
    gini: Interval
    entropy: Interval
    pointing: Interval
    pointing_game: Interval
    accuracy: tuple[Interval, ...]
    probability: tuple[Interval, ...]


@dataclass(frozen=True)
class RandomControl:
    """What masking pixels in random order does: the measure of the network's own robustness.

    Attributes:
        masking_area, accuracy, probability: as in `MapScores`.
    """

    masking_area: Interval
    accuracy: tuple[Interval, ...]
    probability: tuple[Interval, ...]


@dataclass(frozen=True)
class Explanations:
    """Scores of a classifier's explanations.

    Attributes:
        settings: what they rest on.
        items: tiles given; the features are those of all.
        judged: tiles that maps were made of.
        pointed: those of the target class with a region that neither is empty nor fills the tile.
        area_share: mean share of the tile that their regions cover, which is chance; nan without any.
        shares: shares of pixels masked.
        random: the control of masking.
        maps: by name, see `medsd.evaluate.tile_maps.explanation_maps`.
        features: correlation, rank and dead channels of the pooled features.
    """

    settings: ExplanationSettings
    items: int
    judged: int
    pointed: int
    area_share: Interval
    shares: tuple[float, ...]
    random: RandomControl
    maps: dict[str, MapScores]
    features: FeatureHealth


_DEFAULT = ExplanationSettings()


def score_explanations(
    classifier: Classifier,
    dataset: Dataset[Sample] | Sequence[Sample],
    settings: ExplanationSettings = _DEFAULT,
    region: Region | None = None,
    progress: Progress = no_progress,
) -> Explanations:
    """Judge a classifier's explanations of its tiles' true classes.

    Intervals resample tiles; tiles of one slide are alike, so they are narrower than those over slides would be.
    Probabilities are softmax(logits), without a temperature.

    Args:
        classifier: in eval mode for the length of the call.
        dataset: samples {"image": (3, S, S) uint8, "label"}, all of one size.
        settings: what the scores rest on.
        region: the tumour within the tile of that number, (S, S) bool; `masks.__getitem__` of an array (N, S, S).
        progress: shown over batches.

    Raises:
        DatasetError: fewer than two tiles, labels that are no class, a region of another size, or maps that are not
            finite.
        ConfigError: no such fill.
    """
    with evaluating(classifier):
        features, labels = _features(classifier, dataset, settings.batch_size, progress)
        health = feature_health(features)
        chosen = _even_draw(labels, settings)
        generator = torch.Generator(device_of(classifier)).manual_seed(settings.seed)
        batches = [chosen[start : start + _MAP_BATCH] for start in range(0, len(chosen), _MAP_BATCH)]
        judged = []
        for numbers in progress(batches, len(batches), "batch"):
            batch = default_collate([dataset[number] for number in numbers])
            inside = _regions(region, numbers, batch, settings.target)
            judged.append(
                measure_maps(
                    classifier,
                    batch,
                    inside,
                    generator,
                    settings.draws,
                    settings.fill,
                    settings.steps,
                    settings.batch_size,
                )
            )
    return _scores(judged, len(labels), health, settings)


def _features(
    classifier: Classifier, dataset: Dataset[Sample] | Sequence[Sample], batch_size: int, progress: Progress
) -> tuple[Tensor, npt.NDArray[np.int64]]:
    """Pooled features (N, d) and labels (N,) of all tiles."""
    loader = DataLoader(cast(Dataset[Sample], dataset), batch_size=batch_size)
    count = len(cast(Sized, dataset))
    if count < 2:
        raise DatasetError(f"explanations: {count} tile(s); at least 2 are needed")
    features, labels = [], []
    with torch.inference_mode():
        for batch in progress(loader, len(loader), "batch"):
            features.append(classifier.features(batch["image"].to(device_of(classifier))).float().cpu())
            labels.append(batch["label"])
    truth = torch.cat(labels).numpy().astype(np.int64)
    unknown = truth[(truth < 0) | (truth >= len(classifier.classes))]
    if len(unknown):
        raise DatasetError(
            f"explanations: label {unknown[0]}; give tiles of the classes {', '.join(classifier.classes)}"
        )
    return torch.cat(features), truth


def _even_draw(labels: npt.NDArray[np.int64], settings: ExplanationSettings) -> list[int]:
    """Numbers of up to `items` tiles, as many of each class as there are, rising."""
    random = np.random.default_rng(settings.seed)
    order = random.permutation(len(labels))
    # The place of a tile within its class: the first ones of every class are dealt before any second.
    turn = np.empty(len(labels), np.int64)
    for label in np.unique(labels):
        of_class = order[labels[order] == label]
        turn[of_class] = np.arange(len(of_class))
    dealt = order[np.argsort(turn[order], kind="stable")]
    return [int(number) for number in np.sort(dealt[: settings.items])]


def _regions(region: Region | None, numbers: Sequence[int], batch: Sample, target: int) -> Tensor:
    """(B, H, W) bool; empty for tiles of other classes, whose map explains something else."""
    images, labels = batch["image"], batch["label"]
    inside = torch.zeros(len(numbers), *images.shape[2:], dtype=torch.bool)
    if region is None:
        return inside
    for row, number in enumerate(numbers):
        if int(labels[row]) != target:
            continue
        known = torch.from_numpy(np.asarray(region(number), np.bool_).copy())
        if known.shape != inside.shape[1:]:
            raise DatasetError(
                f"explanations: tile {number} is {tuple(inside.shape[1:])} px, its region {tuple(known.shape)}; "
                "give the region at the pixels of the tile"
            )
        inside[row] = known
    return inside


def _scores(
    batches: Sequence[PerTile], items: int, features: FeatureHealth, settings: ExplanationSettings
) -> Explanations:
    def column(of: str, measure: str) -> Floats:
        return torch.cat([batch[of][measure] for batch in batches]).double().cpu().numpy()

    def mean(of: str, measure: str) -> Interval:
        return bootstrap_mean(column(of, measure), seed=settings.seed)

    def mean_of_defined(of: str, measure: str) -> Interval:
        values = column(of, measure)
        return bootstrap_mean(values[~np.isnan(values)], seed=settings.seed)

    def means(of: str, measure: str) -> tuple[Interval, ...]:
        return tuple(bootstrap_mean(step, seed=settings.seed) for step in column(of, measure).T)

    maps = {
        name: MapScores(
            **{measure: mean(name, measure) for measure in _MEANS},
            pointing=mean_of_defined(name, "pointing"),
            pointing_game=mean_of_defined(name, "pointing_game"),
            accuracy=means(name, "accuracy"),
            probability=means(name, "probability"),
        )
        for name in batches[0]
        if name != "random"
    }
    area = column("random", "area_share")
    return Explanations(
        settings=settings,
        items=items,
        judged=len(area),
        pointed=int(np.count_nonzero(~np.isnan(area))),
        area_share=mean_of_defined("random", "area_share"),
        shares=SHARES,
        random=RandomControl(
            mean("random", "masking_area"), means("random", "accuracy"), means("random", "probability")
        ),
        maps=maps,
        features=features,
    )
