"""Which of the two ways to a slide's maps a network takes, and a method."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from medsd.errors import NetworkError
from medsd.heatmap.dense import DenseEngine, FeatureEngine, ProbabilityEngine
from medsd.heatmap.label_free import LABEL_FREE
from medsd.heatmap.legend import BY_PARTS, MASK
from medsd.heatmap.maps import Assembled, Engine, MapSettings
from medsd.heatmap.tiled import TiledEngine
from medsd.heatmap.value_map import Floats
from medsd.networks.classifier import Classifier, TileClassifier
from medsd.networks.modes import evaluating
from medsd.progress import Progress
from medsd.saliency.neutral import NeutralReference
from medsd.slides.slide import Slide
from medsd.slides.tissue import TissueMask

__all__ = ["Engine", "engine_for_slides", "make_engine"]

logger = logging.getLogger(__name__)

_LEAST_SURE, _LEAST_AGREEING, _BATCH = 8, 0.95, 32
# Passes of each pixel, tile by tile: tiles lie half a tile apart.
_TILED_COST = 4.0


@dataclass(eq=False, repr=False)
class MixedEngine(Engine):
    """Maps slides with each method its best way, on one grid: dense, or tile by tile where it looks at whole tiles.

    The probability is the dense one, also where all methods look at tiles: thresholds hold for it whatever is asked.
    By the way "tiled" it is that of tiles, and label-free methods alone are dense: they decompose features of the slide
    as a whole. Arguments and errors as `Engine`.
    """

    classifier: TileClassifier

    def __post_init__(self) -> None:
        super().__post_init__()
        by_tiles = self.settings.way == "tiled"
        of_tiles = _of_tiles(self.settings)
        dense = tuple(name for name in self.settings.methods if name not in of_tiles)
        rest = self.classifier, self.tile_px, self.mpp, self.target
        scale = self.temperature, None, self.offset
        kind = FeatureEngine if by_tiles else DenseEngine if dense else ProbabilityEngine
        self.tiles_alone = not dense  # asked for
        # Settings name a method where the probability alone is asked for, too; the tiles' map is cheap, and not kept.
        self.of_places = kind(*rest, replace(self.settings, methods=dense or ("gradient",)), *scale)
        self._tiled = TiledEngine(*rest, replace(self.settings, methods=of_tiles or ("gradcam",)), *scale)
        self._main: Engine = self._tiled if by_tiles else self.of_places

    @property
    def strides(self) -> tuple[int, int]:
        return self._main.strides

    @property
    def tiles(self) -> str:
        return self._main.tiles

    def maker_of(self, method: str) -> Engine:
        self._main.reference = self.reference
        return self._tiled if method in self._tiled.settings.methods else self.of_places

    def assemble(self, slide: Slide, tissue: TissueMask, store: Path, progress: Progress) -> Assembled:
        self._main.reference = self.reference
        whole, tiles = (engine.assemble(slide, tissue, store, progress) for engine in (self.of_places, self._tiled))
        found, main = {**whole.explanations, **tiles.explanations}, tiles if self._main is self._tiled else whole
        return replace(
            main,
            explanations={name: found[name] for name in self.settings.methods},
            lost=np.unique(np.concatenate([whole.lost, tiles.lost]), axis=0),
            blocks=whole.blocks + tiles.blocks,
            pixels_read=whole.pixels_read + tiles.pixels_read,
            # Tiles have no borders.
            owner=main.owner if self.settings.methods[0] in main.explanations else None,
        )

    def use_less_memory(self) -> bool:
        # Whichever of them ran out of it.
        return any([self.of_places.use_less_memory(), self._tiled.use_less_memory()])

    def run(self, images: Tensor, method: str | None = None) -> tuple[Floats, Floats]:
        name = method or self.settings.methods[0]
        return self.maker_of(name).run(images, name)

    def neutral(self, without: Iterable[Tensor], having: Iterable[Tensor], source: str) -> NeutralReference:
        return self._main.neutral(without, having, source)


def engine_for_slides(engine: Engine, tiles: Tensor) -> Engine:
    """The engine, or the tiled one where the dense one costs more, or its maps say otherwise than tiles shown alone.

    A network learns from tiles whose borders are padded. In a slide's dense map other tissue lies there instead; where
    what is padded reaches most of the tile, the answer may be another one (EfficientNet-Lite0 on tiles of 96 px), and
    the dense map would be that of a network nobody trained. Asked are tiles in the midst of eight others (our choice).
    Where a layer's cells look so far that little more than their surroundings fits a CPU's memory (DenseNet-121, early
    layers of ConvNeXt-T), blocks overlap more than tiles do; asked of the CPU everywhere, so that weights are mapped
    alike.

    Args:
        engine: as `make_engine` made it; one whose settings say a way keeps it.
        tiles: (B, 3, tile_px, tile_px) uint8, of every class.

    Returns:
        the engine, unless of eight tiles or more with |log-odds| above 1 fewer than 95 % keep the sign, or blocks
        compute each cell more than four times.
    """
    dense = engine.of_places if isinstance(engine, MixedEngine) else engine
    if not isinstance(dense, DenseEngine) or engine.settings.way != "auto":
        return engine
    cost = dense.cascade.top.cost(torch.device("cpu"))
    if engine.settings.block_px is None and cost > _TILED_COST:
        often = f"{cost:.0f} times" if cost < 1e3 else "without end"
        logger.info(
            "slides are mapped tile by tile: above layer '%s' blocks would compute each cell %s, tiles do %.0f times",
            *(engine.settings.layer, often, _TILED_COST),
        )
        return _tiled(engine)
    kept = _keep_their_sign(dense, tiles)
    if len(kept) < _LEAST_SURE or sum(kept) >= _LEAST_AGREEING * len(kept):
        return engine
    logger.warning(
        "slides are mapped tile by tile, which takes longer: among others, %d of %d tiles that the network is sure of "
        "are answered the other way",
        len(kept) - sum(kept),
        len(kept),
    )
    return _tiled(engine)


def _keep_their_sign(engine: DenseEngine, tiles: Tensor) -> list[bool]:
    """Of each tile that the network is sure of, whether its log-odds keep their sign in the midst of eight others."""
    classifier, side = engine.classifier, engine.tile_px
    with evaluating(classifier), torch.no_grad():
        parts = (tiles[start : start + _BATCH].to(classifier.device) for start in range(0, len(tiles), _BATCH))
        alone = torch.cat([engine.evidence(classifier(classifier.normalise(part))) for part in parts])
    generator, kept = torch.Generator().manual_seed(0), []
    for number in (alone.abs() > 1).nonzero()[:, 0].tolist():
        around = tiles[torch.randint(len(tiles), (9,), generator=generator)]
        around[4] = tiles[number]
        mosaic = around.view(3, 3, 3, side, side).permute(2, 0, 3, 1, 4).reshape(1, 3, 3 * side, 3 * side)
        kept.append(bool(engine.with_surroundings(mosaic)[0] * alone[number] > 0))
    return kept


def _tiled(engine: Engine) -> Engine:
    settings = replace(engine.settings, way="tiled")
    rest = engine.mpp, engine.target, settings, engine.temperature, engine.reference, engine.offset
    return make_engine(engine.classifier, engine.tile_px, *rest)


def _of_tiles(settings: MapSettings) -> tuple[str, ...]:
    """The methods that are mapped tile by tile: those that look at whole tiles, or all that explain a class."""
    dense = LABEL_FREE if settings.way == "tiled" else (*BY_PARTS, *LABEL_FREE)
    return tuple(name for name in settings.methods if name not in dense)


def make_engine(
    classifier: Classifier,
    tile_px: int,
    mpp: float,
    target: int = 1,
    settings: MapSettings | None = None,
    temperature: float = 1.0,
    reference: NeutralReference | None = None,
    offset: Sequence[float] = (),
) -> Engine:
    """The engine for a network: as `settings.way` says, and for "auto" the dense one where the network allows it.

    Methods that look at whole tiles are then mapped tile by tile beside the others; by the way "tiled" all methods are,
    but for label-free ones, which take features of the slide as a whole. An `AimClassifier`, whose masks
    depend on the whole tile, a symmetric classifier, which turns tiles, and a network with global operations
    (squeeze-excite, attention) have no dense map and are mapped tile by tile. The maps name the way that was taken.

    Args:
        classifier, tile_px, mpp, target, settings, temperature, reference, offset: as `Engine` takes them.

    Raises:
        NetworkError: no classifier of medsd's, no such layer, no masks, a stride that does not divide the tile, or no
            dense map where it is asked for.
        ConfigError: a temperature that is not positive.
    """
    if not isinstance(classifier, Classifier):
        raise NetworkError(
            f"{type(classifier).__name__}: slides are mapped by medsd's classifiers; load its encoder's "
            "weights into a TileClassifier (load_encoder; encoder_weights of the bundles) and train its head"
        )
    settings = settings or MapSettings()
    if settings.way == "dense" and not isinstance(classifier, TileClassifier):
        raise NetworkError("way 'dense': the masks of an AIM classifier depend on the whole tile; use 'tiled'")
    if classifier.test_time_augmentation:
        if settings.way == "dense":
            raise NetworkError("way 'dense': test_time_augmentation turns tiles, not slides; use 'tiled'")
        settings = replace(settings, way="tiled")
    rest = classifier, tile_px, mpp, target, settings, temperature, reference, offset
    of_tiles, free = _of_tiles(settings), set(LABEL_FREE).intersection(settings.methods)
    if not isinstance(classifier, TileClassifier) or (settings.way == "tiled" and not free):
        return TiledEngine(*rest)
    mixed = settings.way != "dense" and MASK not in of_tiles
    kind = MixedEngine if mixed and (of_tiles or settings.way == "tiled") else DenseEngine
    try:
        return kind(classifier, *rest[1:])
    except NetworkError as reason:
        if settings.way == "dense":
            raise
        # A layer or tile that does not fit is refused by this engine as well.
        tiled = TiledEngine(*rest)
        logger.info("mapped tile by tile: %s", reason)
        return tiled
