"""Weights in and out: safetensors whose metadata say everything needed to use them, with a SHA-256 of all of it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import medsd
from medsd.classes import target_number
from medsd.errors import ConfigError, NetworkError, WeightsError
from medsd.files import atomic_path, json_of
from medsd.networks.aim import AimClassifier
from medsd.networks.calibrated import Calibration, read_calibration
from medsd.networks.classifier import IMAGENET_MEAN, IMAGENET_STD, Classifier, TileClassifier
from medsd.networks.whitening import WhitenedHead
from medsd.slides.mpp import check_tile

FORMAT = "medsd-classifier-1"

Architecture = Literal["tile", "aim"]

_ARCHITECTURES: dict[str, type[TileClassifier] | type[AimClassifier]] = {"tile": TileClassifier, "aim": AimClassifier}


@dataclass(frozen=True)
class ModelCard:
    """What a weights file says of its network.

    Attributes:
        encoder: timm name.
        classes: names in the order of the logits.
        tile_px: side of the tiles it was trained on, in pixels at `mpp`.
        mpp: micrometres per pixel of the tiles.
        trained_on: the training data, in words.
        tissue: what was on its slides, in words; empty where nobody said.
        start: what the encoder started from, in words; empty where nobody said.
        calibration: of the second class, against the others; None until validation data have fixed it.
        others: of further classes by name, each against all others; see `asked`.
        data_sha256: of the items and labels of its training, validation and test parts.
        settings_sha256: of the settings it was trained with.
        stain_target: numbers of the stain that its tiles were normalised to, and that slides are before it maps them
            (`medsd.slides.stain.profile_from_dict`); None where they are taken as they are.
        architecture: "tile" for a `TileClassifier`, "aim" for an `AimClassifier`.
        options: the network's `options`.
        randomised: fields of `medsd.heatmap.faithfulness.Randomised`: how far its map depends on what was learnt; None
            where that was not measured.
        appearance: fields of `medsd.heatmap.appearance.Appearance`: stain and sharpness of its validation tiles; None
            in cards that do not say.
        input_mean, input_std: what its images are normalised by, see `Normalise`; ImageNet's in cards that do not say.
        learnt_from: digests of the slides, patients or groups that it, and what it started from, was trained and
            validated on, see `medsd.cohort.learnt`; empty in cards that do not say.
    """

    encoder: str
    classes: tuple[str, ...]
    tile_px: int
    mpp: float
    trained_on: str
    calibration: Calibration | None = None
    data_sha256: str = ""
    settings_sha256: str = ""
    stain_target: dict[str, Any] | None = None
    architecture: Architecture = "tile"
    options: dict[str, Any] = field(default_factory=dict)
    start: str = ""
    tissue: str = ""
    input_mean: tuple[float, ...] = IMAGENET_MEAN
    input_std: tuple[float, ...] = IMAGENET_STD
    randomised: dict[str, Any] | None = None
    appearance: dict[str, Any] | None = None
    others: dict[str, Calibration] = field(default_factory=dict)
    learnt_from: tuple[str, ...] = ()

    def asked(self, target: str | None) -> tuple[int, Calibration | None]:
        """The number of the class that is asked about, see `target_number`, and what validation data fixed of it.

        Raises:
            ConfigError: no such class, or one that was never calibrated beside others that were.
        """
        number = target_number(self.classes, target)
        if number == target_number(self.classes, None) or self.calibration is None:
            return number, self.calibration
        name = self.classes[number]
        if name not in self.others:
            known = ", ".join((self.classes[1], *self.others))
            raise ConfigError(f"target='{target}': these weights map {known}; thresholds of '{name}' were never fixed")
        return number, self.others[name]


def save_classifier(path: str | Path, classifier: Classifier, card: ModelCard) -> str:
    """Write weights and card atomically; returns the SHA-256 of tensors and card.

    A `WhitenedHead` is written as the plain linear head that it is in evaluation mode.

    Raises:
        WeightsError: the card is that of another network.
        OutputError: the file cannot be written.
    """
    normalise = classifier.normalise
    network = (
        *(classifier.architecture, classifier.encoder_name, classifier.classes, classifier.options),
        *(normalise.input_mean, normalise.input_std),
    )
    described = (card.architecture, card.encoder, card.classes, card.options, card.input_mean, card.input_std)
    if described != network:
        raise WeightsError(f"{path}: the card is that of {described}, the network is {network}; describe this one")
    return save_tensors(path, written_state(classifier), FORMAT, asdict(card))


def written_state(classifier: Classifier) -> dict[str, Tensor]:
    """The state that `save_classifier` writes: the classifier's own, a `WhitenedHead` folded into a linear one."""
    state: dict[str, Tensor] = classifier.state_dict()
    if isinstance(classifier.head, WhitenedHead):
        state = {name: tensor for name, tensor in state.items() if not name.startswith("head.")}
        state |= {f"head.{name}": tensor for name, tensor in classifier.head.folded().state_dict().items()}
    return state


def load_classifier(path: str | Path, device: torch.device | str = "cpu") -> tuple[Classifier, ModelCard, str]:
    """The classifier in eval mode with its neutral reference, its card, and the SHA-256 of its tensors and card.

    Raises:
        WeightsError: no such file, not safetensors, not medsd's, altered, or not fitting its own network.
    """
    path = Path(path)
    file = read_tensors(path)
    if file.kind != FORMAT:
        raise WeightsError(f"{path}: weights of another network (no '{FORMAT}' in its metadata); use medsd's own")
    card = _card(path, file.card)
    options: dict[str, Any] = card.options
    try:
        # No class may fetch weights, whatever the options say.
        classifier = _ARCHITECTURES[card.architecture](
            card.encoder, card.classes, False, input_mean=card.input_mean, input_std=card.input_std, **options
        )
        classifier.load_state_dict(file.state)
    except (NetworkError, ConfigError, RuntimeError, TypeError) as error:  # a TypeError tells of unknown options
        reason = str(error).partition("\n")[0]
        raise WeightsError(
            f"{path}: weights of another network than '{card.encoder}' ({reason}); train again"
        ) from error
    classifier.neutral = card.calibration.reference if card.calibration else None
    return classifier.to(device).eval(), card, file.sha256


def save_tensors(path: str | Path, state: dict[str, Tensor], kind: str, card: dict[str, Any]) -> str:
    """Write tensors as safetensors atomically, with a card (plain JSON values) and a SHA-256 of both in the metadata.

    Returns:
        The SHA-256 as hexadecimal digits.

    Raises:
        OutputError: the file cannot be written.
    """
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    text = json.dumps(card)
    digest = _digest(state, text)
    metadata = {
        "format": kind,
        "card": text,
        "sha256": digest,
        "medsd": medsd.__version__,
        "torch": torch.__version__,
        "intended_use": "research use only",
    }
    with atomic_path(path) as temporary:
        # Written by us: safetensors' own writer makes files that nobody else may read.
        temporary.write_bytes(_sorted(save(state, metadata)))
    return digest


def _sorted(data: bytes) -> bytes:
    """A safetensors file with its header in order: the library's own varies, so equal weights would differ in bytes."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.JSONEncoder(sort_keys=True).encode(json.loads(data[8:end])).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header + data[end:]


@dataclass(frozen=True)
class TensorFile:
    """A safetensors file in memory: its tensors by name and, of medsd's own files, kind, card and SHA-256 of both."""

    state: dict[str, Tensor]
    kind: str = ""
    card: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""


def read_tensors(path: Path) -> TensorFile:
    """What any safetensors file holds; medsd's own, whose kind begins "medsd-", are compared with their SHA-256.

    Raises:
        WeightsError: no such file, not safetensors, values that are no numbers, or medsd's and altered.
    """
    if not path.is_file():
        raise WeightsError(
            f"{path}: no such weights file; run the stage 'finetune' (of a segmentation 'segment'), or check the path"
        )
    try:
        with safe_open(path, framework="pt") as file:
            state, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}  # noqa: SIM118 (not a dict)
    except (SafetensorError, OSError) as error:
        raise WeightsError(f"{path}: not a safetensors file ({error}); weights end in .safetensors") from error
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise WeightsError(f"{path}: '{name}' holds NaN or infinity, so nothing follows from it; train again")
    kind, card = metadata.get("format", ""), metadata.get("card")
    if not kind.startswith("medsd-"):
        return TensorFile(state)
    if card is None or _digest(state, card) != metadata.get("sha256"):
        raise WeightsError(f"{path}: tensors and card do not match their SHA-256; the file is damaged, copy it again")
    try:
        return TensorFile(state, kind, dict(json_of(card)), metadata["sha256"])
    except (ValueError, TypeError) as error:
        raise unreadable_card(path, error) from error


def unreadable_card(path: Path, reason: Exception) -> WeightsError:
    """The error of a file whose card does not hold what it should."""
    return WeightsError(
        f"{path}: its card cannot be read ({reason}); written by another version? Run the stage 'finetune' again"
    )


def _card(path: Path, card: dict[str, Any]) -> ModelCard:
    try:
        calibration = card["calibration"]
        if card.get("architecture", "tile") not in _ARCHITECTURES:
            raise ValueError(f"architecture '{card['architecture']}' is unknown")
        known = None if calibration is None else read_calibration(calibration)
        others = {name: read_calibration(fields) for name, fields in card.get("others", {}).items()}
        check_tile(card["tile_px"], card["mpp"])
        lists: dict[str, Any] = {
            name: tuple(card[name]) for name in ("classes", "input_mean", "input_std", "learnt_from") if name in card
        }
        return ModelCard(**{**card, **lists, "calibration": known, "others": others})
    except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
        raise unreadable_card(path, error) from error


def _digest(state: dict[str, Tensor], card: str) -> str:
    digest = hashlib.sha256(card.encode())
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
