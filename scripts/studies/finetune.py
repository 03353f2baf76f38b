"""Objectives against each other, over seeds: accuracy, faithfulness, shortcuts, and what the features become."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from studies.data import Items
from timm.models import register_model
from timm.models.resnet import BasicBlock, ResNet

from medsd.finetune.augment import augment
from medsd.finetune.terms import Objective
from medsd.networks.aim import AimClassifier
from medsd.networks.classifier import Classifier, TileClassifier
from medsd.networks.modes import evaluating


@register_model
def resnet10t_half(pretrained: bool = False, pretrained_cfg: object = None, **options: object) -> ResNet:
    """timm's ResNet-10-t with half its channels: 1.2 million parameters, for many trainings on a CPU."""
    return ResNet(
        BasicBlock,
        layers=(1, 1, 1, 1),
        channels=(32, 64, 128, 256),
        stem_width=16,
        stem_type="deep_tiered",
        avg_down=True,
        **{name: value for name, value in options.items() if name in ("num_classes", "global_pool")},
    )


ENCODER = "resnet10t_half"


@dataclass(frozen=True)
class Recipe:
    """How long and how fast every objective trains."""

    epochs: int = 8
    batch_size: int = 32
    lr: float = 2e-3
    weight_decay: float = 0.01
    stain: float = 0.1


def tile() -> Classifier:
    return TileClassifier(ENCODER)


def aim(masking: bool) -> Callable[[], Classifier]:
    return lambda: AimClassifier(ENCODER, end_stage=1, feature_width=64, mask_width=16, masking=masking)


def train(
    make: Callable[[], Classifier], objective: Objective, items: Items, recipe: Recipe, seed: int
) -> tuple[Classifier, float]:
    """A network after all epochs, and its seconds a step."""
    torch.manual_seed(seed)
    network = make().to(memory_format=torch.channels_last)
    steps = len(items) // recipe.batch_size
    optimizer = torch.optim.AdamW(network.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, recipe.lr, total_steps=recipe.epochs * steps)
    draws = torch.Generator().manual_seed(seed)
    network.train()
    started = time.perf_counter()
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(items), generator=draws)
        for step in range(steps):
            rows = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            x = network.normalise(augment(items.images[rows], draws, recipe.stain))
            x = x.contiguous(memory_format=torch.channels_last)
            optimizer.zero_grad()
            objective(network, x, items.labels[rows], epoch + step / steps, draws).total.backward()
            optimizer.step()
            schedule.step()
    return network.eval(), (time.perf_counter() - started) / (recipe.epochs * steps)


def logits_of(network: Classifier, items: Items) -> torch.Tensor:
    with evaluating(network), torch.inference_mode():
        return torch.cat([network(batch) for batch in items.images.split(128)])


def group_accuracy(logits: torch.Tensor, items: Items) -> dict[tuple[int, int], float]:
    correct = (logits.argmax(1) == items.labels).float()
    return {
        (label, cue): float(correct[(items.labels == label) & (items.cue == cue)].mean())
        for label in (0, 1)
        for cue in (0, 1)
    }
