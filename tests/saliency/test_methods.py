"""What holds for every registered method: shape and type, one image at a time, nothing left behind, errors by name."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from medsd.errors import ConfigError, DatasetError, MedsdError, NetworkError
from medsd.saliency.method import Method
from medsd.saliency.registry import METHODS, make_method

CLASS_METHODS = [name for name, card in METHODS.items() if card.needs_label]
CASES = [
    (name, layer) for name, card in METHODS.items() for layer in (["block"] if not card.at_input else [None, "block"])
]
HOOKS = [key for key in vars(nn.Module()) if "hooks" in key]


class Block(nn.Module):
    """A residual block: one ReLU in place for two calls, `+=` in place, BatchNorm."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv2(self.relu(self.bn1(self.conv1(x))))
        y += x
        return self.relu(y)


class Classifier(nn.Module):
    """Small, with all that makes methods stumble; raises where `fails` is set."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.pool = nn.MaxPool2d(3, 2, 1)
        self.block, self.after = Block(6), Block(6)
        self.frozen = nn.BatchNorm2d(6).requires_grad_(False).eval()
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(6, 3)
        self.unused = nn.Conv2d(3, 3, 1)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.frozen(self.after(self.block(self.pool(self.stem(x)))))
        if self.fails:
            raise ValueError("inside")
        return self.head(self.drop(x.mean(dim=(2, 3))))


@pytest.fixture
def network(lively: Callable[[nn.Module], nn.Module]) -> Classifier:
    """In training mode, apart from its frozen BatchNorm, which is not."""
    torch.manual_seed(0)
    made = Classifier()
    lively(made).train()
    made.frozen.eval()
    assert isinstance(made, Classifier)
    return made


@pytest.fixture(scope="module")
def images() -> Tensor:
    return torch.randn(3, 3, 40, 32, generator=torch.Generator().manual_seed(1))


def state(network: nn.Module) -> dict[str, object]:
    """All that a method could leave behind in a network."""
    modules = dict(network.named_modules())
    found: dict[str, object] = {"attributes": {name: sorted(vars(module)) for name, module in modules.items()}}
    for key in HOOKS:
        found[key] = {name: len(getattr(module, key) or ()) for name, module in modules.items()}
    found["training"] = {name: module.training for name, module in modules.items()}
    found["inplace"] = {name: getattr(module, "inplace", None) for name, module in modules.items()}
    found["modules"] = {name: id(module) for name, module in modules.items()}
    tensors = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    found["tensors"] = {name: (id(t), t._version, t.requires_grad, t.grad) for name, t in tensors.items()}
    return found


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_maps_are_float32_signed_and_of_the_layers_size(
    network: Classifier, images: Tensor, name: str, layer: str | None
) -> None:
    for dtype in (torch.float32, torch.float64):
        maps = make_method(name, network.to(dtype), layer)(images.to(dtype))
        assert maps.shape == ((3, 10, 8) if layer else (3, 40, 32))
        assert maps.dtype == torch.float32
        assert maps.device == images.device
        assert not maps.requires_grad
        assert torch.isfinite(maps).all()
        assert maps.std() > 0
        assert METHODS[name].signed or (maps >= 0).all()


@pytest.mark.parametrize(("name", "layer"), CASES)
def test_a_map_does_not_depend_on_the_rest_of_its_batch(
    network: Classifier, images: Tensor, name: str, layer: str | None
) -> None:
    method, target = make_method(name, network, layer, "evidence"), torch.tensor([2, 0, 1])
    maps = method(images, target)
    one_by_one = torch.cat([method(images[i : i + 1], target[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(maps, one_by_one, rtol=0, atol=1e-6 * float(maps.abs().max()))
    turned = method(images.flip(0), target.flip(0)).flip(0)
    torch.testing.assert_close(maps, turned, rtol=0, atol=1e-6 * float(maps.abs().max()))


@pytest.mark.parametrize("name", CLASS_METHODS)
def test_the_class_is_the_given_or_the_predicted_one(network: Classifier, images: Tensor, name: str) -> None:
    method = make_method(name, network, "block")
    each = torch.stack([method(images, target) for target in range(3)])
    assert not torch.allclose(each[0], each[1], rtol=0.01)
    assert torch.equal(method(images, torch.tensor([1, 1, 1])), each[1])
    assert torch.equal(method(images, torch.tensor(1)), each[1])
    predicted = network.eval()(images).argmax(dim=1)
    torch.testing.assert_close(method(images), torch.stack([each[c, i] for i, c in enumerate(predicted)]))


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize(("name", "layer"), CASES)
def test_nothing_is_left_behind(
    network: Classifier, images: Tensor, name: str, layer: str | None, mode: Callable[[], AbstractContextManager[None]]
) -> None:
    method, before = make_method(name, network, layer), state(network)
    expected = method(images)
    x = images.clone().requires_grad_()
    with mode():
        assert torch.equal(method(x), expected)
        assert torch.is_grad_enabled() == (mode is torch.enable_grad)
    assert state(network) == before
    assert x.grad is None
    assert torch.equal(x.detach(), images)
    with pytest.raises(NetworkError):
        method(images * torch.inf)
    network.fails = True
    with pytest.raises(ValueError, match="inside"):
        method(images)
    network.fails = False
    assert state(network) == before
    assert network(images).requires_grad


def test_the_state_tells(network: Classifier) -> None:
    before = state(network)
    with network.block.relu.register_forward_hook(lambda *_: None):
        assert state(network) != before
    network.frozen.train()
    assert state(network) != before
    network.frozen.eval()
    assert state(network) == before
    network(torch.zeros(2, 3, 16, 16))  # BatchNorm counts
    assert state(network) != before


class Inner(nn.Module):
    """Maps that are no maps: (B, N, C) tokens, a pair."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.pair, self.head = nn.Flatten(2), Pair(), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.tokens(self.pair(x)[0]).mean(dim=2))


class Pair(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, x


def assert_one_line(error: pytest.ExceptionInfo[MedsdError]) -> None:
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 200


@pytest.mark.parametrize("name", METHODS)
def test_layers_that_cannot_be_explained(network: Classifier, images: Tensor, name: str) -> None:
    with pytest.raises(NetworkError, match="layer 'blok': Classifier has no such layer; did you mean 'block'") as error:
        make_method(name, network, "blok")
    assert_one_line(error)
    for layer, words in (("unused", "not reached"), ("head", r"it gives \(\d, 3\), no map")):
        with pytest.raises(NetworkError, match=f"layer '{layer}': {words}") as error:
            make_method(name, network, layer)(images)
        assert_one_line(error)
    for layer, words in (("tokens", r"it gives \(\d, 3, 1280\)"), ("pair", "it gives tuple")):
        with pytest.raises(NetworkError, match=f"layer '{layer}': {words}, no map") as error:
            make_method(name, Inner(), layer)(images)
        assert_one_line(error)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (torch.zeros(0, 3, 8, 8), "an empty batch"),
        (torch.zeros(3, 8, 8), r"shape \(3, 8, 8\)"),
        (torch.zeros(2, 3, 8, 8, dtype=torch.uint8), "torch.uint8"),
    ],
)
@pytest.mark.parametrize("name", METHODS)
def test_what_is_no_batch_of_images(network: Classifier, name: str, x: Tensor, words: str) -> None:
    with pytest.raises(DatasetError, match=f"images: .*{words}") as error:
        make_method(name, network, "block")(x)
    assert_one_line(error)


@pytest.mark.parametrize("name", METHODS)
def test_values_that_are_not_finite(network: Classifier, images: Tensor, name: str) -> None:
    method = make_method(name, network, "block")
    broken = images.clone()
    broken[1, 0, 3, 3] = torch.nan
    with pytest.raises(NetworkError, match="not finite") as error:
        method(broken)
    assert_one_line(error)
    with torch.no_grad():
        network.block.bn1.bias[0] = torch.nan
    with pytest.raises(NetworkError, match="not finite") as error:
        method(images)
    assert_one_line(error)


@pytest.mark.parametrize(
    "target", [3, -1, torch.tensor([0, 1, 3]), torch.tensor([0, 1]), torch.tensor([0.0, 1.0, 2.0]), True]
)
@pytest.mark.parametrize("name", CLASS_METHODS)
def test_targets_that_are_no_classes(network: Classifier, images: Tensor, name: str, target: Tensor | int) -> None:
    with pytest.raises(ConfigError, match="target") as error:
        make_method(name, network, "block")(images, target)
    assert_one_line(error)


@pytest.mark.parametrize("name", [*CLASS_METHODS, "captum.Saliency"])
def test_names_of_classes_are_answered_with_their_numbers(network: Classifier, images: Tensor, name: str) -> None:
    method = make_method(name, network, "block")
    for target in ("tumour", ["tumour"] * 99, {}):
        with pytest.raises(ConfigError, match=r"^target=.*: give one class number, or one for each image$") as error:
            method(images, target)  # type: ignore[arg-type]
        assert_one_line(error)
    network.classes = ("normal", "tumour", "other")  # type: ignore[assignment]
    with pytest.raises(ConfigError, match=r"^target='tumour': give .*: 0 normal, 1 tumour, 2 other$") as error:
        method(images, "tumour")  # type: ignore[arg-type]
    assert_one_line(error)


@pytest.mark.parametrize("name", [*METHODS, "captum.LayerGradCam"])
def test_a_layer_is_given_by_its_name(network: Classifier, name: str) -> None:
    for layer, words in ((network.block, "Block; give its name, such as 'block'"), (3, "int; give its name")):
        with pytest.raises(NetworkError, match=f"^layer: {words}") as error:
            make_method(name, network, layer)  # type: ignore[arg-type]
        assert_one_line(error)


class Answer(dict[str, Tensor]):
    """As HuggingFace's networks give it."""

    @property
    def logits(self) -> Tensor:
        return self["logits"]


class Answering(nn.Conv2d):
    def forward(self, x: Tensor) -> Answer:  # type: ignore[override]
        return Answer(logits=super().forward(x).mean(dim=(2, 3)))


@pytest.mark.parametrize("name", [*CLASS_METHODS, "captum.Saliency"])
def test_outputs_that_hold_logits(images: Tensor, name: str) -> None:
    with pytest.raises(NetworkError, match=r"output is Answer; .*; wrap it so that it returns \.logits$") as error:
        make_method(name, nn.Sequential(nn.Conv2d(3, 3, 1), Answering(3, 2, 1)), "0")(images)
    assert_one_line(error)


@pytest.mark.parametrize("name", CLASS_METHODS)
def test_outputs_that_are_no_logits(images: Tensor, name: str) -> None:
    with pytest.raises(NetworkError, match="class methods need logits") as error:
        make_method(name, nn.Sequential(nn.Conv2d(3, 2, 1)), "0")(images)
    assert_one_line(error)
    pooled = nn.Sequential(nn.Conv2d(3, 2, 1), nn.AdaptiveAvgPool2d(1))  # sides of 1 behind the classes are well
    assert make_method(name, pooled, "0")(images).shape == (3, 40, 32)


@pytest.mark.parametrize("name", METHODS)
def test_a_constant_map_comes_as_it_is(name: str) -> None:
    """Neither stretched nor NaN: gradients of a mean, and features that are the same everywhere."""
    network = nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    maps = make_method(name, network, "0")(torch.ones(2, 3, 6, 5), 1)
    assert torch.isfinite(maps).all()
    torch.testing.assert_close(maps, maps[:, :1, :1].expand_as(maps))
    network[3].weight.data.zero_()
    if name in CLASS_METHODS:
        assert (make_method(name, network, "0")(torch.randn(2, 3, 6, 5), 1) == 0).all()


def resident_mib() -> float:
    fields = Path("/proc/self/statm").read_text().split()
    return int(fields[1]) * 4096 / 2**20


def live_tensors() -> int:
    gc.collect()
    return sum(issubclass(type(thing), Tensor) for thing in gc.get_objects())


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from Linux's /proc")
@pytest.mark.parametrize(("name", "calls"), [("gradient", 100), ("mean_map", 100), ("eigencam", 50), ("deeplift", 50)])
def test_many_calls_keep_no_memory(name: str, calls: int) -> None:
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    method: Method = make_method(name, network, "0")
    x = torch.randn(4, 3, 24, 24)  # 60 KiB of activations a call, kept they would be 2.9 MiB a round and more
    for _ in range(calls // 4):
        method(x, 1)
    tensors, grown = live_tensors(), []
    for _ in range(3):
        memory = resident_mib()
        for _ in range(calls):
            method(x, 1)
        grown.append(resident_mib() - memory)
    assert live_tensors() == tensors
    # The allocator takes a piece of the system's memory now and then; what calls keep grows in every round.
    assert min(grown) < 1.5
