"""One figure of a run: training, ROC on held-out tiles, slide scores, and where the saliency lies."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from medsd.evaluate.scores import roc_curve
from medsd.files import atomic_path

_NORMAL, _TUMOUR, _INK = "#1f77b4", "#d62728", "#444444"


def draw_summary(path: str | Path, folder: str | Path) -> None:
    """Draw the figure of the run in `folder` from its `training/history.csv`, `test_tiles.npz` and `scores.json`.

    Panels whose data are missing (slides, when a run knows patches only) are left out.

    Raises:
        OutputError: the figure cannot be written.
    """
    folder = Path(folder)
    scores = json.loads((folder / "scores.json").read_text("utf-8"))
    drawers: list[Callable[[Axes, Path, dict[str, Any]], None]] = []
    if (folder / "training" / "history.csv").is_file():
        drawers.append(_draw_training)
    if scores["tiles"]["patch_auc"]["value"] is not None:
        drawers.append(_draw_roc)
    if scores.get("slides", {}).get("slides"):
        drawers.append(_draw_slides)
    if scores.get("slides", {}).get("pointing"):
        drawers.append(_draw_pointing)
    if not drawers:
        return
    figure = Figure(figsize=(4.2 * len(drawers), 3.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    for drawer, axes in zip(drawers, np.atleast_1d(figure.subplots(1, len(drawers))), strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        drawer(axes, folder, scores)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, metadata={"Description": "medsd run, research use only"})


def _draw_training(axes: Axes, folder: Path, _scores: dict[str, Any]) -> None:
    with open(folder / "training" / "history.csv", newline="", encoding="utf-8") as handle:
        rows = list(csv.DictReader(handle))
    epochs = [int(row["epoch"]) for row in rows]
    for name, colour in (("cross_entropy", _INK), ("consistency", "#9467bd")):
        axes.plot(epochs, [float(row[name]) for row in rows], "-o", ms=3, color=colour, label=name.replace("_", "-"))
    axes.set(xlabel="epoch", ylabel="loss term (training)", title="Training", ylim=(0, None), xticks=epochs)
    other = axes.twinx()
    other.plot(epochs, [float(row["validation_auc"]) for row in rows], "--s", ms=3, color="#2ca02c", label="AUC")
    other.set(ylabel="validation AUC (dashed)", ylim=(0.4, 1.02))
    other.spines["top"].set_visible(False)
    # Below the axes: both curves may pass anywhere inside them.
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize="small")


def _draw_roc(axes: Axes, folder: Path, scores: dict[str, Any]) -> None:
    with np.load(folder / "test_tiles.npz", allow_pickle=False) as tiles:
        false_positives, sensitivity = roc_curve(tiles["label"], tiles["probability"])
    interval = scores["tiles"]["patch_auc_by_group"]
    axes.plot([0, 1], [0, 1], ":", color="#999999")
    axes.plot(false_positives, sensitivity, color=_INK)
    axes.text(0.97, 0.05, f"AUC {interval['value']:.3f}{_bounds(interval)}", ha="right")
    axes.set(
        xlabel="1 - specificity",
        ylabel="sensitivity",
        title=f"{scores['tiles']['items']} held-out tiles",
        aspect="equal",
    )


def _bounds(interval: dict[str, float | None]) -> str:
    low, high = interval["low"], interval["high"]
    return "" if low is None or high is None else f"\n95 % over groups:\n{low:.3f} to {high:.3f}"


def _draw_slides(axes: Axes, _folder: Path, scores: dict[str, Any]) -> None:
    slides = scores["slides"]["slides"]
    names = sorted(slides, key=lambda name: slides[name][1])
    for row, name in enumerate(names):
        label, score = slides[name]
        axes.plot(score, row, "o", color=_TUMOUR if label else _NORMAL)
    axes.plot([], [], "o", color=_TUMOUR, label="tumour")
    axes.plot([], [], "o", color=_NORMAL, label="normal")
    axes.set(xlabel="slide score", xlim=(-0.02, 1.02), yticks=range(len(names)), yticklabels=names)
    area = scores["slides"]["slide_auc"]
    axes.set_title("Held-out slides" if area is None else f"Held-out slides, AUC {area:.2f}")
    axes.legend(frameon=False, fontsize="small")


def _draw_pointing(axes: Axes, _folder: Path, scores: dict[str, Any]) -> None:
    pointing = scores["slides"]["pointing"]
    names = sorted(pointing)
    rows = np.arange(len(names))
    for offset, key, colour, word in (
        (0.2, "positive_inside", _TUMOUR, "positive saliency in tumour"),
        (-0.2, "area_share", "#bbbbbb", "tissue that is tumour"),
    ):
        axes.barh(rows + offset, [pointing[name][key] or 0 for name in names], 0.38, color=colour, label=word)
    axes.set(xlabel="share", xlim=(0, 1), yticks=rows, yticklabels=names, title="Where the saliency lies")
    axes.legend(frameon=False, fontsize="small", loc="lower right")
