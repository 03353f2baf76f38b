"""Logits of tiles and patches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sized
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from medsd.cohort.dataset import Sample
from medsd.networks.modes import evaluating
from medsd.progress import Progress, no_progress


def predict_logits(
    classifier: nn.Module,
    dataset: Dataset[Sample],
    batch_size: int = 64,
    workers: int = 0,
    progress: Progress = no_progress,
) -> npt.NDArray[np.float32]:
    """Logits of every item, (n, classes) float32, in the order of the data set.

    Args:
        classifier: gives logits (B, classes) of uint8 images (B, 3, height, width); left in the mode it was in.
        dataset: the items.
        batch_size: items at once.
        workers: processes that read; 0 reads in this one.
        progress: shows the batches.
    """
    pinned = next(classifier.parameters()).device.type == "cuda"
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=workers, pin_memory=pinned)
    return collect(classifier, loader, progress)[0]


def collect(
    classifier: nn.Module,
    loader: Iterable[Any],
    progress: Progress = no_progress,
    forward: Callable[[Tensor], Tensor] | None = None,
) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.int64]]:
    """Logits (n, classes) float32 and labels (n,) int64 of the samples of all batches of a loader, in its order.

    `forward` gives something else of a batch of images in the logits' place, such as `classifier.features`.
    """
    device = next(classifier.parameters()).device
    logits, labels = [], []
    with evaluating(classifier), torch.inference_mode():
        for batch in progress(loader, len(cast(Sized, loader)), "batch"):
            # NHWC is the faster for convolutions, on CPUs too. A GPU is not waited for: meanwhile the next are read.
            images = batch["image"].to(device, memory_format=torch.channels_last, non_blocking=True)
            logits.append((forward or classifier)(images).float().to("cpu", non_blocking=True))
            labels.append(batch["label"].numpy())
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    if not logits:
        return np.zeros((0, 0), np.float32), np.zeros(0, np.int64)
    return torch.cat(logits).numpy(), np.concatenate(labels).astype(np.int64)
