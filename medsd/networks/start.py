"""Where training starts from: pre-trained encoder weights, from files and into files."""

from __future__ import annotations

import logging
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from medsd.errors import ConfigError, NetworkError, WeightsError
from medsd.files import sha256_of
from medsd.networks.classifier import IMAGENET_MEAN, IMAGENET_STD, Normalise, create_encoder
from medsd.networks.cut import left_out
from medsd.networks.weights import FORMAT, read_tensors, save_tensors, unreadable_card

logger = logging.getLogger(__name__)

ENCODER_FORMAT = "medsd-encoder-1"

# What torch and its weights-only unpickler raise on bytes that hold no tensors.
UNREADABLE = (
    UnpicklingError,
    struct.error,
    RuntimeError,
    LookupError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    AssertionError,
    OSError,
)
_HEADS = ("fc.", "head.", "head_dist.", "classifier.", "pre_logits.")
_NAMED = 3


def save_encoder(
    path: str | Path,
    encoder: nn.Module,
    name: str,
    source: str,
    normalise: Normalise | None = None,
    options: Mapping[str, Any] | None = None,
) -> str:
    """Write an encoder's weights for others to start from, as plain timm keys, atomically.

    Args:
        path: ends in .safetensors.
        encoder: a timm network without pooling and head, such as `TileClassifier.encoder`.
        name: its timm name.
        source: how and on what it was trained, in words.
        normalise: what made its input; None for ImageNet's mean and deviation.
        options: `encoder_options` that it was made with, see `TileClassifier`.

    Returns:
        The SHA-256 of tensors and all of that.

    Raises:
        OutputError: the file cannot be written.
    """
    normalise = normalise or Normalise()
    scale = {"input_mean": normalise.input_mean, "input_std": normalise.input_std}
    made = {"encoder_options": dict(options)} if options else {}
    return save_tensors(
        path, encoder.state_dict(), ENCODER_FORMAT, {"encoder": name, "source": source, **scale, **made}
    )


@dataclass(frozen=True)
class Encoder:
    """An encoder alone, from its file.

    Attributes:
        name: timm name.
        network: without pooling and head, in eval mode; images as `normalise` gives them to a map (B, d, h, w), or
            tokens of one, see `encoded_map`.
        sha256: of its tensors and card.
        normalise: images (B, 3, H, W) uint8 as its input.
    """

    name: str
    network: nn.Module
    sha256: str
    normalise: Normalise


def open_encoder(path: str | Path, device: torch.device | str = "cpu") -> Encoder | None:
    """The encoder of `save_encoder`'s file; None of a file of another kind.

    Raises:
        WeightsError: no such file, altered, or not fitting its own network.
        NetworkError: timm has no such network.
    """
    file = read_tensors(Path(path))
    if file.kind != ENCODER_FORMAT:
        return None
    try:
        name, normalise = str(file.card["encoder"]), Normalise(**_scale(file.card))
        options = dict(file.card.get("encoder_options", {}))
    except (KeyError, TypeError, ValueError, ConfigError) as error:
        raise unreadable_card(Path(path), error) from error
    network, _ = create_encoder(name, pretrained=False, options=options)
    load_encoder(network, path)
    return Encoder(name, network.to(device).eval(), file.sha256, normalise.to(device))


def last_stage(encoder: nn.Module, name: str) -> str:
    """The layer that gives a timm encoder's last stage, where maps of its features are usually looked at.

    Raises:
        NetworkError: it does not name its stages.
    """
    stages = getattr(encoder, "feature_info", None)
    if not stages:
        raise NetworkError(f"layer: {name} does not name its stages; name one with 'layer'")
    return str(stages[-1]["module"])


def weights_sha256(path: str | Path) -> str:
    """The SHA-256 of what a file of encoder weights holds.

    Of medsd's own it is that of tensors and card: the bytes of a file that is written anew may come in another order.

    Raises:
        WeightsError: no such file, or damaged.
    """
    path = Path(path)
    return (read_tensors(path).sha256 if path.suffix == ".safetensors" else "") or sha256_of(path)


def learnt_by(path: str | Path | None) -> tuple[str, ...]:
    """The digests of what weights learnt from labels of, `ModelCard.learnt_from`; none where their file does not say.

    Raises:
        WeightsError: a safetensors file that is not there, or damaged.
    """
    if path is None or Path(path).suffix != ".safetensors":
        return ()
    return tuple(map(str, read_tensors(Path(path)).card.get("learnt_from", ())))


def load_encoder(encoder: nn.Module, path: str | Path, normalise: Normalise | None = None) -> None:
    """Put pre-trained weights into a timm encoder: all of its tensors are replaced, or none where it raises.

    They are cast to the encoder's own precision, which is exact from float16 to float32.

    Files: `save_encoder`'s, `save_classifier`'s, and other state dicts under timm's names, as .safetensors, .pt or .pth
    (at top level or under "state_dict"; code in them is refused, not run). A leading "module." is taken off the names;
    where some then begin with "encoder.", the encoder is what is below it. Heads are left out by name: fc, head,
    head_dist, classifier, pre_logits; so is what an encoder that ends early does without. BatchNorms' counts of batches
    may be missing, as in old files: nothing reads them. The encoder's name is compared where both the file and timm
    give one.

    Args:
        encoder: a timm network without pooling and head.
        path: the file.
        normalise: what makes the encoder's input; compared with what medsd's own files say of theirs. Of others'
            files that is warned of where it is ImageNet's, and timm's own weights of the encoder take another.

    Raises:
        WeightsError: no such file, of another kind, damaged, of another network, or of other input; the encoder is
            untouched.
    """
    path = Path(path)
    if not path.is_file():
        raise WeightsError(
            f"{path}: no such encoder weights; check the path; where a bundle pre-trains, run the stage 'pretrain' or "
            "do without it (pretrain_epochs 0)"
        )
    if path.suffix == ".safetensors":
        state, says_its_input = _read_safetensors(path, encoder, normalise)
    elif path.suffix in (".pt", ".pth"):
        state, says_its_input = read_pickled(path), False
    else:
        raise WeightsError(f"{path}: encoder weights of unknown kind; use .safetensors, .pt or .pth")
    state = {name.removeprefix("module."): tensor for name, tensor in state.items()}
    below = {name.removeprefix("encoder."): tensor for name, tensor in state.items() if name.startswith("encoder.")}
    state, expected = below or state, encoder.state_dict()
    without = _HEADS + left_out(encoder)
    heads = [name for name in state if name not in expected and name.startswith(without)]
    for name in heads:
        del state[name]
    if "norm.weight" in expected and "norm.weight" not in state:  # of timm's that pool first; see `TileClassifier`
        state = {name.replace("fc_norm.", "norm.", 1): tensor for name, tensor in state.items()}
    _compare(path, state, expected)
    encoder.load_state_dict(state, strict=False)
    logger.info("%s: %d tensors loaded; left out: %s", path, len(state), ", ".join(heads) or "none")
    if not says_its_input and normalise is not None:
        _warn_of_input(path, encoder, normalise)


def _warn_of_input(path: Path, encoder: nn.Module, normalise: Normalise) -> None:
    """Tell where ImageNet's mean and deviation were left as they are, and timm's weights of the encoder take others."""
    timms = getattr(encoder, "pretrained_cfg", None) or {}
    mean, std = (tuple(timms.get(name, usual)) for name, usual in (("mean", IMAGENET_MEAN), ("std", IMAGENET_STD)))
    given = normalise.input_mean, normalise.input_std
    if given == (IMAGENET_MEAN, IMAGENET_STD) != (mean, std):
        logger.warning(
            "%s: says nothing of the input it takes; timm's weights of this encoder take input_mean %s and input_std "
            "%s, and ImageNet's %s and %s are set. Set both, unless these weights were trained with ImageNet's",
            *(path, list(mean), list(std), *map(list, given)),
        )


def _compare(path: Path, state: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    missing = [repr(name) for name in expected if name not in state and not name.endswith(".num_batches_tracked")]
    unexpected = [repr(name) for name in state if name not in expected]  # in a damaged file they may be anything
    shapes = [
        f"{name!r} {tuple(state[name].shape)} for {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state and state[name].shape != tensor.shape
    ]
    faults = [
        f"{len(names)} {kind}: {', '.join(names[:_NAMED])}{', ...' if len(names) > _NAMED else ''}"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("of another shape", shapes))
        if names
    ]
    if faults:
        raise WeightsError(f"{path}: tensors of another encoder ({'; '.join(faults)}); choose the one they are of")


def _scale(card: dict[str, Any]) -> dict[str, Any]:
    """Mean and deviation of a card, where it says them."""
    return {name: card[name] for name in ("input_mean", "input_std") if name in card}


def _read_safetensors(path: Path, encoder: nn.Module, normalise: Normalise | None) -> tuple[dict[str, Tensor], bool]:
    """The tensors, and whether the file says what makes its input."""
    file = read_tensors(path)
    if file.kind not in (FORMAT, ENCODER_FORMAT):
        return file.state, False
    try:
        name = str(file.card["encoder"])
    except KeyError as error:
        raise unreadable_card(path, error) from error
    made: str | None = getattr(encoder, "pretrained_cfg", {}).get("architecture")
    if made and name.partition(".")[0] != made:  # what follows the dot names weights, not a network
        raise WeightsError(f"{path}: weights of the encoder '{name}', not of '{made}'; choose that encoder")
    if normalise is not None:
        said = {"input_mean": IMAGENET_MEAN, "input_std": IMAGENET_STD} | _scale(file.card)
        normalise.check_weights(str(path), said["input_mean"], said["input_std"])
    return file.state, True


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors of a state dict in a .pt or .pth, at top level or under "state_dict"; code in it is refused, not run.

    Raises:
        WeightsError: damaged, or more than tensors.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UNREADABLE as error:
        # Torch's own words propose to run the file's code.
        kind = type(error).__name__
        raise WeightsError(f"{path}: damaged, or more than tensors ({kind}); save the state_dict() alone") from error
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise WeightsError(f"{path}: holds no tensors by name; save the state_dict() alone")
    return {str(name): tensor for name, tensor in state.items()}
