"""What is measured of every map of every image, and what it comes to over the images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from medsd.evaluate.scores import Interval, bootstrap_mean
from medsd.saliency.metrics.agreement import rank_correlation
from medsd.saliency.metrics.insertion_deletion import curve_area, deletion_curve, insertion_curve
from medsd.saliency.metrics.localisation import best_iou
from medsd.saliency.metrics.masking import masking_curve, random_masking_curve
from medsd.saliency.metrics.perturb import at_pixels, unit_strength
from medsd.saliency.metrics.pointing import area_share, energy_pointing, pointing_game
from medsd.saliency.metrics.scoring import Score
from medsd.saliency.metrics.smoothness import normalised_variation, nyquist_energy

_STEPS = 20
_DRAWS = 3
_SIGNS = {"higher": "+", "lower": "-", "": ""}


@dataclass(frozen=True)
class Measure:
    """A measure of a map.

    Attributes:
        name: its column in `metrics.csv`.
        words: what it is, in one line.
        better: the direction of a better map; "" for what is no judgement.
        kind: the question it answers, by which tables are split.
    """

    name: str
    words: str
    better: Literal["higher", "lower", ""]
    kind: Literal["faithfulness", "smoothness", "localisation"]


MEASURES = (
    Measure("insertion", "area of the class's probability as the most salient pixels come", "higher", "faithfulness"),
    Measure("deletion", "area of the class's probability as the most salient pixels go", "lower", "faithfulness"),
    Measure("masking_gap", "how much sooner the class is lost than by random masking", "higher", "faithfulness"),
    Measure("variation", "variation of the map, channels averaged: 0 flat, 2.8 noise", "lower", "smoothness"),
    Measure("nyquist", "share of the map's energy in the checkerboard of stride 2", "lower", "smoothness"),
    Measure("energy_pointing", "share of the positive saliency inside the mask", "higher", "localisation"),
    Measure("pointing_game", "how often the greatest value lies inside the mask", "higher", "localisation"),
    Measure("best_iou", "overlap with the mask at the best threshold", "higher", "localisation"),
    Measure("area_share", "share of the image that the mask covers: chance", "", "localisation"),
)
"""Measures in the order of the tables (numbers behind them: our choice, as in `medsd.evaluate.explanations`)."""


def smoothness(maps: Tensor) -> dict[str, Tensor]:
    """Measures (B,) of maps (B, h, w) at the size of the layer, which need no class and no unit."""
    planes = unit_strength(maps)[:, None]
    return {"variation": normalised_variation(planes), "nyquist": nyquist_energy(planes)}


def faithfulness(
    network: nn.Module, x: Tensor, target: Tensor | None, maps: Mapping[str, Tensor], seed: int, batch_size: int
) -> dict[str, dict[str, Tensor]]:
    """Measures (B,) by method: does what a map names decide the class?

    The masking gap is nan for images that are predicted to be of another class than the target.
    Of an encoder without classes, likeness to the image's own features stands in for the probability, and there is no
    masking gap.

    Pixels are ranked on maps brought to the image by nearest neighbour (the paper's and the sheet's); equal ones in
    random order, drawn for the batch. Deletion goes to 0, which is the mean colour, insertion starts from RISE's blur,
    masking fills with the image's mean.

    Args:
        network: the network itself, whatever smoothed the maps; gives logits (B, K), of encoders (B, d, h, w).
        x: (B, C, H, W) float images, as the network takes them.
        target: (B,) class numbers; None for an encoder.
        maps: (B, h, w) by method.
        seed: of the random orders.
        batch_size: images in one pass.
    """
    # Drawn anew for each method, so that its measures do not depend on those beside it.
    generator = torch.Generator(x.device)
    x = x.contiguous(memory_format=torch.channels_last)  # the faster for convolutions, on CPUs too
    score: Score = "similarity" if target is None else "probability"
    step_px = -(-x.shape[2] * x.shape[3] // _STEPS)
    judged = {}
    for name, values in maps.items():
        full = at_pixels(values, x)
        options = step_px, generator.manual_seed(seed), batch_size, score
        inserted = insertion_curve(network, x, target, full, "blur", *options)
        deleted = deletion_curve(network, x, target, full, "zero", *options)
        judged[name] = {"insertion": curve_area(inserted), "deletion": curve_area(deleted)}
    if target is not None:
        generator.manual_seed(seed)
        control = random_masking_curve(network, x, target, generator, _DRAWS, batch_size=batch_size)
        for name, values in maps.items():
            full = at_pixels(values, x)
            generator.manual_seed(seed)
            curve = masking_curve(network, x, target, full, generator=generator, batch_size=batch_size)
            # Of an image that is not predicted to be of the class there is nothing to lose.
            held = control.correct[:, 0] == 1
            judged[name]["masking_gap"] = torch.where(held, control.area - curve.area, math.nan)
    return judged


def localisation(maps: Tensor, region: Tensor) -> dict[str, Tensor]:
    """Measures (B,) of maps (B, H, W) against regions (B, H, W) bool; nan where one is empty or fills the image.

    A map without a positive value points at nothing and counts 0.
    """
    area = area_share(region)
    area = torch.where((area > 0) & (area < 1), area, math.nan)
    found = {
        "energy_pointing": energy_pointing(unit_strength(maps), region).nan_to_num(0.0),
        "pointing_game": pointing_game(maps, region).nan_to_num(0.0),
        "best_iou": best_iou(maps, region),
        "area_share": area,
    }
    return {name: torch.where(area.isnan(), math.nan, values) for name, values in found.items()}


def agreement(maps: Mapping[str, Tensor]) -> Tensor:
    """Spearman's correlation of every two methods' maps, (B, M, M); nan where one of them is constant."""
    rows = [torch.stack([rank_correlation(first, second) for second in maps.values()]) for first in maps.values()]
    return torch.stack(rows).permute(2, 0, 1)


def intervals(
    per_image: Sequence[Mapping[str, Mapping[str, float]]], methods: Sequence[str], seed: int
) -> dict[str, dict[str, Interval]]:
    """Means over images by method and measure, with 95 % bootstrap intervals over images.

    Images without a value (no mask, say) are left out; a measure without any is missing.

    Args:
        per_image: for each image its measures by method and name; nan where undefined.
        methods: in the order of the result.
        seed: of the resamples.
    """
    summary: dict[str, dict[str, Interval]] = {method: {} for method in methods}
    for method in methods:
        for measure in MEASURES:
            values = np.array([image[method].get(measure.name, math.nan) for image in per_image])
            known = values[~np.isnan(values)]
            if len(known):
                summary[method][measure.name] = bootstrap_mean(known, seed=seed)
    return summary


def text_tables(summary: Mapping[str, Mapping[str, Interval]]) -> list[str]:
    """The means with their intervals as plain text, a table a kind of measure, about 100 columns wide."""
    width = max(map(len, [*summary, "faithfulness"])) + 1
    tables = []
    for kind in dict.fromkeys(measure.kind for measure in MEASURES):
        measured = {name for row in summary.values() for name in row}
        shown = [measure for measure in MEASURES if measure.kind == kind and measure.name in measured]
        if shown:
            heads = [f"{measure.name} {_SIGNS[measure.better]}" for measure in shown]
            lines = [_line(kind, heads, width)]
            lines += [
                _line(method, [_cell(row.get(measure.name)) for measure in shown], width)
                for method, row in summary.items()
            ]
            tables.append("\n".join(lines))
    if tables:
        tables.append("Means (95 % bootstrap intervals over images); + higher is better, - lower is better.")
    return tables


def agreement_table(agreement: Mapping[str, Mapping[str, float]]) -> str:
    """Rank correlations as plain text, methods numbered; empty for a single method."""
    if len(agreement) < 2:
        return ""
    width = max(map(len, agreement)) + 6
    lines = [f"{'rank correlation':<{width}}" + "".join(f"{number:>7}" for number in range(1, len(agreement) + 1))]
    for number, (name, row) in enumerate(agreement.items(), start=1):
        cells = "".join("      -" if math.isnan(value) else f"{value:7.2f}" for value in row.values())
        lines.append(f"{number:>3}  {name:<{width - 5}}{cells}")
    return "\n".join(lines)


def _line(head: str, cells: Sequence[str], width: int) -> str:
    return (f"{head:<{width}}" + "".join(f"{cell:<20}" for cell in cells)).rstrip()


def _cell(interval: Interval | None) -> str:
    if interval is None:
        return "-"
    # A single image has no interval.
    return f"{interval.value:.3f}" + (
        f" ({interval.low:.3f}-{interval.high:.3f})" if interval.low < interval.high else ""
    )
