"""Runs side by side: accuracy, calibration, faithfulness of their explanations, features, cost."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from medsd.cohort.learnt import why_too_good
from medsd.evaluate.plots import draw_comparison
from medsd.evaluate.runs import Run, number_text, read_runs, setting_text, settings_that_differ
from medsd.evaluate.scores import Interval
from medsd.files import make_folder, write_text
from medsd.tables import write_table

_DASH = "–"
_MAPS = "explanations.maps"
_FEATURES = "explanations.features"
_LESIONS = "lesions.maps.model"


@dataclass(frozen=True)
class Metric:
    """A row of the comparison.

    Attributes:
        key: its column in the table for machines.
        title: its name for people.
        path: where a run keeps it, see `Run.estimate`.
        better: whether "higher" or "lower" is better; "" where it is read beside another.
    """

    key: str
    title: str
    path: str
    better: Literal["higher", "lower", ""]


METRICS = (
    Metric("auc", "patch AUC, interval over slides or groups", "tiles.patch_auc_by_group", "higher"),
    Metric("auc_by_tile", "the same, over tiles (too narrow)", "tiles.patch_auc", "higher"),
    Metric("ece", "calibration error (ECE)", "calibration.ece", "lower"),
    Metric("ece_before", "the same, before calibration", "calibration.ece_before", "lower"),
    Metric("ece_by_chance", "calibration error of true probabilities (chance)", "calibration.ece_by_chance", ""),
    Metric("brier", "Brier score", "calibration.brier", "lower"),
    Metric("masking_area", "accuracy under masking, most salient first", f"{_MAPS}.gradient.masking_area", "lower"),
    Metric("random_area", "accuracy under masking, random control", "explanations.random.masking_area", ""),
    Metric("gap", "gap: control less most salient", f"{_MAPS}.gradient.gap", "higher"),
    Metric("deletion", "deletion", f"{_MAPS}.gradient.deletion", "lower"),
    Metric("insertion", "insertion", f"{_MAPS}.gradient.insertion", "higher"),
    Metric("pointing", "energy pointing, tiles", f"{_MAPS}.gradient.pointing", "higher"),
    Metric("pointing_game", "pointing game, tiles", f"{_MAPS}.gradient.pointing_game", "higher"),
    Metric("area_share", "their regions' share of the tile (chance)", "explanations.area_share", ""),
    Metric("slide_pointing", "energy pointing, slides", "slide_pointing.saliency.positive_inside", "higher"),
    Metric("slide_area_share", "the class's share of the tissue (chance)", "slide_pointing.saliency.area_share", ""),
    Metric("slide_pointing_ratio", "energy pointing over chance, slides", "slide_pointing.saliency.ratio", "higher"),
    Metric("slide_auc", "slide AUC", f"{_LESIONS}.slide_auc", "higher"),
    Metric("froc", "lesion FROC score", f"{_LESIONS}.froc", "higher"),
    Metric("dice", "Dice of the class above the threshold, slides", f"{_LESIONS}.dice", "higher"),
    Metric("total_variation", "total variation of the map", f"{_MAPS}.gradient.total_variation", "lower"),
    Metric("gini", "concentration of the map (Gini)", f"{_MAPS}.gradient.gini", "higher"),
    Metric("entropy", "entropy of the map, 0 to 1", f"{_MAPS}.gradient.entropy", "lower"),
    Metric("magnitude", "mean of the map", f"{_MAPS}.gradient.magnitude", ""),
    Metric("mask_gap", "mask: gap of masking", f"{_MAPS}.mask.gap", "higher"),
    Metric("mask_deletion", "mask: deletion", f"{_MAPS}.mask.deletion", "lower"),
    Metric("mask_insertion", "mask: insertion", f"{_MAPS}.mask.insertion", "higher"),
    Metric("mask_pointing", "mask: energy pointing, tiles", f"{_MAPS}.mask.pointing", "higher"),
    Metric("mask_slide_pointing", "mask: energy pointing, slides", "slide_pointing.mask.positive_inside", "higher"),
    Metric("mask_slide_area", "mask: the class's share of the tissue (chance)", "slide_pointing.mask.area_share", ""),
    Metric("mask_slide_ratio", "mask: energy pointing over chance, slides", "slide_pointing.mask.ratio", "higher"),
    Metric("mask_share", "mask: share left open (small masks point well)", f"{_MAPS}.mask.magnitude", ""),
    Metric("correlation", "mean |correlation| of features", f"{_FEATURES}.mean_abs_correlation", "lower"),
    Metric(
        "correlation_by_chance",
        "mean |correlation| of independent features (chance)",
        f"{_FEATURES}.correlation_by_chance",
        "",
    ),
    Metric("effective_rank", "effective rank of features", f"{_FEATURES}.effective_rank", "higher"),
    Metric("dead_channels", "dead channels", f"{_FEATURES}.dead_channels", "lower"),
    Metric("seconds_per_step", "training, seconds a step", "training.seconds_per_step", "lower"),
)

_NOTES = """\
Intervals are 95 %, by bootstrap over tiles; over slides or groups in the first row and of what slides are. Tiles of a
slide are alike, so intervals over tiles are too narrow; so are, of few slides, those over slides. Without an interval:
of one slide, or alike in every resample. A dash is what a run did not measure. Tiles are judged by the |input gradient|
of their true class, slides by the map that the run draws of them; rows of masks are AIM's own. Masking, deletion and
insertion replace pixels in the order of the map. A low accuracy under masking speaks for the map
only as far as it lies below the random control: a robust network loses less whatever is masked. Research use only."""


def compare_runs(folders: Sequence[str | Path], out: str | Path) -> list[Run]:
    """Write `compare.csv` (a row a run), `compare.md` (a column a run) and `compare.png` into `out`.

    Args:
        folders: output_dirs of bundle runs on one test set.
        out: folder to write, made when missing.

    Raises:
        DatasetError: as `read_runs`.
        OutputError: `out` cannot be written to.
    """
    runs = read_runs(folders)
    out = make_folder(out)
    write_table(out / "compare.csv", map(_row_of, runs))
    write_text(out / "compare.md", _markdown(runs))
    draw_comparison(out / "compare.png", runs)
    return runs


def _row_of(run: Run) -> dict[str, float | str | None]:
    """A row of the table for machines; cells of what a run did not measure are empty, so that columns stay numbers."""
    learnt = run.node("learnt_before")
    row: dict[str, float | str | None] = {
        "run": str(run.folder),
        "label": run.label,
        "learnt_before": len(learnt) if learnt else None,
    }
    for metric in METRICS:
        found = run.estimate(metric.path)
        for suffix, name in (("", "value"), ("_low", "low"), ("_high", "high")):
            row[metric.key + suffix] = getattr(found, name, None)
    return row


def _markdown(runs: Sequence[Run]) -> str:
    labels = [run.label for run in runs]
    measured = [(metric, [run.estimate(metric.path) for run in runs]) for metric in METRICS]
    tiles, groups = (runs[0].node(f"tiles.{key}") for key in ("items", "groups"))
    lines = [f"# {len(runs)} runs on {tiles} test tiles of {groups or 'unknown'} slides or groups", ""]
    for run in runs:
        if learnt := run.node("learnt_before"):
            lines += [f"**Beware, {run.label}**: {why_too_good(learnt)}", ""]
    lines += [table_row("", "better", *labels), "| --- | --- |" + " ---: |" * len(runs)]
    lines += [table_row(metric.title, metric.better, *map(_cell, found)) for metric, found in measured if any(found)]
    told = settings_that_differ(runs)
    if told:
        lines += ["", table_row("settings that differ", *labels), "| --- |" + " ---: |" * len(runs)]
    for key in told:
        values = (setting_text(run.settings[key]) if key in run.settings else _DASH for run in runs)
        lines.append(table_row(key, *values))
    return "\n".join([*lines, "", _NOTES, ""])


def table_row(*cells: str) -> str:
    """A row of a Markdown table."""
    return "| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |"


def _cell(found: Interval | None) -> str:
    if found is None:
        return _DASH
    if math.isnan(found.low + found.high):
        return number_text(found.value)
    numbers = found.value, found.low, found.high
    return "{} ({} to {})".format(*(number_text(number, max(numbers, key=abs)) for number in numbers))
