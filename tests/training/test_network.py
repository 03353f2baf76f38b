"""Frozen stages do not move by a bit; rates follow a count by hand, and timm's."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from timm.optim import param_groups_layer_decay
from torch import Tensor

from medsd.errors import ConfigError, NetworkError, WeightsError
from medsd.networks.aim import AimClassifier
from medsd.networks.classifier import Classifier, TileClassifier
from medsd.networks.modes import training
from medsd.networks.start import save_encoder
from medsd.networks.whitening import WhitenedHead
from medsd.training.network import parameter_groups, ready_to_train

LR, DECAY = 0.01, 0.05


@pytest.fixture(scope="module")
def _resnet18() -> TileClassifier:
    torch.manual_seed(0)
    return TileClassifier("resnet18")


@pytest.fixture
def resnet18(_resnet18: TileClassifier) -> Iterator[TileClassifier]:
    yield _resnet18
    _resnet18.requires_grad_(True)


@pytest.fixture(scope="module")
def convnext() -> TileClassifier:
    return TileClassifier("convnext_tiny")


@pytest.fixture
def small() -> TileClassifier:
    torch.manual_seed(0)
    return TileClassifier("test_resnet")


def by_name(network: Classifier, groups: list[dict[str, Any]], key: str = "lr") -> dict[str, float]:
    """The value of each parameter's group; a parameter in two groups fails."""
    names = {parameter: name for name, parameter in network.named_parameters()}
    listed = [(names[parameter], group[key]) for group in groups for parameter in group["params"]]
    assert len(listed) == len(dict(listed))
    return dict(listed)


def step(network: Classifier, groups: Any, steps: int = 3) -> dict[str, Tensor]:
    """The network's state after some steps of AdamW."""
    optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=DECAY)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        training(network)
        x = torch.randn(4, 3, 32, 32, generator=generator)
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x), torch.tensor([0, 1, 0, 1])).backward()
        optimizer.step()
    return {name: tensor.clone() for name, tensor in network.state_dict().items()}


def test_the_default_is_one_group_in_order(resnet18: TileClassifier) -> None:
    (group,) = parameter_groups(resnet18, LR, DECAY)
    assert (group["lr"], group["weight_decay"]) == (LR, DECAY)
    for ours, theirs in zip(group["params"], resnet18.parameters(), strict=True):
        assert ours is theirs


def test_the_default_trains_bit_for_bit_as_plain_parameters(small: TileClassifier) -> None:
    twin = copy.deepcopy(small)
    ours, theirs = step(small, parameter_groups(small, LR, DECAY)), step(twin, twin.parameters())
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


@pytest.mark.parametrize("frozen", [("stem",), ("stem", "layer1", "layer2"), ("layer3.0",)])
def test_frozen_stages_do_not_move_by_a_bit(small: TileClassifier, frozen: tuple[str, ...]) -> None:
    before = {name: tensor.clone() for name, tensor in small.state_dict().items()}
    after = step(small, parameter_groups(small, LR, DECAY, frozen, layer_decay=0.9))
    stem = ("conv1.", "bn1.")
    prefixes = tuple(f"encoder.{p}" for name in frozen for p in (stem if name == "stem" else (f"{name}.",)))
    moved = {name for name, tensor in after.items() if not torch.equal(tensor, before[name])}
    still = {name for name in after if name.startswith(prefixes)}
    assert any("running_mean" in name for name in still)
    # All else moves, buffers too; nothing of the frozen stages does.
    assert moved == set(after) - still


def layer_of_resnet18(name: str) -> int:
    """Counted by hand: 0 the head, 1 and 2 the blocks of layer4, 8 the first block of layer1, 9 the stem."""
    if name.startswith("head."):
        return 0
    part, block, *_ = name.removeprefix("encoder.").split(".")
    return 9 if part in ("conv1", "bn1") else 2 * (5 - int(part[-1])) - int(block)


def test_rates_of_resnet18_by_hand(resnet18: TileClassifier) -> None:
    rates = by_name(resnet18, parameter_groups(resnet18, LR, DECAY, layer_decay=0.7))
    assert rates.keys() == dict(resnet18.named_parameters()).keys()
    for name, rate in rates.items():
        assert math.isclose(rate, LR * 0.7 ** layer_of_resnet18(name)), name
    assert math.isclose(rates["encoder.layer4.1.bn2.bias"], 0.007)
    assert math.isclose(rates["encoder.layer4.0.downsample.0.weight"], 0.0049)
    assert math.isclose(rates["encoder.conv1.weight"], LR * 0.7**9)


def test_rates_of_resnet18_are_timms(resnet18: TileClassifier) -> None:
    network = timm.create_model("resnet18", num_classes=2)
    names = {parameter: name for name, parameter in network.named_parameters()}
    groups = param_groups_layer_decay(network, DECAY, layer_decay=0.6)
    ours = parameter_groups(resnet18, LR, DECAY, layer_decay=0.6, decay_vectors=False)
    rates, decays = by_name(resnet18, ours), by_name(resnet18, ours, "weight_decay")
    for group in groups:
        for parameter in group["params"]:
            name = names[parameter]
            name = name.replace("fc.", "head.") if name.startswith("fc.") else f"encoder.{name}"
            assert math.isclose(rates[name], LR * group["lr_scale"]), name
            assert decays[name] == group["weight_decay"], name


def test_rates_of_convnext_by_hand(convnext: TileClassifier) -> None:
    rates = by_name(convnext, parameter_groups(convnext, LR, DECAY, layer_decay=0.5))
    blocks_above = {0: 18 - 3, 1: 18 - 6, 2: 18 - 15, 3: 0}
    blocks = (3, 3, 9, 3)
    for name, rate in rates.items():
        part, *rest = name.removeprefix("encoder.").split(".")
        if name.startswith("head."):
            depth = 0
        elif part == "head":  # the final norm
            depth = 1
        elif part == "stem":
            depth = 20
        else:
            stage = int(rest[0])
            block = int(rest[2]) if rest[1] == "blocks" else 0  # what scales down goes with the first block
            depth = 1 + blocks_above[stage] + blocks[stage] - block
        assert math.isclose(rate, LR * 0.5**depth), name


def test_the_head_has_its_own_rate(small: TileClassifier) -> None:
    rates = by_name(small, parameter_groups(small, LR, DECAY, head_lr=0.5))
    assert {name for name, rate in rates.items() if rate == 0.5} == {"head.weight", "head.bias"}
    assert set(rates.values()) == {LR, 0.5}
    decayed = by_name(small, parameter_groups(small, LR, DECAY, layer_decay=0.5, head_lr=0.5))
    assert math.isclose(decayed["encoder.layer4.0.conv1.weight"], LR / 2)


def test_what_aim_adds_has_the_full_rate() -> None:
    network = AimClassifier("test_resnet", feature_width=8, mask_width=4)
    rates = by_name(network, parameter_groups(network, LR, DECAY, ("stem",), layer_decay=0.5))
    for name, rate in rates.items():
        assert (rate == LR) == (not name.startswith("encoder.")), name
    assert not any(name.startswith(("encoder.conv1", "encoder.bn1")) for name in rates)


def test_norms_and_biases_may_stay_undecayed(convnext: TileClassifier) -> None:
    decays = by_name(convnext, parameter_groups(convnext, LR, DECAY, decay_vectors=False), "weight_decay")
    for name, parameter in convnext.named_parameters():
        assert decays[name] == (0 if parameter.ndim == 1 else DECAY), name
    assert decays["encoder.stages.0.blocks.0.gamma"] == decays["head.bias"] == 0
    assert decays["head.weight"] == DECAY


def test_frozen_batchnorm_keeps_parameters_and_statistics(small: TileClassifier) -> None:
    def of_norms() -> dict[str, torch.Tensor]:
        names = [f"{name}." for name, module in small.named_modules() if isinstance(module, torch.nn.BatchNorm2d)]
        return {name: v.clone() for name, v in small.state_dict().items() if name.startswith(tuple(names))}

    before = of_norms()
    step(small, parameter_groups(small, LR, DECAY, ("batchnorm",)))
    assert len(before) > 10 and all(torch.equal(tensor, before[name]) for name, tensor in of_norms().items())
    with pytest.raises(NetworkError, match="frozen 'batchnorm': convnext_atto has none"):
        parameter_groups(TileClassifier("convnext_atto"), LR, DECAY, ("batchnorm",))


def test_a_frozen_encoder_is_linear_probing(resnet18: TileClassifier) -> None:
    stages = ("stem", "layer1", "layer2", "layer3", "layer4")
    rates = by_name(resnet18, parameter_groups(resnet18, LR, DECAY, stages, layer_decay=0.5))
    assert rates == {"head.weight": LR, "head.bias": LR}


def test_convnexts_stages_have_its_names(convnext: TileClassifier) -> None:
    network = copy.deepcopy(convnext)
    rates = by_name(network, parameter_groups(network, LR, DECAY, ("stem", "stages.0")))
    left_out = {name for name in dict(network.named_parameters()) if name not in rates}
    assert left_out == {name for name in left_out if name.startswith(("encoder.stem.", "encoder.stages.0."))}
    assert len(left_out) == 4 + 3 * 9


@pytest.mark.parametrize(
    ("name", "words"),
    [
        (
            "layer5",
            "has no such stage to freeze; did you mean 'layer[1-4]'.*it has encoder, stem, batchnorm, layer1,.*layer4$",
        ),
        (1, "frozen '1': resnet18 has no such stage"),  # as a command line reads it
        ("act1", "frozen 'act1': resnet18 has no such stage"),  # a module without parameters
        ("head", "frozen 'head': resnet18"),
        ("", "frozen ''"),
    ],
)
def test_stages_that_are_none(resnet18: TileClassifier, name: str, words: str) -> None:
    with pytest.raises(NetworkError, match=words) as caught:
        parameter_groups(resnet18, LR, DECAY, ("stem", name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layer_decay": 0.0}, "layer_decay=0.0"),
        ({"layer_decay": 1.01}, "layer_decay=1.01"),
        ({"layer_decay": math.nan}, "layer_decay=nan"),
        ({"lr": -1e-9}, "lr=-1e-09: must be a number from 0 on"),
        ({"weight_decay": -1.0}, "weight_decay=-1.0"),
        ({"head_lr": -1.0}, "head_lr=-1.0"),
        ({"head_lr": math.nan}, "head_lr=nan"),
    ],
)
def test_rates_that_are_none(small: TileClassifier, options: dict[str, float], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        parameter_groups(small, **{"lr": LR, "weight_decay": DECAY, "frozen": ("stem",), **options})
    assert all(parameter.requires_grad for parameter in small.parameters())


def test_nothing_left_to_train(small: TileClassifier) -> None:
    small.requires_grad_(False)
    with pytest.raises(NetworkError, match="frozen: nothing of test_resnet"):
        parameter_groups(small, LR, DECAY)


def test_an_encoder_whose_layers_timm_does_not_know(small: TileClassifier) -> None:
    small.encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1))
    assert len(parameter_groups(small, LR, DECAY, ("0",))) == 1
    with pytest.raises(NetworkError, match=r"layer_decay=0\.5: timm does not know the layers"):
        parameter_groups(small, LR, DECAY, layer_decay=0.5)
    with pytest.raises(NetworkError, match="frozen 'stem': timm does not know"):
        parameter_groups(small, LR, DECAY, ("stem",))


def test_a_network_starts_from_a_file_and_may_whiten_its_features(tmp_path: Path) -> None:
    torch.manual_seed(0)
    trained, network = TileClassifier("test_resnet"), TileClassifier("test_resnet")
    path = str(tmp_path / "encoder.safetensors")
    save_encoder(path, trained.encoder, "test_resnet", "a test")
    ready = ready_to_train(network, torch.device("cpu"), path, whitening=True, channels_last=True)
    assert ready is network and network.encoder_weights == path
    for name, tensor in network.encoder.state_dict().items():
        assert torch.equal(tensor, trained.encoder.state_dict()[name]), name
    assert isinstance(network.head, WhitenedHead)
    assert network.encoder.conv1[0].weight.is_contiguous(memory_format=torch.channels_last)
    with pytest.raises(WeightsError, match="no such encoder weights"):
        ready_to_train(network, torch.device("cpu"), "nowhere.pt")
    with pytest.raises(ConfigError, match="whitening: AIM's head"):
        ready_to_train(AimClassifier("test_resnet"), torch.device("cpu"), whitening=True)
    with pytest.raises(ConfigError, match=r"^device 'cuda:99': cannot be used here \(.*\); try 'cpu'"):
        ready_to_train(TileClassifier("test_resnet"), torch.device("cuda:99"))


STAGES = ("stem", "layer1", "layer2", "layer3", "layer4", "layer1.0.conv1")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    frozen=st.lists(st.sampled_from(STAGES)),
    layer_decay=st.floats(0.1, 1),
    head_lr=st.none() | st.floats(0, 1),
    decay_vectors=st.booleans(),
)
def test_every_parameter_is_frozen_or_in_one_group(
    resnet18: TileClassifier, frozen: list[str], layer_decay: float, head_lr: float | None, decay_vectors: bool
) -> None:
    resnet18.requires_grad_(True)
    groups = parameter_groups(resnet18, LR, DECAY, frozen, layer_decay, head_lr, decay_vectors)
    rates = by_name(resnet18, groups)
    assert rates.keys() == {name for name, parameter in resnet18.named_parameters() if parameter.requires_grad}
    assert all(0 < rate <= LR for name, rate in rates.items() if name.startswith("encoder."))
    # Rates never fall towards the head, and groups are as few as they can be.
    kinds = [(group["lr"], group["weight_decay"]) for group in groups]
    assert len(kinds) == len(set(kinds))
    encoder = [rate for name, rate in rates.items() if name.startswith("encoder.")]
    assert encoder == sorted(encoder)
