"""The stages of `bundles/segmentation.json`: a network trained on masks, scored, and its worst pictures shown."""

from __future__ import annotations

import heapq
import json
import logging
from collections.abc import Iterator
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, Literal, cast, get_args

import ignite.distributed as idist
import numpy as np
import torch
from ignite.handlers import EarlyStopping
from monai.engines import SupervisedEvaluator, SupervisedTrainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Subset

from medsd.bundle.masks import MaskData
from medsd.checks import check_choice, check_number
from medsd.cohort.dataset import evenly
from medsd.cohort.learnt import learnt_and_tested, learnt_from, tell_of_learnt, why_too_good
from medsd.errors import DatasetError, WeightsError
from medsd.evaluate.mask_scores import UnitScores, joined_scores, rows_of, score_unit, summarise_masks
from medsd.evaluate.mask_sheet import SheetItem, draw_mask_sheet
from medsd.evaluate.summary import interval_text
from medsd.files import as_json, sha256_of, write_json
from medsd.networks.memory import freed_memory_kept
from medsd.networks.modes import evaluating, usable_device
from medsd.networks.start import learnt_by, weights_sha256
from medsd.progress import progress_bar
from medsd.record import read_record, write_record
from medsd.segment.items import MaskedItems, MaskedSample
from medsd.segment.network import SegmentationNetwork, standardise_channels
from medsd.segment.weights import SegmentationCard, load_segmentation, save_segmentation, start_weights_for
from medsd.tables import write_table
from medsd.training.checkpoint import Checkpoint
from medsd.training.training import run_training, settings_of, validation_settings

logger = logging.getLogger(__name__)

Protocol = Literal["linear", "full"]
SEGMENTATION, SCORES, TABLE, SHEET = "segmentation.safetensors", "scores.json", "masks.csv", "sheet.png"
_MOMENTS_OF, _BATCH = 64, 8


def segment(
    data: MaskData,
    trainer: SupervisedTrainer,
    evaluator: SupervisedEvaluator,
    checkpoint: Checkpoint,
    protocol: Protocol = "full",
    early_stop: EarlyStopping | None = None,
    start_weights: str | None = None,
    val_interval: int = 1,
) -> None:
    """Stage segment: train (or go on), then write the network of the best epoch beside the checkpoint's folder.

    Args:
        data: described in the weights' card; a training belongs to its split and fraction of labels.
        trainer: of a `SegmentationNetwork` on masked items, with a `SegmentationStep`.
        evaluator: its key metric, higher is better, chooses the epoch.
        checkpoint: of the network, the optimiser, the schedule and the step.
        protocol: "linear" where the encoder stays as it is, "full" where all learns.
        early_stop: see `run_training`.
        start_weights: a `segmentation.safetensors` of the same network, decoder and all, that the training starts from;
            None starts from the network as it was made.
        val_interval: that of the trainer's `ValidationHandler`.

    Raises:
        ConfigError: an unknown protocol, or see `validation_settings`.
        WeightsError: start weights of another network.
    """
    check_choice("protocol", protocol, get_args(Protocol))
    network = cast(SegmentationNetwork, trainer.network)
    # Before anything is written.
    start = None if start_weights is None else start_weights_for(network, start_weights)
    learnt = learnt_from(data, (*learnt_by(network.encoder_weights), *learnt_by(start_weights)))
    tell_of_learnt(data, learnt)
    settings = settings_of(
        trainer,
        **_network_settings(network, start_weights),
        protocol=protocol,
        data={"side_px": data.side_px, "split": data.fingerprint()},
        **validation_settings(trainer, early_stop, val_interval),
        **{name: part for name, part in checkpoint.parts.items() if name in ("scheduler", "step")},
    )
    if start is None:
        begin = partial(standardise_channels, network, _some(data.part("training")))
    else:
        begin = partial(network.load_state_dict, start)
    state = run_training(trainer, evaluator, checkpoint, settings, early_stop, stage="segment", begin=begin)
    if idist.get_rank() > 0:
        return
    path, record = checkpoint.folder.parent / SEGMENTATION, checkpoint.folder / "weights.json"
    recipe = {"settings": settings, "epoch": state.epoch, "best_epoch": state.best_epoch, "mpp": data.mpp}
    written = read_record(record, recipe)
    if written is not None and path.is_file() and sha256_of(path) == written["sha256"]:
        return
    card = SegmentationCard(
        *(network.encoder_name, network.decoder_name, network.classes, data.side_px, data.description),
        mpp=data.mpp,
        start=_start_of(network, start_weights),
        protocol=protocol,
        data_sha256=settings["data"]["split"],
        settings_sha256=sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        input_mean=network.normalise.input_mean,
        input_std=network.normalise.input_std,
        learnt_from=learnt,
        validation={str(evaluator.state.key_metric_name): round(state.best_metric, 4)} if state.best_epoch else {},
    )
    save_segmentation(path, network, card)
    write_record(record, recipe, [f"../{SEGMENTATION}"], sha256=sha256_of(path))


def _network_settings(network: SegmentationNetwork, start_weights: str | None) -> dict[str, Any]:
    """How a network was made and what it starts from: a training belongs to both."""
    weights = network.encoder_weights
    return {
        "network": {
            "encoder": network.encoder_name,
            "decoder": network.decoder_name,
            "classes": list(network.classes),
            "input_mean": network.normalise.input_mean,
            "input_std": network.normalise.input_std,
        },
        "start": {
            "pretrained": network.pretrained,
            "encoder_weights": weights and weights_sha256(weights),
            **({"start_weights": sha256_of(start_weights)} if start_weights else {}),
        },
    }


def _some(items: MaskedItems) -> Iterator[Tensor]:
    """Batches of up to 64 of the images, spread over all."""
    subset = Subset(cast("Dataset[MaskedSample]", items), evenly(len(items), _MOMENTS_OF).tolist())
    for batch in DataLoader(subset, _BATCH):
        yield batch["image"]


def _start_of(network: SegmentationNetwork, start_weights: str | None) -> str:
    """What the encoder started from, in words."""
    if start_weights is not None:
        return f"the whole network from {Path(start_weights).name}, SHA-256 {sha256_of(start_weights)}"
    if network.encoder_weights is None:
        return "ImageNet weights (timm)" if network.pretrained else "random weights"
    return f"{Path(network.encoder_weights).name}, SHA-256 {weights_sha256(network.encoder_weights)}"


@freed_memory_kept()
def score_masks(
    data: MaskData,
    output_dir: str,
    device: torch.device,
    batch_size: int = 8,
    workers: int = 0,
    surface_tolerance: float = 2.0,
    sheet_items: int = 12,
    seed: int = 0,
) -> None:
    """Stage evaluate: scores on the test part into `scores.json`, a row a unit and class into `masks.csv`, `sheet.png`.

    A unit is an image, a slide (its tiles together, without distances) or a volume. What scores mean, and how classes
    that are not there count: `medsd.evaluate.mask_scores`.

    Args:
        data: the split that the network was trained on.
        output_dir: holds `segmentation.safetensors`.
        device: computes.
        batch_size, workers: of the reading.
        surface_tolerance: of the surface Dice, in the data's `length`s.
        sheet_items: the worst items that are shown.
        seed: of the bootstrap.

    Raises:
        WeightsError: no network, or of another split.
    """
    check_number("sheet_items", sheet_items, "[1, inf)", whole=True)
    folder = Path(output_dir)
    network, card, digest = load_segmentation(folder / SEGMENTATION, usable_device(device))
    if card.data_sha256 != data.fingerprint():
        raise WeightsError(
            f"{folder / SEGMENTATION}: trained on another split of the data; run the stage 'segment' for this one"
        )
    items = data.part("testing")
    worst = _Worst(sheet_items, network.classes)
    units = list(_units(data, items, network, batch_size, workers, surface_tolerance, worst))
    scores = summarise_masks(units, network.classes, seed)
    content = {
        "weights_sha256": digest,
        "data_sha256": card.data_sha256,
        "protocol": card.protocol,
        "encoder": card.encoder,
        "decoder": card.decoder,
        "start": card.start,
        "trained_on": card.trained_on,
        "units": len(units),
        "unit": data.unit,
        "length": data.length,
        "surface_tolerance": surface_tolerance,
        "masks": {name: as_json(each) for name, each in scores.items()},
    }
    if learnt := learnt_and_tested(data, card.learnt_from):
        content["learnt_before"] = learnt
    write_table(folder / TABLE, list(rows_of(units, network.classes)))
    write_json(folder / SCORES, content)
    first, few = next(iter(scores.values())), len(worst) < len(items)
    draw_mask_sheet(
        folder / SHEET,
        worst.items(),
        network.classes,
        f"The {len(worst)} worst of {len(items)} test {data.item}s" if few else f"All {len(items)} test {data.item}s",
        [
            f"{card.encoder} with {card.decoder}, {card.protocol} protocol, trained on {card.trained_on}.",
            f"{'These are the worst, not the usual: mean' if few else 'The worst first; mean'} Dice of {first.units} "
            f"{data.unit}{'s' * (first.units != 1)} {first.dice.value:.2f}.",
            "The mask that was given may be wrong, too. Research use only.",
        ],
    )


def _units(
    data: MaskData,
    items: MaskedItems,
    network: SegmentationNetwork,
    batch_size: int,
    workers: int,
    tolerance: float,
    worst: _Worst,
) -> Iterator[UnitScores]:
    """The scores of each unit, whose items are read in order."""
    order = np.argsort(items.units, kind="stable")
    pairs: list[tuple[Tensor, Tensor]] = []
    for place, (item, found, sample) in enumerate(_predicted(items, order, network, batch_size, workers)):
        worst.see(items, item, sample, found)
        pairs.append(data.judged(items, item, found))
        if place + 1 < len(order) and items.units[order[place + 1]] == items.units[item]:
            continue
        spacing = data.spacing(items, item)
        score = partial(
            score_unit,
            classes=len(network.classes),
            unit=str(items.units[item]),
            patient=str(items.patients[item]),
            spacing=spacing,
            tolerance=tolerance,
        )
        if spacing is None:
            yield joined_scores(score(one, other) for one, other in pairs)
        elif len(spacing) == 3:
            one, other = (torch.stack(list(side)) for side in zip(*pairs, strict=True))
            yield score(one, other)
        else:
            yield score(*pairs[0])
        pairs = []


def _predicted(
    items: MaskedItems, order: Any, network: SegmentationNetwork, batch_size: int, workers: int
) -> Iterator[tuple[int, Tensor, MaskedSample]]:
    """Each item with the likeliest class (S, S) uint8 of its pixels, and itself."""
    loader = DataLoader(Subset(cast("Dataset[MaskedSample]", items), order.tolist()), batch_size, num_workers=workers)
    rows = iter(order.tolist())
    for batch in progress_bar("evaluate")(loader, len(loader), "batch"):
        # NHWC is the faster for convolutions, on CPUs too.
        images = batch["image"].to(network.device, memory_format=torch.channels_last)
        with evaluating(network), torch.inference_mode():
            found = network(images).argmax(dim=1).to("cpu", torch.uint8)
        for number in range(len(found)):
            yield next(rows), found[number], {"image": batch["image"][number], "label": batch["label"][number]}


class _Worst:
    """The items of the lowest Dice, of equal ones those of the largest error; where nothing is drawn or found, none."""

    def __init__(self, count: int, classes: tuple[str, ...]) -> None:
        self.count, self.classes = count, classes
        self._heap: list[tuple[float, int, int, SheetItem]] = []

    def __len__(self) -> int:
        return len(self._heap)

    def see(self, items: MaskedItems, item: int, sample: MaskedSample, found: Tensor) -> None:
        mask = sample["label"][0]
        scores = score_unit(found, mask, len(self.classes))
        whole = scores.true + scores.found
        if not whole.any():
            return
        dice = float((2 * scores.both[whole > 0] / whole[whole > 0]).mean())
        rank = -dice, int((mask != found).sum()), -item
        if len(self._heap) == self.count and rank < self._heap[0][:3]:
            return
        patient = str(items.patients[item])
        name = Path(items.place(item)).name
        row = SheetItem(
            pixels=sample["image"].permute(1, 2, 0).numpy().copy(),
            mask=mask.numpy().copy(),
            found=found.numpy().copy(),
            captions=(name if patient in name else f"{name}, {patient}", _in_words(dice, scores)),
            dice=dice,
        )
        add = heapq.heappush if len(self._heap) < self.count else heapq.heapreplace
        add(self._heap, (*rank, row))

    def items(self) -> list[SheetItem]:
        return [row for *_, row in self._heap]


def _in_words(dice: float, scores: UnitScores) -> str:
    if not scores.true.any():
        return f"nothing drawn, {int(scores.found.sum()):,} px found"
    if not scores.found.any():
        return f"nothing found, {int(scores.true.sum()):,} px drawn"
    return f"Dice {dice:.2f}"


def segmentation_summary(output_dir: str) -> str:
    """What a run leaves, in a few lines."""
    folder = Path(output_dir)
    lines = ["", "medsd: done"]
    if (folder / SCORES).is_file():
        scores = json.loads((folder / SCORES).read_text("utf-8"))
        if "masks" not in scores:
            raise DatasetError(f"{folder / SCORES}: no scores of masks; choose another output_dir")
        for name, each in scores["masks"].items():
            dice, distance = each["dice"], each["hausdorff95"]["value"]
            what = f"{each['units']} {scores['unit']}s, {each['patients']} patients"
            line = f"  {name:<12} Dice {interval_text(dice)} ({what})"
            lines.append(line + (f"; Hausdorff 95 {distance:.1f} {scores['length']}" if distance is not None else ""))
        if learnt := scores.get("learnt_before"):
            lines.append(f"  beware       {why_too_good(learnt)}")
    for label, name in (("weights", SEGMENTATION), ("table", TABLE), ("sheet", SHEET)):
        if (folder / name).is_file():
            lines.append(f"  {label:<12} {folder / name}")
    return "\n".join(lines)
