"""Encoder weights come in from files of every kind bit for bit, or not at all."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from medsd.errors import OutputError, WeightsError
from medsd.networks.aim import AimClassifier
from medsd.networks.classifier import Normalise, TileClassifier, create_encoder
from medsd.networks.start import load_encoder, open_encoder, save_encoder
from medsd.networks.weights import ModelCard, save_classifier
from medsd.pretrain.med_moco import MedMoCoSettings
from medsd.pretrain.start import EncoderStart
from medsd.training.network import ready_to_train

ENCODER = "test_resnet"
CARD = ModelCard(ENCODER, ("normal", "tumour"), 96, 0.97, "phantoms")
State = dict[str, Tensor]


def make_encoder(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    encoder: nn.Module = timm.create_model(ENCODER, num_classes=0, global_pool="")
    for buffer in encoder.buffers():  # running statistics travel too
        if buffer.dtype == torch.float32:
            buffer.uniform_(0.5, 1.5)
        else:
            buffer.fill_(seed)
    return encoder


@pytest.fixture(scope="module")
def trained() -> nn.Module:
    return make_encoder(1)


@pytest.fixture
def encoder() -> nn.Module:
    return make_encoder(2)


def assert_same(encoder: nn.Module, state: State) -> None:
    assert encoder.state_dict().keys() == state.keys()
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, state[name]), name


def refuse(encoder: nn.Module, path: Path, words: str) -> str:
    """The message; the encoder must be as it was."""
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    with pytest.raises(WeightsError, match=words) as caught:
        load_encoder(encoder, path)
    assert_same(encoder, before)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message and "\x1b" not in message
    return message


def test_saved_and_loaded(tmp_path: Path, trained: nn.Module, encoder: nn.Module) -> None:
    path = tmp_path / "a" / "encoder.safetensors"
    digest = save_encoder(path, trained, f"{ENCODER}.r160_in1k", "MoCo on 12 slides, µ")
    load_encoder(encoder, path)
    assert_same(encoder, trained.state_dict())
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert (metadata["format"], metadata["sha256"], len(digest)) == ("medsd-encoder-1", digest, 64)
    card = json.loads(metadata["card"])
    assert (card["encoder"], card["source"]) == (f"{ENCODER}.r160_in1k", "MoCo on 12 slides, µ")
    assert card["input_mean"] == [0.485, 0.456, 0.406] and card["input_std"] == [0.229, 0.224, 0.225]
    assert save_encoder(path, trained, ENCODER, "elsewhere") != digest


def test_the_input_that_weights_take_goes_with_them(
    tmp_path: Path, trained: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, half = tmp_path / "e.safetensors", Normalise((0.5, 0.5, 0.5), (0.5, 0.25, 0.125))
    save_encoder(path, trained, ENCODER, "halves", half)
    found = open_encoder(path)
    assert found is not None
    images = torch.randint(256, (2, 3, 8, 8), dtype=torch.uint8)
    assert torch.equal(found.normalise(images), half(images))
    classifier, cpu = TileClassifier(ENCODER), torch.device("cpu")
    before = {name: tensor.clone() for name, tensor in classifier.encoder.state_dict().items()}
    with pytest.raises(WeightsError, match=r"input_mean \[0.5, 0.5, 0.5\] and input_std .*; set both so"):
        ready_to_train(classifier, cpu, str(path))
    assert_same(classifier.encoder, before)
    with pytest.raises(WeightsError, match="set both so"):
        EncoderStart(ENCODER, weights=str(path)).encoder_alone()
    start = EncoderStart(ENCODER, weights=str(path), input_mean=half.input_mean, input_std=list(half.input_std))
    assert torch.equal(start.network(MedMoCoSettings(queue=8), cpu).normalise(images), half(images))
    # A file of before the card said so holds ImageNet's.
    plain = json.dumps({"encoder": ENCODER, "source": ""})
    monkeypatch.setattr("medsd.networks.weights.json.dumps", lambda _card: plain)
    save_encoder(path, trained, ENCODER, "")
    ready_to_train(classifier, cpu, str(path))
    old = open_encoder(path)
    assert old is not None and torch.equal(old.normalise(images), Normalise()(images))


@pytest.mark.parametrize(
    ("encoder", "normalise", "warns"),
    [
        ("tf_efficientnet_lite0", Normalise(), True),
        ("tf_efficientnet_lite0", Normalise((0.5,) * 3, (0.5,) * 3), False),
        ("tf_efficientnet_lite0", Normalise((0.0,) * 3, (1.0,) * 3), False),  # chosen on purpose
        ("resnet10t", Normalise(), False),
    ],
)
def test_others_weights_that_take_another_input_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, encoder: str, normalise: Normalise, warns: bool
) -> None:
    """With a wrong mean and deviation every tensor fits."""
    network, _ = create_encoder(encoder, pretrained=False)
    save_file(network.state_dict(), tmp_path / "others.safetensors")
    load_encoder(network, tmp_path / "others.safetensors", normalise)
    assert ("take input_mean [0.5, 0.5, 0.5]" in caplog.text) == warns


def test_half_precision_weights_are_the_same_numbers(tmp_path: Path, trained: nn.Module, encoder: nn.Module) -> None:
    halved = {n: t.half() if t.is_floating_point() else t for n, t in trained.state_dict().items()}
    save_file(halved, tmp_path / "h.safetensors")
    load_encoder(encoder, tmp_path / "h.safetensors")
    assert {tensor.dtype for tensor in encoder.parameters()} == {torch.float32}
    assert_same(encoder, {n: t.float() if t.is_floating_point() else t for n, t in halved.items()})


def test_saved_by_us_and_damaged(tmp_path: Path, trained: nn.Module, encoder: nn.Module) -> None:
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, trained, ENCODER, "here and now")
    content = path.read_bytes()
    for damaged, words in (
        (content[:-1] + bytes([content[-1] ^ 1]), "SHA-256; the file is damaged"),
        (content.replace(b"here and now", b"here and won"), "SHA-256; the file is damaged"),
        (content[:-1], "not a safetensors file"),
        (b"", "not a safetensors file"),
    ):
        path.write_bytes(damaged)
        refuse(encoder, path, words)


def test_the_name_decides_where_tensors_would_fit(tmp_path: Path, trained: nn.Module, encoder: nn.Module) -> None:
    save_encoder(tmp_path / "e.safetensors", trained, "test_resnet_2", "phantoms")
    refuse(encoder, tmp_path / "e.safetensors", "weights of the encoder 'test_resnet_2', not of 'test_resnet'")
    plain = nn.Sequential(nn.Linear(2, 2))  # timm has not made it, so that it has no name to compare
    save_encoder(tmp_path / "p.safetensors", plain, "plain", "")
    load_encoder(nn.Sequential(nn.Linear(2, 2)), tmp_path / "p.safetensors")


@pytest.mark.parametrize("card", ["text", '{"name": "x"}', "[1]", None])
def test_a_card_that_is_none(
    tmp_path: Path, trained: nn.Module, encoder: nn.Module, card: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "e.safetensors"
    monkeypatch.setattr("medsd.networks.weights.json.dumps", lambda _card: card or "")
    save_encoder(path, trained, ENCODER, "")
    if card is None:
        save_file(encoder.state_dict(), path, {"format": "medsd-encoder-1"})
    refuse(encoder, path, "SHA-256" if card is None else "card cannot be read")


def test_a_file_that_cannot_be_written(tmp_path: Path, trained: nn.Module) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        save_encoder(tmp_path / "file" / "e.safetensors", trained, ENCODER, "")


def test_the_encoder_of_a_classifier(tmp_path: Path, encoder: nn.Module) -> None:
    tile, aim = TileClassifier(ENCODER), AimClassifier(ENCODER, feature_width=8, mask_width=4)
    for network, card in ((tile, CARD), (aim, replace(CARD, architecture="aim", options=aim.options))):
        save_classifier(tmp_path / "m.safetensors", network, card)
        load_encoder(encoder, tmp_path / "m.safetensors")
        assert_same(encoder, network.encoder.state_dict())
    other: nn.Module = timm.create_model("resnet18", num_classes=0, global_pool="")
    refuse(other, tmp_path / "m.safetensors", "weights of the encoder 'test_resnet', not of 'resnet18'")


SPELLINGS: dict[str, Callable[[State], dict[str, Any]]] = {
    "plain": lambda state: state,
    "nested": lambda state: {"state_dict": state, "epoch": 3, "best": 0.9},
    "parallel": lambda state: {f"module.{name}": tensor for name, tensor in state.items()},
    "classifier": lambda state: {
        **{f"encoder.{name}": tensor for name, tensor in state.items()},
        "head.weight": torch.zeros(2, 8),
        "projector.0.bias": torch.zeros(2),
    },
    "parallel_classifier": lambda state: {
        "state_dict": {f"module.encoder.{name}": tensor for name, tensor in state.items()}
    },
    "with_heads": lambda state: {
        **state,
        "fc.weight": torch.zeros(9, 8),
        "head.fc.bias": torch.zeros(2),
        "classifier.weight": torch.zeros(2, 8),
    },
}


@pytest.mark.parametrize("ending", ["safetensors", "pt", "pth"])
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_files_of_others(tmp_path: Path, trained: nn.Module, encoder: nn.Module, ending: str, spelling: str) -> None:
    content = SPELLINGS[spelling](trained.state_dict())
    path = tmp_path / f"weights.{ending}"
    if ending == "safetensors":
        content = content.get("state_dict", content)
        save_file({name: tensor.clone() for name, tensor in content.items()}, path, {"format": "pt"})
    else:
        torch.save(content, path, _use_new_zipfile_serialization=ending == "pt")
    load_encoder(encoder, path)
    assert_same(encoder, trained.state_dict())


def test_torchvisions_weights_give_torchvisions_features(tmp_path: Path) -> None:
    models = pytest.importorskip("torchvision.models")
    torch.manual_seed(0)
    theirs = models.resnet18().eval()
    # As the oldest files are: without counts of batches.
    state = {name: tensor for name, tensor in theirs.state_dict().items() if "num_batches" not in name}
    torch.save(state, tmp_path / "resnet18.pth")
    ours: nn.Module = timm.create_model("resnet18", num_classes=0, global_pool="").eval()
    load_encoder(ours, tmp_path / "resnet18.pth")
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(nn.Sequential(*list(theirs.children())[:-2])(x), ours(x))


def test_what_does_not_fit_is_counted_and_named(tmp_path: Path, trained: nn.Module, encoder: nn.Module) -> None:
    state = trained.state_dict()
    first, *_, last = [name for name in state if name.endswith("weight")]
    torch.save({name: tensor for name, tensor in state.items() if name != first}, tmp_path / "missing.pt")
    assert f"(1 missing: '{first}')" in refuse(encoder, tmp_path / "missing.pt", "another encoder")
    torch.save({**state, **{f"extra\n{i}": torch.zeros(1) for i in range(7)}}, tmp_path / "unexpected.pt")
    words = refuse(encoder, tmp_path / "unexpected.pt", "another encoder")
    assert r"(7 unexpected: 'extra\n0', 'extra\n1', 'extra\n2', ...)" in words
    torch.save({**state, last: torch.zeros(5)}, tmp_path / "shape.pt")
    words = refuse(encoder, tmp_path / "shape.pt", "another encoder")
    assert f"(1 of another shape: '{last}' (5,) for {tuple(state[last].shape)})" in words
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "head.safetensors")
    assert "unexpected" not in refuse(encoder, tmp_path / "head.safetensors", "missing: 'conv1")
    torch.save({}, tmp_path / "empty.pt")
    refuse(encoder, tmp_path / "empty.pt", "missing")


def test_another_network_of_the_same_family(tmp_path: Path, trained: nn.Module) -> None:
    torch.save(trained.state_dict(), tmp_path / "e.pth")
    refuse(timm.create_model("test_efficientnet", num_classes=0), tmp_path / "e.pth", r"missing: .*unexpected: ")


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_code_in_a_pickle_is_not_run(tmp_path: Path, trained: nn.Module, encoder: nn.Module) -> None:
    bomb = Bomb(tmp_path / "exploded")
    torch.save({**trained.state_dict(), "bomb": bomb}, tmp_path / "zip.pt")
    torch.save({"state_dict": bomb}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "raw.pt").write_bytes(pickle.dumps(bomb))
    torch.save(trained, tmp_path / "whole.pt")
    for name in ("zip.pt", "old.pth", "raw.pt", "whole.pt"):
        assert "trust" not in refuse(encoder, tmp_path / name, "more than tensors")
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize("content", [torch.zeros(3), [1, 2], {"epoch": 3}, {"state_dict": [1]}, {"a": {"b": 1}}])
def test_pickles_without_named_tensors(tmp_path: Path, encoder: nn.Module, content: Any) -> None:
    torch.save(content, tmp_path / "x.pt")
    refuse(encoder, tmp_path / "x.pt", "holds no tensors by name")


def test_files_that_are_none(tmp_path: Path, encoder: nn.Module) -> None:
    (tmp_path / "text.pt").write_text("weights are elsewhere\n" * 9)
    refuse(encoder, tmp_path / "text.pt", "damaged, or more than tensors")
    (tmp_path / "weights.bin").write_bytes(b"\0")
    refuse(encoder, tmp_path / "weights.bin", "unknown kind; use .safetensors, .pt or .pth")
    refuse(encoder, tmp_path / "none.safetensors", "no such encoder weights")
    refuse(encoder, tmp_path, "no such encoder weights")


SMALL = nn.Linear(3, 2)


@pytest.fixture(scope="module")
def pickles(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    path, contents = tmp_path_factory.mktemp("pickles") / "x.pt", []
    for new in (True, False):
        torch.save({"state_dict": SMALL.state_dict(), "epoch": 1}, path, _use_new_zipfile_serialization=new)
        contents.append(path.read_bytes())
    return contents


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_pickles_are_told_in_one_line_or_load(
    tmp_path: Path, pickles: list[bytes], data: st.DataObject
) -> None:
    content = bytearray(data.draw(st.sampled_from(pickles)))
    for place in data.draw(st.lists(st.integers(0, 400), min_size=1, max_size=4)):
        content[place] = data.draw(st.integers(0, 255))
    path = tmp_path / "x.pt"
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2, 300]))])
    try:
        load_encoder(nn.Linear(3, 2), path)
    except WeightsError as error:
        assert "\n" not in str(error)
