"""Training mode leaves frozen parts the function they were."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from medsd.errors import NetworkError
from medsd.networks.modes import channels_last, evaluating, map_of_layer, training


@pytest.fixture
def network() -> nn.Sequential:
    """Two stages alike; the first one is frozen."""
    stage = [nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout(0.5), nn.BatchNorm2d(3, affine=False)]
    network = nn.Sequential(nn.Sequential(*stage), nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Dropout()))
    network[0].requires_grad_(False)
    return network


def test_frozen_parts_stay_in_eval_mode(network: nn.Sequential) -> None:
    network.eval()
    training(network)
    assert network.training
    assert not any(module.training for module in network[0].modules())
    assert all(module.training for module in network[1].modules())


def test_a_frozen_stage_is_one_function(network: nn.Sequential) -> None:
    training(network)
    before = {name: tensor.clone() for name, tensor in network[0].state_dict().items()}
    x = torch.randn(4, 3, 5, 5)
    assert torch.equal(network[0](x), network[0](x))
    network(x)
    for name, tensor in network[0].state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert not torch.equal(network[1][1].running_mean, torch.zeros(3))


def test_a_half_frozen_part_trains_but_for_its_frozen_norm(network: nn.Sequential) -> None:
    network[0][0].weight.requires_grad_(True)
    training(network)
    assert network[0].training and network[0][0].training and network[0][2].training
    assert not network[0][1].training


def test_melting_again(network: nn.Sequential) -> None:
    training(network)
    network.requires_grad_(True)
    training(network)
    assert all(module.training for module in network.modules())
    network.requires_grad_(False)
    training(network)
    assert not any(module.training for module in network.modules())


def test_evaluating_inside_training_keeps_frozen_parts(network: nn.Sequential) -> None:
    training(network)
    before = [module.training for module in network.modules()]
    with evaluating(network):
        assert not any(module.training for module in network.modules())
    assert [module.training for module in network.modules()] == before


@pytest.mark.parametrize(
    ("shape", "images", "last"),
    [
        ((1, 7, 7, 768), (224, 224), True),
        ((1, 2, 4, 96), (64, 128), True),
        ((1, 13, 20, 96), (50, 80), True),  # rounded up
        ((1, 96, 2, 4), (64, 128), False),
        ((1, 64, 7, 10), (50, 77), False),
        ((1, 64, 64, 64), (128, 128), False),  # may be either
        ((1, 512, 1, 1), (64, 128), False),
    ],
)
def test_channels_last_are_told_by_the_images_proportions(
    shape: tuple[int, ...], images: tuple[int, int], last: bool
) -> None:
    output, given = torch.zeros(shape), torch.zeros(1, 3, *images)
    assert channels_last(output, given) is last
    if last:
        with pytest.raises(NetworkError, match="layer 'x': its channels come last"):
            map_of_layer("x", output, given)
    else:
        assert map_of_layer("x", output, given) is output
