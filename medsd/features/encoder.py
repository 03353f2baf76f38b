"""A weights file as what gives tiles' features: a classifier's encoder, an encoder alone, or any of timm's."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from medsd.checks import WORKERS, check_number
from medsd.errors import ConfigError, NetworkError, WeightsError, nearest
from medsd.networks.classifier import IMAGENET_MEAN, IMAGENET_STD, Classifier, Normalise
from medsd.networks.modes import encoded_map, evaluating
from medsd.networks.start import load_encoder, open_encoder, weights_sha256
from medsd.networks.tokens import check_encoder_options, check_image_px, image_side, token_stride
from medsd.networks.weights import load_classifier, read_tensors
from medsd.slides.mpp import check_mpp

logger = logging.getLogger(__name__)

_CHANNELS = 3


@dataclass(frozen=True)
class FeatureRequest:
    """What is asked of slides' features beside what the weights say.

    Attributes:
        encoder: timm's name, of weights that do not say it; features are then timm's own pooled ones (what stands
            before the classifier: the class token of most vision transformers).
        encoder_options: of that, see `TileClassifier`.
        input_mean, input_std: three numbers each that its weights were trained with, see `Normalise`; None for
            ImageNet's, which most weights for pathology take; where timm's own of that name do not, it is told.
        network_mpp: micrometres per pixel that the encoder takes; of a classifier its weights say it.
        tile_px: side of a tile in pixels at that scale; None for what the weights of a classifier, or a vision
            transformer, say.
        stride_px: step between tiles in those pixels; None for a tile's side.
        min_tissue: least share of a tile that is tissue, 0 to 1.
        max_unseen: a slide of which a larger share (0 to 1) cannot be decoded has failed.
        batch: tiles computed at once.
        workers: processes that read a slide at once; None for one, and four threads of that one where a GPU computes.

    Raises:
        ConfigError: a value out of its range.
    """

    encoder: str | None = None
    encoder_options: Mapping[str, Any] = field(default_factory=dict)
    input_mean: Sequence[float] | None = None
    input_std: Sequence[float] | None = None
    network_mpp: float | None = None
    tile_px: int | None = None
    stride_px: int | None = None
    min_tissue: float = 0.5
    max_unseen: float = 0.05
    batch: int = 32
    workers: int | None = None

    def __post_init__(self) -> None:
        if self.network_mpp is not None:
            check_mpp("network_mpp", self.network_mpp)
        for name in ("tile_px", "stride_px", "batch", "workers"):
            if (value := getattr(self, name)) is not None:
                check_number(name, value, WORKERS if name == "workers" else "[1, inf)", whole=True)
        for name in ("min_tissue", "max_unseen"):
            check_number(name, getattr(self, name), "[0, 1]")
        if self.encoder is None:
            for name in ("encoder_options", "input_mean", "input_std"):
                if getattr(self, name):
                    raise ConfigError(f"{name}: goes with an encoder of timm's; name it by encoder, or leave this out")


@dataclass(frozen=True)
class FeatureEncoder:
    """A network that gives features of tiles.

    Attributes:
        name: timm's name of the encoder.
        network: images (B, 3, tile_px, tile_px) uint8 to features (B, D), in eval mode.
        sha256: of the weights.
        dim: D.
        tile_px, mpp: side of a tile in pixels, and micrometres per pixel.
        stain_target: numbers of the stain that slides are normalised to first; None where they are taken as they are.
    """

    name: str
    network: nn.Module
    sha256: str
    dim: int
    tile_px: int
    mpp: float
    stain_target: dict[str, Any] | None = None


class _Pooled(nn.Module):
    """Images uint8 to the mean of an encoder's map, or to what it pools itself."""

    def __init__(self, encoder: nn.Module, normalise: Normalise, pools: bool) -> None:
        super().__init__()
        self.encoder, self.normalise, self.pools = encoder, normalise, pools

    def forward(self, images: Tensor) -> Tensor:
        x = self.normalise(images)
        features: Tensor = self.encoder(x) if self.pools else encoded_map(self.encoder, x).mean(dim=(2, 3))
        return features


class _OfClassifier(nn.Module):
    """Images uint8 to what a classifier's head takes."""

    def __init__(self, classifier: Classifier) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier.features(images)


def load_feature_encoder(weights: str | Path, request: FeatureRequest, device: torch.device) -> FeatureEncoder:
    """The network of `save_classifier`'s or `save_encoder`'s file, or of any file of weights under timm's names.

    Features of medsd's own files are the mean of the map that heatmaps explain (what a classifier's head takes).

    Raises:
        WeightsError: weights that cannot be used, or do not fit the encoder.
        NetworkError: timm has no such encoder, or it gives no vector of a tile of that size.
        ConfigError: a scale or tile size that nobody gives, or that the weights say themselves.
    """
    if request.encoder is not None:
        return _checked(_of_timm(Path(weights), request), device)
    encoder = open_encoder(weights)
    if encoder is not None:
        network = _Pooled(encoder.network, encoder.normalise, pools=False)
        return _checked(_sized(encoder.name, encoder.network, network, encoder.sha256, request), device)
    if not read_tensors(Path(weights)).kind:
        raise WeightsError(f"{weights}: weights of no network of medsd; name their encoder, --encoder with timm's name")
    classifier, card, digest = load_classifier(weights)
    for name, given in (("network_mpp", request.network_mpp), ("tile_px", request.tile_px)):
        if given is not None:
            raise ConfigError(f"{name}={given}: {weights} says it itself; leave it out")
    found = _OfClassifier(classifier), digest, 0, card.tile_px, card.mpp
    return _checked(FeatureEncoder(card.encoder, *found, card.stain_target), device)


def _of_timm(weights: Path, request: FeatureRequest) -> FeatureEncoder:
    name = str(request.encoder)
    if not timm.is_model(name):
        raise NetworkError(f"encoder '{name}': timm has no such network{nearest(name, timm.list_models())}")
    options = check_encoder_options(name, request.encoder_options)
    try:
        network: nn.Module = timm.create_model(name, pretrained=False, num_classes=0, **options)
    except (AssertionError, RuntimeError, TypeError) as error:
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise ConfigError(f"encoder '{name}': timm cannot make it with encoder_options={options} ({reason})") from error
    normalise = Normalise(request.input_mean or IMAGENET_MEAN, request.input_std or IMAGENET_STD)
    load_encoder(network, weights, normalise)
    return _sized(name, network, _Pooled(network, normalise, pools=True), weights_sha256(weights), request)


def _sized(name: str, encoder: nn.Module, network: nn.Module, digest: str, request: FeatureRequest) -> FeatureEncoder:
    """An encoder alone, whose file says neither scale nor size of its tiles."""
    if request.network_mpp is None:
        raise ConfigError(f"network_mpp: encoder '{name}' does not say its scale; give its um per pixel")
    tile_px = request.tile_px
    if tile_px is None:
        if token_stride(encoder) is None:
            raise ConfigError(f"tile_px: encoder '{name}' takes tiles of any size; give their side in pixels")
        tile_px = image_side(encoder)
    check_image_px(encoder, name, tile_px)
    return FeatureEncoder(name, network, digest, 0, tile_px, request.network_mpp)


def _checked(found: FeatureEncoder, device: torch.device) -> FeatureEncoder:
    """With the number of features, which a white tile tells."""
    network = found.network.to(device).eval()
    white = torch.full((1, _CHANNELS, found.tile_px, found.tile_px), 255, dtype=torch.uint8, device=device)
    with evaluating(network), torch.no_grad():
        try:
            features = network(white)
        except (AssertionError, RuntimeError) as error:
            reason = str(error).partition("\n")[0]
            raise NetworkError(
                f"encoder '{found.name}': does not take tiles of {found.tile_px} px ({reason})"
            ) from error
    if features.ndim != 2:
        raise NetworkError(
            f"encoder '{found.name}': gives {tuple(features.shape)} of a tile, no vector; choose another"
        )
    return replace(found, network=network, dim=features.shape[1])
