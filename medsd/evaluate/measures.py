"""What is measured of saliency maps, of tiles and of images alike: the list, the measuring, means with intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from medsd.checks import check_choice, check_number
from medsd.evaluate.scores import Interval, bootstrap_mean
from medsd.saliency.metrics.agreement import rank_correlation
from medsd.saliency.metrics.concentration import gini_index, normalised_entropy, total_variation
from medsd.saliency.metrics.insertion_deletion import curve_area, deletion_curve, insertion_curve
from medsd.saliency.metrics.masking import MaskingCurve, masking_curve, random_masking_curve
from medsd.saliency.metrics.perturb import Baseline, at_pixels, unit_strength
from medsd.saliency.metrics.pointing import area_share, best_iou, energy_pointing, pointing_game
from medsd.saliency.metrics.scoring import Perturbation
from medsd.saliency.metrics.smoothness import normalised_variation, nyquist_energy


@dataclass(frozen=True)
class Measure:
    """A measure of a map.

    Attributes:
        name: its column in tables.
        words: what it is, in one line.
        better: the direction of a better map; "" for what is no judgement.
        kind: the question it answers, by which tables are split.
    """

    name: str
    words: str
    better: Literal["higher", "lower", ""]
    kind: Literal["faithfulness", "smoothness", "concentration", "localisation"]


_LIST = (
    Measure("insertion", "area of the class's probability as the most salient pixels come", "higher", "faithfulness"),
    Measure("deletion", "area of the class's probability as the most salient pixels go", "lower", "faithfulness"),
    Measure("masking_area", "area of accuracy as the most salient pixels are masked", "lower", "faithfulness"),
    Measure("gap", "area of accuracy under random masking less that", "higher", "faithfulness"),
    Measure("masking_gap", "how much sooner the class is lost than by random masking", "higher", "faithfulness"),
    Measure("variation", "variation of the map, channels averaged: 0 flat, 2.8 noise", "lower", "smoothness"),
    Measure("nyquist", "share of the map's energy in the checkerboard of stride 2", "lower", "smoothness"),
    Measure("total_variation", "mean difference of neighbours over the mean of the map", "lower", "smoothness"),
    Measure("gini", "Gini index of the map: 0 constant, 1 a single pixel", "higher", "concentration"),
    Measure("entropy", "entropy of the map: 1 constant, 0 a single pixel", "lower", "concentration"),
    Measure("magnitude", "mean of the map without its sign", "", "concentration"),
    Measure("energy_pointing", "share of the positive saliency inside the mask", "higher", "localisation"),
    Measure("pointing_game", "how often the greatest value lies inside the mask", "higher", "localisation"),
    Measure("best_iou", "overlap with the mask at the best threshold", "higher", "localisation"),
    Measure("area_share", "share of the image that the mask covers: chance", "", "localisation"),
)
MEASURES = {measure.name: measure for measure in _LIST}
"""By name, in the order of tables."""

_OF_MASKING = {"masking_area", "gap", "masking_gap"}
_OF_REMOVAL: dict[str, Callable[..., Tensor]] = {"insertion": insertion_curve, "deletion": deletion_curve}
_OF_MAP: dict[str, Callable[[Tensor], Tensor]] = {
    "variation": lambda maps: normalised_variation(unit_strength(maps)[:, None]),
    "nyquist": lambda maps: nyquist_energy(unit_strength(maps)[:, None]),
    "total_variation": total_variation,
    "gini": gini_index,
    "entropy": normalised_entropy,
    "magnitude": lambda maps: maps.abs().mean(dim=(1, 2)),
}
_OF_REGION: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "energy_pointing": lambda maps, region: energy_pointing(unit_strength(maps.double()), region),
    "pointing_game": pointing_game,
    "best_iou": best_iou,
    "area_share": lambda _maps, region: area_share(region),
}


@dataclass(frozen=True, kw_only=True)
class MeasureSettings:
    """How the network is asked about changed images (numbers: our choice).

    Attributes:
        draws: random orders an image of the masking control.
        fill: what masked pixels become; deletion goes to 0, the mean colour, insertion starts from RISE's blur.
        steps: steps of deletion and insertion.
        batch_size: images in one pass.
        seed: of random orders.

    Raises:
        ConfigError: a number below 1, or a seed below 0.
    """

    draws: int = 3
    fill: Baseline = "mean"
    steps: int = 20
    batch_size: int = 32
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("draws", "steps", "batch_size"):
            check_number(name, getattr(self, name), "[1, inf)", whole=True)
        check_number("seed", self.seed, "[0, inf)", whole=True)


_DEFAULT = MeasureSettings()


@dataclass(frozen=True)
class Measured:
    """What was measured of the maps of a batch.

    Attributes:
        of: (B,) by map and measure; nan where undefined.
        masking: the curve behind the measures of masking, by map.
        control: that of masking in random order; None where masking is not measured.
    """

    of: dict[str, dict[str, Tensor]]
    masking: dict[str, MaskingCurve]
    control: MaskingCurve | None


def measure_maps(
    network: nn.Module,
    x: Tensor,
    target: Tensor | None,
    maps: Mapping[str, Tensor],
    names: Sequence[str],
    region: Tensor | None = None,
    settings: MeasureSettings = _DEFAULT,
    generator: torch.Generator | None = None,
) -> Measured:
    """Measure maps of a batch: do they name what decides, are they smooth, do they point into the region?

    Maps are brought to the image by nearest neighbour where pixels are ranked or compared with the region, and are as
    given where smoothness and concentration are measured. A map without a positive value points at nothing and counts
    0; an empty region, and one that fills the image, compare with nothing. The masking gap is undefined for images that
    are predicted to be of another class than the target: there is nothing to lose.

    Args:
        network: the network itself, whatever smoothed the maps; gives logits (B, K), of encoders (B, d, h, w).
        x: (B, C, H, W) float images, as the network takes them; channels-last is the faster for convolutions.
        target: (B,) class numbers; None for an encoder, where likeness to the image's own features stands in for the
            probability, and nothing is measured by masking.
        maps: (B, h, w) by name.
        names: measures of `MEASURES`, insertion and deletion in the order in which random numbers are drawn for them.
        region: (B, H, W) bool; None leaves localisation out.
        settings: how the network is asked.
        generator: orders equal pixels and goes on from map to map, on the device of `x`. None begins anew from the seed
            for each map, so that its measures do not depend on those beside it.

    Raises:
        DatasetError: maps that are not finite, or a region of another size.
        ConfigError: no such measure or fill, or a class that the network does not have.
        NetworkError: the network's output is neither logits nor features.

    Example:
        >>> x, maps = torch.zeros(1, 3, 8, 8), {"edge": torch.eye(8)[None]}
        >>> region = torch.eye(8)[None] > 0
        >>> found = measure_maps(nn.Identity(), x, None, maps, ["gini", "energy_pointing", "area_share"], region)
        >>> {name: round(float(values), 3) for name, values in found.of["edge"].items()}
        {'gini': 0.875, 'energy_pointing': 1.0, 'area_share': 0.125}
    """
    for measure in names:
        check_choice("measure", measure, MEASURES)
    fresh = torch.Generator(x.device)

    def asked(baseline: Baseline | None = None) -> Perturbation:
        orders = fresh.manual_seed(settings.seed) if generator is None else generator
        step_px = -(-x.shape[2] * x.shape[3] // settings.steps)
        return Perturbation(
            baseline, step_px, orders, settings.batch_size, "similarity" if target is None else "probability"
        )

    control = None
    if target is not None and not _OF_MASKING.isdisjoint(names):
        control = random_masking_curve(network, x, target, settings.draws, asked(settings.fill))
    measured = Measured({}, {}, control)
    for name, values in maps.items():
        full, found = at_pixels(values, x), {}
        if control is not None and target is not None:
            measured.masking[name] = masking_curve(network, x, target, full, asked(settings.fill))
            found = _against_random(measured.masking[name], control)
        removal = asked()
        for measure in names:
            if measure in _OF_REMOVAL:
                found[measure] = curve_area(_OF_REMOVAL[measure](network, x, target, full, removal))
            elif measure in _OF_MAP:
                found[measure] = _OF_MAP[measure](values)
            elif measure in _OF_REGION and region is not None:
                found[measure] = _inside(measure, full, region)
        # Without classes nothing is masked, and without a region nothing compared.
        measured.of[name] = {measure: found[measure] for measure in names if measure in found}
    return measured


def _against_random(curve: MaskingCurve, control: MaskingCurve) -> dict[str, Tensor]:
    """The measures of masking, (B,) each."""
    gap = control.area - curve.area
    held = control.correct[:, 0] == 1
    return {"masking_area": curve.area, "gap": gap, "masking_gap": torch.where(held, gap, math.nan)}


def _inside(measure: str, full: Tensor, region: Tensor) -> Tensor:
    """A measure of localisation, (B,)."""
    area = area_share(region)
    return _OF_REGION[measure](full, region).nan_to_num(0.0).where((area > 0) & (area < 1), math.nan)


def mean_of_known(values: npt.ArrayLike, seed: int = 0) -> Interval:
    """Mean of what is defined, with its 95 % bootstrap interval over items; nan where nothing is.

    Args:
        values: (n,), nan where undefined.
        seed: of the resamples.
    """
    known = np.asarray(values, np.float64)
    return bootstrap_mean(known[~np.isnan(known)], seed=seed)


def agreement(maps: Mapping[str, Tensor]) -> Tensor:
    """Spearman's correlation of every two maps of an image, (B, M, M); nan where one of them is constant.

    Maps of several sizes are brought to that of the largest by nearest neighbour.
    """
    largest = max(maps.values(), key=lambda values: values.shape[1:].numel())
    full = [at_pixels(values, largest[:, None]) for values in maps.values()]
    rows = [torch.stack([rank_correlation(first, second) for second in full]) for first in full]
    return torch.stack(rows).permute(2, 0, 1)
