"""A weights file as a network that can be explained: a classifier of medsd's, or an encoder without classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from medsd.classes import class_number
from medsd.errors import ConfigError, nearest
from medsd.networks.calibrated import calibrated
from medsd.networks.modes import full_name, usable_device
from medsd.networks.start import last_stage, open_encoder
from medsd.networks.weights import ModelCard, load_classifier

# Every encoder has been tried at this size when it was made (`create_encoder`).
_TRIED_PX = 64
INPUT = "input"
"""What the network's input is called where a layer is asked for."""


@dataclass(frozen=True)
class Model:
    """A network with what its weights file says of it.

    Attributes:
        path: the weights file.
        network: in eval mode; gives logits (B, K), or features (B, d, h, w) for an encoder.
        encoder: the part whose layers are named, the network itself for an encoder.
        name: timm name of the encoder.
        classes: names in the order of the logits; none for an encoder.
        card: of a classifier; None for an encoder.
        sha256: of its tensors and card.
        normalise: images (B, 3, H, W) uint8 as the network's input, float32.
        device: where both are.
    """

    path: Path
    network: nn.Module
    encoder: nn.Module
    name: str
    classes: tuple[str, ...]
    card: ModelCard | None
    sha256: str
    normalise: nn.Module
    device: torch.device

    @property
    def temperature(self) -> float:
        """Divides the logits, see `medsd.networks.calibrated`."""
        calibration = self.card.calibration if self.card else None
        return calibration.temperature if calibration else 1.0

    def calibrated(self, logits: Tensor) -> Tensor:
        """Logits (B, K), as slides' probabilities follow from them."""
        calibration = self.card.calibration if self.card else None
        return calibrated(logits, self.temperature, calibration.offset if calibration else ())

    @property
    def smallest_px(self) -> int:
        """The least side of an image that is known to pass through the network."""
        return min(_TRIED_PX, self.card.tile_px) if self.card else _TRIED_PX

    def input(self, images: Tensor) -> Tensor:
        """Images (B, 3, H, W) uint8 as the network takes them, on its device."""
        x: Tensor = self.normalise(images.to(self.device))
        return x

    def layer(self, name: str | None) -> str | None:
        """The full name of a layer, such as "encoder.layer3" for "layer3"; None for "input".

        Args:
            name: in the network or in its encoder; None takes the calibrated one, or else timm's last stage.

        Raises:
            NetworkError: there is no such layer.
        """
        if name == INPUT:
            return None
        calibrated = self.card.calibration.layer if self.card and self.card.calibration else None
        inside = "" if self.encoder is self.network else "encoder"
        wanted = name or calibrated or last_stage(self.encoder, self.name)
        return full_name(self.network, wanted, inside, also=[INPUT])

    def target(self, name: str) -> int | None:
        """The number of a class given by name or number; None for "predicted".

        Raises:
            ConfigError: the network has no such class.
        """
        if name == "predicted":
            return None
        number = class_number(self.classes, name)
        if number is not None:
            return number
        if name in (numbers := [str(number) for number in range(len(self.classes))]):
            return numbers.index(name)
        if not self.classes:
            raise ConfigError(f"target '{name}': {self.path} is an encoder, which has no classes; leave it out")
        known = ["predicted", *self.classes]
        hint = nearest(name, known) or f"; use one of {', '.join(known)}"
        raise ConfigError(f"target '{name}': {self.path} has no such class{hint}")


def load_model(path: str | Path, device: torch.device | str | None = "cpu") -> Model:
    """The network of `save_classifier`'s or `save_encoder`'s file.

    Raises:
        WeightsError: no such file, of another kind, altered, or not fitting its own network.
        ConfigError: the device does not exist here.
    """
    path, place = Path(path), usable_device(device)
    found = open_encoder(path, place)
    if found is None:
        classifier, card, digest = load_classifier(path, place)
        name, classes = classifier.encoder_name, classifier.classes
        return Model(path, classifier, classifier.encoder, name, classes, card, digest, classifier.normalise, place)
    network = found.network
    return Model(path, network, network, found.name, (), None, found.sha256, found.normalise, place)
