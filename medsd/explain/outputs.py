"""What a call leaves behind: contact sheets, `metrics.csv`, `metrics.json`, `maps.safetensors`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch

from medsd import RESEARCH_USE_ONLY
from medsd.evaluate.calibration import SCALE_PERCENTILE
from medsd.evaluate.measures import MEASURES, mean_of_known
from medsd.evaluate.scores import Interval
from medsd.evaluate.summary import as_json
from medsd.explain.model import INPUT, Model
from medsd.explain.settings import MEASURED, ExplainSettings
from medsd.explain.sheet import OPACITY, SheetColumn, SheetRow, draw_sheets
from medsd.files import write_json
from medsd.heatmap.legend import ADDITIVE, meaning
from medsd.heatmap.scale import ColourScale, saliency_scale
from medsd.networks.weights import save_tensors
from medsd.saliency import CAPTUM
from medsd.saliency.neutral import NeutralReference
from medsd.saliency.registry import method_card
from medsd.slides.readers.base import RGB, Bools
from medsd.tables import write_table

MAPS_FORMAT = "medsd-maps-1"
# An image this many times larger or smaller than the tiles of the training shows other things than they did.
_FAR = 2.0
_LABEL_FREE_COLORMAP = "cividis"
_UNITS = {
    "gradient": "{output} per unit of {layer}",
    "smoothgrad": "{output} per unit of {layer}",
    "gradient_x_activation": "{output}, mean of channels",
    ADDITIVE: "{output}",
    "integrated_gradients": "{output}, mean of channels",
    "gradcam": "{output}, sum of channels",
    "multivec_eigencam": "activation squared",
    "mtsm": "activation squared",
    "channel_energy": "activation squared",
}
_SIGNS = {"higher": " +", "lower": " -", "": ""}


@dataclass(frozen=True)
class ExplainedImage:
    """One image with what became of it.

    Attributes:
        name: in tables.
        size_px: height and width.
        picture: a small one.
        region: its mask at that small size, or None.
        predicted, explained: names of classes; "" for an encoder.
        probability: of the predicted class; nan for an encoder.
        output: what is explained, of the explained class and at the weights' temperature; nan for an encoder.
        unexplained: what the map of "deeplift" lacks of that when it is summed; nan without that method.
        maps: (h, w) float32 by method, signed, not normalised, at the size of the layer.
        measures: by method and name; nan where undefined.
        agreement: (M, M) Spearman's correlations of the methods' maps.
    """

    name: str
    size_px: tuple[int, int]
    picture: RGB
    region: Bools | None
    predicted: str
    explained: str
    probability: float
    output: float
    unexplained: float
    maps: dict[str, npt.NDArray[np.float32]]
    measures: dict[str, dict[str, float]]
    agreement: npt.NDArray[np.float64]

    def classes(self) -> dict[str, Any]:
        """What tables say of its classes."""
        probability = round(self.probability, 6) if self.predicted else ""
        return {"predicted": self.predicted, "probability": probability, "explained": self.explained}


@dataclass(frozen=True)
class ExplainedImages:
    """What a call made.

    Attributes:
        model: that was explained.
        settings: with the methods that were chosen.
        images: in the order they were given.
        failed: reasons by name of the image.
        masked: whether masks were given.
        reference: what "deeplift" compared with; None without that method.
    """

    model: Model
    settings: ExplainSettings
    images: tuple[ExplainedImage, ...]
    failed: dict[str, str]
    masked: bool
    reference: NeutralReference | None

    @property
    def output(self) -> str:
        """What is explained, in words."""
        of_two = self.settings.output == "evidence" and len(self.model.classes) == 2
        return "log-odds" if of_two else self.settings.output


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
    meaning: dict[str, str]
    notes: list[str]

    def in_words(self) -> str:
        """The means and the agreement as plain text, a table a kind of measure, about 100 columns wide."""
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
    notes = list(_notes(explained, columns))
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
        meaning={name: f"{MEASURES[name].words} ({MEASURES[name].better or 'no judgement'})" for name in MEASURED},
        notes=notes,
    )
    draw_sheets(folder, [_row(image, settings) for image in images], columns, _title(explained, layer), notes)
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
    start.
    """
    settings = explained.settings
    unit = _UNITS.get(name, "as captum gives it" if name.startswith(CAPTUM) else "activation").format(
        output=explained.output, layer="input" if settings.layer == "input" else "activation"
    )
    strengths = np.abs(np.concatenate([image.maps[name].ravel() for image in explained.images]))
    limit, source = _calibrated_limit(name, explained), "limit: kept with the weights"
    if limit is None:
        limit = float(np.percentile(strengths, SCALE_PERCENTILE))
        source = f"limit: {SCALE_PERCENTILE:g}th percentile of all images"
    if not limit > 0:
        limit, source = float(strengths.max()) or 1.0, "limit: the greatest value of all images"
    if method_card(name).needs_label:
        return SheetColumn(name, saliency_scale(limit, unit), source, "brown: for" if name == ADDITIVE else "explains")
    # Other colours than for and against a class, signed or not.
    least = -limit if method_card(name).signed else 0.0
    return SheetColumn(name, ColourScale(least, limit, _LABEL_FREE_COLORMAP, "Strength", unit), source, "")


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
        about = f"predicted {image.predicted} {image.probability:.2f}"
    maps = tuple(image.maps[name] for name in settings.methods)
    return SheetRow(image.picture, image.region, (image.name, about), image.explained, maps)


def _title(explained: ExplainedImages, layer: str) -> str:
    model, smoothing = explained.model, explained.settings.smoothing
    where = "the input" if layer == INPUT else layer.removeprefix("encoder.")
    smoothed = "no smoothing" if smoothing == "none" else f"smoothing: {smoothing.replace('_', ' ')}"
    return f"{RESEARCH_USE_ONLY} {model.name} {model.sha256[:8]}, maps at {where}, {smoothed}"


def _notes(explained: ExplainedImages, columns: Sequence[SheetColumn]) -> Iterator[str]:
    """What a reader of the sheet must know."""
    settings, card, images = explained.settings, explained.model.card, explained.images
    sizes = [image.size_px for image in images]
    yield f"{RESEARCH_USE_ONLY} Maps show what the model reacts to, not where tumour is."
    methods: dict[str, list[str]] = {}
    for name in settings.methods:
        methods.setdefault(meaning(name, "the class below its map", "an image", explained.output), []).append(name)
    yield from (f"{', '.join(names)}: {words[0].lower()}{words[1:]}" for words, names in methods.items())
    if explained.reference is not None:
        yield _about(explained.reference, explained)
    if any(column.caption for column in columns):
        yield "Brown is above 0, teal below."
        if len({image.explained for image in images}) > 1:
            yield (
                "Rows explain different classes, so brown changes its meaning from row to row: name one class as "
                "target to compare them."
            )
    if "eigencam_reference" in settings.methods:
        yield "The sign of eigencam_reference is arbitrary, image by image."
    yield (
        "A column has one scale for all images; colours of two columns do not compare. Bars are in full colour, maps "
        f"at {OPACITY:.0%} over the picture in light grey; their squares are the cells of the layer."
    )
    if len(set(sizes)) > 1:
        yield "The images differ in size, and values with it: compare the colours of images of one size only."
    if card is None:
        yield "The weights do not say which scale (µm per pixel) they expect."
    else:
        yield (
            f"The weights expect {card.mpp:g} µm per pixel; pictures do not tell theirs, so check it "
            f"(tiles of {card.tile_px} px, trained on {card.trained_on})."
        )
        far = sum(not 1 / _FAR <= math.sqrt(height * width) / card.tile_px <= _FAR for height, width in sizes)
        if far:
            yield f"{far} image(s) are over {_FAR:g} times larger or smaller than those tiles."
        if card.stain_target is not None:
            yield "The weights were trained on stain-normalised tiles; these images are taken as they are."
    if explained.masked and not any(image.region is not None and image.region.any() for image in images):
        yield "No mask marks anything, so nothing is compared with masks."
    elif explained.masked:
        yield "Black and white outline: the mask."
        if settings.target == "predicted":
            yield "Masks are compared with maps of the predicted class; name the masks' class as target."
    if explained.failed:
        yield f"{len(explained.failed)} image(s) could not be read and are left out."


def _about(reference: NeutralReference, explained: ExplainedImages) -> str:
    """What DeepLift compared with, and how far its maps add up."""
    lacking = [image.unexplained for image in explained.images]
    least, most = (f"{value:+.2g}" for value in (min(lacking), max(lacking)))
    extent = {"plane": "an endless plane", "tile": "a map of a tile's size"}[reference.extent]
    return (
        f"{ADDITIVE} compares with the neutral reference from {reference.source}, whose {explained.output} as {extent} "
        f"is {reference.log_odds:.1g}. An image's map lacks {least if least == most else f'{least} to {most}'} of its "
        f"{explained.output}: the reference's own at that size, and what smoothing and DeepLift's rules leave."
    )


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
