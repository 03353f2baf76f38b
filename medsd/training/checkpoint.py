"""The state of a training, one file that is always whole: what resumes it and the best network so far."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from medsd.checks import check_number
from medsd.errors import OutputError, TrainingError
from medsd.files import atomic_path, write_json
from medsd.networks.start import UNREADABLE
from medsd.record import differences


@dataclass
class TrainingState:
    """Where a training stands.

    Attributes:
        epoch, steps: whole epochs and steps done.
        epoch_length: steps an epoch.
        sums: of each term of the loss, over the steps of the epoch that is not whole yet, divided by `epoch_length`.
        best_metric: the best validation metric, -1 before the first.
        best_epoch: the epoch that gave it.
        best_network: state of the network at that epoch.
        hard: items of the hard-negative round, once found.
    """

    epoch: int = 0
    steps: int = 0
    epoch_length: int = 0
    sums: dict[str, float] = field(default_factory=dict)
    best_metric: float = -1.0
    best_epoch: int = 0
    best_network: dict[str, torch.Tensor] | None = None
    hard: torch.Tensor | None = None


class Checkpoint:
    """Reads and writes the checkpoint of one training.

    Not ignite's: that one names a file by epoch and removes the last before the next is written, and it neither knows
    the settings nor what cannot be resumed from.

    Args:
        folder: holds `checkpoint.pt`, and `settings.json` for people to read.
        parts: objects with `state_dict` and `load_state_dict` by name, as for ignite's `to_save`; None is left out.
        save_every: steps between two saves within an epoch; None saves whole epochs alone.

    Raises:
        ConfigError: `save_every` is below 1.
    """

    def __init__(self, folder: str | Path, parts: Mapping[str, Any], save_every: int | None = None) -> None:
        if save_every is not None:
            check_number("save_every", save_every, "[1, inf)", whole=True, hint="null saves whole epochs alone")
        self.folder, self.save_every = Path(folder), save_every
        self.parts = {name: part for name, part in parts.items() if part is not None}
        self.path = self.folder / "checkpoint.pt"

    def load(self, settings: Mapping[str, Any]) -> TrainingState:
        """Put the parts back to where the training stopped; the state of a new training when there is none.

        Args:
            settings: what must be equal for a training to be resumed (plain JSON values, nested by key).

        Raises:
            TrainingError: the folder holds a training with other settings, or the checkpoint is damaged.
        """
        self.settings: dict[str, Any] = json.loads(json.dumps(settings))
        if not self.path.is_file():
            write_json(self.folder / "settings.json", self.settings)
            return TrainingState()
        try:
            content = torch.load(self.path, map_location="cpu", weights_only=True)
            changed = differences(content["settings"], self.settings)
            if changed:
                raise TrainingError(
                    f"{self.folder}: holds a training with another {', '.join(changed)}; choose another output_dir or "
                    "delete this folder"
                )
            for name, part in self.parts.items():
                part.load_state_dict(content[name])
            return TrainingState(**content["state"])
        except UNREADABLE as error:
            reason = f"{type(error).__name__} {error}".partition("\n")[0]
            raise TrainingError(
                f"{self.path}: damaged or of another network ({reason}); delete it to start anew"
            ) from error

    def save(self, state: TrainingState) -> None:
        """Write settings, parts and state atomically.

        Raises:
            OutputError: the file cannot be written.
            TrainingError: weights are not finite; the checkpoint before stays.
        """
        networks = [part for part in self.parts.values() if isinstance(part, nn.Module)]
        finite = [weights.isfinite().all() for network in networks for weights in network.parameters()]
        if finite and not torch.stack(finite).all():
            # A loss may be finite and its gradient not: what can never go on would take the place of what can.
            raise TrainingError(
                f"{self.path}: weights are not finite after step {state.steps} and are not saved; lower the learning "
                "rate in another output_dir; this one keeps its last checkpoint"
            )
        content = {name: part.state_dict() for name, part in self.parts.items()}
        with atomic_path(self.path) as temporary:
            try:
                torch.save({**content, "settings": self.settings, "state": vars(state)}, temporary)
            except RuntimeError as error:  # what a full disk gives here, instead of an OSError
                reason = str(error).partition("\n")[0]
                raise OutputError(f"{self.path}: cannot be written ({reason}); free some disk space") from error
