"""Which of the two ways to a slide's maps a network takes."""

from __future__ import annotations

import logging

from medsd.errors import NetworkError
from medsd.heatmap.dense import DenseEngine
from medsd.heatmap.maps import Engine, MapSettings
from medsd.heatmap.tiled import TiledEngine
from medsd.networks.classifier import Classifier, TileClassifier
from medsd.saliency.neutral import NeutralReference

__all__ = ["Engine", "make_engine"]

logger = logging.getLogger(__name__)


def make_engine(
    classifier: Classifier,
    tile_px: int,
    mpp: float,
    target: int = 1,
    settings: MapSettings | None = None,
    temperature: float = 1.0,
    reference: NeutralReference | None = None,
) -> Engine:
    """The engine for a network: as `settings.way` says, and for "auto" the dense one where the network allows it.

    An `AimClassifier`, whose masks depend on the whole tile, and a network with global operations (squeeze-excite,
    attention) have no dense map and are mapped tile by tile. The maps name the way that was taken.

    Args:
        classifier, tile_px, mpp, target, settings, temperature, reference: as `Engine` takes them.

    Raises:
        NetworkError: no such layer, no masks, a stride that does not divide the tile, or no dense map where it is
            asked for.
        ConfigError: a temperature that is not positive.
    """
    settings = settings or MapSettings()
    if settings.way == "dense" and not isinstance(classifier, TileClassifier):
        raise NetworkError("way 'dense': the masks of an AIM classifier depend on the whole tile; use 'tiled'")
    if settings.way == "tiled" or not isinstance(classifier, TileClassifier):
        return TiledEngine(classifier, tile_px, mpp, target, settings, temperature, reference)
    try:
        return DenseEngine(classifier, tile_px, mpp, target, settings, temperature, reference)
    except NetworkError as reason:
        if settings.way == "dense":
            raise
        # A layer or tile that does not fit is refused by this engine as well.
        tiled = TiledEngine(classifier, tile_px, mpp, target, settings, temperature, reference)
        logger.info("mapped tile by tile: %s", reason)
        return tiled
