"""AIM (arXiv 2508.11502): a classifier that sees only the positions of its own features that its masks leave open."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from medsd.checks import check_choice, check_flag, check_number
from medsd.errors import NetworkError
from medsd.networks.aim_parts import FeatureBranch, MaskEstimator, gumbel_mask, hard_mask
from medsd.networks.classifier import IMAGENET_MEAN, IMAGENET_STD, Classifier, create_encoder
from medsd.networks.modes import evaluating, layer_named
from medsd.networks.symmetry import mean_answer

Direction = Literal["top_down", "bottom_up"]

_STAGES = 4
_PROBE_PX = 64


@dataclasses.dataclass(frozen=True)
class AimOutput:
    """What one pass gives; stages are ordered from the deepest to the finest, as in `AimClassifier.stages`.

    Attributes:
        logits: (B, classes), of the merged map.
        stage_logits: (B, classes) of each stage on its own.
        masks: (B, 1, h_l, w_l) of each stage, float32 (float64 of such a network), 0 or 1: in training with the
            gradient of the sigmoid.
        merged: (B, d, h, w), the sum of the masked stages at the size of the finest.
    """

    logits: Tensor
    stage_logits: tuple[Tensor, ...]
    masks: tuple[Tensor, ...]
    merged: Tensor

    def mean_mask(self, size: Sequence[int] | None = None) -> Tensor:
        """The mean (B, h, w) of the stages' masks, up-sampled (nearest) to a size (h, w); None is the finest's."""
        size = tuple(size or self.masks[-1].shape[2:])
        return torch.stack([F.interpolate(mask, size, mode="nearest")[:, 0] for mask in self.masks]).mean(dim=0)


class AimClassifier(Classifier):
    """Logits of a tile from the positions of the encoder's stages that learned binary masks leave open.

    At each stage l, from the deepest (3) down to `end_stage`: A_l = mask estimator, B_l = Gumbel mask of A_l in {0, 1},
    O_l = feature branch * B_l, and the logits of that stage from the pooled O_l. The maps are summed from the deepest
    on, with nearest up-sampling, P_l = O_l + up(P_{l+1}); the final logits come from the pooled P_e. Pooling divides by
    all positions, not by the open ones, so that an empty mask hurts. A closed position keeps a gradient through its
    mask, and can open again.

    The paper itself was not readable: stages, masks, sum and loss follow a public digest of it; the widths, the form of
    the branches, the pooled linear heads and the head of the merged map are our choice.

    The mask says which feature positions were used, not which pixels: a position of a deep stage sees most of a tile.
    The estimators pool over the image, so a tile's logits depend on all of it: regions are mapped tile by tile.
    What an encoder has above its last stage (a norm, a last convolution) is kept, for its weights stay those of timm's
    network, but not used: torch's DistributedDataParallel needs find_unused_parameters=True.

    Args:
        encoder: a timm name with feature stages, such as "resnet18" or "convnext_tiny".
        classes: names of the classes in the order of the logits.
        pretrained: load timm's ImageNet weights (downloads them).
        end_stage: finest stage used, 3 to 0; stage 3 is the encoder's last (mostly of stride 32), 0 the last but three.
        feature_width: channels d of the merged map.
        mask_width: channels of the mask estimators.
        temperature: of the masks' gradient (see `gumbel_mask`); kept as an attribute that training may change.
        direction: "top_down" masks beside the encoder (AIM); "bottom_up" also hands each stage's masked features to the
            next stage, an ablation (the paper compares with such masking; our version of it).
        masking: False leaves every mask open and has no estimators: the plain feature pyramid classifier to compare
            with, whose weights go by the same names.
        input_mean, input_std: see `medsd.networks.classifier.Normalise`.
        test_time_augmentation: see `Classifier`; holds for `open_share`, too.

    Attributes:
        options: the arguments from `end_stage` to `masking`, and `test_time_augmentation`, as a model card keeps them.

    Raises:
        NetworkError: timm has no such encoder, it has no pyramid of feature maps, or its weights cannot be fetched.
        WeightsError: timm's weights take another mean or deviation.
        ConfigError: stage, temperature, widths, direction, masking, mean or deviation are not possible.
    """

    architecture = "aim"

    def __init__(
        self,
        encoder: str,
        classes: Sequence[str] = ("normal", "tumour"),
        pretrained: bool = False,
        end_stage: int = 2,
        feature_width: int = 256,
        mask_width: int = 64,
        temperature: float = 1.0,
        direction: Direction = "top_down",
        masking: bool = True,
        input_mean: Sequence[float] = IMAGENET_MEAN,
        input_std: Sequence[float] = IMAGENET_STD,
        test_time_augmentation: bool = False,
    ) -> None:
        super().__init__(encoder, classes, input_mean, input_std)
        check_number("end_stage", end_stage, "[0, 3]", whole=True, hint="3 is the deepest stage")
        check_number("temperature", temperature, "(0, inf)")
        for name, width in (("feature_width", feature_width), ("mask_width", mask_width)):
            check_number(name, width, "[1, inf)", whole=True)
        check_choice("direction", direction, get_args(Direction))
        check_flag("masking", masking)
        self.options = {
            "end_stage": end_stage,
            "feature_width": feature_width,
            "mask_width": mask_width,
            "temperature": temperature,
            "direction": direction,
            "masking": masking,
        }
        self.augment_at_test_time(test_time_augmentation)
        self.stages = tuple(range(_STAGES - 1, end_stage - 1, -1))
        self.feature_dim, self.temperature, self.direction = feature_width, temperature, direction
        (self.encoder, _), self.pretrained = create_encoder(encoder, pretrained, self.normalise), pretrained
        channels = dict(zip(range(_STAGES), _stage_channels(encoder, self.encoder), strict=True))
        names = {stage: str(stage) for stage in self.stages}
        self.branches = nn.ModuleDict({names[s]: FeatureBranch(channels[s], feature_width) for s in self.stages})
        self.mask_estimators = nn.ModuleDict(
            {names[s]: MaskEstimator(channels[s], mask_width) for s in self.stages if masking}
        )
        self.stage_heads = nn.ModuleDict({names[s]: nn.Linear(feature_width, len(self.classes)) for s in self.stages})
        self.head = nn.Linear(feature_width, len(self.classes))

    def masked(self, x: Tensor, noise: bool | None = None, generator: torch.Generator | None = None) -> AimOutput:
        """One pass over images (B, 3, H, W), with all that it saw.

        In eval mode the masks are hard (logit >= 0) and deterministic, whatever `noise`.

        Args:
            x: uint8 as read, or float as `normalise` gives them.
            noise: whether training masks are drawn (True or None) or thresholded (False).
            generator: draws the noise, and nothing else does, on the device of `x`; torch's own where None.
        """
        drawn = self.training and noise is not False
        features, masks = self._stages(self.normalise(x) if x.dtype == torch.uint8 else x, drawn, generator)
        merged: Tensor | None = None
        stage_logits = []
        for stage in self.stages:
            # Masked last, so that a closed position is exactly 0.
            branch: Tensor = self.branches[str(stage)](features[stage])
            open_features = branch * masks[stage].to(branch.dtype)
            stage_logits.append(self.stage_heads[str(stage)](open_features.mean(dim=(2, 3))))
            if merged is None:
                merged = open_features
            else:
                merged = open_features + F.interpolate(merged, size=open_features.shape[2:], mode="nearest")
        assert merged is not None
        logits = self.head(merged.mean(dim=(2, 3)))
        return AimOutput(logits, tuple(stage_logits), tuple(masks[stage] for stage in self.stages), merged)

    def open_share(self, x: Tensor, whole: bool = False) -> tuple[Tensor, Tensor]:
        """Logits (B, classes) of images as in `masked`, and the share (B, h, w) of stages' masks that is open.

        Args:
            x: the images.
            whole: the shares at the images' size, not at that of the finest stage.
        """

        def run(images: Tensor) -> tuple[Tensor, Tensor]:
            output = self.masked(images, noise=False)
            return output.logits, output.mean_mask(images.shape[2:] if whole else None)

        return mean_answer(run, x, self.test_time_augmentation and not self.training)

    def feature_map(self, x: Tensor) -> Tensor:
        """Masked, merged features (B, d, h, w) of images as in `masked`; in training mode under noisy masks."""
        return self.masked(x).merged

    def _stages(
        self, x: Tensor, noise: bool, generator: torch.Generator | None
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Features (B, C_l, h_l, w_l) and mask of each used stage, by its number."""
        masks: dict[int, Tensor] = {}

        def mask_of(stage: int, features: Tensor) -> Tensor:
            masks[stage] = self._mask(stage, features, noise, generator)
            return masks[stage]

        bottom_up = self.direction == "bottom_up"
        with _masked_stages(self.encoder, self.stages if bottom_up else (), mask_of):
            features = dict(enumerate(_intermediates(self.encoder, x)))
        if not bottom_up:
            for stage in self.stages:
                mask_of(stage, features[stage])
        elif masks.keys() != set(self.stages):
            raise NetworkError(f"encoder '{self.encoder_name}': its stages cannot be masked; use 'top_down'")
        return features, masks

    def _mask(self, stage: int, features: Tensor, noise: bool, generator: torch.Generator | None) -> Tensor:
        if not self.mask_estimators:
            batch, _, height, width = features.shape
            return torch.ones(batch, 1, height, width, device=features.device)
        logits = self.mask_estimators[str(stage)](features)
        return gumbel_mask(logits, self.temperature, noise, generator) if self.training else hard_mask(logits)


def _intermediates(encoder: nn.Module, x: Tensor) -> list[Tensor]:
    """Feature maps of the encoder's last four stages."""
    maps: list[Tensor] = encoder.forward_intermediates(x, intermediates_only=True)  # type: ignore[operator]
    return maps[-_STAGES:]


def _stage_channels(name: str, encoder: nn.Module) -> list[int]:
    """Channels of the last four stages."""
    if len(getattr(encoder, "feature_info", [])) < _STAGES or not hasattr(encoder, "forward_intermediates"):
        raise NetworkError(f"encoder '{name}': timm does not give the maps of {_STAGES} stages of it; use 'resnet18'")
    with evaluating(encoder), torch.no_grad():
        maps = _intermediates(encoder, torch.zeros(1, 3, _PROBE_PX, _PROBE_PX))
    sides = [features.shape[-1] for features in maps]
    if sides != sorted(set(sides), reverse=True):
        raise NetworkError(f"encoder '{name}': its stages are no pyramid ({sides} cells a side); use 'resnet18'")
    return [features.shape[1] for features in maps]


@contextmanager
def _masked_stages(
    encoder: nn.Module, stages: Sequence[int], mask_of: Callable[[int, Tensor], Tensor]
) -> Iterator[None]:
    """Inside the block each stage hands on its features multiplied by its mask."""

    def hook(stage: int) -> Callable[[nn.Module, object, Tensor], Tensor]:
        return lambda _module, _inputs, output: output * mask_of(stage, output).to(output.dtype)

    with ExitStack() as stack:
        for stage in stages:
            module = layer_named(encoder, stage_layer(encoder, stage))
            stack.callback(module.register_forward_hook(hook(stage)).remove)
        yield


def stage_layer(encoder: nn.Module, stage: int) -> str:
    """The name of the layer that gives an encoder's stage (0 to 3, its last four)."""
    info: list[dict[str, str]] = encoder.feature_info  # type: ignore[assignment]
    return info[stage - _STAGES]["module"]
