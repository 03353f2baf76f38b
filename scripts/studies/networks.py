"""The small network of the studies."""

from __future__ import annotations

from typing import Any

from timm.models import build_model_with_cfg, register_model
from timm.models.resnet import BasicBlock, ResNet

ENCODER = "resnet10t_half"


@register_model  # type: ignore[no-untyped-call]
def resnet10t_half(pretrained: bool = False, pretrained_cfg: None = None, **options: Any) -> ResNet:
    """timm's ResNet-10-t with half its channels: 1.2 million parameters, for many trainings on a CPU."""
    made: ResNet = build_model_with_cfg(
        *(ResNet, ENCODER, pretrained, {"first_conv": "conv1.0", "classifier": "fc"}),
        block=BasicBlock,
        layers=(1, 1, 1, 1),
        channels=(32, 64, 128, 256),
        stem_width=16,
        stem_type="deep_tiered",
        avg_down=True,
        **options,
    )
    return made
