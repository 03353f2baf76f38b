"""Images with what was made of them, in memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from medsd.explain.model import Model
from medsd.explain.settings import ExplainSettings
from medsd.saliency.neutral import NeutralReference
from medsd.slides.readers.base import RGB, Bools


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
        output: what is explained, of the explained class, calibrated as of slides; nan for an encoder.
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
