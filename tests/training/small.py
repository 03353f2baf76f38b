"""Trainings of seconds, as the bundles build them, and what they leave."""

from __future__ import annotations

import csv
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.handlers import EarlyStopping
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ROCAUC, LrScheduleHandler, ValidationHandler, from_engine
from monai.transforms import Activationsd, AsDiscreted, Compose
from torch.utils.data import DataLoader, Dataset

from medsd.cohort.dataset import SlideGroupedSampler
from medsd.errors import TrainingError
from medsd.networks.classifier import TileClassifier
from medsd.objectives.saliency_decor import SaliencyDecor
from medsd.training.checkpoint import Checkpoint, TrainingState
from medsd.training.step import ObjectiveStep
from medsd.training.training import run_training

SETTINGS = {"lr": 0.01, "seed": 0, "classes": ("normal", "tumour"), "nested": {"stain": 0.1}}


class Blobs(Dataset[dict[str, torch.Tensor]]):
    """Noise on pink; tumour has dark spots. 48 images of 32 px."""

    def __init__(self, seed: int, count: int = 48) -> None:
        draw = np.random.default_rng(seed)
        self.labels = np.arange(count, dtype=np.int8) % 2
        self.groups = np.array([f"slide{i // 12}" for i in range(count)])
        pixels = draw.normal([200, 150, 190], 25, (count, 32, 32, 3))
        for image in np.flatnonzero(self.labels):
            for y, x in draw.integers(0, 28, (6, 2)):
                pixels[image, y : y + 4, x : x + 4] -= 70
        self.images = torch.from_numpy(pixels.clip(0, 255).astype(np.uint8)).permute(0, 3, 1, 2).contiguous()

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, item: int) -> dict[str, torch.Tensor]:
        return {"image": self.images[item], "label": torch.tensor(int(self.labels[item]))}


@dataclass
class Training:
    trainer: SupervisedTrainer
    evaluator: SupervisedEvaluator
    sampler: SlideGroupedSampler
    scheduler: torch.optim.lr_scheduler.LRScheduler
    step: ObjectiveStep | None = None

    def run(
        self,
        folder: Path,
        settings: dict[str, Any] | None = None,
        patience: int | None = None,
        save_every: int | None = None,
        **more: Any,
    ) -> Any:
        trainer, evaluator = self.trainer, self.evaluator
        stop = None if patience is None else EarlyStopping(patience, score, trainer)
        parts = {"network": trainer.network, "optimizer": trainer.optimizer, "scheduler": self.scheduler}
        parts |= {"step": self.step, "objective": trainer.loss_function, "early_stop": stop}
        checkpoint = Checkpoint(folder, parts, save_every)
        return run_training(trainer, evaluator, checkpoint, SETTINGS if settings is None else settings, stop, **more)

    @property
    def state(self) -> dict[str, torch.Tensor]:
        return {name: tensor.clone() for name, tensor in self.trainer.network.state_dict().items()}


def score(engine: Any) -> float:
    return float(engine.state.metrics["validation_auc"])


def training(
    epochs: int = 3,
    step: Any = None,
    noise: int = 0,
    workers: int = 0,
    validation: Dataset[Any] | None = None,
    interval: int = 1,
) -> Training:
    """A training as the bundle builds it; `noise` moves torch's global generator, which must not matter."""
    torch.manual_seed(0)
    network = TileClassifier("test_resnet.r160_in1k")
    torch.manual_seed(noise)
    data, device = Blobs(0), torch.device("cpu")
    sampler = SlideGroupedSampler(data.labels, data.groups, 48, run=4, seed=0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.01)
    evaluator = SupervisedEvaluator(
        device=device,
        val_data_loader=DataLoader(validation or Blobs(1), batch_size=20),
        network=network,
        postprocessing=Compose([Activationsd(keys="pred", softmax=True), AsDiscreted(keys="label", to_onehot=2)]),
        key_val_metric={"validation_auc": ROCAUC(output_transform=from_engine(["pred", "label"]))},
    )
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=3 * max(epochs, 3))
    trainer = SupervisedTrainer(
        device=device,
        max_epochs=epochs,
        train_data_loader=DataLoader(data, batch_size=16, sampler=sampler, num_workers=workers, drop_last=True),
        network=network,
        optimizer=optimizer,
        loss_function=SaliencyDecor(decorrelation=0.01),
        iteration_update=step or ObjectiveStep(),
        train_handlers=[
            LrScheduleHandler(scheduler, print_lr=False, epoch_level=False),
            ValidationHandler(interval, evaluator),
        ],
        decollate=False,
    )
    return Training(trainer, evaluator, sampler, scheduler, step if isinstance(step, ObjectiveStep) else None)


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def refuse(run: Callable[[], object], words: str) -> None:
    with pytest.raises(TrainingError, match=words) as caught:
        run()
    assert "\n" not in str(caught.value)


def rows(folder: Path) -> list[dict[str, str]]:
    with open(folder / "history.csv", newline="", encoding="utf-8") as handle:
        return [
            {key: value for key, value in row.items() if key != "seconds_per_step"} for row in csv.DictReader(handle)
        ]


def checkpoint(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return content


@dataclass(frozen=True)
class Whole:
    """A training of three epochs that nothing interrupted: its folder, the network it started from, its last state."""

    folder: Path
    start: dict[str, torch.Tensor]
    state: TrainingState
