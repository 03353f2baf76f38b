"""What a call leaves behind: contact sheets, `metrics.csv`, `metrics.json`, `maps.safetensors`."""

from __future__ import annotations

import csv
import io
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from medsd import RESEARCH_USE_ONLY
from medsd.evaluate.scores import Interval
from medsd.evaluate.summary import as_json
from medsd.explain.columns import sheet_column
from medsd.explain.explained import ExplainedImage, ExplainedImages
from medsd.explain.measures import MEASURES, agreement_table, intervals, text_tables
from medsd.explain.model import INPUT, Model
from medsd.explain.settings import ExplainSettings
from medsd.explain.sheet import OPACITY, SheetColumn, SheetRow, draw_sheets
from medsd.files import write_json, write_text
from medsd.networks.weights import save_tensors

MAPS_FORMAT = "medsd-maps-1"
# An image this many times larger or smaller than the tiles of the training shows other things than they did.
_FAR = 2.0


@dataclass(frozen=True)
class Summary:
    """The content of `metrics.json`; nan becomes null.

    Attributes:
        weights, weights_sha256: the network.
        settings: what was asked for, with the methods that were chosen.
        layer: full name of the layer, "input" for the network's input.
        images, failed: how many, and the reasons of those left out.
        measures: means over images with 95 % bootstrap intervals, by method and measure.
        agreement: mean over images of Spearman's correlation between two methods' maps, by both their names.
        scales: limits and unit of every method's colours.
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
    meaning: dict[str, str]
    notes: list[str]

    def in_words(self) -> str:
        """The means and the agreement as plain text."""
        parts = [*text_tables(self.measures), agreement_table(self.agreement)]
        return "\n\n".join(part for part in parts if part)


def write_outputs(folder: Path, explained: ExplainedImages) -> Summary:
    """Write the files, each whole or not at all; those of an earlier call are replaced.

    `maps.safetensors` holds the map (h, w) float32 of "image/method", signed, not normalised; its metadata's "card" is
    JSON with the settings and each image's classes.

    Raises:
        OutputError: `folder` cannot be written to.
    """
    model, settings, images = explained.model, explained.settings, explained.images
    sizes = {image.size_px for image in images}
    columns = [
        sheet_column(name, [image.maps[name] for image in images], sizes, model, settings) for name in settings.methods
    ]
    notes = _notes(explained, columns)
    layer = model.layer(settings.layer) or INPUT
    per_image = [image.measures for image in images]
    summary = Summary(
        weights=model.path.name,
        weights_sha256=model.sha256,
        settings=asdict(settings),
        layer=layer,
        images=len(images),
        failed=explained.failed,
        measures=intervals(per_image, settings.methods, settings.seed),
        agreement=_agreement(explained),
        scales={column.name: {**asdict(column.scale), "source": column.source} for column in columns},
        meaning={measure.name: f"{measure.words} ({measure.better or 'no judgement'})" for measure in MEASURES},
        notes=notes,
    )
    rows = [_row(image, model, settings) for image in images]
    draw_sheets(folder, rows, columns, _title(model, settings), notes)
    write_text(folder / "metrics.csv", _table(images, model))
    tensors = {f"{image.name}/{name}": torch.from_numpy(image.maps[name]) for image in images for name in image.maps}
    shown = [{"image": image.name, "size_px": image.size_px, **_classes(image, model)} for image in images]
    card = {"weights_sha256": model.sha256, "layer": layer, "settings": asdict(settings), "images": shown}
    save_tensors(folder / "maps.safetensors", tensors, MAPS_FORMAT, card)
    write_json(folder / "metrics.json", as_json(summary))
    return summary


def _row(image: ExplainedImage, model: Model, settings: ExplainSettings) -> SheetRow:
    height, width = image.size_px
    about, explained = f"{width} x {height} px", ""
    if image.predicted is not None and image.explained is not None:
        about = f"predicted {model.classes[image.predicted]} {image.probability:.2f}"
        explained = model.classes[image.explained]
    maps = tuple(image.maps[name] for name in settings.methods)
    return SheetRow(image.picture, image.region, (image.name, about), explained, maps)


def _title(model: Model, settings: ExplainSettings) -> str:
    layer = model.layer(settings.layer) or "the input"
    smoothing = "no smoothing" if settings.smoothing == "none" else f"smoothing: {settings.smoothing.replace('_', ' ')}"
    return f"{RESEARCH_USE_ONLY} {model.name} {model.sha256[:8]}, maps at {layer.removeprefix('encoder.')}, {smoothing}"


def _notes(explained: ExplainedImages, columns: list[SheetColumn]) -> list[str]:
    settings, card = explained.settings, explained.model.card
    sizes = {image.size_px for image in explained.images}
    notes = [f"{RESEARCH_USE_ONLY} Maps show what the model reacts to, not where tumour is."]
    if any(column.of_class for column in columns):
        notes.append("Brown speaks for the class named below the map, teal against it.")
        if len({image.explained for image in explained.images}) > 1:
            notes.append(
                "Rows explain different classes, so brown changes its meaning from row to row: name one class as "
                "target to compare them."
            )
    if not all(column.of_class for column in columns):
        notes.append("Maps without a class named below show where activations are strong or unusual, for no class.")
    if "eigencam_reference" in settings.methods:
        notes.append("The sign of eigencam_reference is arbitrary, image by image.")
    notes.append(
        "A column has one scale for all images; colours of two columns do not compare. Bars are in full colour, maps "
        f"at {OPACITY:.0%} over the picture in light grey; their squares are the cells of the layer."
    )
    if len(sizes) > 1:
        notes.append("The images differ in size, and values with it: compare the colours of images of one size only.")
    if card is None:
        notes.append("The weights do not say which scale (µm per pixel) they expect.")
    else:
        notes.append(
            f"The weights expect {card.mpp:g} µm per pixel; pictures do not tell theirs, so check it "
            f"(tiles of {card.tile_px} px, trained on {card.trained_on})."
        )
        far = [size for size in sizes if not 1 / _FAR <= math.sqrt(size[0] * size[1]) / card.tile_px <= _FAR]
        if far:
            count = sum(image.size_px in far for image in explained.images)
            notes.append(f"{count} image(s) are over {_FAR:g} times larger or smaller than those tiles.")
        if card.stain_target is not None:
            notes.append("The weights were trained on stain-normalised tiles; these images are taken as they are.")
    if explained.masked and not any(image.region is not None and image.region.any() for image in explained.images):
        notes.append("No mask marks anything, so nothing is compared with masks.")
    elif explained.masked:
        notes.append("Black and white outline: the mask.")
        if settings.target == "predicted":
            notes.append("Masks are compared with maps of the predicted class; name the masks' class as target.")
    if explained.failed:
        notes.append(f"{len(explained.failed)} image(s) could not be read and are left out.")
    return notes


def _agreement(explained: ExplainedImages) -> dict[str, dict[str, float]]:
    """Means over the images whose maps are not constant; nan without any."""
    stacked = np.stack([image.agreement for image in explained.images])
    known = ~np.isnan(stacked)
    count = known.sum(axis=0)
    means = np.where(count > 0, np.where(known, stacked, 0.0).sum(axis=0) / np.maximum(count, 1), math.nan)
    names = explained.settings.methods
    return {first: dict(zip(names, map(float, row), strict=True)) for first, row in zip(names, means, strict=True)}


def _classes(image: ExplainedImage, model: Model) -> dict[str, Any]:
    if image.predicted is None or image.explained is None:
        return {"predicted": "", "probability": "", "explained": ""}
    return {
        "predicted": model.classes[image.predicted],
        "probability": round(image.probability, 6),
        "explained": model.classes[image.explained],
    }


def _table(images: tuple[ExplainedImage, ...], model: Model) -> str:
    text = io.StringIO()
    found = {name for image in images for values in image.measures.values() for name in values}
    used = [measure.name for measure in MEASURES if measure.name in found]
    heads = ["image", "width_px", "height_px", "predicted", "probability", "explained", "method", *used]
    writer = csv.DictWriter(text, heads, restval="", lineterminator="\n")
    writer.writeheader()
    for image in images:
        about = {"image": image.name, "width_px": image.size_px[1], "height_px": image.size_px[0]}
        for method, values in image.measures.items():
            known = {name: f"{value:.6g}" for name, value in values.items() if not math.isnan(value)}
            writer.writerow({**about, **_classes(image, model), "method": method, **known})
    return text.getvalue()
