"""Several processes train as one: the same gradients as one process, and each its own items."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ignite.distributed as idist
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import medsd.training.step as step_module
from medsd.cohort.dataset import SlideGroupedSampler
from medsd.errors import ConfigError, TrainingError
from medsd.objectives.saliency_decor import SaliencyDecor
from medsd.training.distributed import BalancedSampler, UnlabelledSampler, start_processes
from medsd.training.step import ObjectiveStep

BATCH = 8


class Network(nn.Module):
    """Without BatchNorm a batch on two processes is the batch on one; and with a part that no loss reaches."""

    classes = ("normal", "tumour")

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        norm = norm or nn.Identity()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), norm, nn.Tanh(), nn.Conv2d(6, 5, 3, 2, 1), nn.Tanh())
        self.unused = nn.Linear(2, 2)
        self.head = nn.Linear(5, 2)

    def normalise(self, images: Tensor) -> Tensor:
        return images.double() / 255

    def features(self, x: Tensor) -> Tensor:
        pooled: Tensor = self.body(x).mean(dim=(2, 3))
        return pooled


def train(rows: slice, accumulation: int) -> dict[str, Tensor]:
    """Three steps on these rows of the batch: losses and parameters. Nothing is drawn at random."""
    torch.manual_seed(0)
    network = Network().double()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5, momentum=0.9)
    objective = SaliencyDecor(decorrelation=0.5, warm_epochs=0)
    step = ObjectiveStep(stain=0.0, accumulation=accumulation)
    outputs = []
    for iteration in (1, 2, 3):
        outputs.append(run_step(step, network, optimizer, objective, iteration, rows))
    start = torch.tensor(list(objective.state_dict().values()), dtype=torch.float64)
    return {"losses": torch.tensor(outputs), "start": start, **network.state_dict()}


def run_step(
    step: ObjectiveStep, network: nn.Module, optimizer: Any, objective: SaliencyDecor, iteration: int, rows: slice
) -> float:
    images = torch.randint(256, (BATCH, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    labels = torch.arange(BATCH) % 2
    state = SimpleNamespace(device=torch.device("cpu"), epoch=1, iteration=iteration, epoch_length=3)
    engine: Any = SimpleNamespace(network=network, optimizer=optimizer, state=state, loss_function=objective)
    return float(step(engine, {"image": images[rows], "label": labels[rows]})["loss"])


def buffers(objective: SaliencyDecor, rows: slice) -> dict[str, Tensor]:
    """Running averages after two steps that leave the weights, the second one with buffers handed round."""
    torch.manual_seed(0)
    network = Network(nn.BatchNorm2d(6)).double()
    optimizer, step = torch.optim.SGD(network.parameters(), lr=0.0), ObjectiveStep(stain=0.0, accumulation=2)
    for iteration in (1, 2):
        run_step(step, network, optimizer, objective, iteration, rows)
    return {name: tensor.clone() for name, tensor in network.named_buffers()}


def gradients_of_nan(rows: slice) -> int:
    """How many parameters have a gradient after a step whose loss is not finite."""
    network = Network().double()
    with torch.no_grad():
        network.head.bias.fill_(torch.nan)
    optimizer, step = torch.optim.SGD(network.parameters(), lr=0.1), ObjectiveStep(stain=0.0)
    with suppress(TrainingError):
        run_step(step, network, optimizer, SaliencyDecor(0, 0), 1, rows)
    return sum(parameter.grad is not None for parameter in network.parameters())


def run_process(number: int, meeting: Path, out: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=f"file://{meeting}", rank=number, world_size=2, timeout=timedelta(seconds=120)
    )
    step_module.augment = lambda images, _generator, _stain: images  # type: ignore[assignment]
    assert (idist.get_rank(), idist.get_world_size()) == (number, 2)
    half = BATCH // 2
    rows = slice(number * half, (number + 1) * half)
    result = train(rows, 1)
    moved = buffers(SaliencyDecor(warm_epochs=0), rows), buffers(SaliencyDecor(0, 0), rows)
    result |= {
        f"{kind}.{name}": tensor
        for kind, of in zip(("own", "plain"), moved, strict=True)
        for name, tensor in of.items()
    }
    draw = list(sampler())
    # As the hard negatives: the first finds, all go by it.
    found = idist.broadcast(torch.tensor([20, 30]) if number == 0 else None, src=0, safe_mode=True)
    result["gradients_of_nan"] = torch.tensor(gradients_of_nan(rows))
    torch.save({**result, "draw": torch.tensor(draw), "found": found}, out / f"{number}.pt")
    idist.finalize()


def items() -> Any:
    return SimpleNamespace(labels=np.arange(30, dtype=np.int8) % 2, groups=np.array(["a", "b", "c"]).repeat(10))


def sampler() -> BalancedSampler:
    return BalancedSampler(items(), samples=21, batch_size=2, seed=3)


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory, run_apart: Callable[..., list[int]]) -> list[dict[str, Tensor]]:
    folder = tmp_path_factory.mktemp("ranks")
    assert run_apart(run_process, *((number, folder / "meeting", folder) for number in (0, 1))) == [0, 0]
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in (0, 1)]


def test_two_processes_train_as_one(processes: list[dict[str, Tensor]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_module, "augment", lambda images, _generator, _stain: images)
    alone = train(slice(0, BATCH), 1)
    torch.testing.assert_close(
        (processes[0]["losses"] + processes[1]["losses"]) / 2, alone["losses"], rtol=1e-10, atol=0
    )
    for name in alone.keys() - {"losses"}:  # scale and level of the decorrelation among them
        torch.testing.assert_close(processes[0][name], alone[name], rtol=1e-10, atol=1e-12, msg=name)
        assert torch.equal(processes[0][name], processes[1][name]), name


def test_running_averages_are_those_of_cross_entropy_on_each_process(processes: list[dict[str, Tensor]]) -> None:
    for process in processes:
        names = [name.removeprefix("own.") for name in process if name.startswith("own.")]
        assert len(names) == 3 and all(torch.equal(process[f"own.{name}"], process[f"plain.{name}"]) for name in names)
        assert process["own.body.1.num_batches_tracked"] == 4
    assert not torch.equal(*(process["own.body.1.running_mean"] for process in processes))  # each its own batch


def test_a_loss_that_is_not_finite_never_becomes_a_gradient_of_the_others(processes: list[dict[str, Tensor]]) -> None:
    assert [int(process["gradients_of_nan"]) for process in processes] == [0, 0]


def test_each_process_draws_its_own_items(processes: list[dict[str, Tensor]]) -> None:
    whole = list(sampler())
    first, second = (process["draw"].tolist() for process in processes)
    assert len(first) == len(second) == 10  # the odd one is left out, so that none waits for the other
    assert [item for pair in zip(first, second, strict=True) for item in pair] == whole[:20]


def test_all_go_by_what_the_first_found(processes: list[dict[str, Tensor]]) -> None:
    assert [process["found"].tolist() for process in processes] == [[20, 30], [20, 30]]


def test_alone_there_is_one_rank() -> None:
    assert (idist.get_rank(), idist.get_world_size()) == (0, 1)
    assert list(sampler()) == list(SlideGroupedSampler(items().labels, items().groups, 21, seed=3))


def test_not_started_by_torchrun() -> None:
    with pytest.raises(ConfigError, match="run torchrun"):
        start_processes()


def test_draws_may_follow_the_items_and_not_their_groups() -> None:
    uneven = items()
    uneven.groups = np.array(["a"] * 28 + ["b"] * 2)
    by_group, plain = (list(BalancedSampler(uneven, 200, 2, by_group=by_group)) for by_group in (True, False))
    assert sum(item >= 28 for item in by_group) == 100 and sum(item >= 28 for item in plain) < 20


def test_draws_without_labels() -> None:
    uneven = items()
    uneven.groups = np.array(["a"] * 28 + ["b"] * 2)
    every = UnlabelledSampler(uneven, None, 2, by_group=False)
    assert sorted(every) == list(range(30)) and len(every) == 30
    assert sum(item >= 28 for item in UnlabelledSampler(uneven, 200, 2)) == 100
    every.set_epoch(0, 28)
    assert len(list(every)) == 2


def test_a_batch_without_labels_fits_into_an_epoch() -> None:
    with pytest.raises(ConfigError, match=r"pretrain_batch_size=31: .* from 2 to 30; an epoch has pretrain_samples=30"):
        UnlabelledSampler(items(), None, 31)


@pytest.mark.parametrize("batch_size", [1, 22, 2.0])
def test_a_batch_fits_into_an_epoch(batch_size: Any) -> None:
    with pytest.raises(ConfigError, match=rf"batch_size={batch_size}: .* from 2 to 21; an epoch has"):
        BalancedSampler(items(), samples=21, batch_size=batch_size)
