"""The colour scale of every method's maps: one for all images of a call."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from medsd.evaluate.calibration import SCALE_PERCENTILE
from medsd.explain.model import Model
from medsd.explain.settings import ExplainSettings
from medsd.explain.sheet import SheetColumn
from medsd.heatmap.scale import ColourScale, saliency_scale
from medsd.saliency.registry import METHODS

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


def sheet_column(
    name: str,
    maps: Sequence[npt.NDArray[np.float32]],
    sizes: set[tuple[int, int]],
    model: Model,
    settings: ExplainSettings,
) -> SheetColumn:
    """A method's scale, from the maps of all images: the weights' own limit where it holds for them.

    That limit holds for two classes, the calibrated layer, attribution and smoothing, and images of the tile's size:
    a gradient of pooled features is smaller where more is pooled. Otherwise the scale ends at the 99.5th percentile of
    |map|. Maps for and against a class diverge from 0; of label-free ones the signed are centred there, the others
    start.

    Args:
        name: of the method.
        maps: (h, w) each.
        sizes: (height, width) of the images.
        model: whose maps they are.
        settings: how they were made.
    """
    output = "log-odds" if settings.output == "evidence" and len(model.classes) == 2 else settings.output
    unit = _UNITS.get(name, "activation").format(
        output=output, layer="input" if settings.layer == "input" else "activation"
    )
    values = np.concatenate([values.ravel() for values in maps])
    limit, source = (
        float(np.percentile(np.abs(values), SCALE_PERCENTILE)),
        f"limit: {SCALE_PERCENTILE:g}th percentile of all images",
    )
    if not limit > 0:
        limit, source = float(np.abs(values).max()) or 1.0, "limit: the greatest value of all images"
    calibrated = _calibrated_limit(name, sizes, model, settings)
    if calibrated is not None:
        limit, source = calibrated, "limit: kept with the weights"
    if METHODS[name].needs_label:
        return SheetColumn(name, saliency_scale(limit, unit), source, True)
    # Other colours than for and against a class, signed or not.
    least = -limit if METHODS[name].signed else 0.0
    return SheetColumn(name, ColourScale(least, limit, LABEL_FREE_COLORMAP, "Strength", unit), source, False)


def _calibrated_limit(name: str, sizes: set[tuple[int, int]], model: Model, settings: ExplainSettings) -> float | None:
    card = model.card
    if card is None or card.calibration is None or len(model.classes) != 2 or settings.output != "evidence":
        return None
    calibration = card.calibration
    asked = (name, model.layer(settings.layer), settings.smoothing)
    known = (calibration.attribution, model.layer(calibration.layer), calibration.smoothing)
    return calibration.saliency_limit if asked == known and sizes == {(card.tile_px, card.tile_px)} else None
