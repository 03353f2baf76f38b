"""Where cells look, by gradients, against receptive fields that are known."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from medsd.errors import NetworkError
from medsd.networks.aim import AimClassifier
from medsd.networks.classifier import TileClassifier
from medsd.networks.effective_field import measure_effective_field
from medsd.networks.geometry import measure_fields


class AddsTheWholeImage(nn.Module):
    """A global operation that no cell escapes: squeeze-excite, and the mean of all cells added."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.excite = nn.Linear(channels, channels)

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(dim=(2, 3))
        return x * self.excite(pooled).sigmoid()[:, :, None, None] + pooled[:, :, None, None]


def network_of(pads: list[tuple[int, int]], everywhere: bool) -> TileClassifier:
    """Three 3 x 3 convolutions of stride 2, each padded by so much on the left and right; the layer is "last"."""
    torch.manual_seed(0)
    encoder = nn.Sequential()
    for number, (left, right) in enumerate(pads):
        encoder.append(nn.ZeroPad2d((left, right, left, right)))
        encoder.append(nn.Conv2d(64 if number else 3, 64, 3, 2))
        encoder.append(nn.ReLU())
        if everywhere:
            encoder.append(AddsTheWholeImage(64))
    encoder.add_module("last", nn.Identity())
    classifier = TileClassifier("test_resnet")
    classifier.encoder = encoder
    return classifier.eval()


@pytest.mark.parametrize("everywhere", [False, True])
@pytest.mark.parametrize("pads", [[(1, 1)] * 3, [(0, 1)] * 3, [(2, 0), (1, 1), (0, 1)]])
def test_centres_are_those_of_the_receptive_field(pads: list[tuple[int, int]], everywhere: bool) -> None:
    centre = measure_fields(network_of(pads, False), ["last"])[0]["last"].centre
    found = measure_effective_field(network_of(pads, everywhere), "last")
    assert found.stride == 8
    assert found.centre == pytest.approx(centre, abs=1)


@pytest.mark.parametrize(
    ("encoder", "layer", "stride", "centre"),
    [
        ("resnet18", "layer2", 8, 0.5),
        ("test_convnext", "stages.1", 8, 4),
        ("test_efficientnet", "blocks.2", 8, 0.5),
    ],
)
def test_encoders_look_where_they_are_known_to(encoder: str, layer: str, stride: int, centre: float) -> None:
    torch.manual_seed(0)
    found = measure_effective_field(TileClassifier(encoder), layer)
    assert found.stride == stride
    assert found.centre == pytest.approx(centre, abs=stride / 8)


def test_a_classifier_with_masks_is_left_as_it_was() -> None:
    torch.manual_seed(0)
    network = AimClassifier("test_resnet", feature_width=8, mask_width=8).train()
    state = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    assert measure_effective_field(network, "layer3") == measure_effective_field(network, "layer3")
    assert network.training and not any(module._forward_hooks for module in network.modules())
    assert all(torch.equal(tensor, state[name]) for name, tensor in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())


def test_layers_without_a_map_are_refused() -> None:
    network = network_of([(1, 1)] * 3, False)
    with pytest.raises(NetworkError, match="did you mean 'last'"):
        measure_effective_field(network, "lst")
    network.encoder.append(nn.Flatten(2))
    network.encoder.add_module("back", nn.Unflatten(2, (8, -1)))
    with pytest.raises(NetworkError, match="no map"):
        measure_effective_field(network, "10")
    torch.nn.init.zeros_(network.encoder[7].weight)
    with pytest.raises(NetworkError, match="nowhere in particular"):
        measure_effective_field(network, "last")


def test_a_stride_that_is_no_whole_number_is_refused() -> None:
    with pytest.raises(NetworkError, match="stride is not a whole number"):
        measure_effective_field(network_of([(0, 0), (0, 0), (0, 0)], False), "last")
