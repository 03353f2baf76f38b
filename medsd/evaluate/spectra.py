"""Pre-training runs side by side: how many directions their features and embeddings use."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from medsd.drawing import save_figure
from medsd.errors import DatasetError
from medsd.evaluate.compare import table_row
from medsd.evaluate.plots import RUN_STYLES
from medsd.evaluate.runs import number_text
from medsd.files import make_folder, read_json, write_text
from medsd.tables import read_table, write_table

_MEASURES = {
    "effective_rank": "effective rank of features",
    "participation_ratio": "participation ratio of features",
    "mean_abs_correlation": "mean absolute correlation of features",
    "embedding_rank": "effective rank of embeddings",
    "alignment": "alignment of two views, 0 where they agree",
    "uniformity": "uniformity, lower is more even",
}
_IMAGES = "held_out_images"
# Of the first; what lies below is rounding, and all that is left where images are fewer than dimensions.
_LEAST = 1e-8
_NOTES = """\
Of held-out images at the end of the last epoch, unit vectors; features are the encoder's, before whitening. A rank
counts directions in use, at most the dimensions or the images less one. Research use only."""


@dataclass(frozen=True)
class SpectrumRun:
    """What a run of the stage `pretrain` left of its features.

    Attributes:
        folder: its output_dir.
        label: the folder's name and what decides the rank: decorrelation and weight of the local loss.
        epoch: the last one.
        singular_values: by "features" and "embeddings", largest first.
        measures: of the last epoch by column of its `history.csv`.
    """

    folder: Path
    label: str
    epoch: int
    singular_values: dict[str, npt.NDArray[np.float64]]
    measures: dict[str, float]


def compare_spectra(folders: Sequence[str | Path], out: str | Path) -> list[SpectrumRun]:
    """Write `spectrum.csv` (a row a run), `spectrum.md` (a column a run) and `spectrum.png` into `out`.

    Args:
        folders: output_dirs of runs of the stage `pretrain`, in the order in which they are shown.
        out: folder to write, made when missing.

    Raises:
        DatasetError: a folder without a pre-training, a damaged file, or one folder twice.
        OutputError: `out` cannot be written to.
    """
    runs = [_read(Path(folder)) for folder in folders]
    if len({run.folder.resolve() for run in runs}) < len(runs):
        raise DatasetError("runs: the same folder twice; name each once")
    out = make_folder(out)
    write_table(out / "spectrum.csv", [{"run": run.folder, "epoch": run.epoch, **run.measures} for run in runs])
    write_text(out / "spectrum.md", _markdown(runs))
    _draw(out / "spectrum.png", runs)
    return runs


def _read(folder: Path) -> SpectrumRun:
    kept = folder / "pretraining"
    if not (kept / "spectrum.csv").is_file():
        raise DatasetError(
            f"{kept / 'spectrum.csv'}: no such file; name the output_dir of a run with the stage pretrain"
        )
    values = read_table(kept / "spectrum.csv", ("features", "embeddings"))
    singular = {}
    try:
        for name in ("features", "embeddings"):
            singular[name] = np.array([float(value) for value in values[name] if value])
            if not (np.isfinite(singular[name]) & (singular[name] >= 0)).all():
                raise ValueError(f"{name} are no singular values")
        history = read_table(kept / "history.csv").to_dict("records")
        last: dict[str, Any] = history[-1]
        measures = {name: float(last[name] or "nan") for name in _MEASURES}
        measures[_IMAGES] = float(last.get(_IMAGES, "nan"))  # runs before it was kept lack it
        settings = read_json(kept / "settings.json")["network"]
        label = f"{folder.name}: decorrelation {settings['decorrelation']}, local {settings['local']:g}"
        return SpectrumRun(folder, label, int(last["epoch"]), singular, measures)
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise DatasetError(
            f"{kept}: settings.json, history.csv or spectrum.csv is damaged ({error}); pre-train again"
        ) from error


def _markdown(runs: Sequence[SpectrumRun]) -> str:
    lines = [table_row("", *(run.label for run in runs)), "|---|" + "---|" * len(runs)]
    lines.append(table_row("epoch", *(str(run.epoch) for run in runs)))
    lines.append(table_row("held-out images", *(f"{run.measures[_IMAGES]:.0f}" for run in runs)))
    for kind in ("features", "embeddings"):
        lines.append(table_row(f"dimensions of {kind}", *(str(len(run.singular_values[kind])) for run in runs)))
    for name, title in _MEASURES.items():
        lines.append(table_row(title, *(number_text(run.measures[name]) for run in runs)))
    return "\n".join([*lines, "", _NOTES, ""])


def _draw(path: Path, runs: Sequence[SpectrumRun]) -> None:
    figure = Figure(figsize=(11, 4.4 + 0.18 * len(runs)), dpi=120, layout="constrained")
    for axes, kind, rank in zip(
        figure.subplots(1, 2), ("features", "embeddings"), ("effective_rank", "embedding_rank"), strict=True
    ):
        _draw_panel(axes, runs, kind, rank)
    save_figure(path, figure, "medsd singular spectra of pre-training runs")


def _most(run: SpectrumRun, kind: str) -> str:
    """What the rank can be at most, where the number of images is known."""
    images = run.measures[_IMAGES]
    return "" if math.isnan(images) else f" of at most {min(len(run.singular_values[kind]), images - 1):.0f}"


def _draw_panel(axes: Axes, runs: Sequence[SpectrumRun], kind: str, rank: str) -> None:
    for number, run in enumerate(runs):
        colour, marker = RUN_STYLES[number % len(RUN_STYLES)]
        style = ("-", "--", ":")[number // len(RUN_STYLES) % 3]
        values = run.singular_values[kind]
        if not values.size or not values[0] > 0:
            axes.plot([], [], style, color=colour, marker=marker, ms=4, label=f"{run.label} (nothing varies: no curve)")
            continue
        shares = values[values > _LEAST * values[0]] / values[0]
        every = max(1, math.ceil(len(shares) / 12))
        axes.plot(
            np.arange(1, len(shares) + 1), shares, style, color=colour, marker=marker, markevery=every, ms=4,
            label=f"{run.label} (rank {number_text(run.measures[rank])}{_most(run, kind)})",
        )  # fmt: skip
    axes.set(
        yscale="log",
        xlabel="direction, strongest first (at most images - 1)",
        ylabel="singular value, share of the first",
    )
    axes.set_title(f"{kind}: a curve that falls early has collapsed")
    axes.spines[["top", "right"]].set_visible(False)
    # Below, where it hides no curve.
    axes.legend(fontsize="x-small", frameon=False, handlelength=4, loc="upper center", bbox_to_anchor=(0.5, -0.14))
