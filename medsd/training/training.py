"""Running a MONAI trainer so that it resumes, keeps its best network, and shows where it is."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import ignite.distributed as idist
import torch
from ignite.engine import Events
from ignite.handlers import EarlyStopping
from monai.engines.evaluator import SupervisedEvaluator
from monai.engines.trainer import SupervisedTrainer
from torch import nn
from torch.nn.modules.loss import _Loss
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader
from tqdm import tqdm

from medsd.checks import check_number
from medsd.claims import claimed
from medsd.cohort.dataset import GroupedSampler, SlideGroupedSampler
from medsd.errors import TrainingError
from medsd.files import make_folder
from medsd.networks.memory import freed_memory_kept
from medsd.tables import read_table, write_table
from medsd.training.checkpoint import Checkpoint, TrainingState
from medsd.training.hard_negatives import HardNegativeRound
from medsd.training.network import Encoded

logger = logging.getLogger(__name__)

_NOT_TERMS = ("pred", "label")
_PLAIN = (str, int, float, bool, type(None))
# What torch's schedules keep to themselves, and what of them is the state of a step; their rates are the optimiser's.
_OF_SCHEDULES = ("_schedule_phases", "_anneal_func_type", "_milestones", "_schedulers")
_OF_STEPS = ("base_lrs", "last_epoch", "best", "cooldown_counter", "num_bad_epochs")


def settings_of(trainer: SupervisedTrainer, **parts: object) -> dict[str, Any]:
    """What a training follows from, read off the objects that it is made of: plain values, nested by name.

    Of every object its public plain attributes, as it was built: a choice that is added to one is recorded with it. Of
    modules also their parts, of losses weights of classes, of schedules phases and milestones. Of an encoder the names
    of what is frozen, unless it is all, which the number of trained values tells.

    Args:
        trainer: its epochs, loss function, optimiser, data loader, and network with an `encoder`.
        parts: what belongs to the training beside it, by name; None is kept as None.
    """
    loader, optimizer = cast(DataLoader[Any], trainer.data_loader), trainer.optimizer
    groups = optimizer.param_groups
    rates: dict[str, Any] = {
        "lr": [group.get("max_lr", group.get("initial_lr", group["lr"])) for group in groups],
        "weight_decay": [group.get("weight_decay") for group in groups],
        "trained_values": [sum(parameter.numel() for parameter in group["params"]) for group in groups],
    }
    for name, key in (("rises_from", "initial_lr"), ("ends_at", "min_lr")):
        if "max_lr" in groups[0]:  # of a OneCycleLR, as a share of the highest rate
            rates[name] = [float(f"{group[key] / (group['max_lr'] or 1):.6g}") for group in groups]
    learns = {name: each.requires_grad for name, each in cast(Encoded, trainer.network).encoder.named_parameters()}
    frozen = [name for name, learning in learns.items() if not learning]
    return {
        "max_epochs": trainer.state.max_epochs,
        "batch_size": loader.batch_size,
        "loss_function": _plain(trainer.loss_function),
        "sampler": {**_plain(loader.sampler), "epoch": None},
        "optimizer": {"name": type(optimizer).__name__, **optimizer.defaults, **rates},
        **({"frozen": frozen} if 0 < len(frozen) < len(learns) else {}),
        **{name: _plain(part) for name, part in parts.items()},
    }


def _plain(thing: object) -> Any:
    if isinstance(thing, _PLAIN):
        return thing
    if isinstance(thing, dict):
        return {key: _plain(value) for key, value in thing.items()}
    if isinstance(thing, list | tuple):
        return [_plain(value) for value in thing]
    names = [field.name for field in dataclasses.fields(thing)] if dataclasses.is_dataclass(thing) else vars(thing)
    if isinstance(thing, LRScheduler):
        names = [name for name in names if name in _OF_SCHEDULES or not (name.startswith("_") or name in _OF_STEPS)]
    else:
        names = [name for name in names if not name.startswith("_")]
    values = {name.lstrip("_"): getattr(thing, name) for name in names}
    kept = {"name": type(thing).__name__, **{name: _plain(v) for name, v in values.items() if _is_settings(v)}}
    if isinstance(thing, nn.Module):
        kept |= {name: _plain(part) for name, part in thing.named_children()}
    if isinstance(thing, _Loss):  # its weights of classes; a head's are learnt
        kept |= {name: part.tolist() for name, part in thing.named_buffers(recurse=False)}
    return kept


def _is_settings(value: object) -> bool:
    if isinstance(value, list | tuple):  # phases of a schedule are dicts in a list
        return all(all(map(_is_settings, e.values())) if isinstance(e, dict) else _is_settings(e) for e in value)
    return isinstance(value, (*_PLAIN, LRScheduler)) or dataclasses.is_dataclass(value)


def validation_settings(
    trainer: SupervisedTrainer, early_stop: EarlyStopping | None, val_interval: int
) -> dict[str, Any]:
    """What of a training's settings says how it is validated; an interval of 1 is left out, as in runs of before.

    Raises:
        ConfigError: no epoch would be trained or validated, or a number that is no whole one.
    """
    epochs = trainer.state.max_epochs
    check_number("max_epochs", epochs, "[1, inf)", whole=True)
    hint = f"above max_epochs={epochs} no epoch is validated"
    check_number("val_interval", val_interval, f"[1, {epochs}]", whole=True, hint=hint)
    if early_stop is not None:
        check_number("patience", early_stop.patience, "[1, inf)", whole=True, hint="null trains to the end")
    patience = early_stop and early_stop.patience
    return {"patience": patience, **({} if val_interval == 1 else {"val_interval": val_interval})}


@freed_memory_kept()
def run_training(
    trainer: SupervisedTrainer,
    evaluator: SupervisedEvaluator | None,
    checkpoint: Checkpoint,
    settings: dict[str, Any],
    early_stop: EarlyStopping | None = None,
    hard_negatives: HardNegativeRound | None = None,
    stage: str = "finetune",
    begin: Callable[[], None] | None = None,
    complete_from: int = 1,
) -> TrainingState:
    """Train to `max_epochs`, or go on from the last step saved; the network ends as the best one on validation.

    Without an evaluator it ends as the last one. What the trainer's handlers put into `state.metrics` by the end of an
    epoch goes into its row of the history.

    Leaves `checkpoint.pt`, `settings.json`, `history.csv` and `pace.csv` (a row an epoch) in the checkpoint's folder. A
    finished training is not repeated. Of several processes the first writes; all validate, on all validation data.

    Args:
        trainer: its iterations give the loss and its parts as floats (`OptimiserStep`), its sampler is a
            `GroupedSampler`, and its handlers validate (MONAI's `ValidationHandler`) and step the schedule.
        evaluator: the handler's; its key metric, higher is better, chooses the best network. None keeps the last one.
        checkpoint: of the network, the optimiser and all else that must be put back to resume.
        settings: what must be equal for a training to be resumed.
        early_stop: ends the training, when validated; one of the checkpoint's parts.
        hard_negatives: from its epoch on, false positives among the training items are drawn more often.
        stage: its name in the progress bar and the log.
        begin: called before the first step of all; a training that is resumed is past it.
        complete_from: the first epoch, counted from 1, that may be the best one and that `early_stop` counts; one
            before is kept where none of these is validated.

    Raises:
        TrainingError: another training's folder, or one at work in it, a damaged checkpoint, or a loss or metric that
            is not finite.
        OutputError: the folder cannot be written to.
        ConfigError: hard negatives after the end.
    """
    if hard_negatives is not None:
        end = f"[0, {trainer.state.max_epochs})"
        check_number("hard_negative_epoch", hard_negatives.epoch, end, whole=True, hint="below max_epochs, or null")
    with _alone_in(make_folder(checkpoint.folder)):
        return _run(trainer, evaluator, checkpoint, settings, early_stop, hard_negatives, stage, begin, complete_from)


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Keep other runs out of a training's folder: two would mix their histories."""
    if idist.get_rank() > 0:  # the first process holds the folder for all
        yield
        return
    with claimed(folder / ".training.claim") as claim:
        if claim is None:
            raise TrainingError(f"{folder}: another run trains here; wait for it, or choose another output_dir")
        yield


def _run(
    trainer: SupervisedTrainer,
    evaluator: SupervisedEvaluator | None,
    checkpoint: Checkpoint,
    settings: dict[str, Any],
    early_stop: EarlyStopping | None,
    hard_negatives: HardNegativeRound | None,
    stage: str,
    begin: Callable[[], None] | None,
    complete_from: int,
) -> TrainingState:
    folder = checkpoint.folder
    state = checkpoint.load(settings)
    if state.epoch < trainer.state.max_epochs and not (early_stop and early_stop.counter >= early_stop.patience):
        if state.steps:
            done = (stage, state.steps, state.epoch, trainer.state.max_epochs)
            logger.info("%s: resuming after step %d, epoch %d of %d", *done)
        elif begin is not None:
            begin()
        # With ignite's pausing on, a trainer that once failed would return from a second run having done nothing.
        trainer.interrupt_resume_enabled = False
        trainer.state.epoch = state.epoch
        epochs = _Epochs(trainer, evaluator, checkpoint, state, hard_negatives, stage, complete_from)
        if state.steps and state.epoch_length != epochs.length:
            raise TrainingError(
                f"{folder}: had {state.epoch_length} steps an epoch, now {epochs.length}; start as many processes as "
                "before, or choose another output_dir"
            )
        state.epoch_length = epochs.length
        trainer.state.iteration = state.steps
        with ExitStack() as stack:
            stack.callback(epochs.bar.close)
            if early_stop is not None and evaluator is not None:
                counts = Events.COMPLETED(lambda engine, _: engine.state.epoch >= complete_from)
                stack.enter_context(evaluator.add_event_handler(counts, early_stop))
            for event, handler in (
                (Events.EPOCH_STARTED, epochs.start),
                (Events.ITERATION_COMPLETED, epochs.step),
                (Events.EPOCH_COMPLETED, epochs.end),
            ):
                stack.enter_context(trainer.add_event_handler(event, handler))
            trainer.run()
    if evaluator is not None:
        if state.best_network is None:
            raise TrainingError(f"{folder}: no epoch was validated; raise max_epochs")
        trainer.network.load_state_dict(state.best_network)
    return state


class _Epochs:
    """What happens between the trainer's steps, beside what MONAI's handlers do."""

    def __init__(
        self,
        trainer: SupervisedTrainer,
        evaluator: SupervisedEvaluator | None,
        checkpoint: Checkpoint,
        state: TrainingState,
        hard_negatives: HardNegativeRound | None,
        stage: str,
        complete_from: int,
    ) -> None:
        self.trainer, self.evaluator, self.complete_from = trainer, evaluator, complete_from
        self.checkpoint, self.state, self.hard_negatives = checkpoint, state, hard_negatives
        self.loader = cast(DataLoader[Any], trainer.data_loader)
        self.sampler = cast(GroupedSampler, self.loader.sampler)
        self.length = len(self.loader)
        self.steps = 0  # of the epoch, in this process
        self.started = self.seconds = 0.0
        self.bar = tqdm(
            desc=stage,
            total=trainer.state.max_epochs * self.length,
            initial=state.steps,
            unit=" step",
            disable=True if idist.get_rank() else None,  # off, too, when standard error is not a terminal
            dynamic_ncols=True,
        )

    def start(self) -> None:
        epoch, hard = self.trainer.state.epoch - 1, self.hard_negatives
        if hard is not None and epoch >= hard.epoch:
            if self.state.hard is None:
                # BatchNorm statistics of processes differ, and so may what they find; all must draw from one list.
                found = torch.from_numpy(hard.find(self.trainer.network)) if idist.get_rank() == 0 else None
                self.state.hard = cast(torch.Tensor, idist.broadcast(found, src=0, safe_mode=True)).cpu()
                logger.info("epoch %d: %d hard negatives", epoch + 1, len(self.state.hard))
            cast(SlideGroupedSampler, self.sampler).set_hard(self.state.hard.numpy(), hard.share)
        done = self.trainer.state.iteration - epoch * self.length
        self.sampler.set_epoch(epoch, done * cast(int, self.loader.batch_size))
        self.steps = 0
        self.started = time.perf_counter()

    def step(self) -> None:
        state, output = self.state, self.trainer.state.output
        self.steps, self.seconds = self.steps + 1, time.perf_counter() - self.started
        for term, value in output.items():
            if term not in _NOT_TERMS:
                state.sums[term] = state.sums.get(term, 0.0) + value / self.length
        self.bar.set_postfix(epoch=self.trainer.state.epoch, loss=f"{output['loss']:.3f}", refresh=False)
        self.bar.update()
        state.steps, every = self.trainer.state.iteration, self.checkpoint.save_every
        # A whole epoch is saved when it has been validated.
        if every and state.steps % every == 0 and state.steps % self.length and idist.get_rank() == 0:
            self.checkpoint.save(state)

    def end(self) -> None:
        state, metrics = self.state, self.trainer.state.metrics
        state.epoch = self.trainer.state.epoch
        row: dict[str, float | None] = {"epoch": state.epoch, **state.sums, **metrics, **self._validated()}
        state.sums = {}
        if idist.get_rank() == 0:  # of several processes each has its own sums, and BatchNorm's averages; one is told
            logger.info("%s", ", ".join(f"{name} {value:.4g}" for name, value in row.items() if value is not None))
            # History first: an epoch whose checkpoint a killed run did not save is done again, and so is its row.
            _append_row(self.checkpoint.folder / "history.csv", row)
            # In a file of its own: a resumed training's history equals the whole one's, its pace does not.
            pace = {"epoch": state.epoch, "seconds_per_step": self.seconds / self.steps}
            _append_row(self.checkpoint.folder / "pace.csv", pace)
            self.checkpoint.save(state)

    def _validated(self) -> dict[str, float | None]:
        """The key metric of the epoch, None where it was not validated; the best network is kept."""
        if self.evaluator is None:
            return {}
        state, validated = self.state, self.evaluator.state
        if validated.epoch != state.epoch:  # the handler's interval may leave epochs out
            return {validated.key_metric_name: None}
        metric = float(validated.metrics[validated.key_metric_name])
        if not math.isfinite(metric):
            raise TrainingError(
                f"{validated.key_metric_name} is {metric} in epoch {state.epoch}; validation data need items of every "
                "class"
            )
        if metric > state.best_metric or state.best_epoch < self.complete_from <= state.epoch:
            network = self.trainer.network.state_dict().items()
            state.best_network = {name: tensor.detach().cpu().clone() for name, tensor in network}
            state.best_metric, state.best_epoch = metric, state.epoch
        return {validated.key_metric_name: metric}


def _append_row(path: Path, row: Mapping[str, float | None]) -> None:
    """Add a row to the history; rows of this epoch and later ones, left by a killed run, are dropped."""
    before = read_table(path).to_dict("records") if path.is_file() else []
    kept = [line for line in before if int(line["epoch"]) < int(row["epoch"] or 0)]
    new = {key: f"{value:.6g}" if isinstance(value, float) else value for key, value in row.items()}
    write_table(path, [*kept, new], list(row))
