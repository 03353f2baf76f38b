"""What bundle runs left in their folders, read so that they can be laid side by side."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

from medsd.errors import DatasetError
from medsd.evaluate.scores import Interval, bootstrap_mean
from medsd.files import read_json
from medsd.tables import read_table

_LONGEST_LABEL = 64
# What the files of `scores.json` rest on: path, and what is said where it differs from the first run's.
_SAME = {"data_sha256": "another split of the data", "tiles.items": "another number of test tiles"}
# Settings of `ExplanationSettings` that change what is measured; the seed only changes which tiles are.
_JUDGED_BY = ("items", "draws", "fill", "steps", "target")


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

    def estimate(self, path: str) -> Interval | None:
        """The number at that path with the bounds that it has, or None where the run lacks it.

        Args:
            path: keys joined by dots, of a number or of a dict with "value", "low" and "high".
        """
        node = self.node(path)
        numbers = [node] if not isinstance(node, dict) else [node.get(key) for key in ("value", "low", "high")]
        value, *bounds = map(_as_number, numbers)
        low, high = (math.nan if bound is None else bound for bound in bounds or (None, None))
        return None if value is None else Interval(value, low, high)

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
    runs = [_read_run(Path(folder)) for folder in folders]
    for run in runs:
        for path, words in _SAME.items():
            if run.node(path) is None:
                raise DatasetError(f"{run.folder}: scores.json has no {path}; run its stage 'evaluate' again")
            if run.node(path) != runs[0].node(path):
                raise DatasetError(f"{run.folder}: {words} than {runs[0].folder}; compare runs on the same test set")
    asked = [run for run in runs if run.node("target")]  # it could not always be chosen, and was not told
    for run in asked[1:]:
        theirs, first = run.node("target"), asked[0].node("target")
        if theirs != first:
            raise DatasetError(
                f"{run.folder}: scores of {theirs}, those of {asked[0].folder} of {first}; compare runs of one target"
            )
    judged = [run for run in runs if run.node("explanations")]
    for run in judged[1:]:
        for key in _JUDGED_BY:
            theirs, first = (one.node(f"explanations.settings.{key}") for one in (run, judged[0]))
            if theirs != first:
                raise DatasetError(
                    f"{run.folder}: explanations judged with {key}={theirs}, those of {judged[0].folder} with {first}; "
                    "run one's stage 'evaluate' again"
                )
    return [replace(run, label=label) for run, label in zip(runs, _labels(runs), strict=True)]


def settings_that_differ(runs: Sequence[Run]) -> list[str]:
    """Keys of the settings that are not the same in all runs, in their order; one that a run lacks differs."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [key for key in keys if len({setting_text(run.settings.get(key)) for run in runs}) > 1]


def setting_text(value: Any) -> str:
    """A setting's value in words."""
    return value if isinstance(value, str) else json.dumps(value)


def number_text(value: float, beside: float = 0.0) -> str:
    """A number with about three digits of itself or of the number beside it, whichever is greater; counts in full."""
    if isinstance(value, int):
        return str(value)
    size = max(abs(value), abs(beside))
    if size >= 10:
        return f"{value:.{1 if size < 100 else 0}f}"
    return f"{value:.3f}" if size >= 0.01 or size == 0 else f"{value:.2g}"


def _read_run(folder: Path) -> Run:
    if not (folder / "scores.json").is_file():
        raise DatasetError(f"{folder}: no run with scores (no scores.json); name the output_dir of an evaluated run")
    scores = read_run_json(folder / "scores.json")
    settings_path, pace_path = folder / "training" / "settings.json", folder / "training" / "pace.csv"
    settings = _flat(read_run_json(settings_path)) if settings_path.is_file() else {}
    # The median over epochs, which the first one's warming up does not move.
    paces = _paces(pace_path) if pace_path.is_file() else []
    cost = {"seconds_per_step": median(paces) if paces else None}
    content = {**scores, "training": cost, "slide_pointing": _slide_pointing(scores.get("slides"))}
    return Run(folder, folder.resolve().name, content, settings)


def read_run_json(path: Path) -> dict[str, Any]:
    """What a stage wrote as JSON.

    Raises:
        DatasetError: it cannot be read, or is damaged.
    """
    try:
        content = read_json(path)
    except (OSError, ValueError) as error:
        raise DatasetError(f"{path}: not JSON ({error}); run its stage again") from error
    if not isinstance(content, dict):
        raise DatasetError(f"{path}: holds no keys; run its stage again")
    return content


def _paces(path: Path) -> list[float]:
    """Seconds a step of each epoch that told them."""
    table = read_table(path)
    try:
        return [float(cell) for cell in table.get("seconds_per_step", ()) if cell]
    except ValueError as error:
        raise DatasetError(f"{path}: not a table of epochs ({error}); train that run again") from error


def _slide_pointing(slides: Any) -> dict[str, Any]:
    """Means over the annotated slides, with intervals over them, by what their maps are (saliency or mask)."""
    if not isinstance(slides, dict):
        return {}
    pointing, keys = slides.get("pointing"), ("positive_inside", "area_share")
    shares = [share for share in pointing.values() if isinstance(share, dict)] if isinstance(pointing, dict) else []
    # All over the very slides that the mean ratio is taken over: without the target there is nothing to point at.
    shares = [share for share in shares if all(_as_number(share.get(key)) is not None for key in (*keys, "ratio"))]
    means = {key: asdict(bootstrap_mean([share[key] for share in shares])) for key in keys}
    return {str(slides.get("quantity") or "saliency"): {"ratio": slides.get("mean_pointing_ratio"), **means}}


def _as_number(value: Any) -> float | None:
    is_number = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    return value if is_number else None


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
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
