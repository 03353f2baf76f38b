"""Where pre-training starts from: an encoder by name, from scratch or with weights, made ready on its device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from medsd.networks.classifier import IMAGENET_MEAN, IMAGENET_STD, Normalise, create_encoder
from medsd.networks.start import load_encoder
from medsd.pretrain.med_moco import MedMoCo, MedMoCoSettings


@dataclass(frozen=True)
class EncoderStart:
    """The encoder that is pre-trained, and its weights before.

    Attributes:
        encoder: a timm name whose features are a map, such as "resnet18".
        pretrained: start from timm's ImageNet weights (downloads them); the paper starts from weights, too.
        weights: start from this file, see `load_encoder`; None for none.
        channels_last: keep weights as NHWC, which half-precision convolutions on GPUs want.
        seed: draws the other weights.
        input_mean, input_std: see `medsd.networks.classifier.Normalise`.

    Raises:
        ConfigError: a mean or deviation that is none.
    """

    encoder: str
    pretrained: bool = False
    weights: str | None = None
    channels_last: bool = False
    seed: int = 0
    input_mean: Sequence[float] = IMAGENET_MEAN
    input_std: Sequence[float] = IMAGENET_STD

    def __post_init__(self) -> None:
        self.normalise()

    def normalise(self) -> Normalise:
        """Images (B, 3, H, W) uint8 as the encoder's input."""
        return Normalise(self.input_mean, self.input_std)

    def network(self, settings: MedMoCoSettings, device: torch.device) -> MedMoCo:
        """Query and key encoder with their heads, on the device; torch's own generators are left as they were.

        Raises:
            NetworkError: timm has no such encoder, or its features are not a map.
            WeightsError: the file holds no weights of it, or of other input.
        """
        with torch.random.fork_rng([]):  # made on the CPU
            torch.manual_seed(self.seed)
            return MedMoCo(self._made(), settings, self.normalise()).to(device)

    def encoder_alone(self) -> nn.Module:
        """The encoder before its pre-training, on the CPU; errors as `network`."""
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            return self._made()

    def _made(self) -> nn.Module:
        encoder, _ = create_encoder(self.encoder, self.pretrained, self.normalise())
        if self.weights is not None:
            load_encoder(encoder, self.weights, self.normalise())
        if self.channels_last:
            encoder = encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return encoder
