"""Images with what became of them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from medsd.explain.model import Model
from medsd.explain.settings import ExplainSettings
from medsd.slides.readers.base import RGB, Bools


@dataclass(frozen=True)
class ExplainedImage:
    """One image with what became of it.

    Attributes:
        name: in tables.
        size_px: height and width.
        picture: a small one.
        region: its mask at that small size, or None.
        predicted, explained: class numbers; None for an encoder.
        probability: of the predicted class.
        maps: (h, w) float32 by method, signed, not normalised, at the size of the layer.
        measures: by method and name; nan where undefined.
        agreement: (M, M) Spearman's correlations of the methods' maps.
    """

    name: str
    size_px: tuple[int, int]
    picture: RGB
    region: Bools | None
    predicted: int | None
    explained: int | None
    probability: float
    maps: dict[str, npt.NDArray[np.float32]]
    measures: dict[str, dict[str, float]]
    agreement: npt.NDArray[np.float64]


@dataclass(frozen=True)
class ExplainedImages:
    """What a call made.

    Attributes:
        model: that was explained.
        settings: with the methods that were chosen.
        images: in the order they were given.
        failed: reasons by name of the image.
        masked: whether masks were given.
    """

    model: Model
    settings: ExplainSettings
    images: tuple[ExplainedImage, ...]
    failed: dict[str, str]
    masked: bool
