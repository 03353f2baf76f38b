"""The cascade: what becomes random in which stage, from which draw, and what is left alone."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from medsd.errors import ConfigError, NetworkError
from medsd.networks.whitening import WhitenedHead
from medsd.saliency.gradient import Gradient
from medsd.saliency.method import Target
from medsd.saliency.metrics.agreement import rank_correlation
from medsd.saliency.metrics.randomisation import randomised_cascade


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        self.layer = nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6, affine=False), nn.Tanh())
        self.pool = nn.AdaptiveAvgPool2d(3)
        self.fc = nn.Linear(54, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.pool(self.layer(self.stem(x))).flatten(1))


class Recorder:
    """Keeps the weights it was built for; its map is the input's mean."""

    layer = None

    def __init__(self, network: nn.Module, states: list[dict[str, Tensor]], targets: list[Target]) -> None:
        self.network, self.targets = network, targets
        states.append(copy.deepcopy(network.state_dict()))

    def __call__(self, x: Tensor, target: Target = None) -> Tensor:
        self.targets.append(target)
        return x.mean(dim=1)


@pytest.fixture
def network() -> Net:
    torch.manual_seed(0)
    network = Net().train()
    network(torch.randn(8, 3, 12, 12) + 2)  # running statistics that are not those of a new network
    for parameter in network.parameters():
        parameter.data += 0.1
    return network


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 3, 12, 12, generator=torch.Generator().manual_seed(2))


def record(network: nn.Module, x: Tensor, **options) -> tuple[list[str], list[dict[str, Tensor]], list[Target]]:
    states, targets = [], []
    cascade = randomised_cascade(network, lambda copy: Recorder(copy, states, targets), x, **options)
    return [stage.name for stage in cascade], states, targets


def changed(first: dict[str, Tensor], second: dict[str, Tensor]) -> set[str]:
    return {name for name in first if not torch.equal(first[name], second[name])}


def test_stages_from_the_top_and_buffers_at_the_end(network, x):
    names, states, targets = record(network, x)
    assert names == ["none", "fc", "layer", "stem", "all"]
    fc, layer = {"fc.weight", "fc.bias"}, {"layer.0.weight", "layer.0.bias"}
    stem = {"stem.0.weight", "stem.0.bias", "stem.1.weight", "stem.1.bias"}
    original = states[0]
    assert changed(original, network.state_dict()) == set()
    assert [changed(original, state) for state in states[1:4]] == [fc, fc | layer, fc | layer | stem]
    assert torch.equal(states[1]["fc.weight"], states[3]["fc.weight"])  # cumulative: kept once drawn
    final = states[4]
    for name in ("stem.1", "layer.1"):
        assert not final[f"{name}.running_mean"].any() and (final[f"{name}.running_var"] == 1).all()
        assert final[f"{name}.num_batches_tracked"] == 0
    assert changed(states[3], final) >= fc | layer
    expected = network.eval()(x).argmax(1)
    assert all(torch.equal(target, expected) for target in targets)


def test_a_head_that_whitens_forgets_its_moments_at_the_end(network, x):
    whitened = nn.Sequential(network, WhitenedHead(4, 2, None))
    whitened(torch.randn(8, 3, 12, 12))
    _, states, _ = record(whitened, x, stages=("1",))
    moments = {"1.running_mean", "1.running_covariance", "1.batches"}
    assert changed(states[0], states[1]) == {"1.linear.weight", "1.linear.bias"}
    assert changed(states[1], states[2]) >= moments
    new = WhitenedHead(4, 2, None).state_dict()
    assert all(torch.equal(states[2][name], new[name.removeprefix("1.")]) for name in moments)


def test_a_seed_is_a_new_networks_draw_and_nothing_else_moves(network, x):
    before, state = copy.deepcopy(network.state_dict()), torch.random.get_rng_state()
    training = [module.training for module in network.modules()]
    _, first, _ = record(network, x, seed=5)
    _, again, _ = record(network, x, seed=5)
    _, other, _ = record(network, x, seed=6)
    assert all(changed(a, b) == set() for a, b in zip(first, again, strict=True))
    assert "fc.weight" in changed(first[1], other[1])
    assert torch.equal(state, torch.random.get_rng_state()) and changed(before, network.state_dict()) == set()
    assert training == [module.training for module in network.modules()]
    torch.manual_seed(5)
    fresh = nn.Linear(54, 4)
    assert torch.equal(first[1]["fc.weight"], fresh.weight) and torch.equal(first[1]["fc.bias"], fresh.bias)


def test_stages_by_name_and_a_class_by_number(network, x):
    names, states, targets = record(network, x, stages=("fc", "layer.0", "stem"), target=2)
    assert names == ["none", "fc", "layer.0", "stem", "all"] and targets == [2] * 5
    assert changed(states[1], states[2]) == {"layer.0.weight", "layer.0.bias"}


def test_maps_of_a_method_follow_the_weights(network, x):
    network.eval()
    cascade = randomised_cascade(network, lambda copy: Gradient(copy, "stem"), x, 1, seed=1)
    first = cascade[0].maps
    np.testing.assert_array_equal(first, Gradient(network, "stem")(x, 1))
    agreements = [float(rank_correlation(first, stage.maps).mean()) for stage in cascade]
    assert agreements[0] == pytest.approx(1) and all(value < 0.9 for value in agreements[1:])
    assert all(torch.isfinite(stage.maps).all() for stage in cascade)


def test_encoders_without_classes(x):
    names, states, targets = record(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU()), x)
    assert names == ["none", "0", "all"] and targets == [None] * 3
    assert changed(states[0], states[1]) == {"0.weight", "0.bias"}


def test_bad_input_is_named(network, x):
    with pytest.raises(NetworkError, match=r"'layer4'.*did you mean 'layer'"):
        record(network, x, stages=("layer4",))
    with pytest.raises(NetworkError, match="stage 'pool': has no weights"):
        record(network, x, stages=("fc", "pool"))
    for stages in ((), ("fc", "fc")):
        with pytest.raises(ConfigError, match="name at least one module"):
            record(network, x, stages=stages)

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = nn.Parameter(torch.ones(1))

    network.layer.append(Scale())
    with pytest.raises(NetworkError, match=r"'layer.3' \(Scale\): has weights but no reset_parameters"):
        record(network, x)


@pytest.mark.parametrize("name", ["convnext_atto", "convnextv2_atto", "edgenext_xx_small"])
def test_what_is_no_draw_is_what_a_new_network_has(name):
    """Layer scales and GRN, which have no reset_parameters: such networks were refused."""
    new = timm.create_model(name, num_classes=2)
    network = copy.deepcopy(new).eval()
    for parameter in network.parameters():
        parameter.data += 0.1
    _, states, _ = record(network, torch.randn(1, 3, 64, 64), stages=("stages",))
    constant = [key for key, _ in new.named_parameters() if "gamma" in key or "grn" in key or "temperature" in key]
    assert len(constant) > 4
    assert all(torch.equal(states[-1][key], new.state_dict()[key]) for key in constant)
    assert changed(states[0], states[1]) == {key for key, _ in new.named_parameters() if key.startswith("stages")}
