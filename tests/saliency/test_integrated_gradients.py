"""Integrated gradients: captum's, complete, and within the memory that is asked for."""

from __future__ import annotations

from collections.abc import Callable

import captum.attr
import pytest
import timm
import torch
from torch import Tensor, nn

from medsd.errors import ConfigError, DatasetError
from medsd.saliency.integrated_gradients import IntegratedGradients

Lively = Callable[[nn.Module], nn.Module]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def resnet(lively: Lively) -> nn.Module:
    return lively(timm.create_model("resnet10t", num_classes=3)).double()


@pytest.mark.parametrize("layer", [None, "layer1", "layer2.0.downsample", "layer3"])
def test_equals_captum(resnet: nn.Module, images: Tensor, layer: str | None) -> None:
    target = torch.tensor([2, 0])
    baseline = torch.full_like(images, 0.2)
    reference = (
        captum.attr.IntegratedGradients(resnet)
        if layer is None
        else captum.attr.LayerIntegratedGradients(resnet, resnet.get_submodule(layer))
    )
    expected = reference.attribute(images, baseline, target=target, n_steps=7).detach()
    value = IntegratedGradients(resnet, layer, baseline=baseline, steps=7, batch_size=5).attribute(images, target)
    # captum's weights of the steps are float32.
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-7 * float(expected.abs().max()))


def test_a_relu_in_place_behind_the_layer(resnet: nn.Module, images: Tensor) -> None:
    with pytest.raises(RuntimeError, match="in-place operation"):
        captum.attr.LayerIntegratedGradients(resnet, resnet.layer4[0].bn1).attribute(images, target=1, n_steps=2)
    value = IntegratedGradients(resnet, "layer4.0.bn1", steps=30).attribute(images, 1)
    # Only the shortcut leads around the layer, and it sees the image all the way.
    with torch.no_grad():
        seen = resnet(images)[:, 1]
        resting: list[Tensor] = []
        with resnet.layer4[0].bn1.register_forward_hook(lambda _m, _i, output: resting.append(output.clone())):
            resnet(torch.zeros_like(images))
        with resnet.layer4[0].bn1.register_forward_hook(lambda *_: resting[0]):
            without = resnet(images)[:, 1]
    torch.testing.assert_close(value.sum(dim=(1, 2, 3)), seen - without, rtol=0, atol=1e-2 * float(seen.abs().max()))


def small(first: nn.Module, second: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        first,
        nn.AvgPool2d(2),
        nn.Conv2d(4, 4, 3),
        second,
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 3),
    ).double()


@pytest.mark.parametrize("layer", [None, "0", "2"])
@pytest.mark.parametrize("output", ["logit", "evidence"])
@pytest.mark.parametrize("smooth", [True, False])
def test_attributions_sum_to_the_change_of_the_output(
    images: Tensor, layer: str | None, output: str, smooth: bool
) -> None:
    """To rounding for a smooth network; ReLUs have kinks on the way, where more steps are needed."""
    network = small(nn.Softplus(), nn.Tanh()) if smooth else small(nn.ReLU(inplace=True), nn.ReLU(inplace=True))
    with torch.no_grad():
        logits = network(images) - network(torch.zeros_like(images))
    expected = logits[:, 1] if output == "logit" else logits[:, 1] - (logits[:, 0] + logits[:, 2]) / 2
    method = IntegratedGradients(network, layer, output, steps=20 if smooth else 200, batch_size=50)
    value = method.attribute(images, 1).sum(dim=(1, 2, 3))
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-10 if smooth else 1e-4)


class Square(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return (x**2).sum(dim=(2, 3))


def test_a_quadratic_is_exact_with_one_step(images: Tensor) -> None:
    value = IntegratedGradients(Square(), steps=1).attribute(images, 1)
    torch.testing.assert_close(value[:, 1], images[:, 1] ** 2)
    assert (value[:, [0, 2]] == 0).all()


@pytest.mark.parametrize("batch_size", [1, 2, 3, 8, 100])
def test_the_batch_size_changes_memory_and_not_the_map(images: Tensor, batch_size: int) -> None:
    network, x = small(nn.Softplus(), nn.Tanh()), torch.cat([images, images + 1, images[:1] * 2])
    expected = IntegratedGradients(network, "1", steps=9, batch_size=1000).attribute(x)
    sizes: list[int] = []
    with network.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0]))):
        value = IntegratedGradients(network, "1", steps=9, batch_size=batch_size).attribute(x)
    torch.testing.assert_close(value, expected, rtol=1e-10, atol=1e-14)
    assert max(sizes) <= batch_size
    assert sum(sizes) == (9 + 2) * len(x)  # what the method's card says of its cost


@pytest.mark.parametrize("key", ["steps", "batch_size"])
def test_bad_options_are_named(key: str) -> None:
    options = {"steps": 5, "batch_size": 5, key: 0}
    with pytest.raises(ConfigError, match=f"{key}=0: must be a whole number from 1 on"):
        IntegratedGradients(Square(), steps=options["steps"], batch_size=options["batch_size"])


def test_a_baseline_of_another_shape_is_refused(images: Tensor) -> None:
    with pytest.raises(DatasetError, match="baseline: shape"):
        IntegratedGradients(Square(), baseline=torch.zeros(1))(images)
