"""Label-free methods on networks: any output will do, nothing is left behind, and EigenCAM equals its release."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import cv2
import numpy as np
import pytest
import torch
from pytorch_grad_cam import EigenCAM as ReleasedEigenCAM
from torch import Tensor, nn
from torchvision.models import resnet18

from medsd.errors import ConfigError, DatasetError, NetworkError
from medsd.saliency.label_free import (
    LabelFree,
    channel_energy,
    eigencam,
    mean_map,
    mtsm,
    multivec_eigencam,
    tsm,
)

FUNCTIONS = [eigencam, multivec_eigencam, tsm, mtsm, mean_map, channel_energy]
Function = Callable[[Tensor], Tensor]


class Encoder(nn.Module):
    """A self-supervised encoder: no logits, a dictionary of features; works in place behind the tapped layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8))
        self.layer = nn.Conv2d(8, 12, 3)
        self.norm = nn.BatchNorm2d(12)
        self.unused = nn.Conv2d(3, 3, 1)
        self.table = nn.Linear(12, 4)
        self.pair = Pair()
        self.fails = False

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        features = self.layer(self.stem(x))
        features += 1
        features.relu_()
        if self.fails:
            raise ValueError("it fails")
        pooled = self.norm(features).mean(dim=(2, 3))
        return {"features": features, "table": self.table(pooled), "pair": self.pair(pooled)[0]}


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


@pytest.fixture
def encoder() -> Encoder:
    torch.manual_seed(0)
    network = Encoder().train()
    network.stem[1].eval()
    network.table.weight.requires_grad_(False)
    return network


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 15, 13, generator=torch.Generator().manual_seed(1))


def state_of(network: nn.Module) -> list[object]:
    """All that a call could leave behind."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return [
        *((module.training, *(len(getattr(module, hook)) for hook in hooks)) for module in network.modules()),
        *((p.requires_grad, p.grad is None) for p in network.parameters()),
        *(value.clone().tolist() for value in network.state_dict().values()),
    ]


@pytest.mark.parametrize("function", FUNCTIONS)
def test_maps_are_those_of_the_layers_activations(function: Function, encoder: Encoder, x: Tensor) -> None:
    before = state_of(encoder)
    method = LabelFree(encoder, "layer", function)
    maps = method(x, target=2)
    assert state_of(encoder) == before
    encoder.eval()
    with torch.no_grad():
        features = encoder.layer(encoder.stem(x))
    assert maps.dtype == torch.float32 and maps.shape == (3, 5, 4) and not maps.requires_grad
    assert torch.equal(maps, function(features).float())
    assert torch.equal(method(x), maps)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_batch_equals_one_by_one(function: Function, encoder: Encoder, x: Tensor) -> None:
    method = LabelFree(encoder.double(), "layer", function)
    maps = method(x.double())
    scale = float(maps.abs().max())
    alone = torch.cat([method(image[None].double()) for image in x])
    torch.testing.assert_close(alone, maps, rtol=0, atol=1e-7 * scale)
    torch.testing.assert_close(method(x.double().flip(0)).flip(0), maps, rtol=0, atol=1e-7 * scale)


def test_nothing_is_left_after_an_error(encoder: Encoder, x: Tensor) -> None:
    before = state_of(encoder)
    encoder.fails = True
    with pytest.raises(ValueError, match="it fails"):
        LabelFree(encoder, "layer", tsm)(x)
    encoder.fails = False
    assert state_of(encoder) == before


@pytest.mark.parametrize(
    ("layer", "words"), [("unused", "not reached"), ("table", r"\(3, 4\)"), ("pair", "tuple"), ("layer", "not finite")]
)
def test_activations_that_are_no_maps_are_told(layer: str, words: str, encoder: Encoder, x: Tensor) -> None:
    before = state_of(encoder)
    bad = x.clone()
    if layer == "layer":
        bad[0, 0, 5, 5] = torch.nan
    with pytest.raises(NetworkError, match=words) as caught:
        LabelFree(encoder, layer, mtsm)(bad)
    assert f"layer '{layer}'" in str(caught.value) and "\n" not in str(caught.value)
    assert state_of(encoder) == before


def test_a_layer_that_regroups_the_batch_is_told(x: Tensor) -> None:
    network = nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Flatten(0, 1), nn.Conv2d(1, 4, 3))
    with pytest.raises(NetworkError, match="layer '2': gives 9 maps for 3 images"):
        LabelFree(network, "2", mean_map)(x)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_layer_must_be_named_and_exist(function: Function, encoder: Encoder) -> None:
    with pytest.raises(ConfigError, match="layer=None"):
        LabelFree(encoder, None, function)
    with pytest.raises(NetworkError, match="did you mean 'layer'"):
        LabelFree(encoder, "layers", function)


def test_bad_images_are_told(encoder: Encoder) -> None:
    for bad in (torch.zeros(3, 15, 13), torch.zeros(0, 3, 15, 13), torch.zeros(1, 3, 15, 13, dtype=torch.uint8)):
        with pytest.raises(DatasetError, match="images"):
            LabelFree(encoder, "layer", tsm)(bad)


def test_runs_under_the_callers_inference_mode_and_on_halves(encoder: Encoder, x: Tensor) -> None:
    expected = LabelFree(encoder, "layer", mtsm)(x)
    with torch.inference_mode():
        assert torch.equal(LabelFree(encoder, "layer", mtsm)(x), expected)
    low = LabelFree(encoder.bfloat16(), "layer", mtsm)(x.bfloat16())
    assert low.dtype == torch.float32
    torch.testing.assert_close(low, expected, rtol=0, atol=0.1 * float(expected.max()))


def test_equals_the_released_eigencam_end_to_end() -> None:
    torch.manual_seed(0)
    network = resnet18(weights=None).eval()
    x = torch.randn(2, 3, 160, 128, generator=torch.Generator().manual_seed(2))
    with ReleasedEigenCAM(network, [network.layer4]) as released:
        expected = released(x, targets=[])
    projections = LabelFree(network, "layer4", partial(eigencam, variant="reference"))(x).numpy()
    assert projections.shape == (2, 5, 4)
    for projection, reference in zip(projections, expected, strict=True):
        positive = np.maximum(projection, 0)
        shares = (positive - positive.min()) / (1e-7 + (positive - positive.min()).max())
        large = cv2.resize(shares, (128, 160))
        np.testing.assert_allclose(large / (1e-7 + large.max()), reference, atol=1e-5)
        assert reference.max() > 0.99
