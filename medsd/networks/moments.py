"""Mean and covariance of a batch's features, over every process of a distributed training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from medsd.errors import ConfigError, TrainingError


@dataclass(frozen=True)
class Moments:
    """Statistics of the features of all processes, with their graph.

    Attributes:
        mean: (..., 1, d) of each channel where features are (..., B, d), (d,) where they are (B, d).
        covariance: (..., d, d), divided by `count` - 1.
        count: samples of all processes.
    """

    mean: Tensor
    covariance: Tensor
    count: int


def feature_moments(features: Tensor) -> Moments:
    """Mean and covariance of a batch, of all processes together where torch.distributed is initialised.

    Two passes, the mean first, so that a large common offset costs no digits; float32 or float64 whatever the
    autocast. Every process gets the same moments. A loss of them alone is the same on every process, and since the
    gradients are summed too, averaging the parameters' gradients (as DistributedDataParallel does) gives exactly the
    gradient of one process with the whole batch, for unequal shares of the batch as well.

    Args:
        features: (B, d), or (..., B, d) of which each has its own moments; every process calls this at the same
            place, and B may differ between them (0 is allowed where others have samples).

    Raises:
        TrainingError: fewer than two samples in all.
    """
    if features.dtype in (torch.float16, torch.bfloat16):
        features = features.float()
    total, count = features.sum(dim=-2, keepdim=features.ndim > 2), features.shape[-2]
    if _is_distributed():
        sums = sum_over_processes(torch.cat([total.flatten(), total.new_tensor([count])]))
        total, count = sums[:-1].view_as(total), int(sums[-1])
    if count < 2:
        raise TrainingError(
            f"batch_size={count} at once: a covariance needs at least 2 samples; raise batch_size or lower accumulation"
        )
    mean = total / count
    centred = features - mean
    with torch.autocast(features.device.type, enabled=False):
        scatter = sum_over_processes(centred.mT @ centred)
    return Moments(mean, scatter / (count - 1), count)


def sum_over_processes(values: Tensor) -> Tensor:
    """The sum of every process's `values` (any shape, the same on all); `values` itself without torch.distributed.

    Differentiable: the gradient is the sum of the processes' gradients.
    """
    if not _is_distributed():
        return values
    summed: Tensor = _SumOverProcesses.apply(values)  # type: ignore[no-untyped-call]
    return summed


def first_of_processes(values: Tensor) -> Tensor:
    """The first process's `values` (any shape, the same on all) on every process; without graph."""
    if _is_distributed():
        values = values.detach().clone(memory_format=torch.contiguous_format)
        dist.broadcast(values, src=0)
    return values


def all_of_processes(values: Tensor) -> Tensor:
    """Every process's `values` (B, ...), the same shape on all, joined in the order of their ranks; without graph."""
    values = values.detach().contiguous()
    if not _is_distributed():
        return values
    parts = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, values)
    return torch.cat(parts)


def group_channels(order: Tensor, group_size: int | None) -> tuple[Tensor, ...]:
    """Channel numbers `order` (d,) cut into groups of at most `group_size`, whose sizes differ by at most one.

    Even sizes rather than a small last group, in which hardly anything could be decorrelated (our choice).
    None makes one group.

    Raises:
        ConfigError: `group_size` is below 2 or above d.
    """
    dim = len(order)
    if group_size is None:
        return (order,)
    if not 2 <= group_size <= dim:
        raise ConfigError(f"group_size={group_size}: must lie in 2 to {dim} (the channels); leave it out for one group")
    return order.tensor_split(-(-dim // group_size))


class _SumOverProcesses(torch.autograd.Function):
    """Stands in for `torch.distributed.nn.functional.all_reduce`, which is deprecated for a private module."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        summed = values.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(summed)
        return summed

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        (gradient,) = gradients
        return sum_over_processes(gradient)


def _is_distributed() -> bool:
    return dist.is_available() and dist.is_initialized()
