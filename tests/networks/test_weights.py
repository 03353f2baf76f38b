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
from medsd.networks.aim import AimClassifier
from medsd.networks.calibrated import Calibration
from medsd.networks.classifier import Classifier, TileClassifier
from medsd.networks.weights import (
    FORMAT,
    ModelCard,
    load_classifier,
    save_classifier,
)
from medsd.networks.whitening import WhitenedHead

CALIBRATION = Calibration(0.1 + 0.2, {"gradient": 1 / 3}, "layer2", "backward_hook", "validation: 3 slides, µ")
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


def test_the_header_is_in_order(path: Path) -> None:
    """The library's follows a hash that is drawn anew in every process."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    assert size % 8 == 0 and list(header) == sorted(header)
    assert list(header["__metadata__"]) == sorted(header["__metadata__"])


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


def _sealed(path: Path, classifier: Classifier, card: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """A file whose digest is right and whose card is `card`."""
    monkeypatch.setattr("medsd.networks.weights.asdict", lambda _card: card)
    described = replace(CARD, architecture=classifier.architecture, options=classifier.options)
    save_classifier(path, classifier, described)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"encoder": "resnet10t"}, "weights of another network than 'resnet10t'"),
        ({"encoder": "no_such_encoder"}, "weights of another network than 'no_such_encoder'"),
        ({"classes": ["a", "b", "c"]}, "weights of another network"),
        ({"tile_px": None}, "card cannot be read"),
        ({"future": 1}, "card cannot be read"),
        ({"calibration": {"threshold": 0.5}}, "card cannot be read"),
        ({"architecture": "aims"}, "card cannot be read .architecture 'aims' is unknown"),
        ({"architecture": ["tile"]}, "card cannot be read"),
        ({"architecture": "aim"}, "weights of another network"),
        ({"options": {"end_stage": 3}}, "weights of another network .*'end_stage'"),
        ({"options": [1]}, "weights of another network"),
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


OLD_CARD = """{"encoder": "test_resnet", "classes": ["normal", "tumour"], "tile_px": 96, "mpp": 0.97,
"trained_on": "phantoms", "calibration": {"threshold": 0.30000000000000004, "limits": {"gradient": 0.3333333333333333},
"layer": "layer2", "smoothing": "backward_hook", "source": "validation: 3 slides, µ"},
"data_sha256": "", "settings_sha256": "", "stain_target": null}"""


def test_a_file_of_before_there_were_options(
    path: Path, classifier: TileClassifier, monkeypatch: pytest.MonkeyPatch
) -> None:
    _sealed(path, classifier, json.loads(OLD_CARD), monkeypatch)
    loaded, card, _ = load_classifier(path)
    assert card == CARD
    assert (card.architecture, card.options) == ("tile", {})
    assert card.input_mean == loaded.normalise.input_mean == (0.485, 0.456, 0.406)
    assert card.calibration is not None and card.calibration.temperature == 1
    assert type(loaded) is TileClassifier


AIM_OPTIONS: dict[str, Any] = {
    "end_stage": 3,
    "feature_width": 16,
    "mask_width": 8,
    "temperature": 0.5,
    "direction": "bottom_up",
    "masking": True,
}


@pytest.fixture(scope="module")
def aim() -> AimClassifier:
    torch.manual_seed(0)
    return AimClassifier("test_resnet", ("normal", "itc", "tumour"), **AIM_OPTIONS, input_mean=(0.5, 0.5, 0.5))


AIM_CARD = replace(
    CARD,
    classes=("normal", "itc", "tumour"),
    architecture="aim",
    options=AIM_OPTIONS,
    input_mean=(0.5, 0.5, 0.5),
)


def test_aim_round_trip(tmp_path: Path, aim: AimClassifier) -> None:
    calibration = replace(CALIBRATION, limits={"mask": 1.0}, temperature=1.7)
    saved = replace(AIM_CARD, calibration=calibration)
    save_classifier(tmp_path / "aim.safetensors", aim, saved)
    loaded, card, _ = load_classifier(tmp_path / "aim.safetensors")
    assert card == saved
    assert type(loaded) is AimClassifier
    assert (loaded.stages, loaded.temperature, loaded.direction) == ((3,), 0.5, "bottom_up")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = loaded.masked(x), aim.eval().masked(x)
    assert torch.equal(ours.logits, theirs.logits)
    assert torch.equal(ours.masks[0], theirs.masks[0])
    tiles = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
    assert torch.equal(loaded.normalise(tiles), aim.normalise(tiles))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({**AIM_OPTIONS, "feature_width": 32}, "another network"),
        ({**AIM_OPTIONS, "end_stage": 2}, "another network"),
        ({**AIM_OPTIONS, "end_stage": 9}, "another network .*end_stage=9"),
        ({**AIM_OPTIONS, "temperature": 0}, "another network .*temperature=0"),
        ({**AIM_OPTIONS, "mask_width": "wide"}, "another network"),
        ({**AIM_OPTIONS, "heads": 2}, "another network .*'heads'"),
        ({**AIM_OPTIONS, "pretrained": True}, "another network .*'pretrained'"),
        ({**AIM_OPTIONS, "encoder": "resnet18"}, "another network .*'encoder'"),
    ],
)
def test_options_of_other_networks(
    tmp_path: Path, options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("timm.models._builder.load_pretrained", lambda *_: pytest.fail("fetched weights"))
    network = AimClassifier("test_resnet", **AIM_OPTIONS)
    card = {**asdict(CARD), "architecture": "aim", "options": options}
    _sealed(tmp_path / "aim.safetensors", network, card, monkeypatch)
    refuse(tmp_path / "aim.safetensors", words)


@pytest.mark.parametrize(
    "card",
    [
        CARD,
        replace(AIM_CARD, architecture="tile"),
        replace(AIM_CARD, classes=("normal", "tumour")),
        replace(AIM_CARD, encoder="resnet18"),
        replace(AIM_CARD, input_std=(0.5, 0.5, 0.5)),
        replace(AIM_CARD, options={**AIM_OPTIONS, "direction": "top_down"}),
    ],
)
def test_a_card_of_another_network_is_not_written(tmp_path: Path, aim: AimClassifier, card: ModelCard) -> None:
    with pytest.raises(WeightsError, match="the card is that of"):
        save_classifier(tmp_path / "m.safetensors", aim, card)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("group_size", [8, None])
def test_a_whitened_head_is_saved_as_the_linear_one_it_is(
    tmp_path: Path, classifier: TileClassifier, group_size: int | None
) -> None:
    classifier.head = WhitenedHead(classifier.feature_dim, 2, group_size)
    x = torch.randn(16, 3, 64, 64)
    for _ in range(3):  # so that running moments are not those of the start
        classifier.train()(x + torch.randn_like(x))
    save_classifier(tmp_path / "m.safetensors", classifier, CARD)
    assert isinstance(classifier.head, WhitenedHead)
    loaded = load_classifier(tmp_path / "m.safetensors")[0]
    assert type(loaded.head) is torch.nn.Linear
    assert loaded.state_dict().keys() == TileClassifier("test_resnet").state_dict().keys()
    with torch.no_grad():
        expected = classifier.eval()(x)
        # Whitening by small eigenvalues makes large logits: 1e-5 of the largest.
        torch.testing.assert_close(loaded(x), expected, rtol=0, atol=1e-5 * max(1, float(expected.abs().max())))
        assert not torch.allclose(expected, classifier.head.linear(classifier.features(x)), atol=1e-2)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_no_numbers_are_refused(tmp_path: Path, classifier: TileClassifier, value: float) -> None:
    with torch.no_grad():
        classifier.encoder.conv1[0].weight.view(-1)[0] = value
    card = ModelCard(classifier.encoder_name, classifier.classes, 64, 1.0, "tests")
    save_classifier(tmp_path / "a.safetensors", classifier, card)
    with pytest.raises(WeightsError, match=r"a\.safetensors: 'encoder\.conv1.*' holds NaN or infinity"):
        load_classifier(tmp_path / "a.safetensors")


@pytest.mark.parametrize(("tile_px", "mpp"), [(0, 1.0), (2**15, 1.0), (64, 250.0)])
def test_a_card_of_tiles_that_nobody_cuts_is_refused(
    tmp_path: Path, classifier: TileClassifier, tile_px: int, mpp: float
) -> None:
    card = ModelCard(classifier.encoder_name, classifier.classes, tile_px, mpp, "tests")
    save_classifier(tmp_path / "a.safetensors", classifier, card)
    with pytest.raises(WeightsError, match=r"its card cannot be read \((tile_px|mpp)="):
        load_classifier(tmp_path / "a.safetensors")
