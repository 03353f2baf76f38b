"""Several processes train as one (`torchrun`), by ignite.distributed: the group, and which items are whose."""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import ClassVar, Protocol

import ignite.distributed as idist
import numpy as np
import numpy.typing as npt
import torch

from medsd.checks import check_number
from medsd.cohort.dataset import GroupedSampler, SlideGroupedSampler
from medsd.errors import ConfigError


class Grouped(Protocol):
    """Items with their groups (n,) str, such as slides."""

    groups: npt.NDArray[np.str_]


class Labelled(Grouped, Protocol):
    """Items with their labels (n,) int8, too."""

    labels: npt.NDArray[np.int8]


class _Dealt(GroupedSampler):
    """A sampler whose items are dealt out to the processes that train together."""

    def __len__(self) -> int:
        return self.samples // idist.get_world_size()

    def __iter__(self) -> Iterator[int]:
        processes = idist.get_world_size()
        yield from self.draw()[idist.get_rank() : len(self) * processes : processes][self._done :]


class BalancedSampler(_Dealt, SlideGroupedSampler):
    """Draws by class and slide (see `SlideGroupedSampler`), dealt out to the processes that train together.

    Args:
        dataset: the items.
        samples: items an epoch, of all processes; what does not deal out evenly is left out.
        batch_size: of one process; at least one batch an epoch.
        run: items of one slide and class in a row.
        by_group: draw evenly from the slides (or clusters) of a class; False draws as many as each holds.
        seed: start of the random draw.

    Raises:
        ConfigError: a number out of its range, or a batch larger than an epoch.
        DatasetError: a class has no item.
    """

    def __init__(
        self, dataset: Labelled, samples: int, batch_size: int, run: int = 1, by_group: bool = True, seed: int = 0
    ) -> None:
        _check(samples, batch_size, run)
        super().__init__(dataset.labels, _groups(dataset, by_group), samples, run, seed)
        self.batch_size, self.by_group = batch_size, by_group


class EvenSampler(_Dealt):
    """Draws whatever the class (see `GroupedSampler`), dealt out to the processes that train together.

    Args:
        dataset: the items.
        samples: items an epoch, of all processes, what does not deal out evenly being left out; None for as many as
            there are.
        batch_size, run, by_group, seed: as in `BalancedSampler`.

    Raises:
        ConfigError: a number out of its range, or a batch larger than an epoch.
    """

    keys: ClassVar[tuple[str, str]] = ("batch_size", "samples_per_epoch")

    def __init__(
        self,
        dataset: Grouped,
        samples: int | None,
        batch_size: int,
        run: int = 1,
        by_group: bool = True,
        seed: int = 0,
    ) -> None:
        samples = len(dataset.groups) if samples is None else samples
        _check(samples, batch_size, run, self.keys)
        super().__init__(_groups(dataset, by_group), samples, run, seed)
        self.batch_size, self.by_group = batch_size, by_group


class UnlabelledSampler(EvenSampler):
    """An `EvenSampler` of pre-training, by whose keys its messages go."""

    keys = ("pretrain_batch_size", "pretrain_samples")


def _check(
    samples: int, batch_size: int, run: int, keys: tuple[str, str] = ("batch_size", "samples_per_epoch")
) -> None:
    check_number("tiles_in_a_row", run, "[1, inf)", whole=True)
    processes = idist.get_world_size()
    hint = f"an epoch has {keys[1]}={samples}" + (f" of {processes} processes" if processes > 1 else "")
    check_number(keys[0], batch_size, f"[2, {samples // processes}]", whole=True, hint=hint)


def _groups(dataset: Grouped, by_group: bool) -> npt.NDArray[np.str_]:
    return dataset.groups if by_group else np.zeros_like(dataset.groups)


def start_processes(timeout_minutes: float = 60.0) -> torch.device:
    """Join the processes that `torchrun` started; returns this one's device, a GPU each, or the CPU (gloo).

    Raises:
        ConfigError: not started by torchrun, or more processes than GPUs.
    """
    if not torch.distributed.is_torchelastic_launched():
        raise ConfigError(
            "multi_gpu: not started by torchrun; run torchrun --nproc_per_node=GPUS -m monai.bundle run ..."
        )
    local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
    if gpus and local >= gpus:
        raise ConfigError(f"torchrun: process {local} has no GPU, there are {gpus}; set --nproc_per_node={gpus}")
    idist.initialize("nccl" if gpus else "gloo", timeout=timedelta(minutes=timeout_minutes))
    return idist.device()
