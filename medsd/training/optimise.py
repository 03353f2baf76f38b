"""What steps of any loss share: precision, a batch in pieces, processes, random draws, a loss that must be finite."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, TypeVar, get_args

import ignite.distributed as idist
import torch
from monai.engines.trainer import SupervisedTrainer
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from medsd.checks import check_choice, check_number
from medsd.errors import TrainingError

Precision = Literal["none", "bfloat16", "float16"]

_DTYPES = {"none": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SEED_STEP = 1_000_003
_RANK_STEP = 7_919


class Loss(Protocol):
    """The loss of a piece of a batch: `total` with its graph, and its parts by name, scalars without graph."""

    @property
    def total(self) -> Tensor: ...

    @property
    def parts(self) -> Mapping[str, Tensor]: ...


OneLoss = TypeVar("OneLoss", bound=Loss)


@dataclass
class OptimiserStep:
    """One optimiser step of MONAI's `SupervisedTrainer(iteration_update=...)`; the loss is a subclass's.

    The step owns zeroing, autocast, gradient scaling, accumulation, backward and the optimiser; the trainer's own are
    not used, nor is its inferer. Its draws, dropout's too, depend on the seed, the iteration and the rank alone, so a
    resumed training equals the whole one. Of several processes each sees its own batch, and gradients are averaged
    over them.

    Attributes:
        seed: start of the random draws.
        amp: "bfloat16" or "float16" (with gradient scaling) autocast, or "none". Statistics stay in float32.
        accumulation: a batch is run in this many pieces, whose gradients are averaged: less memory, the same number of
            steps. BatchNorm and decorrelation see a piece at a time.

    Raises:
        ConfigError: an unknown precision, or fewer than one piece.
    """

    key_prefix: ClassVar[str] = ""  # of the keys that messages name

    seed: int = 0
    amp: Precision = "none"
    accumulation: int = 1
    _wrapped: tuple[tuple[object, ...], nn.Module] | None = field(init=False, repr=False, default=None)
    _scaler: GradScaler | None = field(init=False, repr=False, default=None)
    _scale: dict[str, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("amp", self.amp, get_args(Precision))
        check_number("accumulation", self.accumulation, "[1, inf)", whole=True)

    def seed_of(self, engine: SupervisedTrainer) -> int:
        """Where the draws of this process in this iteration start."""
        return self.seed + _SEED_STEP * int(engine.state.iteration) + _RANK_STEP * idist.get_rank()

    def optimise(
        self, engine: SupervisedTrainer, loss: nn.Module, size: int, piece: Callable[[slice], OneLoss]
    ) -> tuple[list[OneLoss], dict[str, float]]:
        """Run a batch piece by piece, forwards and backwards, and step.

        Args:
            engine: its optimiser steps.
            loss: the module that `piece` runs, as `on_all_ranks` gives it.
            size: B, the batch's.
            piece: the loss of these rows of the batch.

        Returns:
            The pieces' losses, and the batch's mean `loss` and parts by name.

        The host waits for the device once, until it knows the last loss; the backward pass is then under way (of
        several processes it waits for each piece, before its backward pass).

        Raises:
            TrainingError: a loss is not finite, or the batch has fewer items than pieces; nothing was stepped.
        """
        if size < self.accumulation:
            key = f"{self.key_prefix}batch_size"
            raise TrainingError(f"{key}={size}: less than accumulation={self.accumulation}; raise {key}")
        device = torch.device(engine.state.device)
        scaler = self._scaling(device)
        engine.optimizer.zero_grad()
        pieces = [slice(int(rows[0]), int(rows[-1]) + 1) for rows in torch.arange(size).tensor_split(self.accumulation)]
        shares = [(rows.stop - rows.start) / size for rows in pieces]
        done: list[OneLoss] = []
        told: list[Callable[[], list[float]]] = []
        # Dropout draws from torch's own generators, which are left as they were.
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(self.seed_of(engine) + 3)
            for rows, share in zip(pieces, shares, strict=True):
                with _synchronised(loss, last=rows.stop == size):
                    with torch.autocast(device.type, _DTYPES[self.amp], enabled=self.amp != "none"):
                        done.append(piece(rows))
                    told.append(_told([done[-1].total, *done[-1].parts.values()]))
                    if isinstance(loss, DistributedDataParallel):
                        # Before its gradients become the others': a process that stops here takes part in no sum.
                        self._check_finite(told[-1]()[0], engine)
                    scaler.scale(share * done[-1].total).backward()  # type: ignore[no-untyped-call]
        values = [numbers() for numbers in told]
        for loss_of_piece, *_ in values:
            self._check_finite(loss_of_piece, engine)
        scaler.step(engine.optimizer)
        scaler.update()
        means = (sum(share * each for share, each in zip(shares, of, strict=True)) for of in zip(*values, strict=True))
        return done, dict(zip(("loss", *done[0].parts), means, strict=True))

    def on_all_ranks(self, of: tuple[object, ...], make: Callable[[], nn.Module]) -> nn.Module:
        """The module that `make` gives for these objects, kept; of several processes in `DistributedDataParallel`."""
        if self._wrapped is None or any(one is not other for one, other in zip(self._wrapped[0], of, strict=True)):
            module = make()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                # An encoder may hold parameters that the loss does not reach, such as a norm after AIM's last stage.
                module = DistributedDataParallel(module, find_unused_parameters=True)
            self._wrapped = of, module
        return self._wrapped[1]

    def state_dict(self) -> dict[str, Any]:
        """What resumes the scaling of half-precision gradients; empty unless `amp` is "float16"."""
        return self._scale if self._scaler is None else self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put `state_dict` back; before the first step."""
        self._scale = state

    def _scaling(self, device: torch.device) -> GradScaler:
        if self._scaler is None:
            self._scaler = GradScaler(device.type, enabled=self.amp == "float16")
            if self._scale:
                self._scaler.load_state_dict(self._scale)
        return self._scaler

    def _check_finite(self, value: float, engine: SupervisedTrainer) -> None:
        if not math.isfinite(value):
            raise TrainingError(
                f"loss is {value} in epoch {engine.state.epoch}, iteration {engine.state.iteration}; lower the "
                f"learning rate ({self.key_prefix}lr) or the loss's weights in another output_dir; this one keeps its "
                "last checkpoint, from which the same settings go on"
            )


def _told(values: Sequence[Tensor]) -> Callable[[], list[float]]:
    """Scalars, the first on the device, as numbers: on their way at once, and waited for, alone, by who calls."""
    device = values[0].device
    if device.type != "cuda":  # of which not all know float64
        found_here = [float(value.detach()) for value in values]
        return lambda: found_here
    moved = [value.detach().to(device, torch.float64, non_blocking=True) for value in values]
    there = torch.stack(moved).to("cpu", non_blocking=True)
    sent = torch.cuda.current_stream(device).record_event()

    def numbers() -> list[float]:
        sent.synchronize()
        found: list[float] = there.tolist()
        return found

    return numbers


def _synchronised(loss: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Processes exchange gradients after the last piece alone."""
    return loss.no_sync() if isinstance(loss, DistributedDataParallel) and not last else nullcontext()
