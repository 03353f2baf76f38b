"""Where pre-training starts from: an encoder by name, from scratch or with weights, made ready on its device."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from medsd.errors import NetworkError
from medsd.networks.classifier import IMAGENET_MEAN, IMAGENET_STD, Normalise, create_encoder
from medsd.networks.modes import usable_device
from medsd.networks.start import load_encoder
from medsd.networks.tokens import token_stride
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
        encoder_options: {"end": "layer3"} for an encoder that ends early, see `TileClassifier`.

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
    encoder_options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.normalise()

    def normalise(self) -> Normalise:
        """Images (B, 3, H, W) uint8 as the encoder's input."""
        return Normalise(self.input_mean, self.input_std)

    @property
    def is_random(self) -> bool:
        """Whether it starts from no weights."""
        return not self.pretrained and self.weights is None

    def network(self, settings: MedMoCoSettings, device: torch.device) -> MedMoCo:
        """Query and key encoder with their heads, on the device; torch's own generators are left as they were.

        Raises:
            NetworkError: timm has no such encoder, its features are not a map, or it is a vision transformer.
            WeightsError: the file holds no weights of it, or of other input.
            ConfigError: the device cannot be used here.
        """
        with torch.random.fork_rng([]):  # made on the CPU
            torch.manual_seed(self.seed)
            return MedMoCo(self._made(), settings, self.normalise()).to(usable_device(device))

    def encoder_alone(self) -> nn.Module:
        """The encoder before its pre-training, on the CPU; errors as `network`."""
        with torch.random.fork_rng([]):
            torch.manual_seed(self.seed)
            return self._made()

    def _made(self) -> nn.Module:
        encoder, _ = create_encoder(self.encoder, self.pretrained, self.normalise(), self.encoder_options)
        if token_stride(encoder) is not None:
            raise NetworkError(
                f"encoder '{self.encoder}': vision transformers are not pre-trained here; choose a convolutional one "
                "such as 'resnet18'"
            )
        if self.weights is not None:
            load_encoder(encoder, self.weights, self.normalise())
        if self.channels_last:
            encoder = encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return encoder


@torch.no_grad()
def settle(encoder: nn.Module, batches: Iterable[Tensor], normalise: Normalise) -> None:
    """Set the running statistics of the encoder's BatchNorms to their mean over batches; all else stays.

    Random weights come with averages of 0 and variances of 1, with which features are far worse than the weights:
    against these any training would seem to gain.

    Args:
        encoder: in eval mode, on its device.
        batches: (B, 3, H, W) uint8 images to learn them from, at least one batch.
        normalise: gives the encoder's input of them, on its device.
    """
    norms = [module for module in encoder.modules() if isinstance(module, _BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    device = next(encoder.parameters()).device
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain mean
        norm.train()
    for images in batches:
        encoder(normalise(images.to(device)))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
