"""Normal tiles that a half-trained classifier takes for something else, to be drawn more often from then on.

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
import torch
from torch import nn
from torch.utils.data import Subset

from medsd.checks import check_number
from medsd.cohort.dataset import Sample
from medsd.progress import progress_bar
from medsd.training.predict import predict_logits


@dataclass(frozen=True)
class HardNegativeRound:
    """When a training turns to its false positives, and how much of it.

    Attributes:
        epoch: epochs before the round (0 starts with it).
        share: share of the normal draws from then on that come from the hard negatives, 0 to 1.
        dataset: the training items, with their classes as `labels` (n,): 0 normal.
        threshold: probability of all other classes together from which on an item is hard, 0 to 1.
        batch_size, workers: as in `predict_logits`.

    Raises:
        ConfigError: a number out of its range.
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
        check_number("threshold", self.threshold, "[0, 1]")

    def find(self, classifier: nn.Module) -> npt.NDArray[np.int64]:
        """The normal items whose probability of other classes is `threshold` or more, ascending; perhaps none.

        Every normal item is read once. Tiles that the annotation cuts, or whose label nobody knows, are never among
        them.
        """
        normal = np.flatnonzero(self.dataset.labels == 0).astype(np.int64)
        items: Subset[Sample] = Subset(self.dataset, cast(Sequence[int], normal))  # no list of millions of integers
        logits = predict_logits(classifier, items, self.batch_size, self.workers, progress_bar("mine"))
        if not len(logits):
            return normal
        others = torch.from_numpy(logits).softmax(dim=1)[:, 1:].sum(dim=1).numpy()
        return normal[others >= self.threshold]
