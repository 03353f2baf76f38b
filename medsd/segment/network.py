"""Segmentation networks: a timm encoder, one of segmentation-models-pytorch's decoders or the linear one."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast, get_args

import torch
import torch.nn.functional as F
from timm.models import group_parameters
from torch import Tensor, nn

from medsd.checks import check_choice
from medsd.classes import checked_classes
from medsd.errors import NetworkError
from medsd.networks.classifier import IMAGENET_MEAN, IMAGENET_STD, Normalise, create_encoder
from medsd.networks.modes import evaluating
from medsd.networks.start import load_encoder
from medsd.segment.linear import LinearDecoder, channel_moments
from medsd.segment.transfer import common_name, transfer_weights

logger = logging.getLogger(__name__)

Decoder = Literal["unet", "deeplabv3plus", "fpn", "linear", "linear8", "linear16"]

# Of linear decoders the encoder's stages, and the stride of the last, later ones being dilated.
_LINEAR = {"linear": (5, 8), "linear8": (3, 32), "linear16": (4, 32)}
# What the deepest encoders divide images by.
_MULTIPLE_PX = 32


class SegmentationNetwork(nn.Module):
    """Logits of every pixel.

    The encoder is timm's by its features (`tu-` in segmentation-models-pytorch), so whatever pre-training or
    fine-tuning left goes in by its own names. The linear decoder looks at the last map alone, of an encoder whose
    strides end at 8 (later ones are dilated): of coarser maps the Dice would measure the stride. `linear8` and
    `linear16` look at the encoder's own map of that stride instead, and leave out what comes after it.

    Attributes:
        encoder_name: timm's.
        decoder_name: see `decoder`.
        classes: names in the order of the logits, the background's first.
        normalise: images (B, 3, H, W) uint8 as the network's float input.
        model: segmentation-models-pytorch's network, or the linear one.
        pretrained, encoder_weights: what the encoder was made with.

    Args:
        encoder: a timm name whose features are maps, such as "resnet18".
        classes: two or more.
        decoder: "unet", "deeplabv3plus" (strides end at 16), "fpn", or one of the linear ones.
        pretrained: load timm's ImageNet weights (downloads them).
        encoder_weights: start from this file, see `load_encoder`: what the stages `pretrain` and `finetune` write, or
            any state dict under timm's names; None for none.
        input_mean, input_std: see `Normalise`.

    Raises:
        ConfigError: an unknown decoder, or fewer than two classes of different names.
        NetworkError: timm has no such encoder, or it does not fit the decoder.
        WeightsError: the file holds no weights of this encoder, or of other input.

    Example:
        >>> network = SegmentationNetwork("test_resnet", ("background", "gland"), decoder="fpn")
        >>> network(torch.zeros(2, 3, 64, 96, dtype=torch.uint8)).shape
        torch.Size([2, 2, 64, 96])
    """

    def __init__(
        self,
        encoder: str,
        classes: Sequence[str],
        decoder: Decoder = "unet",
        pretrained: bool = False,
        encoder_weights: str | None = None,
        input_mean: Sequence[float] = IMAGENET_MEAN,
        input_std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        check_choice("decoder", decoder, get_args(Decoder))
        self.encoder_name, self.decoder_name, self.classes = encoder, decoder, checked_classes(classes)
        self.pretrained, self.encoder_weights = pretrained, encoder_weights
        self.normalise = Normalise(input_mean, input_std)
        timm_encoder, _ = create_encoder(encoder, pretrained, self.normalise)
        if encoder_weights is not None:
            load_encoder(timm_encoder, encoder_weights, self.normalise)
        self.model = _model(encoder, decoder, len(classes))
        moved = transfer_weights(timm_encoder, self.model.encoder)
        if moved.missing:
            raise NetworkError(
                f"encoder '{encoder}': its features have tensors that it lacks as a whole ({moved.in_words()}); choose "
                "another encoder"
            )
        said = moved.in_words()
        if decoder in ("linear8", "linear16"):
            said = f"{len(moved.loaded)} tensors loaded, {len(moved.unexpected)} left out, of later stages"
        logger.info("encoder '%s' in '%s': %s", encoder, decoder, said)
        self._layers = self._layers_by_name(timm_encoder)

    @property
    def encoder(self) -> nn.Module:
        """timm's features of the images, under timm's names (levels of a name may be joined by underscores)."""
        return cast(nn.Module, self.model.encoder.model)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    def encoder_layers(self) -> dict[str, int] | None:
        """The layer of each of the encoder's parameters, by name, the stem's being 0; None where timm does not know."""
        return self._layers

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, K, H, W) of images (B, 3, H, W) of any size: uint8 as read, or float as `normalise` gives them.

        Images whose sides are no multiples of 32 px are continued by their last rows and columns, and cut again.
        """
        if x.dtype == torch.uint8:
            x = self.normalise(x)
        height, width = x.shape[2:]
        below, right = -height % _MULTIPLE_PX, -width % _MULTIPLE_PX
        if below or right:
            x = F.pad(x, (0, right, 0, below), mode="replicate")
        logits: Tensor = self.model(x)
        return logits[..., :height, :width]

    def _layers_by_name(self, timm_encoder: nn.Module) -> dict[str, int] | None:
        matcher = getattr(timm_encoder, "group_matcher", None)
        if matcher is None:
            return None
        by_name = group_parameters(timm_encoder, matcher(), reverse=True)
        layers = {common_name(name): layer for name, layer in by_name.items()}
        return {name: layers[common_name(name)] for name, _ in self.encoder.named_parameters()}


class _Linear(nn.Module):
    def __init__(self, encoder: Any, classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        channels = encoder.out_channels[-1]
        self.decoder = LinearDecoder(torch.zeros(channels), torch.ones(channels), classes)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        logits: Tensor = self.decoder(self.encoder(x)[-1], (height, width))
        return logits


def _model(encoder: str, decoder: Decoder, classes: int) -> Any:
    """The network with random weights."""
    # Seconds to import, and the command line asks for help without it.
    import segmentation_models_pytorch as smp
    from segmentation_models_pytorch.encoders import get_encoder

    name = f"tu-{encoder}"
    made: Any
    try:
        if decoder in _LINEAR:
            depth, stride = _LINEAR[decoder]
            made = _Linear(get_encoder(name, depth=depth, weights=None, output_stride=stride), classes)
        else:
            kind: Any = {"unet": smp.Unet, "deeplabv3plus": smp.DeepLabV3Plus, "fpn": smp.FPN}[decoder]
            made = kind(name, encoder_weights=None, classes=classes)
        with evaluating(made), torch.no_grad():
            made(torch.zeros(1, 3, 2 * _MULTIPLE_PX, 2 * _MULTIPLE_PX))
    # What timm and segmentation-models-pytorch raise where one's network does not do what the other asks for.
    except (TypeError, ValueError, RuntimeError, AssertionError, AttributeError, IndexError, KeyError) as error:
        reason = f"{type(error).__name__} {error}".partition("\n")[0][:200]
        raise NetworkError(
            f"encoder '{encoder}': does not fit decoder '{decoder}' ({reason}); choose another encoder, or, where it "
            "cannot be dilated, linear8, unet or fpn"
        ) from error
    return made


@torch.no_grad()
def standardise_channels(network: SegmentationNetwork, batches: Iterable[Tensor]) -> None:
    """Give the linear decoder the moments of the encoder's maps on training images; other decoders need none.

    Without it one learning rate would suit no two encoders, whose features differ in scale by orders of magnitude.

    Args:
        network: its encoder as it is before the training.
        batches: (B, 3, H, W) uint8, a few dozen images in all; they are kept as maps in half precision.
    """
    decoder = network.model.decoder
    if not isinstance(decoder, LinearDecoder):
        return
    with evaluating(network):
        maps = [network.model.encoder(network.normalise(each.to(network.device)))[-1].half() for each in batches]
    decoder.standardise(*channel_moments(maps))
