"""The maps that classifiers of every kind are compared by, at the pixels of tiles, and what is measured of them."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from medsd.cohort.dataset import Sample
from medsd.networks.aim import AimClassifier
from medsd.networks.classifier import Classifier
from medsd.saliency.metrics.concentration import gini_index, normalised_entropy, total_variation
from medsd.saliency.metrics.insertion_deletion import curve_area, deletion_curve, insertion_curve
from medsd.saliency.metrics.masking import masking_curve, random_masking_curve
from medsd.saliency.metrics.perturb import Baseline
from medsd.saliency.metrics.pointing import area_share, energy_pointing, pointing_game

PerTile = dict[str, dict[str, Tensor]]


def explanation_maps(classifier: Classifier, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Maps (B, H, W) by name: "gradient" of every classifier, and "mask" of one that masks itself.

    Args:
        classifier: in eval mode.
        x: (B, C, H, W) float images, as the network takes them.
        labels: (B,) class numbers, whose evidence is explained.
    """
    maps = {"gradient": evidence_gradient(classifier, x, labels)}
    if isinstance(classifier, AimClassifier):
        maps["mask"] = mask_map(classifier, x)
    return maps


def evidence_gradient(classifier: Classifier, x: Tensor, labels: Tensor) -> Tensor:
    """|mean over channels| of the gradient of the evidence with respect to the pixels, (B, H, W), detached.

    The evidence is the class's logit above the mean of the others, since softmax ignores what all share. The mean
    over channels comes before the absolute value, as in training (`medsd.objectives.masking.rank`).

    Args:
        classifier: in the mode that the gradient is wanted in.
        x: (B, C, H, W) float images, as the network takes them.
        labels: (B,) class numbers.
    """
    x = x.detach().clone().requires_grad_()
    with torch.enable_grad():
        logits = classifier(x)
        target = logits.gather(1, labels[:, None])[:, 0]
        others = (logits.sum(dim=1) - target) / (logits.shape[1] - 1)
        (gradient,) = torch.autograd.grad((target - others).sum(), x)
    return gradient.mean(dim=1).abs()


@torch.no_grad()
def mask_map(classifier: AimClassifier, x: Tensor) -> Tensor:
    """The mean over stages of a classifier's own masks, up-sampled to the pixels (nearest), (B, H, W) in 0 to 1."""
    masks = classifier.masked(x, noise=False).masks
    return torch.stack([F.interpolate(mask, x.shape[2:], mode="nearest")[:, 0] for mask in masks]).mean(dim=0)


def measure_maps(
    classifier: Classifier,
    batch: Sample,
    region: Tensor,
    generator: torch.Generator,
    draws: int,
    fill: Baseline,
    steps: int,
    batch_size: int,
) -> PerTile:
    """Every measure of every map by its name, (B,) or (B, shares), under "random" the control and the regions' area.

    Args:
        classifier: in eval mode.
        batch: images (B, 3, H, W) uint8 and labels (B,).
        region: (B, H, W) bool; measures of pointing are nan where it is empty or fills the tile.
        generator: orders pixels, on the classifier's device.
        draws: random orders a tile of the masking control.
        fill: what masked pixels become.
        steps: steps of deletion and insertion.
        batch_size: images in one pass.
    """
    device = device_of(classifier)
    labels, region = batch["label"].to(device), region.to(device)
    x = classifier.normalise(batch["image"].to(device))
    control = random_masking_curve(classifier, x, labels, generator, draws, fill, batch_size=batch_size)
    area = area_share(region)
    area = torch.where((area > 0) & (area < 1), area, math.nan)
    judged = {
        "random": {
            "masking_area": control.area,
            "accuracy": control.correct,
            "probability": control.probability,
            "area_share": area,
        }
    }
    step_px = -(-x.shape[2] * x.shape[3] // steps)
    for name, values in explanation_maps(classifier, x, labels).items():
        curve = masking_curve(classifier, x, labels, values, fill, generator=generator, batch_size=batch_size)
        deleted = deletion_curve(classifier, x, labels, values, "zero", step_px, generator, batch_size)
        inserted = insertion_curve(classifier, x, labels, values, "blur", step_px, generator, batch_size)
        judged[name] = {
            "masking_area": curve.area,
            "accuracy": curve.correct,
            "probability": curve.probability,
            "gap": control.area - curve.area,
            "deletion": curve_area(deleted),
            "insertion": curve_area(inserted),
            "magnitude": values.abs().mean(dim=(1, 2)),
            "total_variation": total_variation(values),
            "gini": gini_index(values),
            "entropy": normalised_entropy(values),
            "pointing": torch.where(area.isnan(), math.nan, energy_pointing(values, region).nan_to_num(0.0)),
            "pointing_game": torch.where(area.isnan(), math.nan, pointing_game(values, region).nan_to_num(0.0)),
        }
    return judged


def device_of(classifier: Classifier) -> torch.device:
    """Where the classifier's weights are."""
    return next(classifier.parameters()).device
