"""Which weights a run's folder holds, and of what kind they are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from medsd.errors import WeightsError
from medsd.networks.classifier import Classifier
from medsd.networks.start import ENCODER_FORMAT, Encoder, open_encoder
from medsd.networks.weights import FORMAT, ModelCard, load_classifier, read_tensors
from medsd.segment.network import SegmentationNetwork
from medsd.segment.weights import SEGMENTATION_FORMAT, SegmentationCard, load_segmentation

CONFIG = "training/config.json"
"""Where a run keeps the configuration that it was started with, from its output folder."""

# In a run's folder the first of them that is there: an encoder is but the start of a classifier.
_WEIGHTS = ("model.safetensors", "segmentation.safetensors", "encoder.safetensors")


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier's file: network in eval mode, card, SHA-256 of its tensors and card."""

    path: Path
    network: Classifier
    card: ModelCard
    sha256: str


@dataclass(frozen=True)
class TrainedSegmentation:
    """A segmentation network's file: network in eval mode, card, SHA-256 of its tensors and card."""

    path: Path
    network: SegmentationNetwork
    card: SegmentationCard
    sha256: str


@dataclass(frozen=True)
class TrainedEncoder:
    """An encoder's file; its weights stand for nothing but features."""

    path: Path
    encoder: Encoder

    @property
    def sha256(self) -> str:
        """Of its tensors and card."""
        return self.encoder.sha256


Trained = TrainedClassifier | TrainedSegmentation | TrainedEncoder


def open_trained(run: str | Path) -> Trained:
    """What a run left, on the CPU.

    Args:
        run: a run's output folder, whose classifier is taken, or else its segmentation network or encoder; or one
            weights file of medsd.

    Raises:
        WeightsError: no weights there, or such as cannot be used.
    """
    path = Path(run)
    if path.is_dir():
        found = [path / name for name in _WEIGHTS if (path / name).is_file()]
        if not found:
            raise WeightsError(f"{path}: none of {', '.join(_WEIGHTS)} in it; name a run's output folder, or weights")
        path = found[0]
    kind = read_tensors(path).kind
    if kind == FORMAT:
        return TrainedClassifier(path, *load_classifier(path))
    if kind == SEGMENTATION_FORMAT:
        return TrainedSegmentation(path, *load_segmentation(path))
    encoder = open_encoder(path) if kind == ENCODER_FORMAT else None
    if encoder is None:
        raise WeightsError(f"{path}: not weights that medsd wrote, so nothing says what network they are of")
    return TrainedEncoder(path, encoder)
