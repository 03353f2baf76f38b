"""Normal tiles that a half-trained classifier takes for tumour, to be drawn more often from then on.

Wang et al., "Deep learning for identifying metastatic breast cancer" (arXiv 1606.05718), winners of CAMELYON16, added
the false positives of a first training to the tiles of a second one; Li and Ping (NCRF, MIDL 2018) did likewise. Here
it is one training: from some epoch on, a share of the normal draws comes from them
(`medsd.cohort.dataset.SlideGroupedSampler.set_hard`). When, how many and from which probability on is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import numpy.typing as npt
from torch import nn
from torch.utils.data import Dataset, Subset

from medsd.checks import check_number
from medsd.cohort.dataset import Sample
from medsd.progress import Progress, no_progress, progress_bar
from medsd.training.predict import predict


def find_hard_negatives(
    classifier: nn.Module,
    dataset: Dataset[Sample],
    labels: npt.NDArray[np.int8],
    threshold: float = 0.5,
    batch_size: int = 64,
    workers: int = 0,
    progress: Progress = no_progress,
) -> npt.NDArray[np.int64]:
    """The normal items whose tumour probability is `threshold` or more, ascending; perhaps none.

    Every normal item is read once. Tiles that the annotation cuts, or whose label nobody knows, are never among them.

    Args:
        classifier: see `medsd.training.predict.predict`.
        dataset: the training items.
        labels: (n,) their classes: 0 normal, 1 tumour, others are left out.
        threshold: tumour probability from which on an item is hard, 0 to 1.
        batch_size, workers, progress: as in `predict`.

    Raises:
        ConfigError: `threshold` is out of its range.
    """
    check_number("threshold", threshold, "[0, 1]")
    normal = np.flatnonzero(labels == 0).astype(np.int64)
    items = Subset(dataset, cast(Sequence[int], normal))  # a list of millions of Python integers takes gigabytes
    probability = predict(classifier, items, batch_size=batch_size, workers=workers, progress=progress)
    return normal[probability >= threshold]


@dataclass(frozen=True)
class HardNegativeRound:
    """When a training turns to its false positives, and how much of it.

    Attributes:
        epoch: epochs before the round (0 starts with it).
        share: share of the normal draws from then on that come from the hard negatives, 0 to 1.
        dataset: the training items, with their classes as `labels`.
        threshold, batch_size, workers: as in `find_hard_negatives`.

    Raises:
        ConfigError: `epoch` is negative or `share` outside 0 to 1.
    """

    epoch: int
    share: float
    dataset: Any
    threshold: float = 0.5
    batch_size: int = 64
    workers: int = 0

    def __post_init__(self) -> None:
        check_number("hard_negative_epoch", self.epoch, "[0, inf)", whole=True, hint="null for no such round")
        check_number("hard_negative_share", self.share, "[0, 1]")

    def find(self, classifier: nn.Module) -> npt.NDArray[np.int64]:
        """The hard negatives of the classifier as it is."""
        labels: npt.NDArray[np.int8] = self.dataset.labels
        return find_hard_negatives(
            classifier, self.dataset, labels, self.threshold, self.batch_size, self.workers, progress_bar("mine")
        )
