"""A weights file as what maps slides: a calibrated classifier, or an encoder without classes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from medsd.checks import check_choice, check_number
from medsd.errors import ConfigError, WeightsError
from medsd.heatmap.appearance import Appearance
from medsd.heatmap.dicom import check_dicom
from medsd.heatmap.engine import Engine, make_engine
from medsd.heatmap.legend import NO_CLASS
from medsd.heatmap.maps import MapSettings
from medsd.heatmap.sample import MOST_TILES
from medsd.networks.calibrated import Calibration
from medsd.networks.classifier import TileClassifier
from medsd.networks.geometry import measure_fields
from medsd.networks.start import Encoder, last_stage, open_encoder
from medsd.networks.weights import ModelCard, load_classifier, unreadable_card
from medsd.saliency.neutral import NeutralReference
from medsd.saliency.registry import check_label_free
from medsd.slides.mpp import check_mpp

ALSO = ("overlay.tif", "tiles.geojson", "dicom")
_OF_ENCODER = ("mtsm_b",)


@dataclass(frozen=True)
class MapRequest:
    """What is asked of slides' maps beside what the weights say.

    Attributes:
        methods: see `MapSettings`; none for those of the weights, "mtsm_b" of an encoder alone. The scale of a method
            that was not calibrated ends at the 99.5th percentile of the slide itself.
        layer: hidden layer, of an encoder alone, whose weights name none; None for its last stage.
        network_mpp: micrometres per pixel that an encoder alone takes.
        block_px, workers: see `MapSettings`.
        max_unseen: a slide of which a larger share (0 to 1) cannot be decoded has failed.
        also: further outputs: "overlay.tif" (see `write_overlay_tiff`), "tiles.geojson" (see `write_tiles`) and "dicom"
            (see `write_dicom`).
        target: name of the class to map, one of those that the weights were calibrated for; None for the second class.
        faithful_tiles: tiles at most on which is measured how far the answer follows the map, see `judge_map`; 0: not.

    Raises:
        ConfigError: a scale or share that is none, no such output, or one that needs a package that is missing.
    """

    methods: Sequence[str] = ()
    layer: str | None = None
    network_mpp: float | None = None
    block_px: int | None = None
    max_unseen: float = 0.05
    also: Sequence[str] = ()
    faithful_tiles: int = MOST_TILES
    target: str | None = None
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.network_mpp is not None:
            check_mpp("network_mpp", self.network_mpp)
        check_number("max_unseen", self.max_unseen, "[0, 1]")
        check_number("faithful_tiles", self.faithful_tiles, "[0, inf)", whole=True)
        for name in self.also:
            check_choice("also", name, ALSO)
        if "dicom" in self.also:
            check_dicom()


@dataclass(frozen=True)
class MapModel:
    """A network that maps slides.

    Attributes:
        engine: makes the maps.
        name: timm name of the encoder.
        sha256: of the weights and what their file says.
        card: of a classifier, calibrated; None of an encoder alone, whose probability says nothing.
        calibration: of the class that is mapped; None of an encoder alone.
        appearance: of the tiles that the classifier was validated on; None where its card does not say.
    """

    engine: Engine
    name: str
    sha256: str
    card: ModelCard | None
    calibration: Calibration | None = None
    appearance: Appearance | None = None


def load_map_model(weights: str | Path, request: MapRequest, device: torch.device) -> MapModel:
    """The network of `save_classifier`'s or `save_encoder`'s file.

    Raises:
        WeightsError: weights that cannot be used, or a classifier that was never calibrated.
        ConfigError: an encoder without its mpp, a method or target that it has no classes for, a classifier whose layer
            and mpp are given, or a target that it was not calibrated for.
        NetworkError: no such layer, or an encoder whose maps are no functions of places.
    """
    encoder = open_encoder(weights, device)
    if encoder is not None:
        return _of_encoder(Path(weights), encoder, request)
    classifier, card, digest = load_classifier(weights, device)
    target, calibration = card.asked(request.target)
    if calibration is None:
        raise WeightsError(f"{weights}: not calibrated (no threshold and scale); run the stage 'finetune' to its end")
    for name, given in (("layer", request.layer), ("network_mpp", request.network_mpp)):
        if given is not None:
            raise ConfigError(f"{name}={given}: {weights} says it itself; leave it out")
    names = tuple(request.methods or calibration.limits)
    try:
        reference = None if calibration.reference is None else NeutralReference(**calibration.reference)
        appearance = None if card.appearance is None else Appearance(**card.appearance)
    except TypeError as error:
        raise unreadable_card(Path(weights), error) from error
    if not names:
        raise unreadable_card(Path(weights), ValueError("it names no method of maps"))
    smoothing, smooth_um = calibration.smoothing, calibration.smooth_um
    engine = make_engine(
        classifier,
        card.tile_px,
        card.mpp,
        target,
        settings=MapSettings(
            *(names, calibration.layer, smoothing, smooth_um, request.block_px, calibration.way),
            workers=request.workers,
        ),
        temperature=calibration.temperature,
        reference=reference,
        offset=calibration.offset,
    )
    return MapModel(engine, card.encoder, digest, card, calibration, appearance)


def _of_encoder(path: Path, encoder: Encoder, request: MapRequest) -> MapModel:
    names = request.methods or _OF_ENCODER
    check_label_free(names, path)
    if request.target is not None:
        raise ConfigError(f"target='{request.target}': {path} is an encoder, which has no classes; leave it out")
    if request.network_mpp is None:
        raise ConfigError(f"network_mpp: {path} is an encoder and does not say its scale; give its um per pixel")
    network = encoder.network
    # A head that nothing looks at, for the engine's sake; no probability, so a tile is a single cell.
    classifier = TileClassifier(encoder.name, (NO_CLASS,)).to(next(network.parameters()).device).eval()
    classifier.encoder, classifier.normalise = network, encoder.normalise
    layer = request.layer or last_stage(network, encoder.name)
    settings = MapSettings(names, layer, "none", block_px=request.block_px, way="dense", workers=request.workers)
    tile_px = measure_fields(classifier, [layer])[1].stride
    engine = make_engine(classifier, tile_px, request.network_mpp, 0, settings)
    return MapModel(engine, encoder.name, encoder.sha256, None)
