"""The queue: order, wrapping, what is excluded, and what does not fit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from medsd.errors import ConfigError
from medsd.pretrain.queue import KeyQueue


def keys(batch: int, dim: int = 4, seed: int = 0) -> Tensor:
    return F.normalize(torch.randn(batch, dim, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_columns_are_replaced_in_order_and_the_pointer_wraps() -> None:
    queue = KeyQueue(4, 12)
    batches = [keys(4, seed=seed) for seed in range(4)]
    for step, batch in enumerate(batches[:3]):
        assert int(queue.pointer) == 4 * step and int(queue.filled) == 4 * step
        queue.enqueue(batch, torch.full((4,), step))
    assert int(queue.pointer) == 0 and int(queue.filled) == 12
    assert torch.equal(queue.keys, torch.cat(batches[:3]).T)
    torch.testing.assert_close(queue.keys.norm(dim=0), torch.ones(12))
    queue.enqueue(batches[3], torch.full((4,), 9))
    assert torch.equal(queue.keys[:, :4], batches[3].T) and torch.equal(queue.keys[:, 4:8], batches[1].T)
    assert queue.groups.tolist() == [9] * 4 + [1] * 4 + [2] * 4
    assert int(queue.pointer) == 4 and int(queue.filled) == 12


def test_no_gradient_is_kept() -> None:
    queue = KeyQueue(4, 8)
    queue.enqueue(keys(4).requires_grad_(), torch.zeros(4, dtype=torch.int64))
    assert not queue.keys.requires_grad and not list(queue.parameters())


def test_same_groups_and_empty_places_are_excluded() -> None:
    queue = KeyQueue(4, 8)
    assert bool(queue.excluded(torch.tensor([0, -1])).all())
    queue.enqueue(keys(4), torch.tensor([0, 1, -1, 1]))
    found = queue.excluded(torch.tensor([1, -1, 5]))
    assert found[:, 4:].all()
    assert found[:, :4].int().tolist() == [[0, 1, 0, 1], [0] * 4, [0] * 4]


def test_state_brings_everything_back() -> None:
    first, second = KeyQueue(4, 12), KeyQueue(4, 12)
    for step in range(4):
        first.enqueue(keys(4, seed=step), torch.full((4,), step))
    second.load_state_dict(first.state_dict())
    for queue in (first, second):
        queue.enqueue(keys(4, seed=7), torch.full((4,), 7))
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name])


@pytest.mark.parametrize(("size", "batch", "near"), [(10, 4, "8 or 12"), (10, 16, "16")])
def test_a_size_that_is_no_multiple_of_the_batch(size: int, batch: int, near: str) -> None:
    queue = KeyQueue(4, size)
    words = rf"queue={size}: must be a multiple of pretrain_batch_size \(of all processes: {batch}\), such as {near}$"
    with pytest.raises(ConfigError, match=words):
        queue.enqueue(keys(batch), torch.zeros(batch, dtype=torch.int64))
    assert int(queue.filled) == 0 and not queue.keys.any()


@pytest.mark.parametrize(("dim", "size", "word"), [(0, 8, "dim=0"), (4, 0, "queue=0"), (4, 2.5, "queue=2.5")])
def test_sizes_out_of_range(dim: int, size: int, word: str) -> None:
    with pytest.raises(ConfigError, match=word):
        KeyQueue(dim, size)
