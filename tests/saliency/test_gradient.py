"""Gradients at the input and at hidden layers: captum's, by one pass, and right where a ReLU works in place."""

from __future__ import annotations

import copy
from collections.abc import Callable

import captum.attr
import pytest
import timm
import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn

from medsd.errors import ChannelsCancelError, ConfigError, NetworkError
from medsd.saliency.gradient import GradCAM, Gradient, GradientXActivation
from medsd.saliency.method import ClassMethod
from medsd.saliency.registry import make_method

Lively = Callable[[nn.Module], nn.Module]


def plain() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.MaxPool2d(2),
        nn.Conv2d(6, 8, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 4),
    )


NETWORKS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "torchvision_resnet18": (
        lambda: torchvision.models.resnet18(num_classes=4),
        ["conv1", "bn1", "layer1.0.bn1", "layer2.0.conv1", "layer2.0.downsample.0", "layer3", "layer4.1", "layer4"],
    ),
    "timm_resnet18": (lambda: timm.create_model("resnet18", num_classes=4), ["act1", "layer1", "layer2.0.bn2"]),
    "timm_resnet10t": (lambda: timm.create_model("resnet10t", num_classes=4), ["conv1.3", "layer2", "layer4"]),
    "torchvision_densenet121": (
        lambda: torchvision.models.densenet121(num_classes=4),
        ["features.norm5"],  # before a functional ReLU in place
    ),
    "plain": (plain, ["0", "3"]),
}
CASES = [(name, layer) for name, (_, layers) in NETWORKS.items() for layer in [None, *layers]]


@pytest.fixture(scope="module")
def networks(lively: Lively) -> dict[str, tuple[nn.Module, nn.Module]]:
    """Each network, and a copy of it that does nothing in place."""
    made = {}
    for name, (build, _) in NETWORKS.items():
        torch.manual_seed(0)
        network = lively(build())
        clean = copy.deepcopy(network)
        for module in clean.modules():
            if isinstance(module, nn.ReLU):
                module.inplace = False
        made[name] = network, clean
    return made


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(2, 3, 40, 40, generator=torch.Generator().manual_seed(1))


def assert_close(value: Tensor, expected: Tensor, share: float = 1e-6) -> None:
    assert expected.abs().max() > 0
    torch.testing.assert_close(value, expected, rtol=0, atol=share * float(expected.abs().max()))


@pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients")
@pytest.mark.parametrize(("name", "layer"), CASES)
def test_all_equal_captum(
    networks: dict[str, tuple[nn.Module, nn.Module]], images: Tensor, name: str, layer: str | None
) -> None:
    network, clean = networks[name]
    target = torch.tensor([2, 0])
    if layer is None:
        gradient = captum.attr.Saliency(clean).attribute(images, target=target, abs=False)
        product = captum.attr.InputXGradient(clean).attribute(images, target=target)
    else:
        module = clean.get_submodule(layer)
        reference = captum.attr.LayerGradientXActivation(clean, module, multiply_by_inputs=False)
        gradient = reference.attribute(images, target=target)
        product = captum.attr.LayerGradientXActivation(clean, module).attribute(images, target=target)
        cam = captum.attr.LayerGradCam(clean, module).attribute(images, target=target, relu_attributions=False)
        assert_close(GradCAM(network, layer)(images, target), cam[:, 0].detach())
    assert_close(Gradient(network, layer).attribute(images, target), gradient.detach())
    assert_close(GradientXActivation(network, layer).attribute(images, target), product.detach())
    assert_close(GradientXActivation(network, layer)(images, target), product.detach().mean(dim=1))


class Written(nn.Module):
    """What its `layer` hands on is also held by the caller, who writes to it."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        x = x * 1
        y = self.layer(x)
        x *= 0
        return (y**2).sum(dim=(2, 3))


@pytest.mark.parametrize("layer", [nn.Identity(), nn.ReLU(inplace=True), nn.Conv2d(3, 3, 1)])
def test_the_activation_is_the_one_that_the_layer_gave(layer: nn.Module, images: Tensor) -> None:
    with torch.no_grad():
        expected = 2 * layer(images.clone()) ** 2
    expected[:, [0, 2]] = 0
    torch.testing.assert_close(GradientXActivation(Written(layer), "layer").attribute(images, 1), expected)


def test_maps_and_logits_come_from_one_pass(networks: dict[str, tuple[nn.Module, nn.Module]], images: Tensor) -> None:
    network, _ = networks["timm_resnet18"]
    passes: list[int] = []
    with network.register_forward_pre_hook(lambda _module, inputs: passes.append(len(inputs[0]))):
        for method in (Gradient, GradientXActivation, GradCAM):
            explanation = method(network, "layer3").explain(images)
            assert passes == [2]
            passes.clear()
            assert torch.equal(explanation.maps, method(network, "layer3")(images, explanation.target))
            passes.clear()
    with torch.no_grad():
        logits = network(images)
    assert torch.equal(explanation.logits, logits)
    assert torch.equal(explanation.target, logits.argmax(dim=1))
    assert not any(tensor.requires_grad for tensor in (explanation.maps, explanation.logits, explanation.target))


@pytest.mark.parametrize("layer", [None, "layer2"])
def test_evidence_is_the_logit_above_the_mean_of_the_others(
    networks: dict[str, tuple[nn.Module, nn.Module]], images: Tensor, layer: str | None
) -> None:
    network, _ = networks["timm_resnet10t"]
    each = [Gradient(network, layer)(images, target) for target in range(4)]
    expected = each[1] - (each[0] + each[2] + each[3]) / 3
    assert_close(Gradient(network, layer, "evidence")(images, 1), expected, 1e-5)


def test_a_linear_network_by_hand() -> None:
    network = nn.Sequential(nn.Conv2d(2, 1, 1, bias=False), nn.Flatten(), nn.Linear(4, 2, bias=False))
    weight = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, -2.0, 3.0, -4.0]])
    with torch.no_grad():
        network[0].weight.copy_(torch.tensor([2.0, -6.0]).view(1, 2, 1, 1))
        network[2].weight.copy_(weight)
    x = torch.arange(8.0).view(1, 2, 2, 2)
    expected = torch.tensor([[1.0, -2.0], [3.0, -4.0]])
    torch.testing.assert_close(Gradient(network)(x, 1)[0], -2 * expected)  # the mean of 2 and -6
    torch.testing.assert_close(Gradient(network, "0")(x, 1)[0], expected)
    hidden = 2 * x[0, 0] - 6 * x[0, 1]
    torch.testing.assert_close(GradientXActivation(network, "0")(x, 1)[0], expected * hidden)
    torch.testing.assert_close(GradCAM(network, "0")(x, 1)[0], -0.5 * hidden)
    assert (Gradient(network, "0")(x, 0) == 0).all()  # constant maps stay as they are


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_gradients_are_taken_whatever_the_caller_switched_off(
    networks: dict[str, tuple[nn.Module, nn.Module]], images: Tensor, mode: type
) -> None:
    network, _ = networks["plain"]
    expected = Gradient(network, "0")(images, torch.tensor([1, 0]))
    with mode():
        inside = images.clone()  # an inference tensor in the second case
        target = torch.tensor([1, 0])
        value = Gradient(network, "0")(inside, target)
        assert torch.equal(Gradient(network)(inside, 1), Gradient(network)(images, 1))
    assert torch.equal(value, expected)
    assert torch.equal(Gradient(network, "0")(inside, target), expected)


def test_a_network_made_in_inference_mode_is_refused() -> None:
    with torch.inference_mode():
        network = plain()
    with pytest.raises(NetworkError, match=r"made under torch\.inference_mode; make it outside"):
        Gradient(network, "0")(torch.zeros(1, 3, 16, 16))


class Aside(nn.Module):
    """Its `aside` runs, and the output does not depend on it."""

    def __init__(self) -> None:
        super().__init__()
        self.main, self.aside = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        self.aside(x)
        return self.main(x).mean(dim=(2, 3))


class NoGraph(Aside):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return super().forward(x)


@pytest.mark.parametrize(("network", "layer"), [(Aside(), "aside"), (NoGraph(), "main"), (NoGraph(), None)])
def test_an_output_that_does_not_depend_on_the_layer(network: nn.Module, layer: str | None) -> None:
    with pytest.raises(NetworkError, match=f"layer '{layer or 'input'}': the output does not depend on it"):
        Gradient(network, layer)(torch.randn(2, 3, 4, 4))


class Folded(nn.Module):
    """Cuts each image into four, which go through `layer` as a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.reshape(-1, 3, 2, 2)).mean(dim=(2, 3)).reshape(len(x), -1, 2).mean(dim=1)


def test_a_layer_that_gives_another_number_of_maps() -> None:
    with pytest.raises(NetworkError, match="layer 'layer': gives 8 maps for 2 images"):
        Gradient(Folded(), "layer")(torch.randn(2, 3, 4, 4))


def test_grad_cam_needs_a_layer() -> None:
    with pytest.raises(ConfigError, match="layer: GradCAM needs a hidden layer"):
        GradCAM(plain())


@pytest.mark.parametrize("method", [Gradient, GradientXActivation, GradCAM])
def test_what_is_asked_for_is_checked_before_anything_runs(method: type[ClassMethod]) -> None:
    with pytest.raises(NetworkError, match="layer 'layr1': Named has no such layer; did you mean 'layer1'"):
        method(Named(), "layr1")
    with pytest.raises(ConfigError, match="did you mean 'logit'"):
        method(Named(), "layer1", "logits")  # type: ignore[arg-type]


class Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer1 = nn.Conv2d(3, 2, 1)


class BeforeNorm(nn.Module):
    """A layer that a LayerNorm over channels reads, or none."""

    def __init__(self, normed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 2, 1)
        self.normed = normed

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if self.normed:  # each place for itself, as ConvNeXt's
            y = F.layer_norm(y.permute(0, 2, 3, 1), (16,), eps=1e-6).permute(0, 3, 1, 2)
        return self.head(y.relu()).mean(dim=(2, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("name", ["gradient", "gradient_x_activation", "smoothgrad", "captum.LayerGradientXActivation"])
def test_channels_that_cancel_are_no_map(name: str, dtype: torch.dtype) -> None:
    """A LayerNorm does not see the mean of what it reads: maps were float noise, which looked like any other."""
    x = torch.randn(2, 3, 12, 10, generator=torch.Generator().manual_seed(1)).to(dtype)
    network = BeforeNorm(True).to(dtype)
    method = make_method(name, network, "layer", "evidence")
    with pytest.raises(ChannelsCancelError, match=r"^\S+ at 'layer': its channels cancel .* use gradcam") as error:
        method(x, 1)
    assert "\n" not in str(error.value) and len(str(error.value)) < 200
    assert method.attribute(x, 1).abs().max() > 0  # channels apart are well
    assert make_method(name, BeforeNorm(False).to(dtype), "layer", "evidence")(x, 1).abs().max() > 0
    for other in ("gradcam", "deeplift"):
        assert make_method(other, network, "layer", "evidence")(x, 1).abs().max() > 0
    network.head.weight.data.zero_()
    assert (make_method(name, network, "layer", "evidence")(x, 1) == 0).all()  # nothing to explain is no fault
