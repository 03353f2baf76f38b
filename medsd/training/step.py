"""The training step for MONAI's `SupervisedTrainer(iteration_update=...)`: any objective, precision and ranks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import torch
from monai.engines.trainer import SupervisedTrainer
from torch import Tensor

from medsd.checks import check_number
from medsd.errors import TrainingError
from medsd.networks.classifier import Classifier
from medsd.networks.modes import training
from medsd.slides.stain.augment import StainAugment
from medsd.training.augment import augment
from medsd.training.optimise import OptimiserStep
from medsd.training.terms import Objective, ObjectiveLoss, Terms


@dataclass
class ObjectiveStep(OptimiserStep):
    """One optimiser step on a batch {"image": uint8 (B, 3, S, S), "label": (B,)}; see `OptimiserStep`.

    The trainer's `loss_function` is the objective. Frozen stages (parameters that require no gradient) keep their
    BatchNorm statistics.

    Attributes:
        stain: strength of the stain augmentation, 0 for none (see `augment`).
        stain_apart: strength of the one that changes haematoxylin and eosin on their own, 0 for none (see
            `StainAugment`; its shift is a quarter of its strength, our choice).

    Raises:
        ConfigError: a strength outside 0 to 1, an unknown precision, or fewer than one piece.
    """

    stain: float = 0.1
    stain_apart: float = 0.0
    _restain: StainAugment | None = field(init=False, repr=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("stain", "stain_apart"):
            check_number(name, getattr(self, name), "[0, 1)")
        self._restain = StainAugment(self.stain_apart, self.stain_apart / 4) if self.stain_apart else None

    def __call__(self, engine: SupervisedTrainer, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Run the step; returns the loss and its parts as floats, with `pred` (logits) and `label`.

        Raises:
            TrainingError: the loss is not finite, a label is outside the classes, or the batch is too small.
        """
        device = torch.device(engine.state.device)
        network, objective = cast(Classifier, engine.network), cast(Objective, engine.loss_function)
        _check_labels(batch["label"], network.classes)
        seed = self.seed_of(engine)
        images = self._augmented(batch["image"].to(device, non_blocking=True), seed)
        labels = batch["label"].to(device, torch.int64, non_blocking=True)
        draws = torch.Generator(device).manual_seed(seed + 1)
        epochs_done = (engine.state.iteration - 1) / (engine.state.epoch_length or 1)
        training(network)
        # The loss is wrapped and not the network: an objective runs the network several times a step, while
        # DistributedDataParallel wants one forward pass a backward pass.
        loss = self.on_all_ranks((network, objective), lambda: ObjectiveLoss(network, objective))

        def piece(rows: slice) -> Terms:
            terms: Terms = loss(network.normalise(images[rows]), labels[rows], epochs_done, draws)
            return terms

        terms, means = self.optimise(engine, loss, len(labels), piece)
        return {**means, "pred": torch.cat([each.logits for each in terms]), "label": labels}

    def _augmented(self, images: Tensor, seed: int) -> Tensor:
        images = augment(images, torch.Generator().manual_seed(seed), self.stain)
        return images if self._restain is None else self._restain(images, torch.Generator().manual_seed(seed + 2))


def _check_labels(labels: torch.Tensor, classes: tuple[str, ...]) -> None:
    """On an accelerator a label without a class would end the process without saying why."""
    outside = labels[(labels < 0) | (labels >= len(classes))]
    if len(outside):
        raise TrainingError(
            f"label {int(outside[0])}: the classes are {', '.join(f'{i} ({name})' for i, name in enumerate(classes))}; "
            "mend the labels of the data set"
        )
