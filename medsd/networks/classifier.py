"""A tile classifier that also runs on whole regions: timm encoder, average pooling, linear head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import timm
import torch
from timm.models import group_parameters
from timm.models.vgg import ConvMlp
from torch import Tensor, nn

from medsd.checks import check_flag, check_number
from medsd.errors import ConfigError, NetworkError, WeightsError, nearest
from medsd.networks.cut import end_at
from medsd.networks.modes import channels_last, encoded_map, evaluating
from medsd.networks.symmetry import SYMMETRIES, MayBeSymmetric, turned
from medsd.networks.tokens import check_encoder_options, image_side, token_stride
from medsd.networks.whitening import WhitenedHead

_PROBE_PX = 64
_END = "end"
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


class Normalise(nn.Module):
    """Images (B, 3, H, W) uint8 as float32: (image / 255 - input_mean) / input_std, channel by channel.

    Args:
        input_mean, input_std: three numbers each, those that the encoder's weights were trained with. ImageNet's are
            those of most of timm's weights, not of all ("tf_" and Inception networks have 0.5).

    Raises:
        ConfigError: other than three numbers, a mean outside 0 to 1, or a deviation outside 0 to 10, 0 excluded.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, input_mean: Sequence[float] = IMAGENET_MEAN, input_std: Sequence[float] = IMAGENET_STD) -> None:
        super().__init__()
        for name, values, interval in (("mean", input_mean, "[0, 1]"), ("std", input_std, "(0, 10]")):
            if not isinstance(values, list | tuple) or len(values) != 3:
                raise ConfigError(f"input_{name}={values!r}: must be three numbers, of red, green and blue")
            for value in values:
                check_number(f"input_{name}", value, interval, hint="of pixels from 0 to 1")
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(1, 3, 1, 1), persistent=False)
        self.input_mean, self.input_std = tuple(input_mean), tuple(input_std)

    def forward(self, images: Tensor) -> Tensor:
        return (images.to(torch.float32) / 255 - self.mean) / self.std

    def check_weights(self, of: str, mean: Sequence[float], std: Sequence[float]) -> None:
        """Raises WeightsError: weights, named by `of`, were trained with another mean or deviation."""
        if (self.input_mean, self.input_std) != (tuple(mean), tuple(std)):
            raise WeightsError(
                f"{of}: its weights take input_mean {list(mean)} and input_std {list(std)}, not "
                f"{list(self.input_mean)} and {list(self.input_std)}; set both so"
            )


class Classifier(MayBeSymmetric, nn.Module):
    """A tile classifier: an encoder, features pooled from a map, a linear head. The kinds differ in `feature_map`.

    Attributes:
        architecture: what a model card calls its kind.
        options: constructor arguments beside encoder and classes, as a model card keeps them.
        encoder: a timm network without pooling and head; `encoder_name` is its timm name.
        classes: names of the classes in the order of the logits.
        normalise: images (B, 3, H, W) uint8 as the network's float input.
        feature_dim: channels of the features.
        head: linear, features to logits.
        test_time_augmentation: in eval mode its logits are means over the eight symmetries of the square, at eight
            times the cost, see `augment_at_test_time`; features are always of the image as it is.
        pretrained, encoder_weights: whether it was made with timm's weights, and the file it started from.
        neutral: fields of a layer's `medsd.saliency.neutral.NeutralReference`, as a model card keeps them.
    """

    architecture: ClassVar[Literal["tile", "aim"]]
    options: dict[str, Any]
    encoder: nn.Module
    feature_dim: int
    head: nn.Linear | WhitenedHead
    pretrained: bool = False
    encoder_weights: str | None = None
    neutral: dict[str, Any] | None = None

    def __init__(
        self,
        encoder: str,
        classes: Sequence[str],
        input_mean: Sequence[float] = IMAGENET_MEAN,
        input_std: Sequence[float] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        self.encoder_name, self.classes = encoder, tuple(classes)
        self.normalise = Normalise(input_mean, input_std)

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return next(self.parameters()).device

    def encoder_layers(self) -> dict[str, int] | None:
        """The layer of each of the encoder's parameters, by name, the stem's being 0; None where timm does not know."""
        matcher = getattr(self.encoder, "group_matcher", None)
        return None if matcher is None else group_parameters(self.encoder, matcher(), reverse=True)

    def feature_map(self, x: Tensor) -> Tensor:
        """Features (B, d, h, w) of images (B, 3, H, W): uint8 as read, or float as `normalise` gives them."""
        raise NotImplementedError

    def features(self, x: Tensor) -> Tensor:
        """Pooled features (B, d) of images as in `feature_map`."""
        return self.feature_map(x).mean(dim=(2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Logits (B, classes) of images as in `feature_map`."""
        numbers = SYMMETRIES if self.test_time_augmentation and not self.training else range(1)
        logits = [self.head(self.features(turned(x, number))) for number in numbers]
        return torch.stack(logits).mean(dim=0) if len(logits) > 1 else logits[0]

    def augment_at_test_time(self, augmented: bool) -> None:
        """Make the answer in eval mode, and all maps of a class, the mean over the square's symmetries, or end that.

        Logits are averaged (our choice), so that maps that add up to them still do. A model card keeps it among the
        `options`.
        """
        check_flag("test_time_augmentation", augmented)
        self.test_time_augmentation = augmented
        others = {name: value for name, value in self.options.items() if name != "test_time_augmentation"}
        self.options = others | ({"test_time_augmentation": True} if augmented else {})


class TileClassifier(Classifier):
    """Logits of a tile, linear in the pooled features of a timm encoder.

    Because pooling and head are linear, the logits of any window of a region are the head applied to the window's
    mean features: one pass over the region serves every tile position (`medsd.heatmap.dense`).

    The map is what timm's network gives without its pooling. What timm has between pooling and classifier (ConvNeXt's
    norm, the last convolution and activation of MobileNetV3, V4, GhostNet, HGNet) thus runs on each cell before the
    mean, as in EfficientNet: not timm's function, but one that adds up over cells (our choice). VGG's dense layers,
    which take maps of one size alone, are left out.

    The map of a vision transformer are its patches' tokens behind the final norm; class token and registers are left
    out of the mean (timm's global_pool "avg", with the norm before the mean for the same reason). Images have one size.

    Args:
        encoder: a timm name whose features are a map (B, d, h, w), such as "resnet18", or tokens of one, such as
            "vit_small_patch16_224".
        classes: names of the classes in the order of the logits.
        pretrained: load timm's ImageNet weights (downloads them).
        input_mean, input_std: see `Normalise`.
        encoder_options: of a vision transformer, as timm makes it: {"img_size": 96}, see `check_encoder_options`. Of a
            convolutional one {"end": "blocks.6"}: the layer whose map is pooled; what runs after it is left out.
        test_time_augmentation: see `Classifier`.

    Raises:
        NetworkError: timm has no such encoder, its features are not a map, it cannot end where it is asked to, or its
            weights cannot be fetched.
        WeightsError: timm's weights take another mean or deviation.
        ConfigError: a mean, deviation or option that is none.

    Example:
        >>> tiles = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
        >>> TileClassifier("test_resnet", classes=("normal", "tumour"))(tiles).shape
        torch.Size([2, 2])
    """

    architecture = "tile"

    def __init__(
        self,
        encoder: str,
        classes: Sequence[str] = ("normal", "tumour"),
        pretrained: bool = False,
        input_mean: Sequence[float] = IMAGENET_MEAN,
        input_std: Sequence[float] = IMAGENET_STD,
        encoder_options: Mapping[str, Any] | None = None,
        test_time_augmentation: bool = False,
    ) -> None:
        super().__init__(encoder, classes, input_mean, input_std)
        self.options = {"encoder_options": dict(encoder_options)} if encoder_options else {}
        self.augment_at_test_time(test_time_augmentation)
        self.pretrained = pretrained
        self.encoder, self.feature_dim = create_encoder(encoder, pretrained, self.normalise, encoder_options or {})
        self.head = nn.Linear(self.feature_dim, len(self.classes))

    def feature_map(self, x: Tensor) -> Tensor:
        return encoded_map(self.encoder, self.normalise(x) if x.dtype == torch.uint8 else x)


def create_encoder(
    name: str, pretrained: bool, normalise: Normalise | None = None, options: Mapping[str, Any] | None = None
) -> tuple[nn.Module, int]:
    """A timm network without pooling and head, and its features' channels; the errors are `TileClassifier`'s.

    Args:
        name, pretrained: as of `TileClassifier`.
        normalise: makes its input; compared with what timm says of its weights.
        options: `encoder_options` of `TileClassifier`; None where a vision transformer is of no use, and is refused.
    """
    if not timm.is_model(name):
        hint = nearest(name, timm.list_models())
        raise NetworkError(f"encoder '{name}': timm has no such network{hint or '; see timm.list_models()'}")
    encoder: nn.Module
    end = (options or {}).get(_END)
    timms = {key: value for key, value in (options or {}).items() if key != _END}
    made_with = check_encoder_options(name, timms, also=(_END,))
    try:
        encoder = timm.create_model(name, pretrained=pretrained, num_classes=0, global_pool="", **made_with)
    except TypeError as error:
        raise ConfigError(f"encoder_options: timm's '{name}' does not take them ({error}); leave them out") from error
    except AssertionError as error:
        raise NetworkError(f"encoder '{name}': timm cannot make it without its pooling; choose another one") from error
    except (OSError, RuntimeError) as error:  # no network, or a tag or weights that timm does not have
        reason = str(error).partition("\n")[0]
        fix = "check its name, or give a file of its weights (encoder_weights)" if pretrained else "check its name"
        raise NetworkError(f"encoder '{name}': timm cannot make it ({reason}); {fix}") from error
    made = getattr(encoder, "pretrained_cfg", None) or {}
    if pretrained and normalise is not None and "mean" in made and "std" in made:
        normalise.check_weights(f"encoder '{name}'", made["mean"], made["std"])
    if isinstance(getattr(encoder, "pre_logits", None), ConvMlp):
        encoder.pre_logits = nn.Identity()
    if options is not None and token_stride(encoder) is not None:
        if end is not None:
            raise ConfigError(f"encoder_options: '{name}' is a vision transformer, which ends by 'depth', not '{_END}'")
        return encoder, _token_width(encoder, name)
    if made_with:
        raise ConfigError(f"encoder_options: '{name}' is no vision transformer and takes '{_END}' alone")
    images = torch.zeros(1, 3, _PROBE_PX, 2 * _PROBE_PX)  # not square, to tell its axes apart
    with evaluating(encoder), torch.no_grad():
        try:
            features = encoder(images)
        except (AssertionError, RuntimeError) as error:  # made for one size of image, or for large ones
            raise NetworkError(
                f"encoder '{name}': it does not take images of every size ({_PROBE_PX} px fail); choose a plain "
                "convolutional one such as 'resnet18'"
            ) from error
    if features.ndim != 4:
        raise NetworkError(f"encoder '{name}': its features are not a map (B, d, h, w); choose a convolutional one")
    if channels_last(features, images):
        raise NetworkError(
            f"encoder '{name}': its features are not a map (B, d, h, w) but (B, h, w, d), channels last; choose a "
            "convolutional one such as 'resnet18'"
        )
    height, width = features.shape[2:]
    if width != 2 * height:
        raise NetworkError(
            f"encoder '{name}': images of {_PROBE_PX} x {2 * _PROBE_PX} px give {height} x {width} cells, so its "
            "features are not a map of the image; choose a convolutional one such as 'resnet18'"
        )
    if end is not None:
        features = end_at(encoder, end, torch.rand(images.shape, generator=torch.Generator().manual_seed(0)))
    return encoder, features.shape[1]


def _token_width(encoder: nn.Module, name: str) -> int:
    """Channels of a vision transformer's tokens, of which every patch has one."""
    side_px = image_side(encoder)
    with evaluating(encoder), torch.no_grad():
        try:
            return encoded_map(encoder, torch.zeros(1, 3, side_px, side_px)).shape[1]
        except (AssertionError, RuntimeError) as error:
            raise NetworkError(f"encoder '{name}': its features are no tokens of patches ({error})") from error
