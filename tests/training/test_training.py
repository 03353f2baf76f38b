"""Whole trainings with MONAI's own engines: learning, resuming, refusing, and dying at the wrong moment."""

from __future__ import annotations

import csv
import json
import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from ignite.engine import Events
from ignite.handlers import EarlyStopping
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from monai.handlers import ROCAUC, LrScheduleHandler, ValidationHandler, from_engine
from monai.transforms import Activationsd, AsDiscreted, Compose
from torch.utils.data import DataLoader, Dataset

from medsd.claims import claimed
from medsd.cohort.dataset import SlideGroupedSampler
from medsd.errors import ConfigError, OutputError, TrainingError
from medsd.networks.classifier import TileClassifier
from medsd.objectives.saliency_decor import SaliencyDecor
from medsd.training.checkpoint import Checkpoint
from medsd.training.hard_negatives import HardNegativeRound
from medsd.training.step import ObjectiveStep
from medsd.training.training import run_training, settings_of

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


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor], Any]:
    """An uninterrupted training of three epochs: its folder, last and best network."""
    folder = tmp_path_factory.mktemp("whole")
    run = training()
    return folder, run.state, run.run(folder)


def checkpoint(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return content


def test_it_learns(tmp_path: Path) -> None:
    state = training(epochs=6).run(tmp_path)
    history = rows(tmp_path)
    assert float(history[4]["cross_entropy"]) < 0.6 * float(history[0]["cross_entropy"])
    assert state.best_metric > 0.95
    assert state.best_metric > float(history[0]["validation_auc"])


def test_what_a_training_leaves(whole: tuple[Path, dict[str, torch.Tensor], Any]) -> None:
    folder, _, state = whole
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


@pytest.mark.parametrize(
    ("stopped_in", "save_every", "saved", "workers"),
    [(5, None, 3, 0), (8, None, 6, 0), (6, 1, 5, 0), (9, 2, 8, 1)],
)
def test_a_resumed_training_equals_the_whole_one_bit_for_bit(
    tmp_path: Path,
    whole: tuple[Path, dict[str, torch.Tensor], Any],
    stopped_in: int,
    save_every: int | None,
    saved: int,
    workers: int,
) -> None:
    """Epochs have 3 steps; where steps are saved, it goes on in the middle of one."""
    folder, _, _ = whole
    first = training(noise=1, workers=workers)
    stop_in(first, stopped_in)
    with pytest.raises(KeyboardInterrupt):
        first.run(tmp_path, save_every=save_every)
    state = checkpoint(tmp_path)["state"]
    assert (state["epoch"], state["steps"]) == (saved // 3, saved)
    again = training(noise=2, workers=workers)
    steps: list[int] = []
    again.trainer.add_event_handler(Events.ITERATION_STARTED, lambda engine: steps.append(engine.state.iteration))
    again.run(tmp_path)
    assert steps == list(range(saved + 1, 10))

    expected, resumed = checkpoint(folder), checkpoint(tmp_path)
    assert equal(resumed["network"], expected["network"])
    assert resumed["scheduler"] == expected["scheduler"]
    assert resumed["objective"] == expected["objective"] and expected["objective"].keys() == {"scale", "level"}
    for number, values in expected["optimizer"]["state"].items():
        assert equal(resumed["optimizer"]["state"][number], values)
    best, expected_best = resumed["state"].pop("best_network"), expected["state"].pop("best_network")
    assert equal(best, expected_best)
    assert resumed["state"] == expected["state"]
    assert (tmp_path / "history.csv").read_bytes() == (folder / "history.csv").read_bytes()


def stop_in(run: Training, step: int) -> None:
    run.trainer.add_event_handler(Events.ITERATION_STARTED(once=step), interrupt_now)


def test_longer_and_finished_trainings(tmp_path: Path, whole: tuple[Path, dict[str, torch.Tensor], Any]) -> None:
    folder, start, state = whole
    before = {path.name: path.read_bytes() for path in folder.iterdir()}

    def fail(*_arguments: object) -> None:
        raise AssertionError("a finished training was repeated")

    again = training(step=fail)
    assert again.run(folder).best_metric == state.best_metric
    assert equal(again.state, state.best_network)
    assert not equal(again.state, start)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    shorter = training(epochs=2, step=fail)
    assert shorter.run(folder).epoch == 3


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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"lr": 0.02}, "another lr; choose another output_dir"),
        ({"extra": 1}, "another extra;"),
        ({"seed": 1, "nested": {"stain": 0.2}}, "another nested::stain, seed;"),
    ],
)
def test_other_settings_are_refused_by_name(
    whole: tuple[Path, dict[str, torch.Tensor], Any], changes: dict[str, Any], words: str
) -> None:
    folder, _, _ = whole
    run = training()
    before = run.state
    refuse(lambda: run.run(folder, {**SETTINGS, **changes}), words)
    refuse(lambda: run.run(folder, {"lr": 0.01}), "another classes, nested::stain, seed")
    assert equal(run.state, before)


def test_settings_may_change_until_something_was_trained(tmp_path: Path) -> None:
    run = training(epochs=1)
    run.trainer.add_event_handler(Events.STARTED, interrupt_now)
    with pytest.raises(KeyboardInterrupt):
        run.run(tmp_path)
    training(epochs=1).run(tmp_path, {"lr": 0.02})
    assert checkpoint(tmp_path)["settings"] == {"lr": 0.02}


def interrupt_now(*_arguments: object) -> None:
    raise KeyboardInterrupt


class Bomb:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.path,)


def test_damaged_checkpoints_are_refused_and_never_run(
    tmp_path: Path, whole: tuple[Path, dict[str, torch.Tensor], Any]
) -> None:
    good = (whole[0] / "checkpoint.pt").read_bytes()
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


def test_checkpoints_of_other_contents_are_refused(
    tmp_path: Path, whole: tuple[Path, dict[str, torch.Tensor], Any]
) -> None:
    good = checkpoint(whole[0])
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


def test_a_loss_of_nan_stops_and_leaves_the_last_epoch_usable(
    tmp_path: Path, whole: tuple[Path, dict[str, torch.Tensor], Any]
) -> None:
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
    assert len(rows(tmp_path)) == 1
    broken.clear()
    run.run(tmp_path)  # the same objects again, as in a notebook
    assert equal(checkpoint(tmp_path)["network"], checkpoint(whole[0])["network"])


def test_validation_of_one_class_is_told(tmp_path: Path) -> None:
    data = Blobs(1)
    data.labels[:] = 1
    with pytest.warns(UserWarning, match="skip AUC"):
        refuse(lambda: training(validation=data).run(tmp_path), "validation data need items of every class")


def test_no_epoch_at_all(tmp_path: Path) -> None:
    refuse(lambda: training(epochs=0).run(tmp_path), "no epoch was validated; raise max_epochs")


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
    tmp_path: Path, whole: tuple[Path, dict[str, torch.Tensor], Any], monkeypatch: pytest.MonkeyPatch
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
    assert (tmp_path / "history.csv").read_bytes() == (whole[0] / "history.csv").read_bytes()
    assert equal(checkpoint(tmp_path)["network"], checkpoint(whole[0])["network"])


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
    tmp_path: Path, whole: tuple[Path, dict[str, torch.Tensor], Any], run_apart: Callable[..., list[int]]
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
    assert equal(checkpoint(tmp_path)["network"], checkpoint(whole[0])["network"])
    assert (tmp_path / "history.csv").read_bytes() == (whole[0] / "history.csv").read_bytes()


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


def test_steps_between_saves_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="save_every=0: must be a whole number from 1 on; null saves whole epochs"):
        Checkpoint(tmp_path, {}, save_every=0)


def test_settings_are_read_off_the_objects() -> None:
    run = training(step=ObjectiveStep(stain=0.2))
    found = settings_of(run.trainer, step=run.step, scheduler=run.scheduler, none=None, data={"split": "a", "px": 3})
    assert json.loads(json.dumps(found)) == json.loads(json.dumps(found))  # plain values
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


def test_a_training_that_failed_goes_on_from_its_last_whole_epoch(tmp_path: Path, whole: Any) -> None:
    """A bad batch in the second epoch; once the data are mended, the same settings end where they would have."""
    broken = training()
    broken.trainer.add_event_handler(
        Events.ITERATION_STARTED(once=5), lambda engine: engine.network.head.weight.data.fill_(torch.nan)
    )
    with pytest.raises(TrainingError, match="loss is nan in epoch 2"):
        broken.run(tmp_path)
    assert [row["epoch"] for row in rows(tmp_path)] == ["1"]
    mended = training()
    mended.run(tmp_path)
    assert equal(mended.state, whole[1]) or equal(mended.state, whole[2].best_network)


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


def test_hard_negatives_after_the_end_are_refused(tmp_path: Path) -> None:
    hard = HardNegativeRound(3, 0.5, Blobs(0))
    with pytest.raises(ConfigError, match=r"hard_negative_epoch=3: .*below max_epochs"):
        training().run(tmp_path, hard_negatives=hard)
