"""Hidden features of a slide's blocks while they are needed: on the accelerator as long as they fit, else on disk."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from medsd.heatmap.store import BlockStore

# Of what a device has left; half of it is for computing.
_DEVICE_SHARE = 0.25


class FeatureStore:
    """Features by number. What the accelerator holds does not outlive the process and is computed again.

    Args:
        blocks: where the others are kept.
        room_bytes: most that is held in memory.
    """

    def __init__(self, blocks: BlockStore, room_bytes: float) -> None:
        self._blocks, self._room = blocks, room_bytes
        self._held: dict[int, Tensor] = {}

    def has(self, number: int) -> bool:
        """Whether they were written."""
        return number in self._held or self._blocks.has(_name(number))

    def write(self, number: int, features: Tensor) -> None:
        """Keep features (1, C, h, w).

        Raises:
            OutputError: the folder cannot be written to, or the disk is full.
        """
        if _bytes(features) + sum(map(_bytes, self._held.values())) <= self._room:
            self._held[number] = features
        else:
            self._blocks.write(_name(number), features=features.float().cpu().numpy())

    def read(self, number: int) -> Tensor:
        """Features (1, C, h, w), on any device."""
        if number in self._held:
            return self._held[number]
        return torch.from_numpy(self._blocks.read(_name(number))["features"])

    def remove(self, number: int) -> None:
        """Let them go, if they are there."""
        self._held.pop(number, None)
        self._blocks.remove(_name(number))


@dataclass(frozen=True)
class TissueFeatures(Sequence[tuple[Tensor, Tensor]]):
    """Features (C, h, w) of each node, read when asked for, and which of their cells are `tissue`."""

    store: FeatureStore
    places: list[tuple[slice, slice]]
    tissue: Tensor

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, at: Any) -> Any:
        # Decomposed on the CPU.
        features = self.store.read(range(len(self))[at]).float().cpu()
        return features[0], self.tissue[self.places[at]]


def room_on(device: torch.device) -> float:
    """Bytes of features to hold on a device: none on the CPU, whose memory is kept for computing."""
    return _DEVICE_SHARE * free_bytes(device) if device.type == "cuda" else 0.0


def free_bytes(device: torch.device) -> float:
    """Bytes of a GPU that nothing is using, what torch has put by included."""
    put_by = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + put_by


def _bytes(features: Tensor) -> int:
    return features.numel() * features.element_size()


def _name(number: int) -> str:
    return f"features-{number}"
