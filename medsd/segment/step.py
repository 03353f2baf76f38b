"""The training step on images with masks, for MONAI's `SupervisedTrainer(iteration_update=...)`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from monai.engines.trainer import SupervisedTrainer
from torch import Tensor, nn

from medsd.checks import check_number
from medsd.errors import ConfigError
from medsd.networks.modes import training
from medsd.segment.network import SegmentationNetwork
from medsd.training.augment import restain, symmetries, turn
from medsd.training.optimise import OptimiserStep


@dataclass
class SegmentationStep(OptimiserStep):
    """One optimiser step on a batch {"image": uint8 (B, 3, S, S), "label": uint8 (B, 1, S, S)}; see `OptimiserStep`.

    The trainer's `loss_function` takes logits (B, K, S, S) and class numbers (B, 1, S, S), as MONAI's `DiceCELoss`
    does. Masks go through the geometry of the augmentation with their images. Frozen parts keep their BatchNorm
    statistics.

    Attributes:
        stain: strength of the change of optical density, 0 for none (see `restain`).
        turns: turn and mirror images, by the symmetries of the square; where left and right matter, False.
        crop_px: side of a square that is cut at random from each image; None takes images whole.

    Raises:
        ConfigError: a value is out of its range, an unknown precision, or fewer than one piece.
    """

    stain: float = 0.1
    turns: bool = True
    crop_px: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("stain", self.stain, "[0, 1)")
        if self.crop_px is not None:
            check_number("crop_px", self.crop_px, "[8, inf)", whole=True, hint="null takes images whole")

    def __call__(self, engine: SupervisedTrainer, batch: dict[str, Tensor]) -> dict[str, Any]:
        """Run the step; returns the loss as a float.

        Raises:
            TrainingError: the loss is not finite, or the batch is too small.
            ConfigError: `crop_px` is larger than the images.
        """
        device = torch.device(engine.state.device)
        network = cast(SegmentationNetwork, engine.network)
        loss_of = cast("Callable[[Tensor, Tensor], Tensor]", engine.loss_function)
        images, masks = (batch[key].to(device, non_blocking=True) for key in ("image", "label"))
        images, masks = self.augmented(images, masks, torch.Generator().manual_seed(self.seed_of(engine)))
        training(network)
        loss = self.on_all_ranks((network, loss_of), lambda: _Loss(network, loss_of))

        def piece(rows: slice) -> _Total:
            return _Total(loss(network.normalise(images[rows]), masks[rows]))

        _, means = self.optimise(engine, loss, len(images), piece)
        return means

    def augmented(self, images: Tensor, masks: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Images and their masks, cut, turned and mirrored alike; images restained."""
        if self.crop_px is not None:
            images, masks = _cut(images, masks, self.crop_px, generator)
        if self.turns:
            symmetry = symmetries(len(images), generator)
            images, masks = turn(images, symmetry), turn(masks, symmetry)
        return (restain(images, generator, self.stain) if self.stain else images), masks


@dataclass(frozen=True)
class _Total:
    total: Tensor
    parts: Mapping[str, Tensor] = field(default_factory=dict)


class _Loss(nn.Module):
    def __init__(self, network: nn.Module, loss_of: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.network, self.loss_of = network, loss_of

    def forward(self, x: Tensor, masks: Tensor) -> Tensor:
        return self.loss_of(self.network(x).float(), masks)  # softmax and sums over pixels in full precision


def _cut(images: Tensor, masks: Tensor, side_px: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A square of each image at a place of its own, and of its mask there."""
    if min(images.shape[2:]) < side_px:
        raise ConfigError(f"crop_px={side_px}: images are {images.shape[3]} x {images.shape[2]} px; lower it, or null")
    corners = [
        torch.randint(length - side_px + 1, (len(images),), generator=generator).tolist() for length in images.shape[2:]
    ]
    squares = [(slice(y, y + side_px), slice(x, x + side_px)) for y, x in zip(*corners, strict=True)]
    cut = [
        torch.stack([each[:, rows, columns] for each, (rows, columns) in zip(batch, squares, strict=True)])
        for batch in (images, masks)
    ]
    return cut[0], cut[1]
