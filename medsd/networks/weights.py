"""Weights in and out: safetensors whose metadata say everything needed to use them, with a SHA-256 of all of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import medsd
from medsd.errors import ConfigError, NetworkError, OutputError, WeightsError
from medsd.files import atomic_path
from medsd.networks.classifier import TileClassifier
from medsd.slides.stain import StainProfile, profile_from_dict

FORMAT = "medsd-classifier-1"

Attribution = Literal["gradient", "gradient_x_activation"]
Smoothing = Literal["backward_hook", "none"]


@dataclass(frozen=True)
class Calibration:
    """What validation data fixed once for all slides.

    Attributes:
        threshold: tumour probability from which a place counts as tumour.
        saliency_limit: end of the colour scale, the 99.5th percentile of |saliency| in validation tissue.
        layer: hidden layer of the saliency.
        attribution: "gradient" or "gradient_x_activation".
        smoothing: "backward_hook" or "none".
        source: the data that fixed these values, for legends.
    """

    threshold: float
    saliency_limit: float
    layer: str
    attribution: Attribution
    smoothing: Smoothing
    source: str


@dataclass(frozen=True)
class ModelCard:
    """What a weights file says of its network.

    Attributes:
        encoder: timm name.
        classes: names in the order of the logits.
        tile_px: side of the tiles it was trained on, in pixels at `mpp`.
        mpp: micrometres per pixel of the tiles.
        trained_on: the training data, in words.
        calibration: None until validation data have fixed it.
        data_sha256: of the items and labels of its training, validation and test parts.
        settings_sha256: of the settings it was trained with.
        stain_target: the stain that its tiles were normalised to, and that slides are before it maps them; None where
            they are taken as they are.
    """

    encoder: str
    classes: tuple[str, ...]
    tile_px: int
    mpp: float
    trained_on: str
    calibration: Calibration | None = None
    data_sha256: str = ""
    settings_sha256: str = ""
    stain_target: StainProfile | None = None


def save_classifier(path: str | Path, classifier: TileClassifier, card: ModelCard) -> str:
    """Write weights and card atomically; returns the SHA-256 of tensors and card.

    Raises:
        OutputError: the file cannot be written.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in classifier.state_dict().items()}
    text = json.dumps(asdict(card))
    digest = _digest(state, text)
    metadata = {
        "format": FORMAT,
        "card": text,
        "sha256": digest,
        "medsd": medsd.__version__,
        "torch": torch.__version__,
        "intended_use": "research use only",
    }
    with atomic_path(path) as temporary:
        try:
            save_file(state, temporary, metadata)
        except SafetensorError as error:  # what a full disk gives here, instead of an OSError
            raise OutputError(f"{path}: cannot be written ({error})") from error
    return digest


def load_classifier(path: str | Path, device: torch.device | str = "cpu") -> tuple[TileClassifier, ModelCard, str]:
    """The classifier in eval mode, its card, and the SHA-256 of its tensors and card.

    Raises:
        WeightsError: no such file, not safetensors, not medsd's, altered, or not fitting its own network.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(f"{path}: no such weights file; run the stage 'finetune' or check the path")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a safetensors file ({error}); weights end in .safetensors") from error
    if metadata.get("format") != FORMAT:
        raise WeightsError(f"{path}: weights of another network (no '{FORMAT}' in its metadata); use medsd's own")
    text = metadata.get("card", "")
    if _digest(state, text) != metadata.get("sha256"):
        raise WeightsError(f"{path}: tensors and card do not match their SHA-256; the file is damaged, copy it again")
    card = _card(path, text)
    try:
        classifier = TileClassifier(card.encoder, card.classes)
        classifier.load_state_dict(state)
    except (NetworkError, RuntimeError) as error:
        raise WeightsError(f"{path}: weights of another network than '{card.encoder}'; train again") from error
    return classifier.to(device).eval(), card, metadata["sha256"]


def _card(path: Path, text: str) -> ModelCard:
    try:
        fields = json.loads(text)
        calibration, stain = fields.pop("calibration"), fields.pop("stain_target", None)
        return ModelCard(
            **{**fields, "classes": tuple(fields["classes"])},
            calibration=None if calibration is None else Calibration(**calibration),
            stain_target=None if stain is None else profile_from_dict(stain),
        )
    except (ConfigError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise WeightsError(f"{path}: its card cannot be read ({error}); written by another version?") from error


def _digest(state: dict[str, Tensor], card: str) -> str:
    digest = hashlib.sha256(card.encode())
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
