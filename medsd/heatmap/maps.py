"""What a slide's maps are asked for with, and what they are: shared by the dense and the tiled engine."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medsd.errors import ConfigError, nearest
from medsd.heatmap.value_map import ValueMap
from medsd.networks.classifier import Classifier, layer_of
from medsd.networks.modes import evaluating
from medsd.networks.weights import Attribution, Smoothing
from medsd.saliency import smooth
from medsd.saliency.hidden import HiddenLayer, tapped
from medsd.slides.readers.base import Bools
from medsd.slides.slide import Slide
from medsd.slides.tissue import TissueMask

Way = Literal["auto", "dense", "tiled"]


@dataclass(frozen=True)
class MapSettings:
    """How a slide's maps are made.

    Attributes:
        layer: hidden layer of the saliency, a name in the encoder such as "layer2"; "mask" does not use it.
        attribution: "gradient": the mean over channels of the gradient; "gradient_x_activation": of its product
            with the activation, both signed; "mask": the share of an `AimClassifier`'s masks that are open, 0 to 1.
        smoothing: "backward_hook" (Smooth Deep Saliency, variant B, symmetric) or "none"; "mask" does not use it.
        block_px: side of the blocks that the dense engine computes at once, in pixels at the model's mpp, without the
            halo; about.
        way: "dense", "tiled", or "auto": dense where the network allows it.
        batch: tiles that the tiled engine computes at once.

    Raises:
        ConfigError: a value that is none of these.
    """

    layer: str = "layer3"
    attribution: Attribution = "gradient_x_activation"
    smoothing: Smoothing = "backward_hook"
    block_px: int = 2048
    way: Way = "auto"
    batch: int = 32

    def __post_init__(self) -> None:
        for name in ("block_px", "batch"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)}: must be positive")
        for name, known in (("attribution", Attribution), ("smoothing", Smoothing), ("way", Way)):
            value, choices = getattr(self, name), get_args(known)
            if value not in choices:
                raise ConfigError(f"{name}='{value}': use one of {', '.join(choices)}{nearest(value, choices)}")


@dataclass(frozen=True)
class SlideMaps:
    """The maps of one slide, and what was read for them.

    Attributes:
        probability, saliency: the maps.
        blocks: number of blocks (dense) or tiles (tiled) that were read.
        pixels_read: number of pixels read at the model's mpp, halos and overlaps included.
        unseen: share of the tissue (0 to 1) that could not be decoded; NaN in the maps.
        lost: (height, width) bool on the saliency's grid, True where something could not be decoded; None if nothing.
    """

    probability: ValueMap
    saliency: ValueMap
    blocks: int
    pixels_read: int
    unseen: float = 0.0
    lost: Bools | None = None


@dataclass(frozen=True)
class MapGrid:
    """One of a slide's maps while it is filled: square map pixels from the slide's origin.

    Attributes:
        values: (height, width) float32, NaN until seen.
        lost: (height, width) bool, True where something could not be decoded.
        stride: side of a map pixel in pixels at `mpp`.
        mpp: micrometres per pixel that the classifier expects.
        ratio: level-0 pixels per pixel at `mpp`.
    """

    values: npt.NDArray[np.float32]
    lost: Bools
    stride: int
    mpp: float
    ratio: float

    @classmethod
    def over(cls, slide: Slide, mpp: float, stride: int) -> MapGrid:
        """An empty grid over the whole slide."""
        ratio = mpp / slide.mpp
        width, height = (math.ceil(length / ratio / stride - 1e-9) for length in slide.dimensions)
        return cls(np.full((height, width), np.nan, np.float32), np.zeros((height, width), bool), stride, mpp, ratio)

    def mark_lost(self, seen: Bools, left_px: float, top_px: float) -> None:
        """Mark the map pixels in which something could not be decoded.

        Args:
            seen: (h, w) as `Slide.read_seen` gives it, at `mpp`.
            left_px, top_px: where it starts, in pixels at `mpp` from the slide's origin.
        """
        down, across = np.nonzero(~seen)
        row, column = (
            np.floor((start + offset + 0.5) / self.stride).astype(np.int64)
            for start, offset in ((top_px, down), (left_px, across))
        )
        inside = (row >= 0) & (row < self.lost.shape[0]) & (column >= 0) & (column < self.lost.shape[1])
        self.lost[row[inside], column[inside]] = True

    def finish(self, tissue: TissueMask, quantity: str, target: str, method: str, unit: str) -> ValueMap:
        """The map: NaN outside the tissue (a pixel is seen when most of it is tissue)."""
        height, width = self.values.shape
        level0_px = self.stride * self.ratio
        self.values[tissue.at(width, height, level0_px) < 0.5] = np.nan
        return ValueMap(self.values, level0_px, self.stride * self.mpp, quantity, target, method, unit)


def finish_maps(
    grids: tuple[MapGrid, MapGrid],
    tissue: TissueMask,
    settings: MapSettings,
    target: str,
    tiles: str,
    blocks: int,
    pixels_read: int,
) -> SlideMaps:
    """The maps of filled grids; what could not be decoded becomes NaN and is counted.

    Args:
        grids: of the probability and of the saliency.
        tissue: the slide's.
        settings: what the saliency is.
        target: name of the class.
        tiles: the way that was taken and the tiles, in words.
        blocks, pixels_read: as in `SlideMaps`.
    """
    probability = grids[0].finish(tissue, "probability", target, tiles, "probability")
    saliency = grids[1].finish(tissue, *_legend(settings, target, tiles))
    lost = grids[1].lost
    if not lost.any():
        return SlideMaps(probability, saliency, blocks, pixels_read)
    unseen = float(lost[saliency.seen].mean()) if saliency.seen.any() else 0.0
    for value_map, grid in ((probability, grids[0]), (saliency, grids[1])):
        value_map.values[grid.lost] = np.nan
    return SlideMaps(probability, saliency, blocks, pixels_read, unseen, lost)


def _legend(settings: MapSettings, target: str, tiles: str) -> tuple[str, str, str, str]:
    """Quantity, target, method and unit of the second map."""
    if settings.attribution == "mask":
        # A mask is drawn before there is an answer, and belongs to none.
        return "mask", "all classes", f"mean of the stages' masks, {tiles}", "share of masks open"
    smoothed = ", smoothed at strided convolutions" if settings.smoothing == "backward_hook" else ""
    method = f"{settings.attribution.replace('_', ' ')} at {settings.layer}{smoothed}, {tiles}"
    unit = "log-odds per channel" if settings.attribution == "gradient_x_activation" else "log-odds per unit activation"
    return "saliency", target, method, unit


@contextmanager
def explained(classifier: Classifier, settings: MapSettings) -> Iterator[HiddenLayer]:
    """Inside the block the classifier is in eval mode and has its hidden layer tapped, gradients smoothed if asked."""
    with ExitStack() as stack:
        stack.enter_context(evaluating(classifier))
        stack.enter_context(torch.enable_grad())
        if settings.smoothing == "backward_hook":
            stack.enter_context(smooth.backward_hook(classifier.encoder, "symmetric"))
        yield stack.enter_context(tapped(classifier, layer_of(classifier, settings.layer)))


def attributed(objective: Tensor, hidden: HiddenLayer, attribution: Attribution) -> npt.NDArray[np.float32]:
    """The signed map (B, h, w) of a scalar at the tapped layer, as `MapSettings.attribution` says."""
    (gradient,) = torch.autograd.grad(objective, hidden.activation)
    if attribution == "gradient_x_activation":
        gradient = gradient * hidden.activation.detach()
    return as_array(gradient.mean(dim=1))


def evidence(logits: Tensor, target: int) -> Tensor:
    """The target's logit above the mean of the others: logits (B, K, ...) to (B, ...).

    Softmax ignores what all logits share, and so must the explanation. For two classes it is the log-odds, what
    a network with a single logit has as its output.
    """
    others = [number for number in range(logits.shape[1]) if number != target]
    return logits[:, target] - logits[:, others].mean(dim=1)


def as_array(values: Tensor) -> npt.NDArray[np.float32]:
    """A tensor of any device as a float32 array."""
    array: npt.NDArray[np.float32] = values.detach().float().cpu().numpy()
    return array


def check_temperature(temperature: float) -> float:
    """A temperature that probabilities can be tempered with.

    Raises:
        ConfigError: it is not positive and finite.
    """
    if not (math.isfinite(temperature) and temperature > 0):
        raise ConfigError(f"temperature={temperature}: must be a positive number; 1 leaves probabilities as they are")
    return temperature
