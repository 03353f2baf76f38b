"""A run as a bundle in the shape of MONAI's model zoo, zipped."""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from medsd.errors import ConfigError, OutputError
from medsd.evaluate.runs import read_run_json
from medsd.export.card import model_card
from medsd.export.source import CONFIG, Trained, TrainedClassifier
from medsd.export.torchscript import check_traced, torchscript_bytes, trace
from medsd.export.zoo_configs import inference_config, metadata, train_config
from medsd.files import atomic_path
from medsd.networks.weights import written_state
from medsd.shipped import shipped_folder

_TIME = (1980, 1, 1, 0, 0, 0)
_LICENSE = """\
The configurations in this bundle come from medsd and are under the Apache License 2.0,
https://www.apache.org/licenses/LICENSE-2.0

No licence was given for the weights. Ask whoever made them before you use or share them.
"""


def write_zoo(path: str | Path, trained: Trained, run: Path | None, license_file: Path | None = None) -> list[str]:
    """Write a classifier as a zipped MONAI bundle, atomically; the same run gives the same bytes.

    The zip holds one folder, of the zip's name, as `monai.bundle.load` wants it. Maps and calibration go with it, in
    `models/model.safetensors`. Places on this machine are taken out of the training's configuration.

    Args:
        path: the zip.
        trained: the classifier.
        run: the run's output folder, for its scores and its configuration; None of weights alone.
        license_file: what becomes LICENSE; None for a text that says that the weights have none.

    Returns:
        the names in the folder.

    Raises:
        ConfigError: weights of another kind than a classifier.
        WeightsError: scores that cannot be read.
        OutputError: the zip cannot be written.
    """
    if not isinstance(trained, TrainedClassifier):
        raise ConfigError(f"{trained.path}: a bundle is made of a classifier; write these weights as .onnx or .ts")
    name = Path(path).stem
    config = None if run is None else _config_of(run)
    files: dict[str, bytes] = {
        "LICENSE": _license(license_file),
        "configs/inference.json": _json(inference_config(trained)),
        "configs/logging.conf": (shipped_folder() / "bundles" / "logging.conf").read_bytes(),
        "configs/metadata.json": _json(metadata(trained, name)),
        "docs/README.md": model_card(trained, name, _scores_of(run, trained), config is not None).encode(),
        "models/model.pt": _state_dict(trained),
        "models/model.safetensors": trained.path.read_bytes(),
        "models/model.ts": _scripted(trained, name),
    }
    if config is not None:
        files["configs/train.json"] = _json(train_config(config))
    with atomic_path(path) as temporary:
        _write_zip(temporary, {f"{name}/{place}": content for place, content in files.items()})
    return sorted(files)


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=4, allow_nan=False, ensure_ascii=False) + "\n").encode()


def _license(path: Path | None) -> bytes:
    if path is None:
        return _LICENSE.encode()
    try:
        content = path.read_bytes()
        text = content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise OutputError(f"{path}: no licence to be read ({reason}); name a text file") from error
    if not text.strip() or "\0" in text:
        raise OutputError(f"{path}: no licence to be read (no text in it); name a text file")
    return content


def _config_of(run: Path) -> dict[str, Any] | None:
    """The configuration that the run kept; None where it was trained before that was kept, or in another way."""
    path = run / CONFIG
    return read_run_json(path) if path.is_file() else None


def _scores_of(run: Path | None, trained: TrainedClassifier) -> dict[str, Any] | None:
    """The run's scores, if they are of these weights."""
    path = None if run is None else run / "scores.json"
    if path is None or not path.is_file():
        return None
    scores = read_run_json(path)
    return scores if scores.get("weights_sha256") == trained.sha256 else None


def _state_dict(trained: TrainedClassifier) -> bytes:
    buffer = io.BytesIO()
    torch.save({name: tensor.clone() for name, tensor in written_state(trained.network).items()}, buffer)
    return buffer.getvalue()


def _scripted(trained: TrainedClassifier, name: str) -> bytes:
    """What MONAI's `ckpt_export` makes of `network_def`, with its files inside: normalised images to logits."""
    side = trained.card.tile_px
    generator = torch.Generator().manual_seed(0)
    examples = [torch.randn(count, 3, side, side, generator=generator) for count in (2, 1, 5)]
    traced = trace(trained.network, examples)
    check_traced(traced, trained.network, examples)
    inside = {"metadata.json": metadata(trained, name), "inference.json": inference_config(trained)}
    return torchscript_bytes(traced, {place: json.dumps(content) for place, content in inside.items()})


def _write_zip(path: Path, files: Mapping[str, bytes]) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for place in sorted(files):
            member = zipfile.ZipInfo(place, _TIME)
            member.external_attr, member.compress_type = 0o644 << 16, zipfile.ZIP_DEFLATED
            archive.writestr(member, files[place])
