"""What bundle runs left in their folders, read so that they can be laid side by side."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from medsd.errors import DatasetError
from medsd.evaluate.scores import bootstrap_mean

_LONGEST_LABEL = 64
# Settings of `ExplanationSettings` that change what is measured; the seed only changes which tiles are.
_JUDGED_BY = ("items", "draws", "fill", "steps", "target")


@dataclass(frozen=True)
class Estimate:
    """A number with the bounds of its 95 % interval, None where it has none."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Run:
    """What a run left.

    Attributes:
        folder: its output_dir.
        label: what sets it apart from the others.
        content: its `scores.json`, with "training" (cost) and "slide_pointing" beside it.
        settings: of its training; empty where they were not kept.
    """

    folder: Path
    label: str
    content: dict[str, Any]
    settings: dict[str, Any]

    def estimate(self, path: str) -> Estimate | None:
        """The number at that path, or None where the run lacks it.

        Args:
            path: keys joined by dots, of a number or of a dict with "value", "low" and "high".
        """
        node = self.node(path)
        if isinstance(node, dict):
            value, low, high = (_as_number(node.get(key)) for key in ("value", "low", "high"))
        else:
            value, low, high = _as_number(node), None, None
        return None if value is None else Estimate(value, low, high)

    def node(self, path: str) -> Any:
        """What lies at that path, or None."""
        node: Any = self.content
        for key in path.split("."):
            node = node.get(key) if isinstance(node, dict) else None
        return node


def read_runs(folders: Sequence[str | Path]) -> list[Run]:
    """The runs, labelled by the settings in which they differ, or by their folder's name where that says too little.

    Raises:
        DatasetError: a folder that holds no run or damaged files, or runs whose test sets or ways of judging differ.
    """
    if not folders:
        raise DatasetError("compare: no runs; name the output_dir of one or more bundle runs")
    read = [_read_run(Path(folder)) for folder in folders]
    for run in read:
        _check_same(read[0], run)
    judged = [run for run in read if run.node("explanations")]
    for run in judged[1:]:
        _check_judged(judged[0], run)
    labels = _labels(read)
    return [replace(run, label=label) for run, label in zip(read, labels, strict=True)]


def settings_that_differ(runs: Sequence[Run]) -> list[str]:
    """Keys of the settings that are not the same in all runs, in their order; one that a run lacks differs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [key for key in keys if len({setting_text(run.settings.get(key)) for run in runs}) > 1]


def setting_text(value: Any) -> str:
    """A setting's value in words."""
    return value if isinstance(value, str) else json.dumps(value)


def _read_run(folder: Path) -> Run:
    path = folder / "scores.json"
    if not path.is_file():
        raise DatasetError(f"{folder}: no run with scores (no scores.json); name the output_dir of an evaluated run")
    scores = _read_json(path)
    settings_path = folder / "training" / "settings.json"
    settings = _flat(_read_json(settings_path)) if settings_path.is_file() else {}
    cost = _seconds_per_step(folder / "training" / "pace.csv")
    slides = scores.get("slides")
    pointing = _slide_pointing(slides) if isinstance(slides, dict) else {}
    content = {**scores, "training": {"seconds_per_step": cost}, "slide_pointing": pointing}
    return Run(folder, folder.resolve().name, content, settings)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: not JSON ({error}); run its stage again") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: holds no keys; run its stage again")
    return content


def _check_same(first: Run, other: Run) -> None:
    for path, words in (("data_sha256", "another split of the data"), ("tiles.items", "another number of test tiles")):
        mine, theirs = first.node(path), other.node(path)
        for run, found in ((first, mine), (other, theirs)):
            if found is None:
                raise DatasetError(f"{run.folder}: scores.json has no {path}; run its stage 'evaluate' again")
        if mine != theirs:
            raise DatasetError(f"{other.folder}: {words} than {first.folder}; compare runs on the same test set")


def _check_judged(first: Run, other: Run) -> None:
    for key in _JUDGED_BY:
        mine, theirs = (run.node(f"explanations.settings.{key}") for run in (first, other))
        if mine != theirs:
            raise DatasetError(
                f"{other.folder}: explanations judged with {key}={theirs}, those of {first.folder} with {mine}; "
                "run one's stage 'evaluate' again"
            )


def _slide_pointing(slides: dict[str, Any]) -> dict[str, Any]:
    """Means over the annotated slides, with intervals over them, by what their maps are (saliency or mask)."""
    pointing = slides.get("pointing")
    keys = ("positive_inside", "area_share")
    shares = [share for share in pointing.values() if isinstance(share, dict)] if isinstance(pointing, dict) else []
    # Chance over the very slides that pointing is taken over.
    shares = [share for share in shares if all(_as_number(share.get(key)) is not None for key in keys)]
    means: dict[str, Any] = {"ratio": slides.get("mean_pointing_ratio")}
    for key in keys:
        interval = bootstrap_mean([float(share[key]) for share in shares])
        means[key] = {"value": interval.value, "low": interval.low, "high": interval.high}
    return {str(slides.get("quantity") or "saliency"): means}


def _seconds_per_step(path: Path) -> float | None:
    """The median over epochs, which the first one's warming up does not move."""
    if not path.is_file():
        return None
    try:
        with open(path, newline="", encoding="utf-8") as handle:
            cells = [row.get("seconds_per_step") for row in csv.DictReader(handle)]
        values = [float(cell) for cell in cells if cell]
    except (OSError, ValueError, csv.Error) as error:
        raise DatasetError(f"{path}: not a table of epochs ({error}); train that run again") from error
    return median(values) if values else None


def _as_number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        nested = _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
        flat |= nested
    return flat


def _labels(runs: Sequence[Run]) -> list[str]:
    names = [run.folder.resolve().name for run in runs]
    if len(set(names)) < len(names):
        names = [str(run.folder) for run in runs]
    told = settings_that_differ(runs)
    labels = [
        ", ".join(f"{key}={setting_text(run.settings[key])}" for key in told if key in run.settings) for run in runs
    ]
    plain = all(0 < len(label) <= _LONGEST_LABEL for label in labels) and len(set(labels)) == len(labels)
    return labels if plain else names
