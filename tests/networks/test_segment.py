"""Encoders cut behind their layers."""

from __future__ import annotations

import pytest
import torch

from medsd.errors import NetworkError
from medsd.networks.classifier import create_encoder
from medsd.networks.segment import Segment, segments

IMAGES = torch.randn(2, 3, 96, 160, generator=torch.Generator().manual_seed(0))


def stirred(name: str) -> torch.nn.Module:
    """Statistics as of some training: the branches that timm starts at zero say something."""
    torch.manual_seed(0)
    encoder, _ = create_encoder(name, pretrained=False)
    for module in encoder.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.running_mean.normal_(0, 0.2)
    return encoder.eval()


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("resnet18", ["maxpool", "layer1", "layer3"]),
        ("resnet18", ["layer4"]),
        ("convnext_atto", ["stages.1", "stages.2"]),
        ("efficientnet_lite0", ["blocks.1", "blocks.2", "blocks.4"]),
        ("densenet121", ["features.denseblock1", "features.transition2", "features.denseblock3"]),
    ],
)
@torch.no_grad()
def test_parts_one_after_the_other_are_the_whole(name, layers):
    encoder = stirred(name)
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    expected = encoder(IMAGES)
    parts = segments(encoder, layers)
    assert [(part.start, part.end) for part in parts] == list(zip([None, *layers], [*layers, None], strict=True))
    x, hidden = IMAGES.clone(), []
    for part in parts:
        x = part(x)
        hidden.append(x.clone())
    torch.testing.assert_close(x, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))
    assert torch.equal(parts[0](IMAGES.clone()), hidden[0])
    # It stays as it was, also where a pass breaks off.
    with pytest.raises(RuntimeError):
        parts[0](torch.zeros(1, 1, 8, 8))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())
    assert not encoder.training and all(torch.equal(value, before[key]) for key, value in encoder.state_dict().items())
    assert torch.equal(encoder(IMAGES), expected)


def test_gradients_go_through_a_part():
    encoder = stirred("test_resnet")
    top = segments(encoder, ["layer2"])[1]
    hidden = Segment(encoder, None, "layer2")(IMAGES).detach().requires_grad_()
    (found,) = torch.autograd.grad(top(hidden).square().sum(), hidden)
    kept = []
    handle = encoder.layer2.register_forward_hook(lambda _module, _inputs, output: kept.append(output))
    (expected,) = torch.autograd.grad(encoder(IMAGES).square().sum(), kept)
    handle.remove()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(expected.abs().max()))


@pytest.mark.parametrize(
    ("name", "layer"), [("resnet18", "layer2.0.conv1"), ("convnext_atto", "stages.1.blocks.0.conv_dw")]
)
def test_a_layer_with_a_path_around_it_is_refused(name, layer):
    encoder = stirred(name)
    with pytest.raises(NetworkError, match=f"'{layer}': a path of the encoder leads around it.*whole stage"):
        segments(encoder, [layer])
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in encoder.modules())


def test_no_such_layer():
    with pytest.raises(NetworkError, match="did you mean 'layer3'"):
        segments(stirred("test_resnet"), ["layr3"])
