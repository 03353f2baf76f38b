"""The step and the loop of pre-training: what a step does to queue and key encoder, and resuming to the very step."""

from __future__ import annotations

import csv
import logging
import os
import signal
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ignite.distributed as idist
import numpy as np
import pytest
import torch
import torch.distributed as dist
from ignite.engine import Events
from monai.engines import SupervisedTrainer
from monai.handlers import LrScheduleHandler
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from medsd.errors import ConfigError, DatasetError, TrainingError
from medsd.pretrain import step, watch
from medsd.pretrain.images import UnlabelledImages
from medsd.pretrain.med_moco import MedMoCo, MedMoCoSettings
from medsd.pretrain.start import EncoderStart
from medsd.pretrain.step import PretrainStep
from medsd.pretrain.views import Views, ViewSettings, draw_views
from medsd.pretrain.watch import CollapseHandler
from medsd.pretrain.whitening import ShuffledWhitening
from medsd.training.checkpoint import Checkpoint
from medsd.training.distributed import UnlabelledSampler
from medsd.training.training import run_training

SETTINGS = MedMoCoSettings(dim=8, queue=16, group_size=8, local_layer="layer2", regions=2)
VIEWS = ViewSettings(size_px=48)
CPU = torch.device("cpu")


class Noise(Dataset[dict[str, Tensor]]):
    """24 images of noise on four slides."""

    def __init__(self) -> None:
        draws = torch.Generator().manual_seed(3)
        self.images = torch.randint(256, (24, 3, 56, 56), dtype=torch.uint8, generator=draws)
        self.groups = np.array([f"slide{i // 6}" for i in range(24)])

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, item: int) -> Any:
        return {"image": self.images[item], "label": torch.tensor(-1)}

    def place(self, item: int) -> str:
        return f"image {item}"

    def fingerprint(self) -> str:
        return "noise"


def network(settings: MedMoCoSettings = SETTINGS) -> MedMoCo:
    return EncoderStart("test_resnet").network(settings, CPU)


def trainer_of(noise: int = 0) -> SupervisedTrainer:
    """Two epochs of 3 steps, as the bundle builds them; `noise` moves torch's own generator, which must not matter."""
    torch.manual_seed(noise)
    data, moco, batch_size = UnlabelledImages(Noise()), network(), 8 // idist.get_world_size()
    optimizer = torch.optim.SGD([p for p in moco.parameters() if p.requires_grad], lr=0.05, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 6)
    trainer = SupervisedTrainer(
        device=CPU,
        max_epochs=2,
        train_data_loader=DataLoader(
            data, batch_size, sampler=UnlabelledSampler(data, 24, batch_size, seed=1), drop_last=True
        ),
        network=moco,
        optimizer=optimizer,
        loss_function=None,
        iteration_update=PretrainStep(views=VIEWS),
        train_handlers=[
            LrScheduleHandler(schedule, print_lr=False, epoch_level=False),
            CollapseHandler(data, 12, 8, VIEWS),
        ],
        decollate=False,
    )
    trainer.schedule = schedule
    return trainer


def pretrain(trainer: SupervisedTrainer, folder: Path, save_every: int | None = None) -> None:
    parts = {"network": trainer.network, "optimizer": trainer.optimizer, "scheduler": trainer.schedule}
    run_training(trainer, None, Checkpoint(folder, parts, save_every), {}, stage="pretrain")


def checkpoint(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = torch.load(folder / "checkpoint.pt", weights_only=True)
    return content


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder: Path = tmp_path_factory.mktemp("whole")
    pretrain(trainer_of(), folder)
    return folder


def run_process(number: int, meeting: Path, out: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=number, world_size=2, timeout=timedelta(seconds=120)
    )
    logging.basicConfig(filename=out / f"{number}.log", level=logging.INFO)
    trainer = trainer_of(noise=number)
    pretrain(trainer, out / "run")
    torch.save(trainer.network.state_dict(), out / f"{number}.pt")
    idist.finalize()


def die_in_step_five(folder: Path) -> None:
    trainer = trainer_of(noise=1)
    trainer.add_event_handler(Events.ITERATION_STARTED(once=6), lambda: os.kill(os.getpid(), signal.SIGKILL))
    pretrain(trainer, folder, save_every=1)


def test_killed_within_an_epoch_it_ends_where_an_uninterrupted_one_does(
    tmp_path: Path, whole: Path, run_apart: Callable[..., list[int]]
) -> None:
    """Query and key encoder, queue, pointer, optimiser, schedule and history, bit for bit."""
    assert run_apart(die_in_step_five, (tmp_path,)) == [-signal.SIGKILL]
    assert checkpoint(tmp_path)["state"]["steps"] == 5
    pretrain(trainer_of(noise=2), tmp_path)
    expected, resumed = checkpoint(whole), checkpoint(tmp_path)
    assert resumed["network"].keys() == expected["network"].keys()
    for name, tensor in expected["network"].items():
        assert torch.equal(resumed["network"][name], tensor), name
    assert int(expected["network"]["queue.pointer"]) == 0 and int(expected["network"]["queue.filled"]) == 16
    for number, values in expected["optimizer"]["state"].items():
        assert torch.equal(resumed["optimizer"]["state"][number]["momentum_buffer"], values["momentum_buffer"])
    assert resumed["scheduler"] == expected["scheduler"] and resumed["state"] == expected["state"]
    assert (tmp_path / "history.csv").read_bytes() == (whole / "history.csv").read_bytes()


def test_the_history_shows_the_terms_and_what_the_features_use(whole: Path) -> None:
    with open(whole / "history.csv", newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    assert [row["epoch"] for row in rows] == ["1", "2"]
    assert {"loss", "contrast", "local", "accuracy", "rank", "effective_rank", "participation_ratio"} < rows[0].keys()
    assert {"mean_abs_correlation", "embedding_rank", "alignment", "uniformity"} < rows[0].keys()
    assert float(rows[0]["loss"]) == pytest.approx(float(rows[0]["contrast"]) + 0.5 * float(rows[0]["local"]), rel=1e-4)
    assert 1 <= float(rows[1]["effective_rank"]) <= 11 and float(rows[1]["uniformity"]) < 0
    assert 0 < float(rows[1]["alignment"]) < 4


def test_two_processes_train_one_network_and_one_queue(tmp_path: Path, run_apart: Callable[..., list[int]]) -> None:
    """Epoch ends with measures included; what two processes compute is tested with `MedMoCo`."""
    assert run_apart(run_process, *((number, tmp_path / "meeting", tmp_path) for number in (0, 1))) == [0, 0]
    one, other = (torch.load(tmp_path / f"{number}.pt", weights_only=True) for number in (0, 1))
    for name, tensor in one.items():
        if "running_" not in name:  # each has its own batches since the last exchange
            assert torch.equal(tensor, other[name]), name
    assert int(one["queue.filled"]) == 16 and checkpoint(tmp_path / "run")["state"]["steps"] == 6
    with open(tmp_path / "run" / "history.csv", newline="", encoding="utf-8") as handle:
        assert "effective_rank" in list(csv.DictReader(handle))[1]
    told = [(tmp_path / f"{number}.log").read_text("utf-8").count("epoch 2, loss") for number in (0, 1)]
    assert told == [1, 0]


def engine(moco: MedMoCo, iteration: int = 1, lr: float = 0.05) -> Any:
    optimizer = torch.optim.SGD([p for p in moco.parameters() if p.requires_grad], lr=lr)
    state = SimpleNamespace(device=CPU, epoch=1, iteration=iteration, epoch_length=3, max_epochs=2)
    return SimpleNamespace(network=moco, optimizer=optimizer, state=state, loss_function=None)


def batch(seed: int = 0) -> dict[str, Tensor]:
    images = torch.randint(256, (8, 3, 56, 56), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return {"image": images, "group": torch.arange(8) % 3}


def test_each_view_goes_with_its_own_place(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: list[Views] = []
    monkeypatch.setattr(step, "draw_views", lambda *given: drawn.append(draw_views(*given)) or drawn[-1])
    asked, forward = [], MedMoCo.forward
    monkeypatch.setattr(MedMoCo, "forward", lambda moco, *given: asked.append(given) or forward(moco, *given))
    moco = network()
    PretrainStep(views=VIEWS)(engine(moco), batch())
    images, places = [moco.normalise(one.images) for one in drawn], [one.to_source for one in drawn]
    assert not torch.equal(*places)
    for given, expected in zip(asked[0], [*images, *places], strict=False):
        assert torch.equal(given, expected)


def without_batch_statistics(settings: MedMoCoSettings) -> MedMoCo:
    """Then pieces of a batch are the batch."""
    moco = network(settings)
    for module in moco.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.forward = torch.nn.Identity().forward  # type: ignore[method-assign]
    return moco


@pytest.mark.parametrize("pieces", [2, 4])
def test_a_batch_in_pieces_is_one_step_for_queue_and_key_encoder(pieces: int) -> None:
    settings = MedMoCoSettings(dim=8, queue=16, decorrelation="none", local=0.0)
    states = []
    for accumulation in (1, pieces):
        moco, step = without_batch_statistics(settings), PretrainStep(views=VIEWS, accumulation=accumulation)
        outputs = [step(engine(moco, iteration), batch(iteration)) for iteration in (1, 2)]
        states.append((moco.state_dict(), [output["loss"] for output in outputs]))
    (one, losses), (other, same) = states
    assert losses == pytest.approx(same, rel=1e-5)
    assert int(other["queue.filled"]) == 16 and other["queue.groups"].tolist() == [0, 1, 2, 0, 1, 2, 0, 1] * 2
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-6, msg=name)


def test_the_key_encoder_follows_before_the_step_and_the_queue_takes_its_keys_after() -> None:
    moco = network()
    with torch.no_grad():
        for parameter in moco.projector.parameters():
            parameter.add_(1.0)
    query = [parameter.detach().clone() for parameter in moco.projector.parameters()]
    key = [parameter.detach().clone() for parameter in moco.key_projector.parameters()]
    output = PretrainStep(views=VIEWS)(engine(moco), batch())
    for before, ours, theirs in zip(key, moco.key_projector.parameters(), query, strict=True):
        torch.testing.assert_close(ours, 0.99 * before + 0.01 * theirs)
    assert int(moco.queue.pointer) == 8 and output["accuracy"] == 1.0  # nothing to mistake it for yet
    torch.testing.assert_close(moco.queue.keys[:, :8].norm(dim=0), torch.ones(8))
    assert not moco.key_projector[0].weight.requires_grad


def test_draws_depend_on_seed_and_iteration_alone() -> None:
    def run(step: PretrainStep, iteration: int) -> Tensor:
        moco = network()
        step(engine(moco, iteration), batch())
        return moco.queue.keys.clone()

    used = PretrainStep(views=VIEWS, seed=3)
    first, second = run(used, 1), run(used, 2)
    torch.manual_seed(99)
    assert torch.equal(run(used, 1), first) and torch.equal(run(PretrainStep(views=VIEWS, seed=3), 2), second)
    assert not torch.equal(first, second) and not torch.equal(run(PretrainStep(views=VIEWS, seed=4), 1), first)


def test_a_loss_that_is_not_finite_leaves_no_keys_behind() -> None:
    moco = network()
    with torch.no_grad():
        moco.projector[0].weight.fill_(torch.inf)
    with pytest.raises(TrainingError, match=r"loss is nan in epoch 1, iteration 1; lower .* \(pretrain_lr\)") as caught:
        PretrainStep(views=VIEWS)(engine(moco), batch())
    assert "\n" not in str(caught.value) and int(moco.queue.filled) == 0


def test_features_that_cannot_be_whitened_name_the_key_of_pretraining() -> None:
    moco = network(replace(SETTINGS, decorrelation="w2"))
    with torch.no_grad():
        next(moco.encoder.parameters()).fill_(torch.nan)
    with pytest.raises(TrainingError, match=r"^features: not finite .*; lower the learning rate \(pretrain_lr\)"):
        PretrainStep(views=VIEWS)(engine(moco), batch())


def test_more_pieces_than_images_is_refused() -> None:
    with pytest.raises(TrainingError, match="pretrain_batch_size=8: less than accumulation=9"):
        PretrainStep(views=VIEWS, accumulation=9)(engine(network()), batch())


@pytest.mark.parametrize("amp", ["bfloat16", "float16"])
def test_half_precision_trains_as_full_precision_does(amp: Any) -> None:
    half, full = network(), network()
    output, expected = (
        PretrainStep(views=VIEWS, amp=precision)(engine(each), batch())
        for precision, each in ((amp, half), ("none", full))
    )
    assert output["loss"] == pytest.approx(expected["loss"], rel=0.05)
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())
    torch.testing.assert_close((half.queue.keys * full.queue.keys).sum(dim=0)[:8], torch.ones(8), rtol=0, atol=0.05)


def test_the_start_draws_by_its_seed_alone_and_leaves_the_generator() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    one, other = (EncoderStart("test_resnet", seed=seed).network(SETTINGS, CPU) for seed in (1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    again = EncoderStart("test_resnet", seed=1).network(SETTINGS, CPU)
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in one.state_dict().items())
    assert not torch.equal(one.projector[0].weight, other.projector[0].weight)


def test_a_collapse_is_told_once_in_the_end(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the rank of the epoch before, which says whether it still rises."""
    monkeypatch.setattr(watch, "collapse_warning", lambda _found, what, before: f"{what} {before}")
    pretrain(trainer_of(), tmp_path)
    with open(tmp_path / "history.csv", newline="", encoding="utf-8") as handle:
        first = next(csv.DictReader(handle))
    told = [record.getMessage().split() for record in caplog.records if record.levelname == "WARNING"]
    assert [what for what, _ in told] == ["features", "embeddings"]
    for (_, before), column in zip(told, ("effective_rank", "embedding_rank"), strict=True):
        assert float(before) == pytest.approx(float(first[column]), rel=1e-5)


def test_too_few_held_out_images_are_told_before_anything_is_trained(tmp_path: Path) -> None:
    data, trainer = UnlabelledImages(Noise()), trainer_of()
    trainer.network.settings = replace(SETTINGS, decorrelation="w2")
    trainer.network._whitening = ShuffledWhitening(24)
    trainer.add_event_handler(Events.ITERATION_STARTED, lambda: pytest.fail("trained"))
    CollapseHandler(data, 3, 8, VIEWS).attach(trainer)
    with pytest.raises(DatasetError, match=r"held-out images: 3 are too few \(group_size=24: .*; hold more") as told:
        pretrain(trainer, tmp_path)
    assert "\n" not in str(told.value)
    data.images.images = data.images.images[:1]
    with pytest.raises(DatasetError, match=r"held-out images: 1; .*, hold more out \(held_out"):
        CollapseHandler(data, 2, 8, VIEWS)


def test_weights_that_are_not_finite_take_the_place_of_no_checkpoint(tmp_path: Path) -> None:
    """The loss of the step was finite, its gradient not."""

    def spoil(when: int, trainer: SupervisedTrainer) -> None:
        if trainer.state.iteration == when:
            next(trainer.network.encoder.parameters()).data.fill_(torch.nan)

    for when, words in ((2, "weights are not finite"), (3, "features are not finite after epoch 1; .*_lr")):
        trainer = trainer_of()
        trainer.network.settings = replace(SETTINGS, decorrelation="none")  # nothing else looks at features
        trainer.add_event_handler(Events.ITERATION_COMPLETED, partial(spoil, when, trainer))
        with pytest.raises(TrainingError, match=words):
            pretrain(trainer, tmp_path / str(when), save_every=1)
        kept = checkpoint(tmp_path / str(when))
        assert kept["state"]["steps"] == when - 1 and kept["network"]["encoder.conv1.0.weight"].isfinite().all()


def test_measures_of_no_images_are_refused() -> None:
    with pytest.raises(ConfigError, match="images=1: "):
        CollapseHandler(UnlabelledImages(Noise()), 1, 8, VIEWS)
