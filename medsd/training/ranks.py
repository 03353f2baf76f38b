"""Several processes train as one (`torchrun`): who am I, and which items are mine."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import Sampler

from medsd.cohort.dataset import SlideGroupedSampler
from medsd.errors import ConfigError
from medsd.networks.moments import first_of_processes


def rank() -> int:
    """The number of this process, 0 where there is only one."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def world_size() -> int:
    """How many processes train together, 1 where there is only one."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def of_first_rank(values: Tensor, device: torch.device) -> Tensor:
    """The first process's values (n,), whatever this one found, on the CPU.

    Args:
        device: what the processes exchange tensors on.
    """
    if world_size() == 1:
        return values
    count = int(first_of_processes(torch.tensor(len(values), device=device)))
    mine = values.to(device) if rank() == 0 else torch.zeros(count, dtype=values.dtype, device=device)
    return first_of_processes(mine).cpu()


def start_ranks(timeout_minutes: float = 60.0) -> torch.device:
    """Join the processes that `torchrun` started; returns this one's device, a GPU each, or the CPU (gloo).

    Raises:
        ConfigError: not started by torchrun, or more processes than GPUs.
    """
    if not dist.is_torchelastic_launched():
        raise ConfigError(
            "multi_gpu: not started by torchrun; run torchrun --nproc_per_node=GPUS -m monai.bundle run ..."
        )
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if gpus and local >= gpus:
        raise ConfigError(f"torchrun: process {local} has no GPU, there are {gpus}; set --nproc_per_node={gpus}")
    device = torch.device(f"cuda:{local}" if gpus else "cpu")
    if gpus:
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if gpus else "gloo", timeout=timedelta(minutes=timeout_minutes))
    return device


def stop_ranks() -> None:
    """Leave the group of processes."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


class RankSampler(Sampler[int]):
    """This process's items of a sampler's draw: every `world_size`-th, so that all draw as many.

    Args:
        sampler: the same on every rank; its draw depends on seed and epoch alone.
    """

    def __init__(self, sampler: SlideGroupedSampler) -> None:
        self.sampler, self.rank, self.world_size = sampler, rank(), world_size()

    def __len__(self) -> int:
        return len(self.sampler) // self.world_size

    def set_epoch(self, epoch: int) -> None:
        """Choose the draw of epoch `epoch` (counted from 0)."""
        self.sampler.set_epoch(epoch)

    def set_hard(self, items: npt.NDArray[np.int64], share: float) -> None:
        """See `SlideGroupedSampler.set_hard`."""
        self.sampler.set_hard(items, share)

    def __iter__(self) -> Iterator[int]:
        drawn = list(self.sampler)
        yield from drawn[self.rank : len(self) * self.world_size : self.world_size]
