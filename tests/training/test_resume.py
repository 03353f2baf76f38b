"""A training that goes on: the same to the last bit, refused where it would be another, whole wherever it died."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ignite.engine import Events
from torch.utils.data import DataLoader

from medsd.claims import claimed
from medsd.errors import ConfigError, OutputError, TrainingError
from medsd.training.checkpoint import Checkpoint
from medsd.training.step import ObjectiveStep
from tests.training.small import SETTINGS, Blobs, Whole, checkpoint, equal, refuse, rows, training


def interrupt_now(*_arguments: object) -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("stopped_in", "save_every", "saved", "workers"),
    [(5, None, 3, 0), (8, None, 6, 0), (6, 1, 5, 0), (9, 2, 8, 1)],
)
def test_a_resumed_training_equals_the_whole_one_bit_for_bit(
    tmp_path: Path,
    whole: Whole,
    stopped_in: int,
    save_every: int | None,
    saved: int,
    workers: int,
) -> None:
    """Epochs have 3 steps; where steps are saved, it goes on in the middle of one."""
    first = training(noise=1, workers=workers)
    first.trainer.add_event_handler(Events.ITERATION_STARTED(once=stopped_in), interrupt_now)
    with pytest.raises(KeyboardInterrupt):
        first.run(tmp_path, save_every=save_every)
    state = checkpoint(tmp_path)["state"]
    assert (state["epoch"], state["steps"]) == (saved // 3, saved)
    again = training(noise=2, workers=workers)
    steps: list[int] = []
    again.trainer.add_event_handler(Events.ITERATION_STARTED, lambda engine: steps.append(engine.state.iteration))
    again.run(tmp_path)
    assert steps == list(range(saved + 1, 10))

    expected, resumed = checkpoint(whole.folder), checkpoint(tmp_path)
    assert equal(resumed["network"], expected["network"])
    assert resumed["scheduler"] == expected["scheduler"]
    assert resumed["objective"] == expected["objective"] and expected["objective"].keys() == {"scale", "level"}
    for number, values in expected["optimizer"]["state"].items():
        assert equal(resumed["optimizer"]["state"][number], values)
    best, expected_best = resumed["state"].pop("best_network"), expected["state"].pop("best_network")
    assert equal(best, expected_best)
    assert resumed["state"] == expected["state"]
    assert (tmp_path / "history.csv").read_bytes() == (whole.folder / "history.csv").read_bytes()


def test_longer_and_finished_trainings(tmp_path: Path, whole: Whole) -> None:
    folder, state = whole.folder, whole.state
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_arguments: object) -> None:
        raise AssertionError("a finished training was repeated")

    again = training(step=fail)
    assert again.run(folder).best_metric == state.best_metric
    assert equal(again.state, state.best_network)
    assert not equal(again.state, whole.start)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    shorter = training(epochs=2, step=fail)
    assert shorter.run(folder).epoch == 3


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0.02}, "another lr; choose another output_dir"),
        ({"extra": 1}, "another extra;"),
        ({"seed": 1, "nested": {"stain": 0.2}}, "another nested::stain, seed;"),
    ],
)
def test_other_settings_are_refused_by_name(whole: Whole, changes: dict[str, Any], words: str) -> None:
    run = training()
    before = run.state
    refuse(lambda: run.run(whole.folder, {**SETTINGS, **changes}), words)
    refuse(lambda: run.run(whole.folder, {"lr": 0.01}), "another classes, nested::stain, seed")
    assert equal(run.state, before)


def test_settings_may_change_until_something_was_trained(tmp_path: Path) -> None:
    run = training(epochs=1)
    run.trainer.add_event_handler(Events.STARTED, interrupt_now)
    with pytest.raises(KeyboardInterrupt):
        run.run(tmp_path)
    training(epochs=1).run(tmp_path, {"lr": 0.02})
    assert checkpoint(tmp_path)["settings"] == {"lr": 0.02}


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_damaged_checkpoints_are_refused_and_never_run(tmp_path: Path, whole: Whole) -> None:
    good = (whole.folder / "checkpoint.pt").read_bytes()
    path, run = tmp_path / "checkpoint.pt", training()
    damaged = [
        b"",
        good[:100],
        good[: len(good) // 2],
        good[:-10],
        b"\x80\x02",
        b"\x80\x02}q\x00.",
        b"not a checkpoint\n",
    ]
    draw = np.random.default_rng(0)
    damaged += [draw.bytes(500) for _ in range(50)] + [b"\x80\x02" + draw.bytes(50) for _ in range(200)]
    for content in damaged:
        path.write_bytes(content)
        refuse(lambda: run.run(tmp_path), r"checkpoint\.pt: damaged or of another network .*delete it to start anew")
    for content in ({"network": Bomb(tmp_path / "exploded")}, Bomb(tmp_path / "exploded")):
        torch.save(content, path)
        refuse(lambda: run.run(tmp_path), "damaged")
    assert not (tmp_path / "exploded").exists()


def test_checkpoints_of_other_contents_are_refused(tmp_path: Path, whole: Whole) -> None:
    good = checkpoint(whole.folder)
    changes: list[Any] = [
        {**good, "network": {}},
        {**good, "optimizer": {"state": {}, "param_groups": []}},
        {**good, "optimizer": [1]},
        {**good, "scheduler": 3},
        {**good, "state": {"epochs": 3}},
        {**good, "settings": None},
        {key: value for key, value in good.items() if key != "scheduler"},
        [1, 2],
        torch.zeros(3),
    ]
    for content in changes:
        torch.save(content, tmp_path / "checkpoint.pt")
        refuse(lambda: training().run(tmp_path), "damaged or of another network")


@pytest.mark.parametrize("same", [True, False], ids=["the same objects, as in a notebook", "new ones"])
def test_after_a_loss_of_nan_it_goes_on_from_its_last_whole_epoch(tmp_path: Path, whole: Whole, same: bool) -> None:
    inner = ObjectiveStep()
    broken = [5]

    def step(engine: Any, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        if engine.state.iteration in broken:
            with torch.no_grad():
                engine.network.head.bias.fill_(torch.nan)
        return inner(engine, batch)

    run = training(step=step)
    refuse(lambda: run.run(tmp_path), "loss is nan in epoch 2, iteration 5")
    assert checkpoint(tmp_path)["state"]["epoch"] == 1
    assert [row["epoch"] for row in rows(tmp_path)] == ["1"]
    broken.clear()
    mended = run if same else training()
    mended.run(tmp_path)
    assert equal(checkpoint(tmp_path)["network"], checkpoint(whole.folder)["network"])
    assert equal(mended.state, whole.state.best_network)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError):
        training().run(tmp_path / "file" / "run")


def test_two_runs_do_not_train_in_one_folder(tmp_path: Path) -> None:
    with claimed(tmp_path / ".training.claim"):
        with pytest.raises(TrainingError, match="another run trains here; wait for it, or choose another output_dir"):
            training(1).run(tmp_path)
        assert {path.name for path in tmp_path.iterdir()} == {".training.claim"}


def test_killed_before_the_checkpoint_of_an_epoch(
    tmp_path: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row of an epoch that is done again is not there twice, and no temporary file stays."""
    save = torch.save

    def killed(content: dict[str, Any], path: Path) -> None:
        if content["state"]["epoch"] == 2:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        save(content, path)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", killed)
        with pytest.raises(KeyboardInterrupt):
            training().run(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint.pt",
        "history.csv",
        "pace.csv",
        "settings.json",
    ]
    assert checkpoint(tmp_path)["state"]["epoch"] == 1
    training().run(tmp_path)
    assert (tmp_path / "history.csv").read_bytes() == (whole.folder / "history.csv").read_bytes()
    assert equal(checkpoint(tmp_path)["network"], checkpoint(whole.folder)["network"])


def test_a_full_disk_is_told_and_keeps_the_last_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training(epochs=1).run(tmp_path)
    before = (tmp_path / "checkpoint.pt").read_bytes()

    def full(_content: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0\nmore lines")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OutputError, match="free some disk space") as caught:
        training(epochs=2).run(tmp_path)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def die_in_epoch_three(folder: Path) -> None:
    run = training()
    run.trainer.add_event_handler(Events.ITERATION_STARTED(once=9), lambda: os.kill(os.getpid(), signal.SIGKILL))
    run.run(folder, save_every=2)


def test_killed_by_the_system_within_an_epoch(
    tmp_path: Path, whole: Whole, run_apart: Callable[..., list[int]]
) -> None:
    assert run_apart(die_in_epoch_three, (tmp_path,)) == [-signal.SIGKILL]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".training.claim",  # of a dead process, so nobody's
        "checkpoint.pt",
        "history.csv",
        "pace.csv",
        "settings.json",
    ]
    assert checkpoint(tmp_path)["state"]["steps"] == 8
    training().run(tmp_path)
    assert equal(checkpoint(tmp_path)["network"], checkpoint(whole.folder)["network"])
    assert (tmp_path / "history.csv").read_bytes() == (whole.folder / "history.csv").read_bytes()


def test_steps_between_saves_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save_every=0: must be a whole number from 1 on; null saves whole epochs"):
        Checkpoint(tmp_path, {}, save_every=0)


def test_the_scale_of_half_precision_is_kept(tmp_path: Path) -> None:
    step = ObjectiveStep(amp="float16")
    training(epochs=1, step=step).run(tmp_path)
    resumed = ObjectiveStep(amp="float16")
    training(epochs=2, step=resumed).run(tmp_path)
    assert resumed.state_dict()["_growth_tracker"] + 1 > step.state_dict()["_growth_tracker"]


def test_another_number_of_steps_an_epoch_is_refused(tmp_path: Path) -> None:
    """As when a training is resumed on more processes: schedule and draws would no longer be its own."""
    training(epochs=1).run(tmp_path)
    other = training(epochs=2)
    other.trainer.data_loader = DataLoader(Blobs(0), batch_size=8, sampler=other.sampler, drop_last=True)
    refuse(lambda: other.run(tmp_path), "had 3 steps an epoch, now 6; start as many processes as before")
