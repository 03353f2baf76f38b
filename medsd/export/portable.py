"""Networks as they leave: images as read in, named answers out, and a description that goes with the file.

Normalisation and calibration are inside (our choice): who has the file alone cannot get either wrong. The description
is what `medsd export` writes into the metadata of ONNX and TorchScript files, as JSON under "medsd".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import medsd
from medsd.export.source import Trained, TrainedClassifier, TrainedEncoder, TrainedSegmentation
from medsd.networks.calibrated import Calibration, calibrated
from medsd.networks.classifier import Classifier, Normalise
from medsd.networks.modes import encoded_map
from medsd.segment.network import SegmentationNetwork

FORMAT = "medsd-export-1"
DESCRIPTION = "medsd"
"""The key of the description in a file's metadata."""

INPUT = "images"
_ENCODER_SIDE_PX = 64
_STRIDE_PX = 32

Sizes = Literal["any", "multiples of 32 px", "as given"]


class ClassifierOutputs(nn.Module):
    """Images (B, 3, H, W) uint8 to probabilities (B, K) and the network's own logits (B, K)."""

    def __init__(self, classifier: Classifier, calibration: Calibration | None) -> None:
        super().__init__()
        self.classifier = classifier
        self.temperature = 1.0 if calibration is None else calibration.temperature
        self.offset = () if calibration is None else calibration.offset

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits: Tensor = self.classifier(self.classifier.normalise(images))
        return calibrated(logits, self.temperature, self.offset).softmax(dim=1), logits


class EncoderOutputs(nn.Module):
    """Images (B, 3, H, W) uint8 to features (B, d) and the map (B, d, h, w) that they are the mean of."""

    def __init__(self, encoder: nn.Module, normalise: Normalise) -> None:
        super().__init__()
        self.encoder, self.normalise = encoder, normalise

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        feature_map = encoded_map(self.encoder, self.normalise(images))
        return feature_map.mean(dim=(2, 3)), feature_map


class SegmentationOutputs(nn.Module):
    """Images (B, 3, H, W) uint8 to probabilities (B, K, H, W)."""

    def __init__(self, network: SegmentationNetwork) -> None:
        super().__init__()
        self.network = network

    def forward(self, images: Tensor) -> tuple[Tensor]:
        logits: Tensor = self.network(self.network.normalise(images))
        return (logits.softmax(dim=1),)


@dataclass(frozen=True)
class Portable:
    """A network ready to leave.

    Attributes:
        module: images (B, 3, H, W) uint8 RGB to a tuple of `outputs`, in eval mode.
        outputs: their names.
        side_px: side of the images that it was trained on; of an encoder alone, whose file does not say, 64.
        description: what the file's metadata say, plain JSON values; see `described`.
    """

    module: nn.Module
    outputs: tuple[str, ...]
    side_px: int
    description: dict[str, Any]

    @property
    def sizes(self) -> Sizes:
        """The images' sizes that are asked of the file: decoders go by halves, which only these sides have evenly."""
        return "multiples of 32 px" if self.description["kind"] == "segmentation" else "any"

    def described(self, sizes: Sizes) -> dict[str, Any]:
        """The description with the sizes that the file takes."""
        side: Any = self.side_px if sizes == "as given" else sizes
        return {**self.description, "input": {**self.description["input"], "height": side, "width": side}}

    def examples(self, sizes: Sizes, seed: int = 0) -> list[Tensor]:
        """Batches of noise, the first of the network's own side, the others of other numbers and `sizes`."""
        generator, side = torch.Generator().manual_seed(seed), self.side_px
        if sizes == "as given":
            shapes = [(2, side, side), (1, side, side), (5, side, side)]
        else:
            side = -(-side // _STRIDE_PX) * _STRIDE_PX if sizes == "multiples of 32 px" else side
            # Not square in the first, so that no exporter takes one axis for the other.
            shapes = [(2, side, side + _STRIDE_PX), (1, side, side), (5, side + _STRIDE_PX, 2 * side)]
        return [
            torch.randint(256, (count, 3, height, width), generator=generator, dtype=torch.uint8)
            for count, height, width in shapes
        ]


def portable(trained: Trained) -> Portable:
    """The network of a weights file, with its description."""
    if isinstance(trained, TrainedClassifier):
        card = trained.card
        module: nn.Module = ClassifierOutputs(trained.network, card.calibration)
        outputs = {
            "probabilities": _output("(batch, classes)", _probability_words(card.calibration)),
            "logits": _output("(batch, classes)", "the network's own, without calibration"),
        }
        side_px, said = card.tile_px, _of_classifier(trained)
    elif isinstance(trained, TrainedSegmentation):
        of = trained.card
        module = SegmentationOutputs(trained.network)
        outputs = {"probabilities": _output("(batch, classes, height, width)", "softmax, not calibrated")}
        side_px = of.side_px
        said = {"kind": "segmentation", "classes": list(of.classes), "mpp": of.mpp, "trained_on": of.trained_on}
    else:
        assert isinstance(trained, TrainedEncoder)
        module = EncoderOutputs(trained.encoder.network, trained.encoder.normalise)
        outputs = {
            "features": _output("(batch, d)", "mean of feature_map"),
            "feature_map": _output("(batch, d, h, w)", "before any pooling"),
        }
        side_px, said = _ENCODER_SIDE_PX, {"kind": "encoder", "mpp": None, "encoder": trained.encoder.name}
    description = {"format": FORMAT, **said, "input": _INPUT, "outputs": outputs, **_origin(trained)}
    return Portable(module.eval(), tuple(outputs), side_px, description)


_INPUT = {
    "name": INPUT,
    "layout": "(batch, 3, height, width), red, green, blue",
    "type": "uint8",
    "values": "0 to 255, as read; they are normalised inside",
}


def _output(shape: str, words: str) -> dict[str, str]:
    return {"shape": shape, "type": "float32", "values": words}


def _probability_words(calibration: Calibration | None) -> str:
    return "softmax of the logits; never calibrated" if calibration is None else "calibrated; sum to 1 over classes"


def _of_classifier(trained: TrainedClassifier) -> dict[str, Any]:
    card = trained.card
    thresholds: dict[str, float] = {}
    if card.calibration is not None:
        named = {card.classes[1]: card.calibration, **card.others}
        thresholds = {name: each.threshold for name, each in named.items()}
    return {
        "kind": "classifier",
        "encoder": card.encoder,
        "architecture": card.architecture,
        "classes": list(card.classes),
        "tile_px": card.tile_px,
        "mpp": card.mpp,
        "trained_on": card.trained_on,
        "tissue": card.tissue,
        "thresholds": thresholds,
        "calibration": None if card.calibration is None else _plain(card.calibration),
        "stain_target": card.stain_target,
        "test_time_augmentation": trained.network.test_time_augmentation,
    }


def _plain(calibration: Calibration) -> dict[str, Any]:
    """What makes probabilities of logits, see `medsd.networks.calibrated`; it is inside the file already."""
    fields = asdict(calibration)
    return {"temperature": fields["temperature"], "offset": list(calibration.offset), "source": fields["source"]}


def _origin(trained: Trained) -> dict[str, Any]:
    return {"weights_sha256": trained.sha256, "medsd": medsd.__version__, "intended_use": "research use only"}


def differences(answers: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference of two tuples of outputs, as a share of the largest value expected, or of 1."""
    return max(
        float((one - other).abs().max() / max(1.0, float(other.abs().max())))
        for one, other in zip(answers, expected, strict=True)
    )
