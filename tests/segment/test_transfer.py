"""Weights go between timm's names and segmentation-models-pytorch's, and every tensor is accounted for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from segmentation_models_pytorch.encoders import get_encoder
from torch import Tensor, nn

from medsd.errors import WeightsError
from medsd.networks.modes import recorded
from medsd.segment.transfer import transfer_weights

Trained = Callable[[str], nn.Module]


def stages(encoder: nn.Module, images: Tensor) -> list[Tensor]:
    """What each stage of a timm encoder gives, by timm's own names of them."""
    found = []
    for info in encoder.feature_info:  # type: ignore[union-attr]
        with recorded(encoder, info["module"]) as outputs:
            encoder(images)
        found += [output.clone() for output in outputs]
    return found


@pytest.mark.parametrize(
    ("name", "theirs", "left_over"),
    [
        ("resnet18", "resnet18", set()),
        ("resnet18", "tu-resnet18", set()),
        ("resnet50", "resnet50", set()),
        ("resnet50", "tu-resnet50", set()),
        ("tf_efficientnet_lite0", "tu-tf_efficientnet_lite0", {"conv_head", "bn2"}),
        ("convnext_atto", "tu-convnext_atto", {"head"}),
    ],
)
def test_features_are_the_same_before_and_after(
    name: str, theirs: str, left_over: set[str], trained_encoder: Trained
) -> None:
    ours, target = trained_encoder(name), get_encoder(theirs, weights=None).eval()
    images = torch.rand(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    report = transfer_weights(ours, target)
    with torch.inference_mode():
        expected, found = stages(ours, images), target(images)
        for one, other in zip(expected[::-1], found[::-1], strict=False):
            assert (one - other).abs().max() <= 1e-6 * one.abs().max()
    assert {key.split(".")[0] for key in report.unexpected} == left_over
    assert not report.missing
    assert set(report.loaded) | set(report.unexpected) == set(ours.state_dict())
    assert set(report.loaded.values()) == set(target.state_dict())
    back = trained_encoder(name)
    for tensor in back.state_dict().values():
        tensor.zero_()
    returned = transfer_weights(target, back)
    assert set(returned.missing) == set(report.unexpected) and not returned.unexpected
    for key in returned.loaded.values():
        assert torch.equal(back.state_dict()[key], ours.state_dict()[key]), key


def test_another_encoder_is_refused_and_nothing_is_changed(trained_encoder: Trained) -> None:
    target = get_encoder("tu-resnet34", weights=None)
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(WeightsError, match=r"'layer1\.0\.conv1\.weight' .* does not fit 'model\.layer1\.0\.conv1"):
        transfer_weights(trained_encoder("resnet50"), target)
    with pytest.raises(WeightsError, match="no tensor of one has a name of the other's"):
        transfer_weights(nn.Linear(2, 2), target)
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
    report = transfer_weights(trained_encoder("resnet18"), target)  # a shallower one of the same kind
    assert report.missing and all(".layer" in name for name in report.missing)
    assert "missing: model.layer1.2.conv1.weight" in report.in_words()
