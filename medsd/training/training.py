"""Running a MONAI trainer so that it resumes, keeps its best network, and shows where it is."""

from __future__ import annotations

import csv
import io
import logging
import math
import time
from collections.abc import Sized
from contextlib import ExitStack
from pathlib import Path
from typing import Any, cast

import torch
from ignite.engine import Events
from monai.engines.evaluator import SupervisedEvaluator
from monai.engines.trainer import SupervisedTrainer
from tqdm import tqdm

from medsd.cohort.dataset import SlideGroupedSampler
from medsd.errors import ConfigError, TrainingError
from medsd.files import make_folder, write_text
from medsd.training.checkpoint import Checkpoint, TrainingState
from medsd.training.hard_negatives import HardNegativeRound
from medsd.training.ranks import RankSampler, of_first_rank, rank
from medsd.training.step import ObjectiveStep

logger = logging.getLogger(__name__)

_NOT_TERMS = ("pred", "label")


def run_training(
    trainer: SupervisedTrainer,
    evaluator: SupervisedEvaluator,
    sampler: SlideGroupedSampler | RankSampler,
    scheduler: torch.optim.lr_scheduler.LRScheduler,
    folder: str | Path,
    settings: dict[str, Any],
    step: ObjectiveStep | None = None,
    patience: int | None = None,
    hard_negatives: HardNegativeRound | None = None,
) -> TrainingState:
    """Train to `max_epochs`, or go on from the last whole epoch; the network ends as the best one on validation.

    Leaves `checkpoint.pt`, `settings.json`, `history.csv` and `pace.csv` (a row an epoch) in `folder`. A finished
    training is not repeated. Of several ranks the first writes; all validate, on all validation data.

    Args:
        trainer: its iterations give the loss and its parts as floats (`ObjectiveStep`).
        evaluator: run after every epoch; its key metric, higher is better, chooses the best network.
        sampler: told the epoch, so that a resumed training draws what the whole one would have.
        scheduler: stepped after every iteration.
        folder: where the training's state is kept.
        settings: what must be equal for a training to be resumed.
        step: the trainer's, whose gradient scale is kept with the rest.
        patience: stop after this many epochs without a better metric; None trains to the end.
        hard_negatives: from its epoch on, false positives among the training items are drawn more often.

    Raises:
        TrainingError: another training's folder, a damaged checkpoint, or a loss or metric that is not finite.
        OutputError: the folder cannot be written to.
        ConfigError: `patience` below 1, or hard negatives after the end.
    """
    if patience is not None and patience < 1:
        raise ConfigError(f"patience={patience}: must be 1 or more, or null to train to the end")
    if hard_negatives is not None and hard_negatives.epoch >= trainer.state.max_epochs:
        raise ConfigError(
            f"hard_negative_epoch={hard_negatives.epoch}: must be below max_epochs={trainer.state.max_epochs}, or null"
        )
    folder = make_folder(folder)
    parts = {"network": trainer.network, "optimizer": trainer.optimizer, "scheduler": scheduler}
    parts |= {} if step is None else {"step": step}
    checkpoint = Checkpoint(folder, settings, parts)
    state = checkpoint.load()
    if state.epoch < trainer.state.max_epochs and not _out_of_patience(state, patience):
        if state.epoch:
            logger.info("resuming after epoch %d of %d", state.epoch, trainer.state.max_epochs)
        # With ignite's pausing on, a trainer that once failed would return from a second run having done nothing.
        trainer.interrupt_resume_enabled = False
        trainer.state.epoch = state.epoch
        loop = _Loop(trainer, evaluator, sampler, scheduler, checkpoint, state, patience, hard_negatives)
        if state.steps != state.epoch * loop.length:
            raise TrainingError(
                f"{folder}: had {state.steps // state.epoch} steps an epoch, now {loop.length}; start as many "
                "processes as before, or choose another output_dir"
            )
        trainer.state.iteration = state.steps
        with ExitStack() as stack:
            stack.callback(loop.bar.close)
            for event, handler in (
                (Events.EPOCH_STARTED, loop.start_epoch),
                (Events.ITERATION_COMPLETED, loop.end_iteration),
                (Events.EPOCH_COMPLETED, loop.end_epoch),
            ):
                stack.enter_context(trainer.add_event_handler(event, handler))
            trainer.run()
    if state.best_network is None:
        raise TrainingError(f"{folder}: no epoch was validated; raise max_epochs")
    trainer.network.load_state_dict(state.best_network)
    return state


class _Loop:
    """What happens between the trainer's steps."""

    def __init__(
        self,
        trainer: SupervisedTrainer,
        evaluator: SupervisedEvaluator,
        sampler: SlideGroupedSampler | RankSampler,
        scheduler: torch.optim.lr_scheduler.LRScheduler,
        checkpoint: Checkpoint,
        state: TrainingState,
        patience: int | None,
        hard_negatives: HardNegativeRound | None,
    ) -> None:
        self.trainer, self.evaluator, self.sampler, self.scheduler = trainer, evaluator, sampler, scheduler
        self.checkpoint, self.state, self.patience, self.hard_negatives = checkpoint, state, patience, hard_negatives
        self.length = len(cast(Sized, trainer.data_loader))
        self.sums: dict[str, float] = {}
        self.started = 0.0
        self.bar = tqdm(
            desc="finetune",
            total=trainer.state.max_epochs * self.length,
            initial=state.epoch * self.length,
            unit=" step",
            disable=True if rank() else None,  # off, too, when standard error is not a terminal
            dynamic_ncols=True,
        )

    def start_epoch(self) -> None:
        epoch, hard = self.trainer.state.epoch - 1, self.hard_negatives
        if hard is not None and epoch >= hard.epoch:
            if self.state.hard is None:
                found = torch.from_numpy(hard.find(self.trainer.network))
                # The ranks' BatchNorm statistics differ, and so may what they find; all must draw from one list.
                self.state.hard = of_first_rank(found, torch.device(self.trainer.state.device))
                logger.info("epoch %d: %d hard negatives", epoch + 1, len(self.state.hard))
            self.sampler.set_hard(self.state.hard.numpy(), hard.share)
        self.sampler.set_epoch(epoch)
        self.sums = {}
        self.started = time.perf_counter()

    def end_iteration(self) -> None:
        output = self.trainer.state.output
        self.scheduler.step()
        for term, value in output.items():
            if term not in _NOT_TERMS:
                self.sums[term] = self.sums.get(term, 0.0) + value / self.length
        self.bar.set_postfix(epoch=self.trainer.state.epoch, loss=f"{output['loss']:.3f}", refresh=False)
        self.bar.update()

    def end_epoch(self) -> None:
        state, trainer, evaluator = self.state, self.trainer, self.evaluator
        seconds = (time.perf_counter() - self.started) / self.length
        evaluator.run(trainer.state.epoch)
        metric = float(evaluator.state.metrics[evaluator.state.key_metric_name])
        state.epoch, state.steps = trainer.state.epoch, trainer.state.iteration
        if not math.isfinite(metric):
            raise TrainingError(
                f"validation metric is {metric} in epoch {state.epoch}; validation data need items of both classes"
            )
        if metric > state.best_metric:
            network = {name: tensor.detach().cpu().clone() for name, tensor in trainer.network.state_dict().items()}
            state.best_metric, state.best_epoch, state.best_network = metric, state.epoch, network
        if rank() == 0:
            # History first: an epoch whose checkpoint a killed run did not save is done again, and so is its row.
            row = {"epoch": state.epoch, **self.sums, "validation_auc": metric}
            _append_row(self.checkpoint.folder / "history.csv", row)
            # In a file of its own: a resumed training's history equals the whole one's, its pace does not.
            _append_row(self.checkpoint.folder / "pace.csv", {"epoch": state.epoch, "seconds_per_step": seconds})
            self.checkpoint.save(state)
            logger.info("epoch %d: loss %.4f, validation AUC %.4f", state.epoch, self.sums["loss"], metric)
        if _out_of_patience(state, self.patience):
            trainer.terminate()


def _out_of_patience(state: TrainingState, patience: int | None) -> bool:
    return patience is not None and state.epoch - state.best_epoch >= patience


def _append_row(path: Path, row: dict[str, float]) -> None:
    """Add a row to the history; rows of this epoch and later ones, left by a killed run, are dropped."""
    kept = []
    if path.is_file():
        with open(path, newline="", encoding="utf-8") as handle:
            kept = [line for line in csv.DictReader(handle) if int(line["epoch"]) < row["epoch"]]
    text = io.StringIO()
    writer = csv.DictWriter(text, row.keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(kept)
    writer.writerow({key: value if key == "epoch" else f"{value:.6g}" for key, value in row.items()})
    write_text(path, text.getvalue())
