"""What is asked for when images are explained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from medsd.checks import check_choice, check_number
from medsd.errors import ConfigError
from medsd.saliency.method import Output, check_output

ImageSmoothing = Literal["none", "backward_hook", "forward_hook", "surrogate"]

CLASS_METHODS = ("gradient", "gradient_x_activation", "gradcam", "tsm")
LABEL_FREE_METHODS = ("eigencam", "tsm", "mtsm_b")
MEASURED = (
    "insertion", "deletion", "masking_gap", "variation", "nyquist",
    "energy_pointing", "pointing_game", "best_iou", "area_share",
)  # fmt: skip
"""What is measured of every map, names in `medsd.evaluate.measures.MEASURES`."""


@dataclass(frozen=True)
class ExplainSettings:
    """How images are explained.

    Attributes:
        methods: names that `make_method` takes ("gradient", "captum.LayerConductance"), each once, and "mask" of a
            network that masks itself (AIM); none takes `CLASS_METHODS` for a classifier, but for those whose channels
            cancel at the layer (see `medsd.saliency.method`), "deeplift" before them where the weights hold its
            reference, "mask" after them, and `LABEL_FREE_METHODS` for an encoder.
        layer: in the network or its encoder; "input"; None takes the calibrated one or else the last stage.
        target: the class that is explained, by name or number, or "predicted": each image's own.
        smoothing: "none", or a variant of Smooth Deep Saliency at strided convolutions, borders mirrored so that maps
            keep their place (as for slides).
        surrogate: file of the trained networks that smoothing "surrogate" needs.
        output: what class methods explain: "evidence", the class's logit above the mean of the others (as for slides;
            softmax ignores what all logits share), or "logit".
        measured: measure the maps (insertion, deletion, ...), which takes most of the time.
        seed: of random orders and resamples.

    Raises:
        ConfigError: a value that is none of these, or a method that is named twice.
    """

    methods: tuple[str, ...] = ()
    layer: str | None = None
    target: str = "predicted"
    smoothing: ImageSmoothing = "none"
    surrogate: str | None = None
    output: Output = "evidence"
    measured: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_choice("smoothing", self.smoothing, get_args(ImageSmoothing))
        if (self.smoothing == "surrogate") != (self.surrogate is not None):
            raise ConfigError("surrogate: its file and smoothing='surrogate' go together; give both or neither")
        check_output(self.output)
        check_number("seed", self.seed, "[0, inf)", whole=True)
        twice = [name for name in self.methods if self.methods.count(name) > 1]
        if twice:
            raise ConfigError(f"methods: '{twice[0]}' is named twice; name it once")


def method_names(text: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names of methods from "a,b,c" or a list; none for None."""
    parts = text.split(",") if isinstance(text, str) else list(text or ())
    return tuple(part.strip() for part in parts if part.strip())
