"""The two ways to a slide's maps behind one interface, and which of them a network takes."""

from __future__ import annotations

import logging
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from medsd.errors import NetworkError
from medsd.heatmap.dense import DenseEngine
from medsd.heatmap.maps import MapSettings, SlideMaps
from medsd.heatmap.tiled import TiledEngine
from medsd.networks.classifier import Classifier, TileClassifier
from medsd.progress import Progress, no_progress
from medsd.slides.slide import Slide
from medsd.slides.tissue import TissueMask

logger = logging.getLogger(__name__)


class Engine(Protocol):
    """Maps slides with one classifier.

    Attributes:
        classifier: the network.
        tile_px: side of the tiles it was trained on, in pixels at `mpp`.
        mpp: micrometres per pixel that it expects.
        target: number of the class that is mapped.
        settings: how the maps are made.
        temperature: probabilities are softmax(logits / temperature).
        device: where the classifier's weights are.
    """

    tile_px: int
    mpp: float
    target: int
    settings: MapSettings
    temperature: float

    @property
    def classifier(self) -> Classifier: ...
    @property
    def device(self) -> torch.device: ...

    def map(self, slide: Slide, tissue: TissueMask, progress: Progress = no_progress) -> SlideMaps:
        """Probability and saliency of the slide's tissue; NaN where there is none.

        Args:
            slide: read at the model's mpp.
            tissue: what holds none is not read.
            progress: shows the blocks or tiles as they are done.
        """
        ...

    def patch_saliency(self, images: Tensor) -> npt.NDArray[np.float32]:
        """Saliency (B, h, w) of images (B, 3, tile_px, tile_px) uint8, in the values of the slide's map."""
        ...


def make_engine(
    classifier: Classifier,
    tile_px: int,
    mpp: float,
    target: int = 1,
    settings: MapSettings | None = None,
    temperature: float = 1.0,
) -> Engine:
    """The engine for a network: as `settings.way` says, and for "auto" the dense one where the network allows it.

    An `AimClassifier`, whose masks depend on the whole tile, and a network with global operations (squeeze-excite,
    attention) have no dense map and are mapped tile by tile. The maps name the way that was taken.

    Args:
        classifier, tile_px, mpp, target, settings, temperature: as `DenseEngine` and `TiledEngine` take them.

    Raises:
        NetworkError: no such layer, no masks, a stride that does not divide the tile, or no dense map where it is
            asked for.
        ConfigError: a temperature that is not positive.
    """
    settings = settings or MapSettings()
    if settings.way == "dense" and not isinstance(classifier, TileClassifier):
        raise NetworkError("way 'dense': the masks of an AIM classifier depend on the whole tile; use 'tiled'")
    if settings.way == "tiled" or not isinstance(classifier, TileClassifier):
        return TiledEngine(classifier, tile_px, mpp, target, settings, temperature)
    try:
        return DenseEngine(classifier, tile_px, mpp, target, settings, temperature)
    except NetworkError as reason:
        if settings.way == "dense":
            raise
        # A layer or tile that does not fit is refused by this engine as well.
        tiled = TiledEngine(classifier, tile_px, mpp, target, settings, temperature)
        logger.info("mapped tile by tile: %s", reason)
        return tiled
