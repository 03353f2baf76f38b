"""What a call leaves behind: contact sheets, `metrics.csv`, `metrics.json`, `maps.safetensors`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from medsd import RESEARCH_USE_ONLY
from medsd.evaluate.calibration import SCALE_PERCENTILE
from medsd.evaluate.measures import MEASURES, mean_of_known
from medsd.evaluate.scores import Interval
from medsd.explain.explained import ExplainedImage, ExplainedImages
from medsd.explain.model import INPUT
from medsd.explain.notes import additivity, orange_elsewhere, reading_notes
from medsd.explain.settings import MEASURED, ExplainSettings
from medsd.explain.sheet import SheetColumn, SheetRow, draw_sheets
from medsd.files import as_json, write_json
from medsd.heatmap.legend import ADDITIVE, MASK, explains_class, unit_of
from medsd.heatmap.numbers import probability_text
from medsd.heatmap.scale import explanation_scale
from medsd.networks.weights import save_tensors
from medsd.tables import write_table

MAPS_FORMAT = "medsd-maps-1"
_COLUMNS = 100
_SIGNS = {"higher": " +", "lower": " -", "": ""}


@dataclass(frozen=True)
class Summary:
    """The content of `metrics.json`; nan becomes null.

    Attributes:
        weights, weights_sha256: the network.
        settings: what was asked for, with the methods that were chosen.
        layer: full name of the layer, "input" for the network's input.
        images, failed: how many, and the reasons of those left out.
        measures: means over images with 95 % bootstrap intervals, by method and measure; images without a value (no
            mask, say) are left out, and a measure without any is missing.
        agreement: mean over images of Spearman's correlation between two methods' maps, by both their names.
        scales: limits and unit of every method's colours.
        reference: what "deeplift" compared with, but for its vector; None without that method.
        additivity: how far its maps add up, in words.
        meaning: what each measure is, and which direction is better.
        notes: how to read the sheet.
    """

    weights: str
    weights_sha256: str
    settings: dict[str, Any]
    layer: str
    images: int
    failed: dict[str, str]
    measures: dict[str, dict[str, Interval]]
    agreement: dict[str, dict[str, float]]
    scales: dict[str, dict[str, Any]]
    reference: dict[str, Any] | None
    additivity: str
    meaning: dict[str, str]
    notes: list[str]

    def in_words(self) -> str:
        """Means, agreement and additivity as plain text, a table a kind of measure, about 100 columns wide."""
        found = pd.DataFrame.from_dict(self.measures, orient="index").map(_cell)
        parts = []
        for kind in dict.fromkeys(measure.kind for measure in MEASURES.values()):
            shown = {m.name: m.name + _SIGNS[m.better] for m in MEASURES.values() if m.kind == kind and m.name in found}
            if shown:
                parts.append(found[list(shown)].rename(columns=shown).rename_axis(kind, axis=1).to_string())
        if parts:
            parts.append("Means (95 % bootstrap intervals over images); + higher is better, - lower is better.")
        if len(self.agreement) > 1:
            alike = pd.DataFrame.from_dict(self.agreement, orient="index").rename_axis("rank correlation", axis=1)
            numbered = {name: f"{number}  {name}" for number, name in enumerate(self.agreement, start=1)}
            alike = alike.rename(index=numbered, columns={name: text.split()[0] for name, text in numbered.items()})
            parts.append(alike.to_string(float_format="{:.2f}".format, na_rep="-"))
        parts += [textwrap.fill(self.additivity, _COLUMNS)] if self.additivity else []
        return "\n\n".join(parts)


def write_outputs(folder: Path, explained: ExplainedImages) -> Summary:
    """Write the files, each whole or not at all; those of an earlier call are replaced.

    `maps.safetensors` holds the map (h, w) float32 of "image/method", signed, not normalised; its metadata's "card" is
    JSON with the settings, each image's classes, and the neutral reference.

    Raises:
        OutputError: `folder` cannot be written to.
    """
    model, settings, images = explained.model, explained.settings, explained.images
    columns = [_column(name, explained) for name in settings.methods]
    warning, notes = orange_elsewhere(explained), list(reading_notes(explained))
    layer = model.layer(settings.layer) or INPUT
    reference = None if explained.reference is None else asdict(explained.reference)
    summary = Summary(
        weights=model.path.name,
        weights_sha256=model.sha256,
        settings=asdict(settings),
        layer=layer,
        images=len(images),
        failed=explained.failed,
        measures={method: _means(images, method, settings.seed) for method in settings.methods},
        agreement=_agreement(explained),
        scales={column.name: {**asdict(column.scale), "source": column.source} for column in columns},
        reference=None if reference is None else {key: reference[key] for key in reference if key != "vector"},
        additivity=additivity(explained),
        meaning={name: f"{MEASURES[name].words} ({MEASURES[name].better or 'no judgement'})" for name in MEASURED},
        notes=[warning, *notes] if warning else notes,
    )
    rows = [_row(image, settings) for image in images]
    draw_sheets(folder, rows, columns, _title(explained, layer), notes, warning)
    known = {name for image in images for measures in image.measures.values() for name in measures}
    heads = [
        "image",
        "width_px",
        "height_px",
        "predicted",
        "probability",
        "explained",
        "output",
        "method",
        "unexplained",
    ]
    table = [
        {"image": image.name, "width_px": image.size_px[1], "height_px": image.size_px[0], **image.classes()}
        | {"output": _number(image.output), "method": method}
        | {"unexplained": _number(image.unexplained) if method == ADDITIVE else ""}
        | {name: _number(value) for name, value in measures.items()}
        for image in images
        for method, measures in image.measures.items()
    ]
    write_table(folder / "metrics.csv", table, [*heads, *(name for name in MEASURED if name in known)])
    tensors = {f"{image.name}/{name}": torch.from_numpy(image.maps[name]) for image in images for name in image.maps}
    shown = [{"image": image.name, "size_px": image.size_px, **image.classes()} for image in images]
    card = {"weights_sha256": model.sha256, "layer": layer, "settings": asdict(settings), "images": shown}
    save_tensors(folder / "maps.safetensors", tensors, MAPS_FORMAT, card | {"reference": reference})
    write_json(folder / "metrics.json", as_json(summary))
    return summary


def _column(name: str, explained: ExplainedImages) -> SheetColumn:
    """A method's scale, from the maps of all images: the weights' own limit where it holds for them.

    That limit holds for two classes, the calibrated layer, method and smoothing, and images of the tile's size:
    a gradient of pooled features is smaller where more is pooled. Otherwise the scale ends at the 99.5th percentile of
    |map|. Maps for and against a class diverge from 0; of label-free ones the signed are centred there, the others
    start. Masks end at 1, where all are open.
    """
    settings = explained.settings
    unit = unit_of(name, explained.output, "input" if settings.layer == INPUT else "activation")
    if name == MASK:
        return SheetColumn(name, explanation_scale(name, 1.0, unit), "limit: all masks open", "")
    strengths = np.abs(np.concatenate([image.maps[name].ravel() for image in explained.images]))
    limit, source = _calibrated_limit(name, explained), "limit: kept with the weights"
    if limit is None:
        limit = float(np.percentile(strengths, SCALE_PERCENTILE))
        source = f"limit: {SCALE_PERCENTILE:g}th percentile of all images"
    if not limit > 0:
        limit, source = float(strengths.max()) or 1.0, "limit: the greatest value of all images"
    of_class = "orange: for" if name == ADDITIVE else "explains"
    caption = of_class if explains_class(name) else ""
    return SheetColumn(name, explanation_scale(name, limit, unit), source, caption)


def _calibrated_limit(name: str, explained: ExplainedImages) -> float | None:
    settings, model, card = explained.settings, explained.model, explained.model.card
    if card is None or card.calibration is None or len(model.classes) != 2 or settings.output != "evidence":
        return None
    known = card.calibration
    asked = model.layer(settings.layer), settings.smoothing, {image.size_px for image in explained.images}
    holds = model.layer(known.layer), known.smoothing, {(card.tile_px, card.tile_px)}
    blurred = name == ADDITIVE and known.smooth_um > 0
    return known.limits.get(name) if asked == holds and not blurred else None


def _row(image: ExplainedImage, settings: ExplainSettings) -> SheetRow:
    about = f"{image.size_px[1]} x {image.size_px[0]} px"
    if image.predicted:
        about = f"predicted {image.predicted} {probability_text(image.probability)}"
    maps = tuple(image.maps[name] for name in settings.methods)
    return SheetRow(image.picture, image.region, (image.name, about), image.explained, maps)


def _title(explained: ExplainedImages, layer: str) -> str:
    model, smoothing = explained.model, explained.settings.smoothing
    where = "the input" if layer == INPUT else layer.removeprefix("encoder.")
    smoothed = "no smoothing" if smoothing == "none" else f"smoothing: {smoothing.replace('_', ' ')}"
    return f"{RESEARCH_USE_ONLY} {model.name} {model.sha256[:8]}, maps at {where}, {smoothed}"


def _number(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def _means(images: Sequence[ExplainedImage], method: str, seed: int) -> dict[str, Interval]:
    found = {name: [image.measures[method].get(name, math.nan) for image in images] for name in MEASURED}
    return {name: mean_of_known(values, seed) for name, values in found.items() if not np.isnan(values).all()}


def _agreement(explained: ExplainedImages) -> dict[str, dict[str, float]]:
    """Means over the images whose maps are not constant; nan without any."""
    stacked = np.ma.masked_invalid([image.agreement for image in explained.images])
    means = stacked.mean(axis=0).filled(math.nan).tolist()
    names = explained.settings.methods
    return {first: dict(zip(names, row, strict=True)) for first, row in zip(names, means, strict=True)}


def _cell(interval: Interval | float) -> str:
    if not isinstance(interval, Interval):
        return "-"  # pandas' nan: not measured of this method
    bounds = f" ({interval.low:.3f}-{interval.high:.3f})" if interval.low < interval.high else ""
    return f"{interval.value:.3f}{bounds}"  # a single image has no interval
