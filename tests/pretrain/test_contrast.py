"""InfoNCE at known similarities, the momentum encoder, and the schedule of its momentum."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from medsd.pretrain.contrast import follow, info_nce, momentum_at, shuffle_ranks, unshuffle_ranks


def unit(rows: int, dim: int, seed: int = 0) -> Tensor:
    draw = torch.randn(rows, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    return F.normalize(draw, dim=1)


@settings(max_examples=25, deadline=None)
@given(size=st.integers(1, 20), temperature=st.floats(0.05, 1))
def test_known_similarities(size: int, temperature: float) -> None:
    basis = torch.eye(size + 2, dtype=torch.float64)
    queue = basis[:, :size]
    q, other = basis[-1:], basis[-2:-1]
    loss, accuracy = info_nce(q, other, queue, temperature)  # all similarities are 0
    assert float(loss) == pytest.approx(math.log(1 + size))
    loss, accuracy = info_nce(q, q, queue, temperature)
    assert float(loss) == pytest.approx(math.log(1 + size * math.exp(-1 / temperature)))
    assert float(accuracy) == 1
    loss, accuracy = info_nce(queue.T[:1], other, queue, temperature)
    assert float(loss) == pytest.approx(math.log(size + math.exp(1 / temperature)))
    assert float(accuracy) == 0


def test_excluded_keys_are_as_if_they_were_not_there() -> None:
    q, k, queue = unit(3, 6, 0), unit(3, 6, 1), unit(10, 6, 2).T
    excluded = torch.rand(3, 10, generator=torch.Generator().manual_seed(3)) < 0.5
    loss, accuracy = info_nce(q, k, queue, 0.2, excluded)
    alone = [info_nce(q[i : i + 1], k[i : i + 1], queue[:, ~excluded[i]], 0.2) for i in range(3)]
    torch.testing.assert_close(loss, torch.stack([each for each, _ in alone]).mean())
    torch.testing.assert_close(accuracy, torch.stack([each for _, each in alone]).mean())


def test_without_any_negative_there_is_nothing_to_learn() -> None:
    q = unit(3, 6).requires_grad_()
    loss, _ = info_nce(q, unit(3, 6, 1), torch.zeros(6, 4), 0.2, torch.ones(3, 4, dtype=torch.bool))
    loss.backward()
    assert float(loss.detach()) == 0 and q.grad is not None and not q.grad.any()


def test_gradcheck() -> None:
    k, queue = unit(3, 4, 1), unit(5, 4, 2).T
    assert torch.autograd.gradcheck(
        lambda q: info_nce(F.normalize(q, dim=1), k, queue, 0.5)[0], unit(3, 4).requires_grad_()
    )


def test_single_precision_under_autocast() -> None:
    q, k, queue = unit(4, 8).float(), unit(4, 8, 1).float(), unit(9, 8, 2).T.float()
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = info_nce(q, k, queue, 0.2)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, info_nce(q, k, queue, 0.2)[0])


def network(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7)).double()


@pytest.mark.parametrize("momentum", [0.99, 0.5])
def test_the_difference_shrinks_as_a_power(momentum: float) -> None:
    query, key = network(0), network(1).requires_grad_(False)
    before = [a.detach() - b.detach() for a, b in zip(key.parameters(), query.parameters(), strict=True)]
    statistics = key[1].running_mean.clone()  # type: ignore[index, union-attr]
    query[1].running_mean.add_(3)  # type: ignore[index, union-attr]
    for _ in range(10):
        follow(key, query, momentum)
    for ours, theirs, start in zip(key.parameters(), query.parameters(), before, strict=True):
        torch.testing.assert_close(ours - theirs, start * momentum**10, rtol=0, atol=1e-6)
        assert ours.grad is None and not ours.requires_grad
    assert torch.equal(key[1].running_mean, statistics)  # type: ignore[index, arg-type]


def test_momentum_rises_from_its_start_to_one() -> None:
    values = [momentum_at(share / 20, 0.99) for share in range(21)]
    assert values[0] == pytest.approx(0.99) and values[10] == pytest.approx(0.995) and values[20] == pytest.approx(1)
    assert values == sorted(values) and max(values) <= 1


def test_one_process_keeps_its_batch() -> None:
    x = unit(5, 3)
    shuffled, order = shuffle_ranks(x, torch.Generator())
    assert torch.equal(shuffled, x) and torch.equal(unshuffle_ranks(shuffled, order), x)
