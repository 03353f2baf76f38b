"""A classifier for WSInfer: TorchScript and `config.json`, as its command and its QuPath extension take them.

WSInfer (Kaczmarzyk et al. 2024, doi:10.1038/s41698-024-00499-9; read: wsinfer 0.6.1, wsinfer-zoo 0.6.3, and the source
of the QuPath extension) cuts squares of patch_size_pixels * spacing_um_px micrometres at level 0, applies the
transforms of `config.json` in their order (`Resize` to pixels, `ToTensor` to floats of 0 to 1, `Normalize`), runs the
network, and takes the softmax of what it gives. So this network gives logarithms of its calibrated probabilities, whose
softmax are these probabilities again; probabilities would be squeezed by a second softmax (0 and 1 to 0.27 and 0.73).
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from medsd.errors import ConfigError, OutputError
from medsd.export.portable import ClassifierOutputs
from medsd.export.source import Trained, TrainedClassifier
from medsd.export.torchscript import check_traced, torchscript_bytes, trace
from medsd.files import make_folder, write_json
from medsd.networks.calibrated import calibrated

MODEL, CONFIG = "torchscript_model.pt", "config.json"
"""The names that WSInfer and its QuPath extension look for in a model's folder."""


class WsinferOutputs(ClassifierOutputs):
    """Images (B, 3, H, W) float of 0 to 1 to logarithms (B, K) of calibrated probabilities."""

    def forward(self, images: Tensor) -> Tensor:  # type: ignore[override]
        logits: Tensor = self.classifier(self.classifier.normalise(images * 255))
        return calibrated(logits, self.temperature, self.offset).log_softmax(dim=1)


def wsinfer_config(trained: TrainedClassifier) -> dict[str, Any]:
    """`config.json`, after wsinfer-zoo's schema (spec version 1.0)."""
    card = trained.card
    return {
        "spec_version": "1.0",
        "architecture": card.encoder,
        "num_classes": len(card.classes),
        "class_names": list(card.classes),
        "patch_size_pixels": card.tile_px,
        "spacing_um_px": card.mpp,
        "transform": [{"name": "Resize", "arguments": {"size": card.tile_px}}, {"name": "ToTensor"}],
    }


def write_wsinfer(folder: str | Path, trained: Trained) -> None:
    """Write a classifier into a new folder for WSInfer, which is there whole or not at all.

    Raises:
        ConfigError: weights of another kind than a classifier, or of one that takes slides of one stain.
        NetworkError: traced, the network gives other answers.
        OutputError: the folder cannot be written to.
    """
    if not isinstance(trained, TrainedClassifier):
        raise ConfigError(f"{trained.path}: WSInfer runs classifiers; write these weights as .onnx or .ts")
    if trained.card.stain_target is not None:
        raise ConfigError(
            f"{trained.path}: it takes slides normalised to a stain, which WSInfer cannot; map with medsd heatmap"
        )
    folder = Path(folder)
    module = WsinferOutputs(trained.network, trained.card.calibration).eval()
    examples = _examples(trained.card.tile_px)
    traced = trace(module, examples)
    check_traced(traced, module, examples)
    parent = make_folder(folder.absolute().parent)
    made = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=parent))
    try:
        (made / MODEL).write_bytes(torchscript_bytes(traced, {}))
        write_json(made / CONFIG, wsinfer_config(trained))
        made.chmod(0o755)
        made.replace(folder)
    except OSError as error:
        raise OutputError(f"{folder}: cannot be written ({error.strerror or error})") from error
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _examples(side_px: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(count, 3, side_px, side_px, generator=generator) for count in (2, 1, 5)]
