"""Weights files: bit for bit there and back; anything else is refused in one line."""

from __future__ import annotations

import json
import pickle
import struct
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from medsd.errors import OutputError, WeightsError
from medsd.networks.classifier import TileClassifier
from medsd.networks.weights import FORMAT, Calibration, ModelCard, load_classifier, save_classifier

CALIBRATION = Calibration(0.1 + 0.2, 1 / 3, "layer2", "gradient", "backward_hook", "validation: 3 slides, µ")
CARD = ModelCard("test_resnet", ("normal", "tumour"), 96, 0.97, "phantoms", CALIBRATION)


@pytest.fixture
def classifier() -> TileClassifier:
    torch.manual_seed(0)
    network = TileClassifier("test_resnet")
    for buffer in network.buffers():  # running statistics travel too
        if buffer.dtype == torch.float32:
            buffer.uniform_(0.5, 1.5)
    return network


@pytest.fixture
def path(tmp_path: Path, classifier: TileClassifier) -> Path:
    save_classifier(tmp_path / "model.safetensors", classifier, CARD)
    return tmp_path / "model.safetensors"


def refuse(path: Path, words: str) -> str:
    with pytest.raises(WeightsError, match=words) as caught:
        load_classifier(path)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


def edit(path: Path, changes: dict[str, str | None]) -> None:
    """Rewrite the metadata of a weights file, its tensors as they are."""
    with safe_open(path, framework="pt") as file:
        metadata = {**file.metadata(), **changes}
        state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    save_file(state, path, {key: value for key, value in metadata.items() if value is not None})


def test_round_trip_bit_for_bit(tmp_path: Path, classifier: TileClassifier) -> None:
    classifier.to(memory_format=torch.channels_last)
    digest = save_classifier(tmp_path / "a" / "model.safetensors", classifier, CARD)
    loaded, card, loaded_digest = load_classifier(tmp_path / "a" / "model.safetensors")
    assert card == CARD
    assert digest == loaded_digest
    assert len(digest) == 64
    state = classifier.state_dict()
    assert loaded.state_dict().keys() == state.keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, state[name]), name
        assert tensor.dtype == state[name].dtype
    assert not any(module.training for module in loaded.modules())
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    with torch.no_grad():
        assert torch.equal(loaded(images), classifier.to(memory_format=torch.contiguous_format).eval()(images))


def test_a_card_without_calibration(tmp_path: Path, classifier: TileClassifier) -> None:
    card = replace(CARD, calibration=None)
    save_classifier(tmp_path / "m.safetensors", classifier, card)
    assert load_classifier(tmp_path / "m.safetensors")[1] == card


def test_the_digest_follows_tensors_and_card(tmp_path: Path, classifier: TileClassifier) -> None:
    def save(card: ModelCard) -> str:
        return save_classifier(tmp_path / "m.safetensors", classifier, card)

    first = save(CARD)
    assert save(CARD) == first
    assert save(replace(CARD, calibration=replace(CALIBRATION, threshold=0.31))) != first
    with torch.no_grad():
        classifier.head.bias[0] += 1e-6
    assert save(CARD) != first


def test_one_flipped_bit_anywhere_in_the_tensors_is_found(path: Path) -> None:
    content = bytearray(path.read_bytes())
    (header,) = struct.unpack("<Q", content[:8])
    for place in (8 + header, 8 + header + 12_345, len(content) - 1):
        damaged = bytearray(content)
        damaged[place] ^= 1
        path.write_bytes(damaged)
        refuse(path, "do not match their SHA-256; the file is damaged")


def test_a_changed_card_is_found(path: Path) -> None:
    content = path.read_bytes()
    assert content.count(b"0.97") == 1
    path.write_bytes(content.replace(b"0.97", b"0.57"))
    refuse(path, "do not match their SHA-256")


@pytest.mark.parametrize("keep", [0, 4, 100, 5_000, -1])
def test_truncated_files(path: Path, keep: int) -> None:
    path.write_bytes(path.read_bytes()[:keep])
    refuse(path, "not a safetensors file")


def test_other_safetensors(tmp_path: Path) -> None:
    save_file({"x": torch.zeros(3)}, tmp_path / "x.safetensors")
    refuse(tmp_path / "x.safetensors", FORMAT)
    save_file({"x": torch.zeros(3)}, tmp_path / "x.safetensors", {"format": "pt"})
    refuse(tmp_path / "x.safetensors", FORMAT)


def test_missing_file_and_folder(tmp_path: Path) -> None:
    refuse(tmp_path / "none.safetensors", "no such weights file")
    refuse(tmp_path, "no such weights file")


def test_text_and_pickles_are_not_run(tmp_path: Path, classifier: TileClassifier) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
            return Path.touch, (tmp_path / "exploded",)

    (tmp_path / "readme.txt").write_text("weights are elsewhere\n" * 50)
    torch.save(classifier.state_dict(), tmp_path / "model.pt")
    torch.save({"state": Bomb()}, tmp_path / "bomb.pt")
    (tmp_path / "bomb.pkl").write_bytes(pickle.dumps(Bomb()))
    for name in ("readme.txt", "model.pt", "bomb.pt", "bomb.pkl"):
        refuse(tmp_path / name, "not a safetensors file")
    assert not (tmp_path / "exploded").exists()


def _sealed(path: Path, classifier: TileClassifier, card: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose digest is right and whose card is `card`."""
    monkeypatch.setattr("medsd.networks.weights.asdict", lambda _card: card)
    save_classifier(path, classifier, CARD)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder": "resnet10t"}, "weights of another network than 'resnet10t'"),
        ({"encoder": "no_such_encoder"}, "weights of another network than 'no_such_encoder'"),
        ({"classes": ["a", "b", "c"]}, "weights of another network"),
        ({"tile_px": None}, "card cannot be read"),
        ({"future": 1}, "card cannot be read"),
        ({"calibration": {"threshold": 0.5}}, "card cannot be read"),
    ],
)
def test_cards_of_other_networks_or_versions(
    path: Path, classifier: TileClassifier, change: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    card = {**asdict(CARD), **change}
    _sealed(path, classifier, {key: value for key, value in card.items() if value is not None}, monkeypatch)
    refuse(path, words)


@pytest.mark.parametrize("card", ["text", ["list"], 3])
def test_cards_that_are_no_cards(
    path: Path, classifier: TileClassifier, card: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sealed(path, classifier, card, monkeypatch)
    refuse(path, "card cannot be read")


def test_missing_metadata(path: Path) -> None:
    edit(path, {"card": None})
    refuse(path, "SHA-256")
    edit(path, {"card": json.dumps(asdict(CARD)), "sha256": None})
    refuse(path, "SHA-256")


def test_missing_tensors(path: Path, classifier: TileClassifier, monkeypatch: pytest.MonkeyPatch) -> None:
    state = classifier.state_dict()
    del state["head.bias"]
    monkeypatch.setattr(classifier, "state_dict", lambda: state)
    save_classifier(path, classifier, CARD)
    refuse(path, "weights of another network")


def test_a_file_that_cannot_be_written(tmp_path: Path, classifier: TileClassifier) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        save_classifier(tmp_path / "file" / "m.safetensors", classifier, CARD)
    (tmp_path / "m.safetensors").mkdir()
    with pytest.raises(OutputError):
        save_classifier(tmp_path / "m.safetensors", classifier, CARD)
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["file", "m.safetensors"]
