"""Measured receptive fields against the recursion of strides, kernels and paddings."""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import nn

from medsd.errors import NetworkError
from medsd.networks.classifier import TileClassifier
from medsd.networks.geometry import ReceptiveField, measure_fields

# Kernel, stride, padding left, padding right; along x.
Layer = tuple[int, int, int, int]


class Geometry(NamedTuple):
    """The fields of the features and of a hidden layer."""

    features: ReceptiveField
    hidden: ReceptiveField

    @property
    def halo_px(self) -> int:
        """Context in image pixels that a block needs on each side for exact saliency; a multiple of the stride.

        The gradient at a hidden cell depends on the gates of every cell above that it feeds, as far as the layers
        above reach, and each of these depends on the image as far as the whole network reaches. One stride more pays
        for the gradient smoothing (one pixel at each strided convolution above) and for rounding.
        """
        above = (self.features.size - self.hidden.size) / 2
        return (math.ceil((above + self.features.size / 2) / self.features.stride) + 1) * self.features.stride


def measure_geometry(classifier: TileClassifier, layer: str) -> Geometry:
    hidden, features = measure_fields(classifier, [layer])
    return Geometry(features, hidden[layer])


def recursion(layers: list[Layer]) -> ReceptiveField:
    """Cell j of a layer sees the cells j * stride - left to j * stride - left + kernel - 1 below."""
    stride, first, last = 1, 0, 0
    for kernel, step, left, _ in layers:
        first, last = first - left * stride, last + (kernel - 1 - left) * stride
        stride *= step
    return ReceptiveField(stride, first, last)


def network_of(layers: list[Layer], hidden: int) -> TileClassifier:
    """A classifier whose encoder is the given layers; the layer "hidden" ends after the first `hidden` of them."""
    modules: list[nn.Module] = []
    for kernel, step, left, right in layers:
        channels = 4 if modules else 3
        pad = nn.ZeroPad2d((left, right, left, right))
        modules.append(nn.Sequential(pad, nn.Conv2d(channels, 4, kernel, step), nn.ReLU(inplace=True)))
    classifier = TileClassifier("test_resnet")
    encoder = nn.Sequential()
    encoder.add_module("hidden", nn.Sequential(*modules[:hidden]))
    encoder.add_module("rest", nn.Sequential(*modules[hidden:]))
    classifier.encoder = encoder
    return classifier


@pytest.mark.parametrize(
    ("layers", "hidden"),
    [
        ([(3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 1, 1)], 1),
        ([(7, 2, 3, 3), (3, 2, 1, 1), (3, 2, 1, 1), (1, 1, 0, 0)], 2),
        ([(3, 2, 0, 1), (3, 2, 0, 1), (5, 1, 2, 2)], 1),  # TensorFlow's padding: right and bottom only
        ([(3, 2, 1, 0), (5, 1, 4, 0), (3, 2, 1, 0)], 2),  # left only (causal)
        ([(4, 4, 0, 0), (7, 1, 3, 3), (2, 2, 0, 0)], 2),  # ConvNeXt
        ([(1, 2, 0, 0), (3, 1, 1, 1)], 1),  # every second column is never seen by the hidden layer
        ([(3, 1, 1, 1), (2, 2, 0, 0)], 1),
    ],
)
def test_fields_equal_the_recursion(layers: list[Layer], hidden: int) -> None:
    geometry = measure_geometry(network_of(layers, hidden), "hidden")
    assert geometry == Geometry(recursion(layers), recursion(layers[:hidden]))


def test_several_layers_in_one_probing() -> None:
    layers: list[Layer] = [(7, 2, 3, 3), (3, 2, 0, 1), (3, 1, 1, 1), (3, 2, 1, 1), (3, 1, 1, 1)]
    classifier = network_of(layers, 3)
    ends = {"rest.1": 5, "hidden.0": 1, "hidden": 3, "hidden.1": 2}
    fields, features = measure_fields(classifier, list(ends))
    assert list(fields) == list(ends)
    assert fields == {name: recursion(layers[:end]) for name, end in ends.items()}
    assert features == recursion(layers)
    assert measure_fields(classifier, []) == ({}, features)


def test_very_deep_networks_are_probed_wider() -> None:
    layers: list[Layer] = [(3, 2, 1, 1)] * 3 + [(41, 1, 20, 20)] * 4  # sees 15 + 4 * 40 * 8 = 1295 px
    geometry = measure_geometry(network_of(layers, 3), "hidden")
    assert geometry.features.size == 1295
    assert geometry == Geometry(recursion(layers), recursion(layers[:3]))


def test_resnet18() -> None:
    # 7 x 7 / 2, pooling 3 / 2, then two blocks of two 3 x 3 at strides 4, 8, 16, 32 (the first / 2 from layer2 on).
    block: list[Layer] = [(3, 2, 1, 1)] + [(3, 1, 1, 1)] * 3
    layers: list[Layer] = [(7, 2, 3, 3), (3, 2, 1, 1), *[(3, 1, 1, 1)] * 4, *block * 3]
    geometry = measure_geometry(TileClassifier("resnet18"), "layer2")
    assert geometry == Geometry(recursion(layers), recursion(layers[:10]))
    assert (geometry.features.size, geometry.hidden.size) == (435, 99)
    assert (geometry.features.centre, geometry.hidden.centre) == (0.5, 0.5)
    assert (geometry.features.stride, geometry.hidden.stride) == (32, 8)
    assert geometry.halo_px == 448  # 435 - 99 / 2 = 385.5, up to a multiple of 32, and one stride


def test_convnext_looks_at_the_middle_of_its_cells() -> None:
    geometry = measure_geometry(TileClassifier("test_convnext"), "stages.1")
    assert (geometry.features.stride, geometry.features.centre) == (32, 16)
    assert (geometry.hidden.stride, geometry.hidden.centre) == (8, 4)


@pytest.mark.parametrize("layer", ["layer1", "layer3"])
def test_nothing_beyond_the_halo_changes_the_gradient(layer: str) -> None:
    """The use of the numbers: a block with its halo gives the gradient of the whole image, and with less not."""
    torch.manual_seed(0)
    classifier = TileClassifier("test_resnet").double().eval()
    for parameter in classifier.encoder.parameters():
        if parameter.ndim == 1:  # BatchNorms start with residual branches at 0
            nn.init.uniform_(parameter, 0.2, 1.0)
    geometry = measure_geometry(classifier, layer)
    halo, stride = geometry.halo_px, geometry.hidden.stride
    image = torch.randn(1, 3, 32, 2 * halo + 256, dtype=torch.float64)

    def gradient(x: torch.Tensor) -> torch.Tensor:
        held: list[torch.Tensor] = []
        handle = getattr(classifier.encoder, layer).register_forward_hook(lambda _m, _i, output: held.append(output))
        objective = classifier.head(classifier.feature_map(x).sum(dim=(2, 3)))[:, 1].sum()
        handle.remove()
        return torch.autograd.grad(objective, held[0])[0]

    whole = gradient(image)
    start, end = halo + 64, halo + 128

    def worst(margin: int) -> float:
        part = gradient(image[..., start - margin : end + margin])
        inner = part[..., margin // stride : (margin + end - start) // stride]
        return float((inner - whole[..., start // stride : end // stride]).abs().max() / whole.abs().max())

    assert worst(halo) < 1e-12
    assert worst(32) > 1e-6


def test_the_network_is_left_as_it_was() -> None:
    classifier = TileClassifier("test_resnet")
    classifier.encoder.bn1.eval()
    state = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    modes = [module.training for module in classifier.modules()]
    measure_geometry(classifier, "layer1")
    assert [module.training for module in classifier.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in classifier.state_dict().items())
    assert not any(module._forward_hooks for module in classifier.modules())


@pytest.mark.parametrize("operation", ["squeeze_excite", "group_norm"])
def test_global_operations_are_refused_in_words(operation: str) -> None:
    classifier, layer = TileClassifier("test_efficientnet"), "blocks.1"
    if operation == "group_norm":
        classifier, layer = TileClassifier("test_resnet"), "layer1"
        classifier.encoder.bn1 = nn.GroupNorm(1, classifier.encoder.bn1.num_features)
    with pytest.raises(NetworkError, match="global operations such as squeeze-excite") as caught:
        measure_geometry(classifier, layer)
    assert "\n" not in str(caught.value)


def test_layers_without_a_map_are_refused() -> None:
    classifier = network_of([(3, 1, 1, 1)], 1)
    classifier.encoder.rest.add_module("flatten", nn.Flatten(2))
    classifier.encoder.rest.add_module("back", nn.Unflatten(2, (32, -1)))
    classifier.encoder.add_module("split", _Split())
    assert measure_geometry(classifier, "rest.back").features.size == 3
    with pytest.raises(NetworkError, match=r"layer 'rest\.flatten': it gives .* no map"):
        measure_geometry(classifier, "rest.flatten")
    with pytest.raises(NetworkError, match=r"layer 'split\.pair': it gives tuple, no map"):
        measure_geometry(classifier, "split.pair")
    with pytest.raises(NetworkError, match=r"layer 'split\.unused': not reached"):
        measure_geometry(classifier, "split.unused")
    with pytest.raises(NetworkError, match="did you mean 'hidden'"):
        measure_geometry(classifier, "hiden")


def test_a_layer_that_does_not_see_the_image_is_refused() -> None:
    classifier = network_of([(3, 2, 1, 1), (3, 1, 1, 1)], 1)
    classifier.encoder.rest.append(_Adds(nn.Sequential(_Zeros(), nn.Conv2d(4, 4, 1))))
    with pytest.raises(NetworkError, match=r"test_resnet: layer 'rest\.1\.part' does not depend on the image"):
        measure_fields(classifier, ["hidden", "rest.1.part"])


class _Adds(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.part(x)


class _Zeros(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.zeros_like(x)


class _Split(nn.Module):
    """Holds a layer with two outputs and one that never runs."""

    def __init__(self) -> None:
        super().__init__()
        self.pair, self.unused = _Pair(), nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = self.pair(x)
        return torch.cat([first, second], dim=1)


class _Pair(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x[:, :2], x[:, 2:]


def test_layers_with_channels_last_are_refused() -> None:
    with pytest.raises(NetworkError, match=r"blocks\.0\.norm': its channels come last"):
        measure_geometry(TileClassifier("test_convnext"), "stages.1.blocks.0.norm")


def test_padding_by_the_images_size_is_measured_where_it_is_the_same_for_each_multiple_of_the_stride() -> None:
    """TensorFlow's padding: cells of an inner crop are those of the whole image, and those of single tiles' middles."""
    torch.manual_seed(0)
    classifier = TileClassifier("tf_efficientnet_lite0").eval()
    field = measure_geometry(classifier, "blocks.2").features
    assert (field.first + field.last + 1) / 2 == field.centre == 31.5  # below and to the right of the cell's middle
    edge = -(-max(-field.first, field.last + 1 - 32) // 32)
    image = torch.randn(1, 3, 32, 32 * (2 * edge + 4))
    with torch.no_grad():
        whole = classifier.feature_map(image)
        scale = float(whole.abs().max())
        for start in (1, 2, 3):
            tile = classifier.feature_map(image[..., 32 * start : 32 * (start + 2 * edge + 1)])
            torch.testing.assert_close(tile[..., edge], whole[..., edge + start], rtol=0, atol=1e-5 * scale)


class _PadsToFours(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.pad(x, (-x.shape[-1] % 4, 0))[..., : x.shape[-1]]


class _Resizes(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        side = 4 * -(-x.shape[-1] // 4)
        return nn.functional.interpolate(nn.functional.interpolate(x, (x.shape[-2], side)), x.shape[-2:])


@pytest.mark.parametrize(
    "odd", [_PadsToFours(), _Resizes(), nn.Sequential(nn.AvgPool2d(2), nn.Upsample(scale_factor=2))]
)
def test_what_depends_on_the_images_size_is_refused(odd: nn.Module) -> None:
    classifier = network_of([(3, 2, 1, 1), (3, 2, 1, 1)], 1)
    classifier.encoder.rest.append(odd)
    classifier.encoder.rest.append(nn.Conv2d(4, 4, 3, padding=1))
    with pytest.raises(NetworkError, match="crops at multiples of its stride of 4 px give other features") as caught:
        measure_geometry(classifier, "hidden")
    assert "\n" not in str(caught.value)


def test_a_stride_that_is_no_whole_number_is_refused() -> None:
    with pytest.raises(NetworkError, match="stride is not a whole number"):
        measure_geometry(network_of([(3, 2, 0, 0), (3, 1, 1, 1)], 1), "hidden")
    with pytest.raises(NetworkError, match="stride is not a whole number"):
        measure_geometry(network_of([(3, 1, 2, 2), (3, 2, 0, 0)], 1), "hidden")


def test_size_and_centre() -> None:
    field = ReceptiveField(8, -3, 4)
    assert (field.size, field.centre) == (8, 1.0)
