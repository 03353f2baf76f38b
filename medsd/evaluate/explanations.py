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

from medsd.checks import check_number
from medsd.cohort.dataset import Sample, even_draw
from medsd.errors import DatasetError
from medsd.evaluate.features import FeatureHealth, feature_health
from medsd.evaluate.measures import Measured, MeasureSettings, mean_of_known, measure_maps
from medsd.evaluate.scores import Interval
from medsd.networks.aim import AimClassifier
from medsd.networks.classifier import Classifier
from medsd.networks.modes import evaluating
from medsd.progress import Progress, no_progress
from medsd.saliency.metrics.masking import SHARES, MaskingCurve
from medsd.saliency.registry import make_method
from medsd.training.predict import collect

TileRegion = Callable[[int], npt.NDArray[np.bool_]]
MapScores = dict[str, Interval | tuple[Interval, ...]]

_MAP_BATCH = 32
_MEASURES = ("masking_area", "gap", "deletion", "insertion", "magnitude", "total_variation", "gini", "entropy")
# Measures by their names in `scores.json`.
_MEASURED = {name: name for name in _MEASURES} | {"pointing": "energy_pointing", "pointing_game": "pointing_game"}


@dataclass(frozen=True, kw_only=True)
class ExplanationSettings(MeasureSettings):
    """What the scores rest on (numbers: our choice); runs to be compared must share all but seed and batch size.

    Attributes:
        items: tiles that maps are made of, as many of each class as the data allow.
        target: the class whose regions are pointed at.
        seed: chooses tiles, random orders and resamples.
    """

    items: int = 128
    target: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("items", self.items, "[1, inf)", whole=True)
        check_number("target", self.target, "[0, inf)", whole=True)


@dataclass(frozen=True)
class Explanations:
    """Scores of a classifier's explanations: means over tiles, with 95 % bootstrap intervals.

    Attributes:
        settings: what they rest on.
        items: tiles given; the features are those of all.
        judged: tiles that maps were made of.
        pointed: those of the target class with a region that neither is empty nor fills the tile.
        area_share: mean share of the tile that their regions cover, which is chance; nan without any.
        shares: shares of pixels masked.
        random: what masking in random order does, the network's own robustness: "masking_area", and at each of the
            shares "accuracy" and "probability" of the true class.
        maps: the same by name (see `explanation_maps`) in the order of the map, and measures of it, see
            `medsd.evaluate.measures.MEASURES` (its "energy_pointing" is "pointing" here).
        features: correlation, rank and dead channels of the pooled features.
    """

    settings: ExplanationSettings
    items: int
    judged: int
    pointed: int
    area_share: Interval
    shares: tuple[float, ...]
    random: MapScores
    maps: dict[str, MapScores]
    features: FeatureHealth


_DEFAULT = ExplanationSettings()


def score_explanations(
    classifier: Classifier,
    dataset: Dataset[Sample] | Sequence[Sample],
    settings: ExplanationSettings = _DEFAULT,
    region: TileRegion | None = None,
    progress: Progress = no_progress,
    collected: tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]] | None = None,
) -> Explanations:
    """Judge a classifier's explanations of its tiles' true classes.

    Intervals resample tiles; tiles of one slide are alike, so they are narrower than those over slides would be.
    Probabilities are softmax(logits), without a temperature.

    Args:
        classifier: in eval mode for the length of the call.
        dataset: samples {"image": (3, S, S) uint8, "label"}, all of one size.
        settings: what the scores rest on.
        region: the target within the tile of that number, (S, S) bool; `masks.__getitem__` of an array (N, S, S).
        progress: shown over batches.
        collected: pooled features (n, d) and labels (n,) of all tiles, where they are there already.

    Raises:
        DatasetError: fewer than two tiles, labels that are no class, a region of another size, or maps that are not
            finite.
        ConfigError: no such fill, or a target that is no class.

    Example:
        >>> from medsd.networks.classifier import TileClassifier
        >>> tiles = [{"image": torch.full((3, 32, 32), 9 * n, dtype=torch.uint8), "label": n % 2} for n in range(4)]
        >>> found = score_explanations(TileClassifier("test_resnet"), tiles, ExplanationSettings(steps=2, draws=1))
        >>> sorted(found.maps), found.judged
        (['gradient'], 4)
    """
    if len(cast(Sized, dataset)) < 2:
        raise DatasetError(f"explanations: {len(cast(Sized, dataset))} tile(s); at least 2 are needed")
    check_number("target", settings.target, f"[0, {len(classifier.classes) - 1}]", whole=True, hint="a class's number")
    device = next(classifier.parameters()).device
    with evaluating(classifier):
        loader = DataLoader(cast(Dataset[Sample], dataset), settings.batch_size)
        features, labels = collected or collect(classifier, loader, progress, classifier.features)
        unknown = labels[(labels < 0) | (labels >= len(classifier.classes))]
        if len(unknown):
            known = ", ".join(classifier.classes)
            raise DatasetError(f"explanations: label {unknown[0]}; give tiles of the classes {known}")
        health = feature_health(features)
        chosen = even_draw(labels, settings.items, settings.seed)
        generator = torch.Generator(device).manual_seed(settings.seed)
        batches = [chosen[start : start + _MAP_BATCH] for start in range(0, len(chosen), _MAP_BATCH)]
        judged = []
        for numbers in progress(batches, len(batches), "batch"):
            batch = default_collate([dataset[number] for number in numbers])
            inside = _regions(region, numbers, batch, settings.target).to(device)
            # NHWC is the faster for convolutions, on CPUs too.
            images = batch["image"].to(device, memory_format=torch.channels_last)
            truth, x = batch["label"].to(device), classifier.normalise(images)
            maps, names = explanation_maps(classifier, x, truth), [*_MEASURED.values(), "area_share"]
            judged.append(measure_maps(classifier, x, truth, maps, names, inside, settings, generator))
    return _scores(judged, len(labels), health, settings)


def explanation_maps(classifier: Classifier, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Maps (B, H, W) that classifiers of every kind are compared by, and of one that masks itself its "mask".

    "gradient" is |mean over channels| of the gradient of the evidence with respect to the pixels: the mean comes before
    the absolute value, as where training ranks pixels. "mask" is the mean over the stages' masks, 0 to 1.

    Args:
        classifier: in eval mode.
        x: (B, C, H, W) float images, as the network takes them.
        labels: (B,) class numbers, whose evidence is explained.
    """
    maps = {"gradient": make_method("gradient", classifier, None, "evidence")(x, labels).abs()}
    if isinstance(classifier, AimClassifier):
        with torch.no_grad():
            _, maps["mask"] = classifier.open_share(x, whole=True)
    return maps


def _regions(region: TileRegion | None, numbers: Sequence[int], batch: Sample, target: int) -> Tensor:
    """(B, H, W) bool; empty for tiles of other classes, whose map explains something else."""
    inside = torch.zeros(len(numbers), *batch["image"].shape[2:], dtype=torch.bool)
    for row, number in enumerate(numbers):
        if region is None or int(batch["label"][row]) != target:
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
    batches: Sequence[Measured], items: int, features: FeatureHealth, settings: ExplanationSettings
) -> Explanations:
    def mean(values: Tensor) -> Interval:
        return mean_of_known(values.double().cpu().numpy(), settings.seed)

    def column(of: str, measure: str) -> Tensor:
        return torch.cat([batch.of[of][measure] for batch in batches])

    def masking(curves: Sequence[MaskingCurve]) -> MapScores:
        correct = torch.cat([curve.correct for curve in curves])
        probability = torch.cat([curve.probability for curve in curves])
        return {"accuracy": tuple(map(mean, correct.T)), "probability": tuple(map(mean, probability.T))}

    controls = [batch.control for batch in batches if batch.control is not None]
    area = column("gradient", "area_share")
    return Explanations(
        settings=settings,
        items=items,
        judged=len(area),
        pointed=int(torch.count_nonzero(~area.isnan())),
        area_share=mean(area),
        shares=SHARES,
        random={"masking_area": mean(torch.cat([control.area for control in controls])), **masking(controls)},
        maps={
            name: {
                **{key: mean(column(name, measure)) for key, measure in _MEASURED.items()},
                **masking([batch.masking[name] for batch in batches]),
            }
            for name in batches[0].of
        },
        features=features,
    )
