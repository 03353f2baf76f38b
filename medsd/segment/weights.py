"""Weights of segmentation networks, in and out, with a card that says what they are of."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from medsd.errors import ConfigError, NetworkError, WeightsError
from medsd.networks.classifier import IMAGENET_MEAN, IMAGENET_STD
from medsd.networks.weights import read_tensors, save_tensors, unreadable_card
from medsd.segment.network import Decoder, SegmentationNetwork

SEGMENTATION_FORMAT = "medsd-segmentation-1"


@dataclass(frozen=True)
class SegmentationCard:
    """What a weights file says of its network.

    Attributes:
        encoder: timm name.
        decoder: see `SegmentationNetwork`.
        classes: names in the order of the logits, the background's first.
        side_px: side of the images that it was trained on, in pixels.
        trained_on: the training data, in words.
        mpp: micrometres per pixel of these images; None where nobody said.
        start: what the encoder started from, in words.
        protocol: "linear" where the encoder stayed as it was, else "full".
        data_sha256: of the items of its training, validation and test parts.
        settings_sha256: of the settings that it was trained with.
        input_mean, input_std: what its images are normalised by.
        validation: what the best epoch scored on validation images, by name; empty in cards that do not say.
        learnt_from: see `medsd.networks.weights.ModelCard`.
    """

    encoder: str
    decoder: Decoder
    classes: tuple[str, ...]
    side_px: int
    trained_on: str
    mpp: float | None = None
    start: str = ""
    protocol: str = "full"
    data_sha256: str = ""
    settings_sha256: str = ""
    input_mean: tuple[float, ...] = IMAGENET_MEAN
    input_std: tuple[float, ...] = IMAGENET_STD
    validation: dict[str, float] = field(default_factory=dict)
    learnt_from: tuple[str, ...] = ()


def save_segmentation(path: str | Path, network: SegmentationNetwork, card: SegmentationCard) -> str:
    """Write weights and card atomically, as safetensors; returns the SHA-256 of both.

    Raises:
        WeightsError: the card is that of another network.
        OutputError: the file cannot be written.
    """
    normalise = network.normalise
    made = network.encoder_name, network.decoder_name, network.classes, normalise.input_mean, normalise.input_std
    described = card.encoder, card.decoder, card.classes, card.input_mean, card.input_std
    if described != made:
        raise WeightsError(f"{path}: the card is that of {described}, the network is {made}; describe this one")
    return save_tensors(path, network.state_dict(), SEGMENTATION_FORMAT, asdict(card))


def start_weights_for(network: SegmentationNetwork, path: str | Path) -> dict[str, torch.Tensor]:
    """The state dict of a file for a network to start from, decoder and all.

    Raises:
        WeightsError: see `load_segmentation`; or weights of another encoder, decoder, classes or input.
    """
    other, card, _ = load_segmentation(path)
    normalise = network.normalise
    parts = {
        "encoder": (card.encoder, network.encoder_name),
        "decoder": (card.decoder, network.decoder_name),
        "classes": (card.classes, network.classes),
        "input_mean": (card.input_mean, normalise.input_mean),
        "input_std": (card.input_std, normalise.input_std),
    }
    for key, (given, made) in parts.items():
        if given != made:
            raise WeightsError(f"start_weights={path}: its {key} is {given}, not {made}; choose the same for both")
    return other.state_dict()


def load_segmentation(
    path: str | Path, device: torch.device | str = "cpu"
) -> tuple[SegmentationNetwork, SegmentationCard, str]:
    """The network in eval mode, its card, and the SHA-256 of tensors and card.

    Raises:
        WeightsError: no such file, not safetensors, not of a segmentation network, altered, or not fitting its own.
    """
    path = Path(path)
    file = read_tensors(path)
    if file.kind != SEGMENTATION_FORMAT:
        raise WeightsError(
            f"{path}: no weights of a segmentation network (no '{SEGMENTATION_FORMAT}' in its metadata); use those "
            "that bundles/segmentation.json leaves"
        )
    try:
        lists: dict[str, Any] = {name: tuple(file.card[name]) for name in ("classes", "input_mean", "input_std")}
        lists["learnt_from"] = tuple(file.card.get("learnt_from", ()))
        card = SegmentationCard(**{**file.card, **lists})
        network = SegmentationNetwork(
            *(card.encoder, card.classes, card.decoder), input_mean=card.input_mean, input_std=card.input_std
        )
        network.load_state_dict(file.state)
    except (KeyError, TypeError, ConfigError, NetworkError) as error:
        raise unreadable_card(path, error) from error
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise WeightsError(f"{path}: weights of another network than its card says ({reason}); train again") from error
    return network.to(device).eval(), card, file.sha256
