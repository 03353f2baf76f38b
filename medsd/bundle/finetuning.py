"""The stage finetune: training with an objective, and all that maps and scores need of validation data."""

from __future__ import annotations

import copy
import logging
from dataclasses import asdict, replace
from functools import partial
from typing import Any, cast, get_args

import ignite.distributed as idist
import torch
from ignite.handlers import EarlyStopping
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from torch.utils.data import DataLoader

from medsd.bundle.card import card_of, input_of
from medsd.bundle.config import command_config
from medsd.bundle.data import Data
from medsd.bundle.head import HeadStart, start_head
from medsd.bundle.stages import WEIGHTS
from medsd.checks import check_choice
from medsd.cohort.learnt import learnt_from, tell_of_learnt
from medsd.errors import ConfigError
from medsd.export.source import CONFIG
from medsd.files import sha256_of, write_json
from medsd.heatmap.engine import Engine, make_engine
from medsd.heatmap.label_free import LABEL_FREE
from medsd.heatmap.legend import ADDITIVE, MASK
from medsd.heatmap.maps import MapSettings
from medsd.networks.classifier import Classifier
from medsd.networks.start import learnt_by, weights_sha256
from medsd.networks.weights import save_classifier
from medsd.objectives.saliency_decor import SaliencyDecor
from medsd.record import read_record, write_record
from medsd.training.checkpoint import Checkpoint
from medsd.training.hard_negatives import HardNegativeRound
from medsd.training.step import ObjectiveStep
from medsd.training.terms import Growing
from medsd.training.training import run_training, settings_of, validation_settings

logger = logging.getLogger(__name__)


def finetune(
    data: Data,
    trainer: SupervisedTrainer,
    evaluator: SupervisedEvaluator,
    checkpoint: Checkpoint,
    map_settings: MapSettings,
    early_stop: EarlyStopping | None = None,
    hard_negatives: HardNegativeRound | None = None,
    head_start: HeadStart = "random",
    test_time_augmentation: bool = False,
    val_interval: int = 1,
) -> None:
    """Stage finetune: train (or go on), then fix on validation data what maps and scores need, then write the weights.

    The weights go beside the checkpoint's folder. Prevalence, temperature, thresholds and colour scale are the
    validation data's. Of several processes the first does what follows the training. `head_start` "regression": see
    `start_head`. `test_time_augmentation`: see `Classifier.augment_at_test_time`. Training and its validation see tiles
    as they are, so it may be changed of a finished training, whose weights are then calibrated and written anew.
    `val_interval` is that of the trainer's `ValidationHandler`.
    """
    check_choice("head_start", head_start, get_args(HeadStart))
    network, regressed = cast(Classifier, trainer.network), head_start == "regression"
    _check_fits(trainer, data, checkpoint, map_settings, test_time_augmentation)
    learnt = learnt_from(data, learnt_by(network.encoder_weights))
    tell_of_learnt(data, learnt)
    settings = validation_settings(trainer, early_stop, val_interval) | _settings_of(
        trainer, data, checkpoint, hard_negatives, regressed
    )
    objective: object = trainer.loss_function
    complete_from, usable_from, max_epochs = 1, 1, trainer.state.max_epochs
    if isinstance(objective, Growing):
        complete_from = objective.complete_from(network)
        usable_from = getattr(objective, "usable_from", objective.complete_from)(network)
    tell_of_incomplete(objective, complete_from, max_epochs)
    workers = cast("DataLoader[Any]", trainer.data_loader).num_workers
    begin = partial(start_head, network, data.part("training"), workers) if regressed else None
    state = run_training(
        *(trainer, evaluator, checkpoint, settings, early_stop, hard_negatives), begin=begin, complete_from=usable_from
    )
    if idist.get_rank() > 0:
        return
    tell_of_best_epoch(objective, complete_from, state.best_epoch, max_epochs)
    if (config := command_config()) is not None:
        write_json(checkpoint.folder.parent / CONFIG, config)  # for whoever is given the run, see medsd.export
    path, record = checkpoint.folder.parent / WEIGHTS, checkpoint.folder / "weights.json"
    # What the card says besides, but for what costs memory or time alone.
    told = {"maps": asdict(replace(map_settings, block_px=None, workers=None)), "tissue": data.tissue}
    recipe = {"settings": settings, "epoch": state.epoch, "best_epoch": state.best_epoch, **told}
    recipe |= {"test_time_augmentation": True} if test_time_augmentation else {}
    written = read_record(record, recipe)
    if written is None or sha256_of(path) != written["sha256"]:
        network = copy.deepcopy(network)  # a compiled encoder does not see the hooks of saliency; its copy is not
        network.augment_at_test_time(test_time_augmentation)
        save_classifier(path, network, card_of(network, data, trainer, evaluator, map_settings, settings, learnt))
        write_record(record, recipe, [f"../{WEIGHTS}"], sha256=sha256_of(path))


def _settings_of(
    trainer: SupervisedTrainer,
    data: Data,
    checkpoint: Checkpoint,
    hard_negatives: HardNegativeRound | None,
    regressed: bool,
) -> dict[str, Any]:
    """What a training is known by, beside its validation: with another it does not go on."""
    network = cast(Classifier, trainer.network)
    weights = network.encoder_weights
    return settings_of(
        trainer,
        network={
            "encoder": network.encoder_name,
            "architecture": network.architecture,
            "options": network.options,
            **input_of(network),
        },
        # A file by what it holds: a run that is moved goes on, one whose file was made anew does not.
        start={"pretrained": network.pretrained, "encoder_weights": weights and weights_sha256(weights)}
        | ({"head": "regression"} if regressed else {}),
        head=network.head,
        # Training patches of one split are test patches of another: a training belongs to its split.
        data={"tile_px": data.tile_px, "mpp": data.mpp, "split": data.fingerprint()},
        # Not how fast they are found.
        hard_negatives=hard_negatives and replace(hard_negatives, batch_size=1, workers=0),
        **{name: part for name, part in checkpoint.parts.items() if name in ("scheduler", "step")},
    )


def _check_fits(
    trainer: SupervisedTrainer, data: Data, checkpoint: Checkpoint, map_settings: MapSettings, augmented: bool
) -> None:
    """Before hours of training: a layer, tile size or batch that network or objective cannot use is told now."""
    network = cast(Classifier, trainer.network)
    if network.test_time_augmentation:
        raise ConfigError(
            "network_def::test_time_augmentation: training sees tiles as they are; set the key test_time_augmentation"
        )
    answering = copy.copy(network)
    answering.augment_at_test_time(augmented)
    _check_methods(make_engine(answering, data.tile_px, data.mpp, settings=map_settings))
    if isinstance(trainer.loss_function, SaliencyDecor):
        batch = _images_at_once(trainer, checkpoint.parts.get("step"))
        trainer.loss_function.check_fits(data.tile_px, network.feature_dim, batch)


def _check_methods(engine: Engine) -> None:
    """Raises NetworkError: a method of tiles cannot explain this network; tried on noise."""
    tile = torch.randint(256, (1, 3, engine.tile_px, engine.tile_px), generator=torch.Generator().manual_seed(0))
    for name in engine.settings.methods:
        if name not in (ADDITIVE, MASK, *LABEL_FREE):  # the first has no reference before the training
            engine.patch_saliency(tile.to(torch.uint8), name)


def _images_at_once(trainer: SupervisedTrainer, step: object) -> int:
    """In a pass of all processes, where a batch may be run in pieces."""
    pieces = step.accumulation if isinstance(step, ObjectiveStep) else 1
    loader = cast("DataLoader[Any]", trainer.data_loader)
    return (loader.batch_size or 0) // pieces * idist.get_world_size()


def tell_of_incomplete(objective: object, complete_from: int, max_epochs: int) -> None:
    """Warn where a training ends before it learns by all of its objective."""
    if complete_from > max_epochs:
        logger.warning(
            "%s is complete from epoch %d on, and max_epochs is %d: some of its terms never come in; raise max_epochs "
            "or lower what puts them off (of SaliencyDecor warm_epochs)",
            *(type(objective).__name__, complete_from, max_epochs),
        )


def tell_of_best_epoch(objective: object, complete_from: int, best_epoch: int, max_epochs: int) -> None:
    """Warn where the network that is kept has not learnt by all of its objective, though later ones have."""
    if best_epoch < complete_from <= max_epochs:
        logger.warning(
            "the best network on validation, which is kept, is that of epoch %d; %s is complete from epoch %d on",
            *(best_epoch, type(objective).__name__, complete_from),
        )
