"""DeepLift against a layer's own reference: nothing is lost, with borders and without; the neutral one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict

import pytest
import timm
import torch
from torch import Tensor, nn

from medsd.errors import ConfigError, NetworkError
from medsd.networks.aim import AimClassifier
from medsd.saliency.deeplift import DeepLift
from medsd.saliency.neutral import find_neutral, neutral_from_images, plane_evidence, tile_evidence
from medsd.saliency.registry import make_method

Lively = Callable[[nn.Module], nn.Module]

NETWORKS = {
    "resnet10t": "layer2",
    "resnet18": "layer2",
    "resnet50": "layer3",
    "convnext_atto": "stages.1",
    "convnextv2_atto": "stages.1",
    "efficientnet_lite0": "blocks.2",
    "efficientnet_b0": "blocks.2",
    "seresnet18": "layer2",
}


def drawn(name: str, lively: Lively) -> nn.Module:
    network = lively(timm.create_model(name, num_classes=2))
    for key, parameter in network.named_parameters():
        if key.endswith("gamma") or "grn" in key:
            nn.init.uniform_(parameter, 0.2, 1)  # layer scale and response normalisation start silent
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0  # statistics of its own inputs, so that deep signals do not die away
    with torch.no_grad():
        network.train()(torch.randn(4, 3, 64, 64))
    return network.eval().requires_grad_(False)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_attributions_sum_to_the_change_from_a_tiles_reference(lively: Lively, name: str, dtype: torch.dtype) -> None:
    network, layer = drawn(name, lively).to(dtype), NETWORKS[name]
    x = torch.randn(2, 3, 64, 64, dtype=dtype)
    reference = torch.rand(channels(network, layer), dtype=dtype)
    found = DeepLift(network, layer, "evidence", reference=reference).attribute(x, 1).double()
    base = tile_evidence(network, layer, "evidence", 1, (3, 64, 64))(reference)
    logits = network(x).double()
    missed = (found.sum(dim=(1, 2, 3)) - (logits[:, 1] - logits[:, 0] - base)).abs()
    limit = 1e-4 if dtype == torch.float32 else 1e-8
    assert (missed < limit * found.abs().sum(dim=(1, 2, 3))).all()


def channels(network: nn.Module, layer: str) -> int:
    sizes: list[int] = []
    hook = network.get_submodule(layer).register_forward_hook(lambda _m, _i, output: sizes.append(output.shape[1]))
    network(torch.zeros(1, 3, 64, 64, dtype=next(network.parameters()).dtype))
    hook.remove()
    return sizes[0]


def test_attention_loses_nothing() -> None:
    torch.manual_seed(0)
    network = timm.create_model("vit_tiny_patch16_224", img_size=64, depth=2, num_classes=2).double().eval()
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    found = DeepLift(network, "patch_embed.proj", "evidence").attribute(x, 1)
    change = network(x) - network(torch.zeros_like(x))
    torch.testing.assert_close(found.sum(dim=(1, 2, 3)), change[:, 1] - change[:, 0], rtol=1e-8, atol=1e-10)


def test_the_masks_of_aim_lose_nothing(lively: Lively) -> None:
    network = lively(AimClassifier("resnet10t", feature_width=16, mask_width=8)).double().requires_grad_(False)
    for estimator in network.mask_estimators.values():
        estimator.spatial.bias.fill_(0.0)
    x, reference = torch.randn(2, 3, 64, 64).double(), torch.rand(256).double()
    layer = "encoder.layer3"
    found = DeepLift(network, layer, "evidence", reference=reference).attribute(x, 1)
    base = tile_evidence(network, layer, "evidence", 1, (3, 64, 64))(reference)
    logits = network(x)
    torch.testing.assert_close(found.sum(dim=(1, 2, 3)), logits[:, 1] - logits[:, 0] - base, rtol=1e-8, atol=1e-8)


class Cells(nn.Module):
    """Logits of each cell above a hidden layer."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.GELU(), nn.MaxPool2d(3, 1, 1)
        )
        self.norm, self.head = nn.LayerNorm(8), nn.Conv2d(8, 2, 1)
        self.window = nn.AvgPool2d(3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.window(self.body(x)).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        logits: Tensor = self.head(torch.nn.functional.silu(x))
        return logits


class Summed(nn.Module):
    def __init__(self, cells: nn.Module, part: slice = slice(None)) -> None:
        super().__init__()
        self.cells, self.part = cells, part

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.cells(x)[:, :, self.part, self.part].sum(dim=(2, 3))
        return logits


def test_a_plane_is_complete_inside_and_equals_tiles_there() -> None:
    torch.manual_seed(0)
    cells = Cells().double()
    x, vector = torch.randn(1, 3, 40, 40).double(), torch.rand(3).double()
    upper = Summed(cells, slice(6, 14))
    found = make_method("deeplift", upper, None, "evidence", {"reference": vector, "plane": True}).attribute(x, 1)  # type: ignore[attr-defined]
    expected = DeepLift(upper, None, "evidence", reference=vector).attribute(x, 1)
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-11)
    logits = upper(x)[0]
    change = logits[1] - logits[0] - 64 * plane_evidence(cells, vector, 1)
    torch.testing.assert_close(found.sum(), change, rtol=1e-8, atol=1e-10)


def test_a_plane_through_a_convnext(lively: Lively) -> None:
    cells = drawn("convnext_atto", lively).double().stages[2:]
    x, vector = torch.randn(1, 80, 16, 16).double(), torch.rand(80).double()
    method = DeepLift(Summed(cells), None, "evidence", reference=vector, plane=True)
    first = method.attribute(x, 1)
    assert torch.equal(first, method.attribute(x, 1))


def test_global_pooling_has_no_plane() -> None:
    network = Summed(nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.ReLU()))
    with pytest.raises(NetworkError, match="no function of cells") as error:
        DeepLift(network, reference=torch.ones(3), plane=True)(torch.rand(1, 3, 32, 32), 1)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("reference", [torch.ones(2), torch.ones(3, 1, 1)])
def test_a_reference_of_another_shape_is_refused(reference: Tensor) -> None:
    with pytest.raises(ConfigError, match=r"reference: shape .*; give \(3,\) or \(3, 8, 8\)"):
        DeepLift(Summed(Cells()), reference=reference)(torch.rand(1, 3, 8, 8), 1)


class BySize(nn.Module):
    """Calls another function, or none, where maps are small."""

    def __init__(self, small: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.small = small

    def forward(self, x: Tensor) -> Tensor:
        return x.tanh() if x.shape[-1] >= 16 else self.small(x)


@pytest.mark.parametrize(("small", "told"), [(torch.sigmoid, "other"), (torch.neg, "fewer")])
def test_a_network_that_depends_on_the_size_of_maps_has_no_plane(small: Callable[[Tensor], Tensor], told: str) -> None:
    with pytest.raises(NetworkError, match=f"calls {told} functions on another size of map"):
        DeepLift(Summed(BySize(small)), reference=torch.ones(3), plane=True)(torch.rand(1, 3, 8, 8), 1)


def test_a_product_by_hand() -> None:
    """3 * 5 from 1 * 1: the change of 14 is 2 * 3 (mean of the other) and 4 * 2."""

    class Product(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x[:, :1] * x[:, 1:]).flatten(1)

    x = torch.tensor([3.0, 5.0]).view(1, 2, 1, 1)
    assert DeepLift(Product(), reference=torch.ones(2)).attribute(x, 0).flatten().tolist() == [6, 8]


def test_the_neutral_reference_is_neutral_and_turns_with_the_head(lively: Lively) -> None:
    network = drawn("resnet10t", lively)
    x = torch.randn(8, 3, 64, 64) + torch.linspace(-3, 3, 8).view(8, 1, 1, 1)
    with torch.no_grad():
        network.fc.weight *= 100
        logits = network(x)
        network.fc.bias[1] -= (logits[:, 1] - logits[:, 0]).mean()
    network.neutral = neutral_from_images(network, "layer2", x.split(3), "evidence", 1)
    vector = torch.tensor(network.neutral.vector)
    assert abs(tile_evidence(network, "layer2", "evidence", 1, (3, 64, 64))(vector)) < 1e-4
    found = make_method("deeplift", network, "layer2", "evidence", reference="neutral")(x, 1)
    given = make_method("deeplift", network, "layer2", "evidence", reference=vector)(x, 1)
    torch.testing.assert_close(given, found)
    with torch.no_grad():
        network.fc.weight.neg_(), network.fc.bias.neg_()
    network.neutral = asdict(network.neutral)  # as a model card keeps it
    turned = make_method("deeplift", network, "layer2", "evidence", reference="neutral")(x, 1)
    torch.testing.assert_close(turned, -found, rtol=1e-4, atol=1e-6)
    with pytest.raises(ConfigError, match="is of layer 'layer2', not 'layer3'"):
        make_method("deeplift", network, "layer3", reference="neutral")
    with pytest.raises(ConfigError, match="reference"):
        make_method("gradient", network, "layer3", reference="neutral")


def test_one_class_or_no_reference_is_told(lively: Lively) -> None:
    network = drawn("resnet10t", lively)
    with pytest.raises(ConfigError, match="the network has none"):
        DeepLift(network, "layer2", reference="neutral")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        favoured = int(network(x).argmax())
    for target, side in ((favoured, "for"), (1 - favoured, "against")):
        with pytest.raises(ConfigError, match=f"all 2 images are {side} class {target} by.*or choose a method"):
            neutral_from_images(network, "layer2", [x, x], "evidence", target)
    with pytest.raises(ConfigError, match="no images"):
        neutral_from_images(network, "layer2", [], "evidence", 1)
    with pytest.raises(NetworkError, match="not 0 near that line"):
        find_neutral(lambda vector: 1 + vector.sum().square() * 0, torch.zeros(2), torch.ones(2))
    with pytest.raises(ConfigError, match="baseline and reference"):
        DeepLift(network, "layer2", baseline=torch.zeros(3, 4, 4), reference=torch.zeros(4))


def test_a_neutral_point_beside_the_line() -> None:
    """Only the third channel, alike in both classes, can make this evidence 0; the nearest such point is known."""
    weight = torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64)
    low, high = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([2.0, 1.0, 4.0])
    found = find_neutral(lambda vector: (vector @ weight).square() - 1, low, high)
    assert abs(found.log_odds) < 1e-6 and found.vector[2] == pytest.approx(1, abs=1e-6)
    on_line = low + found.position * (high - low)
    torch.testing.assert_close(found.vector[:2], on_line[:2].double())
    assert found.beside == pytest.approx(0.75 / 3**0.5, abs=1e-6)


def test_a_gradient_finds_what_differences_find(lively: Lively) -> None:
    of = tile_evidence(drawn("resnet10t", lively).double(), "layer2", "evidence", 1, (3, 64, 64))
    vector = torch.rand(128, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(of(vector), vector)
    step = 1e-6 * torch.randn(128, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        change = float(of(vector + step)) - float(of(vector - step))
    assert change == pytest.approx(2 * float(gradient @ step), rel=1e-3)
