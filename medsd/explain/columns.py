"""The colour scale of every method's maps: one for all images of a call."""

from __future__ import annotations

import numpy as np

from medsd.evaluate.calibration import SCALE_PERCENTILE
from medsd.explain.explained import ExplainedImages
from medsd.explain.sheet import SheetColumn
from medsd.heatmap.scale import ColourScale, saliency_scale
from medsd.saliency.registry import CAPTUM, method_card

LABEL_FREE_COLORMAP = "cividis"
_UNITS = {
    "gradient": "{output} per unit of {layer}",
    "smoothgrad": "{output} per unit of {layer}",
    "gradient_x_activation": "{output}, mean of channels",
    "deeplift": "{output}, mean of channels",
    "integrated_gradients": "{output}, mean of channels",
    "gradcam": "{output}, sum of channels",
    "multivec_eigencam": "activation squared",
    "mtsm": "activation squared",
    "channel_energy": "activation squared",
}


def sheet_column(name: str, explained: ExplainedImages) -> SheetColumn:
    """A method's scale, from the maps of all images: the weights' own limit where it holds for them.

    That limit holds for two classes, the calibrated layer, attribution and smoothing, and images of the tile's size:
    a gradient of pooled features is smaller where more is pooled. Otherwise the scale ends at the 99.5th percentile of
    |map|. Maps for and against a class diverge from 0; of label-free ones the signed are centred there, the others
    start.
    """
    settings, classes = explained.settings, explained.model.classes
    output = "log-odds" if settings.output == "evidence" and len(classes) == 2 else settings.output
    unit = _UNITS.get(name, "as captum gives it" if name.startswith(CAPTUM) else "activation").format(
        output=output, layer="input" if settings.layer == "input" else "activation"
    )
    strengths = np.abs(np.concatenate([image.maps[name].ravel() for image in explained.images]))
    limit, source = _calibrated_limit(name, explained), "limit: kept with the weights"
    if limit is None:
        limit = float(np.percentile(strengths, SCALE_PERCENTILE))
        source = f"limit: {SCALE_PERCENTILE:g}th percentile of all images"
    if not limit > 0:
        limit, source = float(strengths.max()) or 1.0, "limit: the greatest value of all images"
    if method_card(name).needs_label:
        return SheetColumn(name, saliency_scale(limit, unit), source, True)
    # Other colours than for and against a class, signed or not.
    least = -limit if method_card(name).signed else 0.0
    return SheetColumn(name, ColourScale(least, limit, LABEL_FREE_COLORMAP, "Strength", unit), source, False)


def _calibrated_limit(name: str, explained: ExplainedImages) -> float | None:
    settings, model, card = explained.settings, explained.model, explained.model.card
    if card is None or card.calibration is None or len(model.classes) != 2 or settings.output != "evidence":
        return None
    known = card.calibration
    asked = name, model.layer(settings.layer), settings.smoothing, {image.size_px for image in explained.images}
    holds = known.attribution, model.layer(known.layer), known.smoothing, {(card.tile_px, card.tile_px)}
    return known.saliency_limit if asked == holds else None
