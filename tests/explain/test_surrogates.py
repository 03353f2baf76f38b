"""A file of surrogates serves the classifier it was written for, and no other."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from medsd.errors import WeightsError
from medsd.explain.surrogates import SURROGATE_FORMAT, SurrogateCard, load_surrogate, save_surrogate
from medsd.networks.weights import save_tensors
from medsd.saliency.smooth import Surrogate

CHANNELS = {"encoder.conv1": (3, 4), "encoder.maxpool": (4, 4), "encoder.layer2.0.conv1": (4, 6)}
CARD = SurrogateCard(
    encoder="test_resnet",
    weights_sha256="a" * 64,
    channels=CHANNELS,
    also=("max_pool",),
    relative_l1={"encoder.conv1": 0.1, "encoder.maxpool": None, "encoder.layer2.0.conv1": 0.3},
    settings={"epochs": 2, "lr": 0.001},
)


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, Surrogate]:
    torch.manual_seed(0)
    surrogate = Surrogate(CHANNELS, ("max_pool",))
    save_surrogate(tmp_path / "surrogate.safetensors", surrogate, CARD)
    return tmp_path / "surrogate.safetensors", surrogate


def test_what_was_written_is_read(written: tuple[Path, Surrogate]) -> None:
    path, surrogate = written
    loaded, card = load_surrogate(path, CARD.weights_sha256)
    assert card == CARD and list(loaded.channels) == list(CHANNELS) and loaded.also == ("max_pool",)
    assert not loaded.training and not any(parameter.requires_grad for parameter in loaded.parameters())
    torch.testing.assert_close(loaded.state_dict(), surrogate.state_dict(), rtol=0, atol=0)
    x = torch.randn(1, 4, 9, 7)
    expected = surrogate("encoder.layer2.0.conv1", x, (5, 4))
    assert torch.equal(loaded("encoder.layer2.0.conv1", x, (5, 4)), expected) and expected.shape == (1, 6, 5, 4)


def test_files_that_do_not_serve_are_named(written: tuple[Path, Surrogate], tmp_path: Path) -> None:
    path, surrogate = written
    with pytest.raises(
        WeightsError, match=r"surrogates of other weights \(test_resnet, aaaaaaaaaaaa, not bbbbbbbbbbbb"
    ):
        load_surrogate(path, "b" * 64)
    with pytest.raises(WeightsError, match="no such file of surrogates; run the stage 'surrogate'"):
        load_surrogate(tmp_path / "none.safetensors", "a" * 64)
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(WeightsError, match="do not match their SHA-256"):
        load_surrogate(path, "a" * 64)
    save_file(surrogate.state_dict(), path)
    with pytest.raises(WeightsError, match="holds no surrogates"):
        load_surrogate(path, "a" * 64)
    assert set(load_file(path)) == set(surrogate.state_dict())
    with pytest.raises(WeightsError, match="the card is that of surrogates of"):
        save_surrogate(path, surrogate, replace(CARD, also=()))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"channels": {"encoder.conv1": [3, 4]}}, "its tensors are not what its card says"),
        ({"channels": {"encoder.conv1": [3]}}, "its card cannot be read"),
        ({"also": None}, "its card cannot be read"),
        ({"colour": 1}, "its card cannot be read"),
    ],
)
def test_a_card_that_lies_is_told(written: tuple[Path, Surrogate], change: dict[str, object], words: str) -> None:
    path, surrogate = written
    save_tensors(path, surrogate.state_dict(), SURROGATE_FORMAT, {**asdict(CARD), **change})
    with pytest.raises(WeightsError, match=words):
        load_surrogate(path, "a" * 64)


def test_a_card_takes_no_memory_that_its_file_does_not_fill(tmp_path: Path) -> None:
    path = tmp_path / "surrogate.safetensors"
    for channels in ((10**6, 10**6), (-3, 4)):
        card = {**asdict(CARD), "channels": {"encoder.conv1": channels}}
        save_tensors(path, {"nothing": torch.zeros(1)}, SURROGATE_FORMAT, card)
        with pytest.raises(WeightsError, match="its tensors are not what its card says") as caught:
            load_surrogate(path, CARD.weights_sha256)
        assert "\n" not in str(caught.value)
