"""What a slide's maps are asked for with, what they are, and what the dense and the tiled engine share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn

from medsd.checks import check_choice, check_number
from medsd.heatmap.value_map import ValueMap
from medsd.networks.classifier import Classifier
from medsd.networks.weights import Attribution, Smoothing
from medsd.progress import Progress, no_progress
from medsd.saliency import smooth
from medsd.saliency.method import ClassMethod, Explanation
from medsd.saliency.registry import make_method
from medsd.slides.readers.base import Bools
from medsd.slides.slide import Slide
from medsd.slides.tissue import TissueMask

Floats = npt.NDArray[np.float32]
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
            check_number(name, getattr(self, name), "[1, inf)", whole=True)
        for name, known in (("attribution", Attribution), ("smoothing", Smoothing), ("way", Way)):
            check_choice(name, getattr(self, name), get_args(known))


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

    values: Floats
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


@dataclass(eq=False, repr=False)
class Engine(ABC):
    """Maps slides with one classifier.

    Args:
        classifier: put into eval mode while it runs.
        tile_px: side of the tiles it was trained on, a multiple of its stride, in pixels at `mpp`.
        mpp: micrometres per pixel that the classifier expects.
        target: number of the class to map.
        settings: how the maps are made.
        temperature: probabilities are softmax(logits / temperature); the saliency is of the logits as they are.

    Raises:
        NetworkError: no such layer, no masks, or a stride that does not divide the tile.
        ConfigError: a temperature that is not positive.
    """

    classifier: Classifier
    tile_px: int
    mpp: float
    target: int = 1
    settings: MapSettings = MapSettings()
    temperature: float = 1.0

    def __post_init__(self) -> None:
        check_number("temperature", self.temperature, "(0, inf)", hint="1 leaves probabilities as they are")

    @abstractmethod
    def map(self, slide: Slide, tissue: TissueMask, progress: Progress = no_progress) -> SlideMaps:
        """Probability and saliency of the slide's tissue; NaN where there is none.

        What cannot be decoded is white to the network, and NaN in the maps (its own pixels; our choice).

        Args:
            slide: read at the model's mpp.
            tissue: what holds none is not read.
            progress: shows the blocks or tiles as they are done.
        """

    @abstractmethod
    def run(self, images: Tensor) -> tuple[Floats, Floats]:
        """Probability and saliency of images (B, 3, H, W) uint8 on the classifier's device, without any placing."""

    def patch_saliency(self, images: Tensor) -> Floats:
        """Saliency (B, h, w) of images (B, 3, tile_px, tile_px) uint8, in the values of the slide's map."""
        return self.run(images.to(self.classifier.device))[1]

    def method(self, network: nn.Module, prefix: str = "") -> ClassMethod:
        """The saliency method of the maps: of the evidence, at the classifier's layer, whose name `prefix` leads."""
        name = f"{prefix}encoder.{self.settings.layer}"
        method = make_method(self.settings.attribution, network, name, "evidence")
        assert isinstance(method, ClassMethod)
        return method

    def explain(self, method: ClassMethod, images: Tensor) -> Explanation:
        """What the method says of images (B, 3, H, W) uint8, gradients smoothed as the settings ask."""
        smoothed = self.settings.smoothing == "backward_hook"
        with smooth.backward_hook(self.classifier.encoder, "symmetric") if smoothed else nullcontext():
            return method.explain(self.classifier.normalise(images), self.target)

    def probability(self, logits: Tensor) -> Floats:
        """Of the target (B, ...), of logits (B, K, ...)."""
        return as_array((logits / self.temperature).softmax(dim=1)[:, self.target])


def as_array(values: Tensor) -> Floats:
    """A tensor of any device as a float32 array."""
    array: Floats = values.detach().float().cpu().numpy()
    return array
