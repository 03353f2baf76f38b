"""Moments of features: known values, precision, and two processes against one.

Run as a script, this file is one of the two processes.
"""

from __future__ import annotations

import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medsd.errors import ConfigError, TrainingError
from medsd.networks.moments import feature_moments, first_of_processes, group_channels, sum_over_processes
from medsd.networks.whitening import WhitenedHead
from medsd.objectives.decorrelation import decorrelation_loss
from medsd.objectives.saliency_decor import SaliencyDecor


def features(batch: int, dim: int, seed: int = 0) -> Tensor:
    return torch.randn(batch, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) + 2


@settings(max_examples=25, deadline=None)
@given(batch=st.integers(2, 12), dim=st.integers(1, 9), seed=st.integers(0, 1000))
def test_moments_are_those_of_numpy(batch: int, dim: int, seed: int) -> None:
    f = features(batch, dim, seed)
    moments = feature_moments(f)
    np.testing.assert_allclose(moments.mean, f.numpy().mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(moments.covariance, np.cov(f.numpy().T).reshape(dim, dim), rtol=1e-11, atol=1e-13)
    assert moments.count == batch


def test_gradcheck() -> None:
    def both(f: Tensor) -> tuple[Tensor, Tensor]:
        moments = feature_moments(f)
        return moments.mean, moments.covariance

    assert torch.autograd.gradcheck(both, features(5, 3).requires_grad_())


def test_a_large_offset_costs_no_digits() -> None:
    f = (features(256, 4) * torch.tensor([1, 0.1, 3, 1]) + 1000).float()
    covariance = feature_moments(f).covariance
    assert covariance.dtype == torch.float32
    torch.testing.assert_close(covariance.double(), torch.cov(f.double().T), rtol=1e-4, atol=1e-6)
    mean = f.mean(dim=0)
    one_pass = (f.T @ f / 256 - torch.outer(mean, mean)) * 256 / 255  # what it would be without centring first
    assert not torch.allclose(one_pass.double(), torch.cov(f.double().T), rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_precision_under_autocast(dtype: torch.dtype) -> None:
    f = (features(64, 8) * 300).to(dtype)  # sums of squares overflow float16
    with torch.autocast("cpu", dtype=torch.bfloat16):
        moments = feature_moments(f)
    expected = torch.float64 if dtype == torch.float64 else torch.float32
    assert moments.mean.dtype == moments.covariance.dtype == expected
    torch.testing.assert_close(moments.covariance.double(), torch.cov(f.double().T), rtol=1e-5, atol=1)


@pytest.mark.parametrize("batch", [0, 1])
def test_one_sample_is_refused_in_words(batch: int) -> None:
    with pytest.raises(
        TrainingError, match=f"batch_size={batch} at once: .* at least 2 samples; raise batch_size"
    ) as caught:
        feature_moments(torch.zeros(batch, 4))
    assert "\n" not in str(caught.value)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_groups_part_the_channels_evenly(data: st.DataObject) -> None:
    dim = data.draw(st.integers(2, 40))
    group_size = data.draw(st.integers(2, dim))
    order = torch.randperm(dim, generator=torch.Generator().manual_seed(dim))
    groups = group_channels(order, group_size)
    sizes = [len(group) for group in groups]
    assert torch.equal(torch.cat(groups), order)
    assert max(sizes) <= group_size and max(sizes) - min(sizes) <= 1
    assert len(groups) == -(-dim // group_size)  # as few as there can be


def test_no_group_size_is_one_group() -> None:
    (group,) = group_channels(torch.arange(5), None)
    assert group.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("group_size", [-1, 0, 1, 9])
def test_impossible_group_sizes(group_size: int) -> None:
    with pytest.raises(ConfigError, match=f"group_size={group_size}: must lie in 2 to 8"):
        group_channels(torch.arange(8), group_size)


def test_without_distribution_nothing_is_exchanged() -> None:
    values = torch.arange(3.0)
    assert sum_over_processes(values) is values
    assert first_of_processes(values) is values


# Two processes against one. Each case: the samples of either process, a name, the group size.
BATCH, DIM = 8, 7
SHARES = ((4, 4), (2, 6), (8, 0))
CASES = [(s, m, g) for s in SHARES for m in ("cov", "zca", "corr") for g in (None, 3)]
CASES += [((4, 4), "layer", 3), ((2, 6), "objective", None)]


def run_case(name: str, group_size: int | None, x: Tensor, labels: Tensor, seed: int) -> dict[str, Tensor]:
    """Loss, gradients and buffers; gradients averaged as DistributedDataParallel does, whose import takes seconds."""
    torch.manual_seed(0)
    head = WhitenedHead(DIM, 2, 3) if name == "layer" else nn.Linear(DIM, DIM)
    network = nn.Sequential(nn.Linear(5, DIM), nn.Tanh(), head).double()
    output = network(x)
    if name == "layer":
        loss = F.cross_entropy(output, labels)
    elif name == "objective":  # whose groups are as large as the whole batch allows
        objective = SaliencyDecor(mode="zca")
        loss = objective._decorrelation([output], torch.Generator().manual_seed(seed))
    else:
        loss = decorrelation_loss(output, name, group_size, torch.Generator().manual_seed(seed))  # type: ignore[arg-type]
    loss.backward()
    gradients = {}
    for key, value in network.named_parameters():
        assert value.grad is not None
        if dist.is_initialized():
            dist.all_reduce(value.grad)
            value.grad /= dist.get_world_size()
        gradients[f"gradient of {key}"] = value.grad
    return {"loss": loss.detach(), **gradients, **dict(network.named_buffers())}


def batch() -> tuple[Tensor, Tensor]:
    return features(BATCH, 5), torch.arange(BATCH) % 2


def run_process(rank: int, meeting: Path, out: Path) -> None:
    dist.init_process_group(
        "gloo", init_method=meeting.as_uri(), rank=rank, world_size=2, timeout=timedelta(seconds=30)
    )
    results = []
    x, labels = batch()
    for shares, name, group_size in CASES:
        mine = slice(0, shares[0]) if rank == 0 else slice(shares[0], BATCH)
        # The processes' generators differ, as they do where each masks its own samples.
        results.append(run_case(name, group_size, x[mine], labels[mine], seed=rank))
    torch.save(results, out)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, Tensor]]]:
    folder = tmp_path_factory.mktemp("two")
    outs = [folder / "0.pt", folder / "1.pt"]
    running = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder / "meeting"), str(out)], stderr=subprocess.PIPE, text=True
        )
        for rank, out in enumerate(outs)
    ]
    try:
        errors = [process.communicate(timeout=60)[1] for process in running]
    finally:
        for process in running:
            process.kill()
    assert [process.returncode for process in running] == [0, 0], "\n".join(errors)
    assert "FutureWarning" not in errors[0]
    return [torch.load(out, weights_only=True) for out in outs]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{s[0]}+{s[1]}-{m}-{g}" for s, m, g in CASES])
def test_two_processes_equal_one(number: int, processes: list[list[dict[str, Tensor]]]) -> None:
    _, name, group_size = CASES[number]
    one = run_case(name, group_size, *batch(), seed=0)
    first, second = (results[number] for results in processes)
    if name == "layer":  # cross-entropy is each process's own
        loss = (first.pop("loss") + second.pop("loss")) / 2
        torch.testing.assert_close(loss, one.pop("loss"), rtol=1e-10, atol=1e-10)
    assert one.keys() == first.keys()
    assert max(float(value.abs().max()) for key, value in one.items() if key.startswith("gradient")) > 1e-3
    for key, value in one.items():
        for other in (first, second):
            torch.testing.assert_close(other[key], value, rtol=1e-10, atol=1e-10, msg=lambda text, key=key: key + text)


if __name__ == "__main__":
    run_process(int(sys.argv[1]), Path(sys.argv[2]), Path(sys.argv[3]))
