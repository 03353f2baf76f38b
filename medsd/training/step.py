"""The training step for MONAI's `SupervisedTrainer(iteration_update=...)`: any objective, precision and ranks."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

import ignite.distributed as idist
import torch
from monai.engines.trainer import SupervisedTrainer
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.nn.parallel import DistributedDataParallel

from medsd.checks import check_choice, check_number
from medsd.errors import TrainingError
from medsd.networks.classifier import Classifier
from medsd.networks.modes import training
from medsd.slides.stain.augment import StainAugment
from medsd.training.augment import augment
from medsd.training.terms import Objective, Terms

Precision = Literal["none", "bfloat16", "float16"]

_DTYPES = {"none": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SEED_STEP = 1_000_003
_RANK_STEP = 7_919


@dataclass
class ObjectiveStep:
    """One optimiser step on a batch {"image": uint8 (B, 3, S, S), "label": (B,)}.

    The trainer's `loss_function` is the objective. The step owns zeroing, autocast, gradient scaling, accumulation,
    backward and the optimiser; the trainer's own are not used, nor is its inferer. Its draws depend on the seed, the
    iteration and the rank alone, so a resumed training equals the whole one (for networks without dropout, which draws
    from torch's global generator). Frozen stages (parameters that require no gradient) keep their BatchNorm
    statistics. Of several processes each sees its own batch, and gradients are averaged over them.

    Attributes:
        seed: start of the random draws.
        stain: strength of the stain augmentation, 0 for none (see `augment`).
        stain_apart: strength of the one that changes haematoxylin and eosin on their own, 0 for none (see
            `StainAugment`; its shift is a quarter of its strength, our choice).
        amp: "bfloat16" or "float16" (with gradient scaling) autocast, or "none". Statistics stay in float32.
        accumulation: a batch is run in this many pieces, whose gradients are averaged: less memory, the same number of
            steps. BatchNorm and decorrelation see a piece at a time.

    Raises:
        ConfigError: a strength outside 0 to 1, an unknown precision, or fewer than one piece.
    """

    seed: int = 0
    stain: float = 0.1
    stain_apart: float = 0.0
    amp: Precision = "none"
    accumulation: int = 1
    _restain: StainAugment | None = field(init=False, repr=False)
    _wrapped: tuple[nn.Module, Objective, nn.Module] | None = field(init=False, repr=False, default=None)
    _scaler: GradScaler | None = field(init=False, repr=False, default=None)
    _scale: dict[str, Any] = field(init=False, repr=False, default_factory=dict)

    def __post_init__(self) -> None:
        check_number("stain", self.stain, "[0, 1)")
        check_choice("amp", self.amp, get_args(Precision))
        check_number("accumulation", self.accumulation, "[1, inf)", whole=True)
        self._restain = StainAugment(self.stain_apart, self.stain_apart / 4) if self.stain_apart else None

    def __call__(self, engine: SupervisedTrainer, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Run the step; returns the loss and its parts as floats, with `pred` (logits) and `label`.

        Raises:
            TrainingError: the loss is not finite, a label is outside the classes, or the batch is too small.
        """
        device = torch.device(engine.state.device)
        network, iteration = cast(Classifier, engine.network), engine.state.iteration
        _check_labels(batch["label"], network.classes)
        if len(batch["label"]) < self.accumulation:
            raise TrainingError(
                f"batch_size={len(batch['label'])}: less than accumulation={self.accumulation}; raise batch_size"
            )
        seed = self.seed + _SEED_STEP * iteration + _RANK_STEP * idist.get_rank()
        images = self._augmented(batch["image"], seed).to(device, non_blocking=True)
        labels = batch["label"].to(device, torch.int64, non_blocking=True)
        draws = torch.Generator(device).manual_seed(seed + 1)
        epochs_done = (iteration - 1) / (engine.state.epoch_length or 1)
        training(network)
        engine.optimizer.zero_grad()
        loss, scaler = self._loss(network, cast(Objective, engine.loss_function)), self._scaling(device)
        pieces = list(zip(images.tensor_split(self.accumulation), labels.tensor_split(self.accumulation), strict=True))
        shares = [len(of_piece) / len(labels) for _, of_piece in pieces]
        terms: list[Terms] = []
        for number, ((piece, of_piece), share) in enumerate(zip(pieces, shares, strict=True)):
            with _synchronised(loss, last=number == len(pieces) - 1):
                with torch.autocast(device.type, _DTYPES[self.amp], enabled=self.amp != "none"):
                    terms.append(loss(network.normalise(piece), of_piece, epochs_done, draws))
                _check_finite(terms[-1], engine)
                scaler.scale(share * terms[-1].total).backward()  # type: ignore[no-untyped-call]
        scaler.step(engine.optimizer)
        scaler.update()
        means = {
            name: sum(share * float(of_piece.parts[name]) for share, of_piece in zip(shares, terms, strict=True))
            for name in terms[0].parts
        }
        total = sum(share * float(of_piece.total.detach()) for share, of_piece in zip(shares, terms, strict=True))
        return {"loss": total, **means, "pred": torch.cat([each.logits for each in terms]), "label": labels}

    def state_dict(self) -> dict[str, Any]:
        """What resumes the scaling of half-precision gradients; empty unless `amp` is "float16"."""
        return self._scale if self._scaler is None else self._scaler.state_dict()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put `state_dict` back; before the first step."""
        self._scale = state

    def _augmented(self, images: Tensor, seed: int) -> Tensor:
        images = augment(images, torch.Generator().manual_seed(seed), self.stain)
        return images if self._restain is None else self._restain(images, torch.Generator().manual_seed(seed + 2))

    def _scaling(self, device: torch.device) -> GradScaler:
        if self._scaler is None:
            self._scaler = GradScaler(device.type, enabled=self.amp == "float16")
            if self._scale:
                self._scaler.load_state_dict(self._scale)
        return self._scaler

    def _loss(self, network: Classifier, objective: Objective) -> nn.Module:
        """The objective as a module, inside `DistributedDataParallel` where there are several processes.

        The loss is wrapped and not the network: an objective runs the network several times a step, while the wrapper
        wants one forward pass a backward pass.
        """
        if self._wrapped is None or self._wrapped[0] is not network or self._wrapped[1] is not objective:
            loss: nn.Module = _Loss(network, objective)
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                # An encoder may hold parameters that the loss does not reach, such as a norm after AIM's last stage.
                loss = DistributedDataParallel(loss, find_unused_parameters=True)
            self._wrapped = network, objective, loss
        return self._wrapped[2]


class _Loss(nn.Module):
    def __init__(self, network: nn.Module, objective: Objective) -> None:
        super().__init__()
        self.network, self.objective = network, objective

    def forward(self, x: Tensor, labels: Tensor, epoch: float, draws: torch.Generator) -> Terms:
        return self.objective(self.network, x, labels, epoch, draws)


def _synchronised(loss: nn.Module, last: bool) -> AbstractContextManager[Any]:
    """Processes exchange gradients after the last piece alone."""
    return loss.no_sync() if isinstance(loss, DistributedDataParallel) and not last else nullcontext()


def _check_finite(terms: Terms, engine: SupervisedTrainer) -> None:
    loss = float(terms.total.detach())
    if not math.isfinite(loss):
        raise TrainingError(
            f"loss is {loss} in epoch {engine.state.epoch}, iteration {engine.state.iteration}; lower the learning "
            "rate (lr) or the loss's weights in another output_dir; this one keeps its last whole epoch, from which "
            "the same settings go on"
        )


def _check_labels(labels: torch.Tensor, classes: tuple[str, ...]) -> None:
    """On an accelerator a label without a class would end the process without saying why."""
    outside = labels[(labels < 0) | (labels >= len(classes))]
    if len(outside):
        raise TrainingError(
            f"label {int(outside[0])}: the classes are {', '.join(f'{i} ({name})' for i, name in enumerate(classes))}; "
            "mend the labels of the data set"
        )
