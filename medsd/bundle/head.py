"""Where the head of a classifier starts from."""

from __future__ import annotations

import logging
from typing import Literal

import torch
from torch import nn
from torch.utils.data import DataLoader, Subset

from medsd.cohort.dataset import TileDataset, even_draw
from medsd.cohort.patches import PatchDataset
from medsd.errors import ConfigError, DatasetError
from medsd.evaluate.probes import Labelled, fit_head
from medsd.networks.classifier import Classifier
from medsd.networks.moments import first_of_processes
from medsd.progress import progress_bar
from medsd.training.predict import collect

logger = logging.getLogger(__name__)

HeadStart = Literal["random", "regression"]
_ITEMS, _BATCH = 4096, 64


def start_head(network: Classifier, training: TileDataset | PatchDataset, workers: int = 0) -> None:
    """Set the head to a logistic regression on the encoder as it is, before any training.

    A new head moves the encoder by gradients that mean nothing yet; one that already separates the classes does not
    ("linear probing, then fine-tuning", Kumar et al., ICLR 2022). The regression is `fit_head`'s, of up to 4,096
    training items, as many of each class as there are. Of several processes all compute, and the first one's is taken.

    Args:
        network: its head is changed in place.
        training: the items to be trained on.
        workers: processes that read.

    Raises:
        ConfigError: the head whitens its features.
        DatasetError: a class is in one group only, so that none can be held out to choose the penalty.
    """
    head = network.head
    if not isinstance(head, nn.Linear):
        raise ConfigError("head_start='regression': a head that whitens has no such start; set whitening to false")
    chosen = even_draw(training.labels, _ITEMS, seed=0)
    loader = DataLoader(Subset(training, chosen), _BATCH, num_workers=workers)
    features, labels = collect(network, loader, progress_bar("head"), network.features)
    try:
        found = fit_head(Labelled(features, labels, training.groups[chosen]))
    except DatasetError as error:
        raise DatasetError(f"head_start='regression': {error}; or set it to random") from error
    with torch.no_grad():
        for parameter, values in ((head.weight, found.weight), (head.bias, found.bias)):
            parameter.copy_(first_of_processes(torch.from_numpy(values).to(parameter)))
    logger.info("head: a logistic regression on the encoder, of %d training items", len(chosen))
