"""Tumour probabilities of tiles and patches."""

from __future__ import annotations

from collections.abc import Sized
from typing import cast

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import DataLoader, Dataset

from medsd.networks.classifier import TileClassifier
from medsd.networks.modes import evaluating
from medsd.progress import Progress, no_progress
from medsd.slides.dataset import Sample


def predict(
    classifier: TileClassifier,
    dataset: Dataset[Sample],
    target: int = 1,
    batch_size: int = 64,
    workers: int = 0,
    progress: Progress = no_progress,
) -> npt.NDArray[np.float32]:
    """Probability of the class `target` for every item, (n,) float32, in the order of the data set."""
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers)
    device = next(classifier.parameters()).device
    batches = -(-len(cast(Sized, dataset)) // batch_size)
    parts = []
    with evaluating(classifier), torch.inference_mode():
        for batch in progress(loader, batches, "batch"):
            logits = classifier(batch["image"].to(device))
            parts.append(logits.softmax(dim=1)[:, target].float().cpu().numpy())
    return np.concatenate(parts)
