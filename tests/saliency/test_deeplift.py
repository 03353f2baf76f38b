"""DeepLift: complete where it can be, captum's where captum is right, and told where it is not complete."""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable

import captum.attr
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from medsd.errors import ConfigError, DatasetError
from medsd.saliency.deeplift import DeepLift
from medsd.saliency.gradient import GradientXActivation
from medsd.saliency.integrated_gradients import IntegratedGradients
from medsd.saliency.method import explained_output

Lively = Callable[[nn.Module], nn.Module]


def squeezenet() -> nn.Module:
    """Overlapping max pools with ceil mode between concatenations, and a ReLU at its end, here an open one."""
    network = torchvision.models.squeezenet1_0(num_classes=3)
    nn.init.ones_(network.classifier[1].bias)
    return network


COMPLETE: dict[str, tuple[Callable[[], nn.Module], list[str | None]]] = {
    # One ReLU in place for two calls, `+=` in place, an overlapping max pool.
    "torchvision_resnet18": (lambda: torchvision.models.resnet18(num_classes=3), [None, "conv1", "layer2"]),
    "timm_resnet18": (lambda: timm.create_model("resnet18", num_classes=3), ["bn1", "layer3"]),
    "squeezenet1_0": (squeezenet, [None, "features.3", "features.9"]),
    # Functional ReLU; SiLU.
    "densenet": (
        lambda: torchvision.models.DenseNet(8, (1, 2), 8, 2, num_classes=3),
        [None, "features.transition1"],
    ),
    "silu": (lambda: timm.create_model("resnet10t", num_classes=3, act_layer="silu"), [None, "layer2"]),
}


def captured(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "medsd.saliency.deeplift"]


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 32, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def changes(network: nn.Module, x: Tensor, target: Tensor, output: str, baseline: Tensor | None = None) -> Tensor:
    """f(x) - f(baseline), (B,)."""
    zero = torch.zeros_like(x) if baseline is None else baseline.expand_as(x)
    with torch.no_grad():
        values = [explained_output(network(part).flatten(1), target, output) for part in (x, zero)]
    return values[0] - values[1]


@pytest.mark.parametrize("name", COMPLETE)
@pytest.mark.parametrize("output", ["logit", "evidence"])
def test_attributions_sum_to_the_change_of_the_output(
    lively: Lively, images: Tensor, name: str, output: str, caplog: pytest.LogCaptureFixture
) -> None:
    build, layers = COMPLETE[name]
    torch.manual_seed(0)
    network = lively(build()).double()
    with torch.no_grad():
        target = network(images).flatten(1).argmax(dim=1)
    expected = changes(network, images, target, output)
    assert expected.abs().min() > 0
    for layer in layers:
        attribution = DeepLift(network, layer, output).attribute(images, target)
        missed = (attribution.sum(dim=(1, 2, 3)) - expected).abs() / expected.abs()
        assert missed.max() < 1e-10, layer
    assert not captured(caplog)


def clean_copy(network: nn.Module) -> nn.Module:
    clean = copy.deepcopy(network)
    for module in clean.modules():
        if hasattr(module, "inplace"):
            module.inplace = False
    return clean


@pytest.mark.parametrize("layer", ["maxpool", "layer1", "layer2.0.bn2", "layer3"])
def test_captum_agrees_where_it_is_right(lively: Lively, images: Tensor, layer: str) -> None:
    network = lively(timm.create_model("resnet18", num_classes=3)).double()  # a module for each ReLU
    clean = clean_copy(network)
    target = torch.tensor([2, 0])
    expected = captum.attr.LayerDeepLift(clean, clean.get_submodule(layer)).attribute(images, target=target).detach()
    value = DeepLift(network, layer).attribute(images, target)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def pooled(kernel: int, stride: int, before: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3),
        before,
        nn.MaxPool2d(kernel, stride),
        nn.Conv2d(4, 4, 3),
        nn.Sigmoid(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(4, 2),
    ).double()


def captums(network: nn.Module, x: Tensor, baseline: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value: Tensor = captum.attr.DeepLift(network).attribute(x, baseline, target=1).detach()
    return value


def test_at_the_input_captum_agrees_where_its_max_pool_is_right(images: Tensor) -> None:
    baseline = images.flip(0, 2)
    network = pooled(2, 2, nn.Identity())
    value = DeepLift(network, baseline=baseline).attribute(images, 1)
    expected = captums(network, images, baseline)
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


@pytest.mark.parametrize(("kernel", "before"), [(3, nn.Identity()), (2, nn.Tanh())])
def test_captum_loses_a_part_at_max_pools(images: Tensor, kernel: int, before: nn.Module) -> None:
    """What our own rules are for: pools that overlap or follow an activation. When it fails, captum may do."""
    network, baseline = pooled(kernel, 2, before), images.flip(0, 2)
    expected = changes(network, images, torch.tensor([1, 1]), "logit", baseline)
    attribution = DeepLift(network, baseline=baseline).attribute(images, 1)
    torch.testing.assert_close(attribution.sum(dim=(1, 2, 3)), expected, rtol=1e-10, atol=0)
    lost = captums(network, images, baseline).sum(dim=(1, 2, 3)) - expected
    assert (lost.abs() > 0.1 * expected.abs()).all()


def test_one_baseline_serves_all_images(images: Tensor) -> None:
    network, baseline = pooled(2, 2, nn.Tanh()), torch.full_like(images, 0.3)
    value = DeepLift(network, baseline=baseline[0])(images, 1)
    assert torch.equal(value, DeepLift(network, baseline=baseline)(images, 1))
    assert not torch.allclose(value, DeepLift(network)(images, 1))


class Reused(nn.Module):
    """One activation module under two names, called thrice, in place; GELU and ReLU as functions."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = (nn.Conv2d(3, 3, 3, padding=1) for _ in range(3))
        self.act = nn.LeakyReLU(0.1, inplace=True)
        self.same = self.act
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.first(x))
        shortcut = x
        x = self.same(self.second(x))
        x += shortcut
        x = F.gelu(self.third(self.act(x)))
        return self.head(torch.relu(x).mean(dim=(2, 3)))


@pytest.mark.parametrize("layer", [None, "first", "second", "third"])
def test_modules_used_again_and_functions_have_their_rules(
    images: Tensor, layer: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    network = Reused().double()
    value = DeepLift(network, layer).attribute(images, 1).sum(dim=(1, 2, 3))
    expected = changes(network, images, torch.tensor([1, 1]), "logit")
    if layer == "second":  # the shortcut leads around it
        assert not torch.allclose(value, expected, rtol=0.01)
        assert "a path leads around the layer" in captured(caplog)[0]
    else:
        torch.testing.assert_close(value, expected, rtol=1e-10, atol=0)
        assert not captured(caplog)


def test_by_hand() -> None:
    """relu(a - 2 b) from (0, 0): the change is shared as a - 2 b is, whatever the ReLU's slope at the image."""
    network = nn.Sequential(nn.Conv2d(2, 1, 1), nn.ReLU(inplace=True), nn.Flatten())
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([1.0, -2.0]).view(1, 2, 1, 1))
        network[0].bias.fill_(1.0)
    x = torch.tensor([[3.0, 1.0], [3.0, 3.0]]).view(2, 2, 1, 1)
    value = DeepLift(network).attribute(x, 0).flatten(1)
    # f(0) = 1. The first image: f = 2, all open. The second: -2 before the ReLU, a change of -3 that becomes -1.
    torch.testing.assert_close(value, torch.tensor([[3.0, -2.0], [1.0, -2.0]]))


def test_a_linear_network_is_gradient_times_activation(images: Tensor) -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.AvgPool2d(2), nn.Flatten(), nn.LazyLinear(2)).double()
    network(images)
    for layer in (None, "0", "1"):
        expected = GradientXActivation(network, layer)(images, 1)
        torch.testing.assert_close(DeepLift(network, layer)(images, 1), expected)


class Gated(nn.Module):
    """A variance, which has no rule."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return (x * x.var(dim=(2, 3), keepdim=True)).mean(dim=(2, 3))


@pytest.mark.parametrize("sign", [1, -1])
def test_what_has_no_rule_is_told_once(images: Tensor, sign: int, caplog: pytest.LogCaptureFixture) -> None:
    torch.manual_seed(0)
    network = Gated().double().requires_grad_(False)
    for parameter in network.parameters():
        parameter.mul_(sign)
    method, x = DeepLift(network), torch.cat([images, torch.zeros_like(images[:1])])  # the last misses nothing
    with caplog.at_level(logging.WARNING):
        method(x, 1)
        method(x, 1)
    (message,) = captured(caplog)
    assert "DeepLift at 'input': attributions miss the output's change from the baseline by" in message
    assert "\n" not in message


def test_a_baseline_of_another_shape_is_refused(images: Tensor) -> None:
    with pytest.raises(DatasetError, match=r"baseline: shape \(3, 8, 8\); give \(3, 32, 32\) or \(2, 3, 32, 32\)"):
        DeepLift(Gated(), baseline=torch.zeros(3, 8, 8))(images)


class Normed(nn.Module):
    """LayerNorms over channels without biases, each place for itself, as in a ConvNeXt that has not learnt."""

    def __init__(self, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3, bias=False)
        self.blocks = nn.ModuleList(nn.Conv2d(8, 8, 3, padding=1, bias=False) for _ in range(blocks))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            normed = F.layer_norm(x.permute(0, 2, 3, 1), (8,), eps=1e-6).permute(0, 3, 1, 2)
            x = F.gelu(block(normed))
        logits: Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


def test_a_norm_of_nothing_at_the_baseline_is_told(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    """In float32 the sum is rounding; in float64 it is right, and the map as beyond bounds as it was."""
    network = Normed(3)
    single = DeepLift(network, "first")
    values = single.attribute(images.float(), 1).double()
    (message,) = captured(caplog)
    assert message.startswith("DeepLift at 'first': absolute attributions sum to ") and "\n" not in message
    assert "give another baseline" in message and "float64" in message
    single.attribute(images.float(), 1)
    assert len(captured(caplog)) == 1
    caplog.clear()
    double = DeepLift(network.double(), "first").attribute(images, 1)
    expected = changes(network, images, torch.tensor([1, 1]), "logit")
    torch.testing.assert_close(double.sum(dim=(1, 2, 3)), expected, rtol=1e-4, atol=0)
    assert ((values.sum(dim=(1, 2, 3)) - expected).abs() > 0.01 * expected.abs()).all()
    torch.testing.assert_close(values, double, rtol=0, atol=1e-4 * float(double.abs().max()))
    assert (double.abs().sum(dim=(1, 2, 3)) > 1e4 * expected.abs()).all()
    # Not of another baseline.
    baseline = images.flip(0)
    values = DeepLift(network.float(), "first", baseline=baseline.float()).attribute(images.float(), 1)
    expected = changes(network.double(), images, torch.tensor([1, 1]), "logit", baseline)
    torch.testing.assert_close(values.double().sum(dim=(1, 2, 3)), expected, rtol=1e-3, atol=0)
    assert not captured(caplog)


def test_attributions_beyond_all_numbers_are_told(images: Tensor, caplog: pytest.LogCaptureFixture) -> None:
    assert not DeepLift(Normed(20)).attribute(images.float(), 1).isfinite().all()
    assert "give another baseline" in captured(caplog)[0]


@pytest.mark.parametrize("output", ["logit", "evidence"])
@pytest.mark.parametrize("classes", [1, 2, 3])
def test_an_output_that_did_not_change_by_chance_misses_nothing(
    images: Tensor, lively: Lively, output: str, classes: int, caplog: pytest.LogCaptureFixture
) -> None:
    """What the head sees of an image is turned so that the explained output is as at the baseline, but for rounding."""
    network = lively(timm.create_model("resnet10t", num_classes=classes)).double()
    with torch.no_grad():
        seen, seen_zero = (
            network.forward_head(network.forward_features(x), pre_logits=True)
            for x in (images[:1], torch.zeros_like(images[:1]))
        )
        change = (seen - seen_zero)[0]
        network.fc.weight.sub_(torch.outer(network.fc.weight @ change, change) / change.dot(change))
    x, network = images[:1].float(), network.float()
    values = DeepLift(network, "layer2", output).attribute(x, 0)
    expected = changes(network.double(), images[:1], torch.tensor([0]), output)
    total = float(values.double().abs().sum())
    assert float(expected.abs()) < 1e-4 * total, "the change is nothing beside the attributions"
    assert abs(float(values.double().sum())) > float(expected.abs()), "and their sum is rounding"
    assert not captured(caplog)


def test_a_colour_is_a_baseline_and_a_number_is_none(images: Tensor) -> None:
    network, colour = pooled(2, 2, nn.Tanh()), torch.tensor([0.3, -0.1, 0.2]).view(3, 1, 1)
    expected = DeepLift(network, baseline=colour.expand(3, 32, 32))(images, 1)
    assert torch.equal(DeepLift(network, baseline=colour)(images, 1), expected)
    for method in (DeepLift, IntegratedGradients):
        with pytest.raises(DatasetError, match=r"^baseline: int; give a tensor \(3, 32, 32\), or None for zeros$"):
            method(network, baseline=0)(images, 1)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="reference=0: give a tensor or 'neutral'"):
        DeepLift(network, "0", reference=0)  # type: ignore[arg-type]
