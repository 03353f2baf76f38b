"""What a bundle trains and with what: networks, objectives, optimiser's parameters, samplers, the step."""

from __future__ import annotations

import logging

import numpy as np
import torch
from timm.layers import convert_sync_batchnorm

from medsd.bundle.config import boundary
from medsd.bundle.data import Data, Items
from medsd.cohort.dataset import SlideGroupedSampler
from medsd.errors import ConfigError
from medsd.heatmap.maps import MapSettings
from medsd.networks.aim import AimClassifier, Direction
from medsd.networks.classifier import Classifier, TileClassifier
from medsd.networks.start import load_encoder
from medsd.networks.weights import Attribution, Smoothing
from medsd.networks.whitening import WhitenedHead
from medsd.objectives.aim import AimObjective
from medsd.objectives.saliency_decor import SaliencyDecor
from medsd.training import ranks
from medsd.training.hard_negatives import HardNegativeRound
from medsd.training.parameters import parameter_groups
from medsd.training.ranks import RankSampler, world_size
from medsd.training.step import ObjectiveStep

logger = logging.getLogger(__name__)

# More would let a usual batch be whitened into anything.
_WHITENED_TOGETHER = 32


@boundary
def classifier(
    encoder: str,
    pretrained: bool = False,
    encoder_weights: str | None = None,
    whitening: bool = False,
    group_size: int | None = None,
) -> TileClassifier:
    """A timm encoder with a linear head for the classes normal and tumour.

    Args:
        encoder: timm name.
        pretrained: start from timm's ImageNet weights (downloads them).
        encoder_weights: file of a pre-trained encoder, see `load_encoder`; None starts from scratch, or `pretrained`.
        whitening: whiten the features before the head in training (SaliencyDecor's mode "layer"); folded into the head
            when the weights are written.
        group_size: channels whitened together, best at most half the batch; None takes 32.
    """
    network = TileClassifier(encoder, pretrained=pretrained)
    if encoder_weights is not None:
        load_encoder(network.encoder, encoder_weights)
    if whitening:
        network.head = WhitenedHead(network.feature_dim, len(network.classes), group_size or _WHITENED_TOGETHER)
    return network


@boundary
def aim_classifier(
    encoder: str,
    pretrained: bool = False,
    encoder_weights: str | None = None,
    end_stage: int = 2,
    feature_width: int = 256,
    mask_width: int = 64,
    temperature: float = 1.0,
    direction: Direction = "top_down",
    masking: bool = True,
) -> AimClassifier:
    """A network that masks its own features, see `AimClassifier`; the first three as in `classifier`."""
    network = AimClassifier(
        encoder,
        pretrained=pretrained,
        end_stage=end_stage,
        feature_width=feature_width,
        mask_width=mask_width,
        temperature=temperature,
        direction=direction,
        masking=masking,
    )
    if encoder_weights is not None:
        load_encoder(network.encoder, encoder_weights)
    return network


@boundary
def place(network: Classifier, device: torch.device, channels_last: bool = False, compiled: bool = False) -> Classifier:
    """The network on its device.

    Args:
        channels_last: keep weights as NHWC, which half-precision convolutions on GPUs want.
        compiled: compile the encoder at its first run (torch.compile; not AIM's); names of the weights stay.
    """
    if world_size() > 1 and device.type == "cuda":
        # timm's: torch's own would replace timm's BatchNorms that hold an activation, and lose it.
        network = convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    network = network.to(device)
    if channels_last:
        network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    if compiled and isinstance(network, AimClassifier):
        logger.warning(
            "compiled: torch.compile does not reach the stages that AIM takes from its encoder; not compiled"
        )
    elif compiled:
        network.encoder.compile()
    return network


@boundary
def dataset(data: Data, part: str) -> Items:
    """The items of the part "training", "validation" or "testing"."""
    return data.part(part)


@boundary
def sampler(
    dataset: Items, samples: int, batch_size: int, run: int = 1, by_group: bool = True, seed: int = 0
) -> SlideGroupedSampler | RankSampler:
    """Balanced draws of `samples` items an epoch, at least a batch, see `SlideGroupedSampler`.

    Classes are drawn evenly; with `by_group` so are the slides (or clusters) of a class, else as many as they hold.
    Several ranks share the draw.
    """
    processes = world_size()
    if not 2 <= batch_size <= samples // processes:
        per_rank = f"samples_per_epoch={samples}" + (f" / {processes} processes" if processes > 1 else "")
        raise ConfigError(f"batch_size={batch_size}: must lie in 2 to {per_rank}")
    groups = dataset.groups if by_group else np.zeros_like(dataset.groups)
    drawn = SlideGroupedSampler(dataset.labels, groups, samples, run, seed)
    return RankSampler(drawn) if processes > 1 else drawn


@boundary
def hard_negatives(
    dataset: Items, epoch: int | None, share: float = 0.5, batch_size: int = 64, workers: int = 0
) -> HardNegativeRound | None:
    """The round of hard negatives after `epoch` epochs, see `HardNegativeRound`; None for none."""
    if epoch is None:
        return None
    return HardNegativeRound(epoch, share, dataset, dataset.labels, batch_size=batch_size, workers=workers)  # type: ignore[arg-type]


@boundary
def map_settings(
    layer: str,
    attribution: Attribution,
    smoothing: Smoothing,
    block_px: int,
) -> MapSettings:
    """How slides are mapped, see `MapSettings`."""
    return MapSettings(layer, attribution, smoothing, block_px)


# As they are, but that their errors end a run with one line.
parameters = boundary(parameter_groups)
saliency_decor = boundary(SaliencyDecor)
aim = boundary(AimObjective)
step = boundary(ObjectiveStep)
start_ranks = boundary(ranks.start_ranks)
stop_ranks = boundary(ranks.stop_ranks)
