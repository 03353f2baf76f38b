"""Normal tiles taken for tumour are found, all of them and only they."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from ignite.engine import Events
from torch import Tensor, nn
from torch.utils.data import Dataset

from medsd.cohort.dataset import Sample, SlideGroupedSampler
from medsd.errors import ConfigError
from medsd.training.hard_negatives import HardNegativeRound
from medsd.training.predict import predict_logits
from tests.training.small import Blobs, Training, equal, training

LABELS = np.array([0, 1, 0, 0, -1, 0, 1, 0], np.int8)
REDS = [10, 250, 200, 128, 255, 127, 0, 90]


class Reds(Dataset[Sample]):
    """Plain tiles whose red says how tumour-like they are; counts what is read."""

    labels = LABELS

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return len(REDS)

    def __getitem__(self, item: int) -> Sample:
        self.read.append(int(item))
        image = torch.zeros(3, 8, 8, dtype=torch.uint8)
        image[0] = REDS[item]
        return {"image": image, "label": torch.tensor(int(LABELS[item]))}


class RedMeter(nn.Module):
    """Tumour logit (red - 127.5) / 10, normal logit 0; wrong in training mode."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.1))

    def forward(self, x: Tensor) -> Tensor:
        assert x.dtype == torch.uint8 and not self.training
        logit = (x[:, 0].float().mean(dim=(1, 2)) - 127.5) * self.scale
        return torch.stack([torch.zeros_like(logit), logit], dim=1)


def probability(red: int) -> float:
    return 1 / (1 + np.exp(-(red - 127.5) / 10))


@pytest.mark.parametrize(
    ("threshold", "expected"),
    [(0.5, [2, 3]), (0.0, [0, 2, 3, 5, 7]), (0.48, [2, 3, 5]), (0.99, [2]), (1.0, [])],
)
@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_normal_items_above_the_threshold_are_found(threshold: float, expected: list[int], batch_size: int) -> None:
    data, network = Reds(), RedMeter()
    found = HardNegativeRound(0, 0.5, data, threshold, batch_size).find(network)
    assert found.dtype == np.int64 and found.tolist() == expected
    assert data.read == [0, 2, 3, 5, 7]  # tumour and mixed tiles are not read
    assert network.training


def test_an_item_at_the_threshold_is_hard() -> None:
    threshold = float(torch.from_numpy(predict_logits(RedMeter(), Reds())).softmax(dim=1)[3, 1])
    assert HardNegativeRound(0, 0.5, Reds(), threshold).find(RedMeter()).tolist() == [2, 3]


def test_the_sampler_takes_them() -> None:
    found = HardNegativeRound(0, 0.5, Reds()).find(RedMeter())
    sampler = SlideGroupedSampler(LABELS, np.array(["a", "b"] * 4), samples=40)
    sampler.set_hard(found, 0.5)
    drawn = list(sampler)
    assert sum(item in (2, 3) for item in drawn) >= 10 and 4 not in drawn


def test_without_normal_items_nothing_is_found() -> None:
    data = Reds()
    data.labels = np.ones(8, np.int8)
    assert HardNegativeRound(0, 0.5, data).find(RedMeter()).tolist() == []


@pytest.mark.parametrize("threshold", [-0.1, 1.1, float("nan")])
def test_a_threshold_is_a_probability(threshold: float) -> None:
    with pytest.raises(ConfigError, match=r"threshold=.*: must be a number from 0 to 1"):
        HardNegativeRound(0, 0.5, Reds(), threshold).find(RedMeter())


def test_logits_in_the_order_of_the_items():
    seen = []

    def progress(items, total, unit):
        seen.append((total, unit))
        return iter(items)

    got = predict_logits(RedMeter(), Reds(), batch_size=3, progress=progress)
    expected = [probability(red) for red in REDS]
    assert got.dtype == np.float32 and seen == [(3, "batch")]
    assert np.allclose(torch.from_numpy(got).softmax(dim=1)[:, 1], expected, atol=1e-6)


class Foreseen(HardNegativeRound):
    """A round whose items are known, and the networks that were asked for them."""

    asked: ClassVar[list[float]] = []

    def find(self, classifier: torch.nn.Module) -> Any:
        self.asked.append(float(classifier.head.weight.sum()))
        return np.array([2, 4])


def test_hard_negatives_are_found_once_and_drawn_from_then_on_also_after_a_resume(tmp_path: Path) -> None:
    Foreseen.asked.clear()
    drawn: dict[str, list[list[int]]] = {"whole": [], "parts": []}

    def run(folder: Path, epochs: int, name: str) -> Training:
        part = training(epochs=epochs)
        part.trainer.state.max_epochs = epochs
        hard = Foreseen(1, 1.0, Blobs(0))
        part.trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda _: drawn[name].append(list(part.sampler)))
        part.run(folder, hard_negatives=hard)
        return part

    whole = run(tmp_path / "whole", 3, "whole")
    assert len(Foreseen.asked) == 1
    run(tmp_path / "parts", 2, "parts")
    resumed = run(tmp_path / "parts", 3, "parts")
    assert len(Foreseen.asked) == 2  # the resumed one knows them
    assert equal(whole.state, resumed.state)
    normal = [sorted({item for item in epoch if item % 2 == 0}) for epoch in drawn["whole"]]
    assert normal[1] == normal[2] == [2, 4] and len(normal[0]) == 24


def test_hard_negatives_after_the_end_are_refused(tmp_path: Path) -> None:
    hard = HardNegativeRound(3, 0.5, Blobs(0))
    with pytest.raises(ConfigError, match=r"hard_negative_epoch=3: .*below max_epochs"):
        training().run(tmp_path, hard_negatives=hard)
