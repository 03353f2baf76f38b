"""Training mode leaves frozen parts the function they were; extra passes leave running statistics as they were."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Callable

import pytest
import torch
from timm.layers import BatchNormAct2d, EvoNorm2dB0, FrozenBatchNormAct2d
from torch import nn

from medsd.errors import NetworkError
from medsd.networks.modes import channels_last, evaluating, full_name, keeping_statistics, map_of_layer, training
from medsd.networks.whitening import WhitenedHead
from medsd.pretrain.whitening import IterNorm


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


class Pooled(nn.Module):
    """Maps to logits by a head that whitens."""

    def __init__(self) -> None:
        super().__init__()
        self.head = WhitenedHead(6, 3, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.head(x.mean(dim=(2, 3)))
        return logits


NORMS: list[Callable[[], nn.Module]] = [
    lambda: nn.BatchNorm2d(6),
    lambda: nn.BatchNorm2d(6, momentum=None),
    lambda: nn.SyncBatchNorm(6),  # of one process
    lambda: nn.InstanceNorm2d(6, affine=True, track_running_stats=True),
    lambda: BatchNormAct2d(6),
    lambda: EvoNorm2dB0(6),
    lambda: IterNorm(6),
    Pooled,
]


@pytest.mark.parametrize("make", NORMS)
def test_an_extra_pass_keeps_running_statistics_to_the_bit(make: Callable[[], nn.Module]) -> None:
    draw = torch.Generator().manual_seed(0)
    clean, extra = (torch.randn(4, 6, 5, 5, generator=draw) + shift for shift in (0, 3))
    torch.manual_seed(0)
    kept = make().train()
    plain, moved = copy.deepcopy(kept), copy.deepcopy(kept)
    buffers = list(kept.buffers())
    first = kept(clean)
    with keeping_statistics(kept):
        output = kept(extra)
    # The very tensors, so that whoever holds them (DistributedDataParallel) holds the network's.
    assert all(one is other for one, other in zip(kept.buffers(), buffers, strict=True))
    plain(clean)
    for name, tensor in plain.state_dict().items():
        assert torch.equal(kept.state_dict()[name], tensor), name
    # It is a training pass all the same, by its own batch, and its graph outlives the block.
    expected_first, expected = moved(clean), moved(extra)
    assert any(not torch.equal(tensor, moved.state_dict()[name]) for name, tensor in plain.state_dict().items())
    assert torch.equal(output, expected)
    (first.sum() + output.square().sum()).backward()
    (expected_first.sum() + expected.square().sum()).backward()
    for parameter, other in zip(kept.parameters(), moved.parameters(), strict=True):
        assert torch.equal(parameter.grad, other.grad)  # type: ignore[arg-type]


def test_statistics_are_kept_after_an_error_and_frozen_ones_are_left_alone(network: nn.Sequential) -> None:
    training(network)
    network.append(FrozenBatchNormAct2d(3))
    buffers = list(network.buffers())
    with pytest.raises(RuntimeError, match="stop"), keeping_statistics(network):
        assert network[0][1].running_mean is buffers[0]  # in eval mode: nothing moves it
        assert network[1][1].running_mean is not network[0][1].running_mean
        network(torch.randn(4, 3, 5, 5))
        raise RuntimeError("stop")
    assert all(one is other for one, other in zip(network.buffers(), buffers, strict=True))
    assert torch.equal(network[1][1].running_mean, torch.zeros(3))


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


def test_the_one_layer_that_ends_so_is_meant() -> None:
    """A compiled or parallel network's own names stand behind another; nearer spelt ones are passed over."""
    inner = nn.Sequential(
        OrderedDict(stem=nn.Sequential(OrderedDict(norm=nn.Identity())), layer3=nn.Identity(), norms=nn.Identity())
    )
    for network, name in ((nn.DataParallel(inner), "module.layer3"), (inner, "stem.norm")):
        with pytest.raises(NetworkError, match=f"has no such layer; did you mean '{name}'"):
            full_name(network, name.rpartition(".")[2])
    both = nn.Sequential(inner, inner.stem, nn.Sequential(OrderedDict(layer3=nn.Identity())))
    with pytest.raises(NetworkError, match=r"layer 'layer3': .*did you mean '\d\.layer3'"):  # the nearest of two
        full_name(both, "layer3")
