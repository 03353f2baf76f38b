"""Whole trainings with MONAI's own engines: what is learnt, chosen, stopped and written down."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from monai.losses import DiceCELoss
from monai.optimizers import WarmupCosineSchedule
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, OneCycleLR, SequentialLR

from medsd.record import differences
from medsd.training.network import parameter_groups
from medsd.training.step import ObjectiveStep
from medsd.training.training import settings_of
from tests.training.small import Blobs, Training, Whole, checkpoint, equal, refuse, rows, training


def test_it_learns(tmp_path: Path) -> None:
    state = training(epochs=6).run(tmp_path)
    history = rows(tmp_path)
    assert float(history[4]["cross_entropy"]) < 0.6 * float(history[0]["cross_entropy"])
    assert state.best_metric > 0.95
    assert state.best_metric > float(history[0]["validation_auc"])


def test_what_a_training_leaves(whole: Whole) -> None:
    folder, state = whole.folder, whole.state
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoint.pt",
        "history.csv",
        "pace.csv",
        "settings.json",
    ]
    history = rows(folder)
    assert list(history[0]) == ["epoch", "loss", "cross_entropy", "consistency", "decorrelation", "validation_auc"]
    assert [row["epoch"] for row in history] == ["1", "2", "3"]
    metrics = [float(row["validation_auc"]) for row in history]
    assert state.best_metric == pytest.approx(max(metrics), abs=1e-5)
    assert state.best_epoch == 1 + metrics.index(max(metrics))
    assert state.epoch == 3


def test_history_holds_the_means_of_the_epoch(tmp_path: Path) -> None:
    inner, outputs = ObjectiveStep(), []

    def step(engine: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        outputs.append(inner(engine, batch))
        return outputs[-1]

    training(epochs=2, step=step).run(tmp_path)
    assert len(outputs) == 6
    for number, row in enumerate(rows(tmp_path)):
        part = outputs[3 * number : 3 * number + 3]
        for term in ("loss", "cross_entropy", "consistency", "decorrelation"):
            if number or term in ("loss", "cross_entropy"):
                assert float(row[term]) == pytest.approx(np.mean([output[term] for output in part]), rel=1e-5)
            else:  # the first epoch is plain cross-entropy
                assert row[term] == "" and term not in part[0]


def test_the_network_ends_as_the_best_one(tmp_path: Path) -> None:
    run, states, values = training(), [], iter([0.6, 0.9, 0.7])

    def record(*_arguments: object) -> None:
        states.append(run.state)
        run.evaluator.state.metrics[run.evaluator.state.key_metric_name] = next(values)

    run.evaluator.add_event_handler(Events.COMPLETED, record)
    state = run.run(tmp_path)
    assert (state.best_epoch, state.best_metric) == (2, 0.9)
    assert equal(run.state, states[1])
    assert not equal(states[1], states[2])
    assert equal(checkpoint(tmp_path)["network"], states[2])  # what resumes is the last one


def test_the_metric_is_the_auc_of_the_tumour_probability(tmp_path: Path) -> None:
    run = training(epochs=1)
    state = run.run(tmp_path)
    data = Blobs(1)
    with torch.no_grad():
        score = run.trainer.network.eval()(data.images).softmax(1)[:, 1].double()
    positive, negative = score[data.labels == 1], score[data.labels == 0]
    pairs = positive[:, None] - negative
    assert state.best_metric == pytest.approx(float((pairs > 0).double().mean() + (pairs == 0).double().mean() / 2))


def test_batches_are_drawn_by_epoch(tmp_path: Path) -> None:
    run = training(epochs=2)
    expected = []
    for epoch in range(2):
        run.sampler.set_epoch(epoch)
        expected += list(run.sampler)
    images, seen = Blobs(0).images, []
    inner = ObjectiveStep()

    def step(engine: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        for image in batch["image"]:
            seen.append(int((images == image).flatten(1).all(1).nonzero()[0]))
        return inner(engine, batch)

    spied = training(epochs=2, step=step, workers=1)
    spied.run(tmp_path)
    assert seen == expected
    assert expected[:48] != expected[48:]


def test_validation_of_one_class_is_told(tmp_path: Path) -> None:
    data = Blobs(1)
    data.labels[:] = 1
    with pytest.warns(UserWarning, match="skip AUC"):
        refuse(lambda: training(validation=data).run(tmp_path), "validation data need items of every class")


def test_no_epoch_at_all(tmp_path: Path) -> None:
    refuse(lambda: training(epochs=0).run(tmp_path), "no epoch was validated; raise max_epochs")


def test_patience_stops_a_training_that_no_longer_improves(tmp_path: Path) -> None:
    metrics = [0.9, 0.8, 0.7, 0.95]

    def run(epochs: int) -> tuple[Training, Any]:
        part = training(epochs=4)
        part.trainer.state.max_epochs = epochs
        part.evaluator.add_event_handler(
            Events.EPOCH_COMPLETED,
            lambda engine: engine.state.metrics.update(validation_auc=metrics[engine.state.epoch - 1]),
        )
        return part, part.run(tmp_path, patience=2)

    run(2)
    _, state = run(4)  # what it has waited for is resumed, too
    assert (state.epoch, state.best_epoch) == (3, 1)
    again, state = run(4)  # a run that has stopped stays stopped
    assert state.epoch == 3 and len(rows(tmp_path)) == 3
    assert equal(again.state, state.best_network)


def test_epochs_before_an_objective_is_complete_are_not_the_best_and_try_no_patience(tmp_path: Path) -> None:
    metrics = [0.9, 0.8, 0.7, 0.75]

    def run(folder: Path, epochs: int, complete_from: int) -> Any:
        part = training(epochs=4)
        part.trainer.state.max_epochs = epochs
        part.evaluator.add_event_handler(
            Events.EPOCH_COMPLETED,
            lambda engine: engine.state.metrics.update(validation_auc=metrics[engine.state.epoch - 1]),
        )
        return part.run(folder, patience=1, complete_from=complete_from)

    run(tmp_path / "late", 2, 3)
    state = run(tmp_path / "late", 4, 3)  # resumed
    assert (state.epoch, state.best_epoch, state.best_metric) == (4, 4, 0.75)
    state = run(tmp_path / "never", 2, 3)  # what there is is kept
    assert (state.epoch, state.best_epoch, state.best_metric) == (2, 1, 0.9)


def test_epochs_may_go_without_validation(tmp_path: Path) -> None:
    state = training(interval=2).run(tmp_path)
    assert state.epoch == 3 and state.best_epoch == 2
    assert [bool(row["validation_auc"]) for row in rows(tmp_path)] == [False, True, False]


def test_without_an_evaluator_the_last_network_is_kept_and_handlers_speak_in_the_history(tmp_path: Path) -> None:
    run = training(epochs=2)
    run.evaluator = None
    run.trainer.add_event_handler(
        Events.EPOCH_COMPLETED, lambda engine: engine.state.metrics.update(rank=float(engine.state.epoch))
    )
    state = run.run(tmp_path, stage="pretrain")
    assert (state.epoch, state.best_network) == (2, None)
    assert list(rows(tmp_path)[0]) == ["epoch", "loss", "cross_entropy", "consistency", "decorrelation", "rank"]
    assert [row["rank"] for row in rows(tmp_path)] == ["1", "2"]
    assert equal(run.state, checkpoint(tmp_path)["network"])
    again = training(epochs=2)
    again.evaluator = None
    again.run(tmp_path)
    assert equal(again.state, run.state)


def test_settings_are_read_off_the_objects() -> None:
    run = training(step=ObjectiveStep(stain=0.2))
    found = settings_of(run.trainer, step=run.step, scheduler=run.scheduler, none=None, data={"split": "a", "px": 3})
    json.dumps(found)  # plain values, or it raises
    assert found["loss_function"]["decorrelation"] == 0.01 and found["step"]["stain"] == 0.2
    assert found["optimizer"]["lr"] == [0.01] and found["optimizer"]["betas"] == (0.9, 0.999)
    assert found["sampler"]["run"] == 4 and found["scheduler"]["total_steps"] == 9
    assert found["none"] is None and found["data"] == {"split": "a", "px": 3}
    run.trainer.network.encoder.requires_grad_(False)
    for epoch in range(3):
        run.sampler.set_epoch(epoch)
        run.scheduler.step()
    assert settings_of(run.trainer, step=run.step)["sampler"] == found["sampler"]
    assert settings_of(run.trainer, step=run.step)["optimizer"]["lr"] == [0.01]


def test_what_is_frozen_is_recorded_though_as_much_is_trained() -> None:
    def found(*frozen: str) -> dict[str, Any]:
        run = training()
        groups = parameter_groups(run.trainer.network, 0.01, 0.01, frozen)  # type: ignore[arg-type]
        run.trainer.optimizer = torch.optim.AdamW(groups)
        return settings_of(run.trainer)

    one, other = found("layer2.0.bn1"), found("layer2.0.bn2")
    assert one["optimizer"]["trained_values"] == other["optimizer"]["trained_values"]
    assert differences(one, other) == ["frozen"]
    assert other["frozen"] == ["layer2.0.bn2.weight", "layer2.0.bn2.bias"]
    assert "frozen" not in found() and "frozen" not in found("encoder")  # as runs of before were recorded


LINEAR = torch.nn.Linear(2, 2)


def scheduled(**changes: object) -> LRScheduler:
    options: dict[str, Any] = {"max_lr": 0.1, "total_steps": 50, **changes}
    return OneCycleLR(torch.optim.AdamW(LINEAR.parameters()), **options)


def in_turn(milestone: int) -> LRScheduler:
    optimizer = torch.optim.AdamW(LINEAR.parameters())
    return SequentialLR(optimizer, [LinearLR(optimizer), CosineAnnealingLR(optimizer, 5)], [milestone])


@pytest.mark.parametrize(
    "makes",
    [
        lambda: (DiceCELoss(), DiceCELoss(include_background=False), DiceCELoss(weight=torch.tensor([1.0, 2.0]))),
        lambda: (
            scheduled(),
            scheduled(pct_start=0.9),
            scheduled(three_phase=True),
            scheduled(anneal_strategy="linear"),
        ),
        lambda: (in_turn(5), in_turn(50)),
        lambda: tuple(WarmupCosineSchedule(torch.optim.AdamW(LINEAR.parameters()), steps, 10) for steps in (2, 3)),
    ],
)
def test_what_losses_and_schedules_keep_to_themselves_is_recorded(makes: Callable[[], tuple[object, ...]]) -> None:
    run = training()
    found = [json.dumps(settings_of(run.trainer, part=part)["part"]) for part in makes()]
    assert len(set(found)) == len(found)
    assert [json.dumps(settings_of(run.trainer, part=part)["part"]) for part in makes()] == found


def test_where_a_schedule_starts_and_ends_is_recorded_beside_its_height() -> None:
    run, found = training(), []
    for lr, divisor in ((0.1, 1e4), (0.2, 1e4), (0.1, 10.0)):
        run.trainer.optimizer = torch.optim.AdamW(LINEAR.parameters())
        OneCycleLR(run.trainer.optimizer, lr, 50, final_div_factor=divisor)
        found.append(settings_of(run.trainer)["optimizer"])
    assert found[0] | {"lr": [0.2]} == found[1] and found[0]["ends_at"] != found[2]["ends_at"]
