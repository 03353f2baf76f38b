"""The SaliencyDecor step for MONAI's `SupervisedTrainer(iteration_update=...)`."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
from monai.engines.trainer import SupervisedTrainer

from medsd.errors import ConfigError, TrainingError
from medsd.finetune.augment import augment
from medsd.finetune.objective import SaliencyDecor
from medsd.networks.classifier import TileClassifier
from medsd.slides.stain.augment import StainAugment

_SEED_STEP = 1_000_003


class SaliencyDecorStep:
    """One optimiser step of the SaliencyDecor objective on a batch {"image": uint8 (B, 3, S, S), "label": (B,)}.

    The step owns zeroing, backward and the optimiser; the trainer's own autocast, gradient scaling and accumulation
    are not used. Its draws depend on the seed and the iteration alone, so a resumed training equals the whole one
    (for networks without dropout, which draws from torch's global generator).

    Args:
        objective: the loss.
        seed: start of the random draws.
        stain: strength of the stain augmentation, 0 for none (see `augment`).
        stain_apart: strength of the one that changes haematoxylin and eosin on their own, 0 for none (see
            `StainAugment`; its shift is a quarter of its strength, our choice).

    Raises:
        ConfigError: `stain` or `stain_apart` lies outside 0 to 1.
    """

    def __init__(self, objective: SaliencyDecor, seed: int = 0, stain: float = 0.1, stain_apart: float = 0.0) -> None:
        if not 0 <= stain < 1:
            raise ConfigError(f"stain={stain}: must lie in 0 to 1, 1 excluded")
        self.objective, self.seed, self.stain = objective, seed, stain
        self._restain = StainAugment(stain_apart, stain_apart / 4) if stain_apart else None

    def __call__(self, engine: SupervisedTrainer, batch: dict[str, torch.Tensor]) -> dict[str, Any]:
        """Run the step; returns the parts of the loss as floats, with `pred` (logits) and `label`.

        Raises:
            TrainingError: the loss is not finite, or a label is outside the classes.
        """
        device = torch.device(engine.state.device)
        network, iteration = cast(TileClassifier, engine.network), engine.state.iteration
        _check_labels(batch["label"], network.classes)
        seed = self.seed + _SEED_STEP * iteration
        images = augment(batch["image"], torch.Generator().manual_seed(seed), self.stain)
        if self._restain is not None:
            images = self._restain(images, torch.Generator().manual_seed(seed + 2))
        images = images.to(device, non_blocking=True)
        labels = batch["label"].to(device, torch.int64, non_blocking=True)
        masking = torch.Generator(device).manual_seed(seed + 1)
        epochs_done = (iteration - 1) / (engine.state.epoch_length or 1)
        network.train()
        engine.optimizer.zero_grad()
        terms = self.objective(network, network.normalise(images), labels, epochs_done, masking)
        loss = float(terms.total.detach())
        if not math.isfinite(loss):
            raise TrainingError(
                f"loss is {loss} in epoch {engine.state.epoch}, iteration {iteration}; lower the learning rate (lr) or "
                "the decorrelation weight, and choose another output_dir (the last whole epoch is kept in this one)"
            )
        terms.total.backward()  # type: ignore[no-untyped-call]
        engine.optimizer.step()
        return {
            "loss": loss,
            "cross_entropy": float(terms.cross_entropy),
            "consistency": float(terms.consistency),
            "decorrelation": float(terms.decorrelation),
            "pred": terms.logits,
            "label": labels,
        }


def _check_labels(labels: torch.Tensor, classes: tuple[str, ...]) -> None:
    """On an accelerator a label without a class would end the process without saying why."""
    outside = labels[(labels < 0) | (labels >= len(classes))]
    if len(outside):
        raise TrainingError(
            f"label {int(outside[0])}: the classes are {', '.join(f'{i} ({name})' for i, name in enumerate(classes))}; "
            "mend the labels of the data set"
        )
