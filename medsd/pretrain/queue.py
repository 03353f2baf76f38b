"""The queue of keys of earlier batches that a query is told apart from (MoCo, arXiv 1911.05722)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from medsd.checks import check_number
from medsd.errors import ConfigError
from medsd.networks.moments import all_of_processes

UNKNOWN_GROUP = -1


class KeyQueue(nn.Module):
    """The last `size` keys, oldest out first; the same on every process.

    Places that no key has filled yet are told by `excluded`, so that no random keys stand in for them, as they do in
    the reference (our choice).

    Attributes:
        keys: (dim, size) float32, unit columns once filled.
        groups: (size,) int64, the slide or volume that each key is of, -1 where unknown.
        pointer: the column that the next key takes.
        filled: number of columns that hold keys.

    Raises:
        ConfigError: `dim` or `size` is no whole number above 0.
    """

    keys: Tensor
    groups: Tensor
    pointer: Tensor
    filled: Tensor

    def __init__(self, dim: int, size: int) -> None:
        super().__init__()
        check_number("dim", dim, "[1, inf)", whole=True)
        check_number("queue", size, "[1, inf)", whole=True)
        self.register_buffer("keys", torch.zeros(dim, size))
        self.register_buffer("groups", torch.full((size,), UNKNOWN_GROUP))
        self.register_buffer("pointer", torch.tensor(0))
        self.register_buffer("filled", torch.tensor(0))

    def check_batch(self, batch: int) -> None:
        """Refuse a batch (of all processes) whose keys do not fill the queue evenly.

        Raises:
            ConfigError: the queue's size is no multiple of it.
        """
        size = len(self.groups)
        if batch < 1 or size % batch:
            below, above = size // max(batch, 1) * batch, (size // max(batch, 1) + 1) * batch
            near = f"{below} or {above}" if below else f"{above}"
            raise ConfigError(
                f"queue={size}: must be a multiple of pretrain_batch_size (of all processes: {batch}), such as {near}"
            )

    @torch.no_grad()
    def enqueue(self, keys: Tensor, groups: Tensor) -> None:
        """Put the keys of all processes, in the order of their ranks, in the place of the oldest.

        Args:
            keys: (B, dim) of this process, of unit length; B the same on every process.
            groups: (B,) int64, -1 where unknown.

        Raises:
            ConfigError: the size is no multiple of the batch of all processes.
        """
        keys, groups = all_of_processes(keys), all_of_processes(groups)
        batch, size = len(keys), len(self.groups)
        self.check_batch(batch)
        # The pointer's number stays on the device: it would be waited for.
        columns = (self.pointer + torch.arange(batch, device=self.pointer.device)) % size
        self.keys[:, columns] = keys.T
        self.groups[columns] = groups
        self.pointer.add_(batch).remainder_(size)
        self.filled.copy_((self.filled + batch).clamp(max=size))

    def excluded(self, groups: Tensor) -> Tensor:
        """(B, size) bool: what is no negative of queries of these groups (B,): keys of the same one, empty places."""
        empty = torch.arange(len(self.groups), device=self.groups.device) >= self.filled
        same = (groups[:, None] == self.groups) & (groups[:, None] != UNKNOWN_GROUP)
        return same | empty
