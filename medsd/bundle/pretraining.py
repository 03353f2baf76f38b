"""The stage pretrain: Med-MoCo on images without labels, and the encoder that the stage finetune starts from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast

import ignite.distributed as idist
import numpy as np
import torch
from monai.engines import SupervisedTrainer
from torch.utils.data import DataLoader

from medsd.checks import check_number
from medsd.errors import ConfigError
from medsd.files import sha256_of
from medsd.networks.start import save_encoder, weights_sha256
from medsd.pretrain.images import Unlabelled, UnlabelledImages
from medsd.pretrain.med_moco import MedMoCo
from medsd.pretrain.start import EncoderStart
from medsd.record import read_record, write_record
from medsd.training.checkpoint import Checkpoint
from medsd.training.distributed import EvenSampler
from medsd.training.training import run_training, settings_of

ENCODER = "encoder.safetensors"


class PretrainData(Protocol):
    """What the stage asks of a data set: `SlideData`, `PatchData`, and those of `medsd.bundle.unlabelled`."""

    @property
    def description(self) -> str:
        """The data in words."""
        ...

    def prepare(self) -> None:
        """Make what `unlabelled` reads."""
        ...

    def unlabelled(self, part: str) -> UnlabelledImages:
        """The images of the part "training", or those held out, "validation"."""
        ...


def pretrain(
    data: PretrainData, start: EncoderStart, trainer: SupervisedTrainer | None, checkpoint: Checkpoint | None
) -> None:
    """Stage pretrain: train the encoder (or go on), then write it beside the checkpoint's folder.

    `encoder.safetensors` holds plain timm names, which the classifier, `medsd explain` and segmentation-models-pytorch
    read. Torch's own generators are left as they were, so that a run of several stages equals the stages one by one.

    Args:
        data: described in what is written.
        start: the encoder that was pre-trained.
        trainer: of a `MedMoCo` on `UnlabelledImages`, with a `PretrainStep`; None does nothing.
        checkpoint: of the network, the optimiser, the schedule and the step.

    Raises:
        ConfigError: fewer than one epoch, a queue that does not fit, or `separate_slides` of one slide, see
            `check_negatives`.
    """
    if trainer is None or checkpoint is None:
        return
    check_number("pretrain_epochs", trainer.state.max_epochs, "[1, inf)", whole=True, hint="0 leaves pre-training out")
    network, loader = cast(MedMoCo, trainer.network), cast("DataLoader[Unlabelled]", trainer.data_loader)
    images = cast(UnlabelledImages, loader.dataset)
    sampler = loader.sampler
    even = isinstance(sampler, EvenSampler) and sampler.by_group
    check_negatives(network, images, cast(int, loader.batch_size), even)
    told = {**asdict(start), "weights": start.weights and weights_sha256(start.weights)}
    settings = settings_of(
        trainer,
        network=network.settings,
        # Options only where there are some: runs from before there were any go on. The memory's layout changes nothing.
        start={name: value for name, value in told.items() if value != {} and name != "channels_last"},
        data=images.fingerprint(),
        **{name: part for name, part in checkpoint.parts.items() if name in ("scheduler", "step")},
    )
    with torch.random.fork_rng([]):  # of the loader; what draws on a GPU is the step, which leaves it as it was
        state = run_training(trainer, None, checkpoint, settings, stage="pretrain")
    if idist.get_rank() == 0:
        before = start_in_words(start)
        done = f"{state.epoch} epochs of {state.epoch_length} steps"
        recipe = {"settings": settings, "source": f"Med-MoCo from {before}, {done} on {data.description}"}
        _write_encoder(checkpoint.folder, network, start, recipe)
    idist.barrier()  # the other processes read it next


def start_in_words(start: EncoderStart) -> str:
    """What the encoder was before its pre-training."""
    if start.weights is not None:
        return f"weights {weights_sha256(start.weights)}"
    return "ImageNet" if start.pretrained else "random weights"


def _write_encoder(folder: Path, network: MedMoCo, start: EncoderStart, recipe: dict[str, Any]) -> None:
    """Write the encoder, unless it is there and what the same training gave."""
    path, record = folder.parent / ENCODER, folder / "encoder.json"
    written = read_record(record, recipe)
    if written is None or sha256_of(path) != written["sha256"]:
        made = start.encoder, recipe["source"], network.normalise, start.encoder_options
        save_encoder(path, network.plain_encoder(), *made)
        write_record(record, recipe, [f"../{ENCODER}"], sha256=sha256_of(path))


def check_negatives(network: MedMoCo, images: UnlabelledImages, batch_size: int, even_groups: bool = False) -> None:
    """Refuse a queue that does not fit the batch (of one process) or the images, and slides of which there is one.

    The queue holds a key of an image itself where the image was drawn a short while ago. That shall be so of a quarter
    of the queries at most; `even_groups` draws images of small slides more often.

    Raises:
        ConfigError: a queue that is no multiple of the batch of all processes, or too large for the images, or
            `separate_slides` of one slide.
    """
    network.queue.check_batch(batch_size * idist.get_world_size())
    queue, items, separate = network.settings.queue, len(images), network.settings.separate_slides
    if 4 * queue > items:
        raise ConfigError(
            f"queue={queue}: more than a quarter of the {items} images, so that the keys told apart would often be of "
            f"the image itself; at most {items // 4}"
        )
    sizes = np.unique(images.groups, return_counts=True)[1]
    if separate and len(sizes) < 2:
        raise ConfigError(
            f"separate_slides: all {items} images to train on are of one slide or volume, so that there is no key to "
            "tell apart; set it to False, or give more slides"
        )
    # Keys of an image's own slide are told apart from it unless slides are kept separate.
    copies = queue / (len(sizes) * sizes) if even_groups and not separate else np.zeros(1)
    own = -np.expm1(-copies).mean()  # at least one, of draws at random
    if own > 1 / 4:
        most = int(queue / (4 * copies.mean()))
        raise ConfigError(
            f"queue={queue}: images of small slides or groups are drawn so often that for {own:.0%} of all draws a key "
            f"told apart would be of the image itself; at most {most}, or set even_groups to False"
        )
