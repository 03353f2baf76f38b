"""Figures: one of a run (training, ROC, slide scores, where the saliency lies), one that compares runs."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D

from medsd.drawing import save_figure
from medsd.evaluate.froc import RATES
from medsd.evaluate.lesion_scores import MODEL, PEAKS, JudgedSlide, LesionScores, curve_of
from medsd.evaluate.runs import Run, number_text, read_run_json
from medsd.evaluate.scores import roc_curve
from medsd.tables import read_table

_OTHER, _TARGET, _INK = "#1f77b4", "#d62728", "#444444"
_TERMS = (
    ("cross_entropy", _INK, "cross-entropy"),
    ("consistency", "#9467bd", "consistency"),
    ("decorrelation", "#e69f00", "decorrelation (1 at its start)"),
    ("stage_cross_entropy", "#8c564b", "cross-entropy of the stages"),
    ("mask_loss", "#17becf", "mask loss"),
)
# Okabe and Ito's colours without yellow and black; a marker with each, for those who see no colours.
RUN_STYLES = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
)
_COLUMNS = 5
_DIRECTION = {"higher": "higher is better →", "lower": "← lower is better"}


def draw_summary(path: str | Path, folder: str | Path) -> None:
    """Draw the figure of the run in `folder` from its `training/history.csv`, `test_tiles.npz` and `scores.json`.

    Panels whose data are missing (slides, when a run knows patches only) are left out.

    Raises:
        OutputError: the figure cannot be written.
    """
    folder = Path(folder)
    scores = read_run_json(folder / "scores.json")
    slides = scores.get("slides", {})
    drawers: list[Callable[[Axes, Path, dict[str, Any]], None]] = []
    if (folder / "training" / "history.csv").is_file():
        drawers.append(_draw_training)
    if scores["tiles"]["patch_auc"]["value"] is not None:
        drawers.append(_draw_roc)
    if slides.get("slides"):
        drawers.append(_draw_slides)
    if slides.get("pointing"):
        drawers.append(_draw_pointing)
    if not drawers:
        return
    figure = Figure(figsize=(4.2 * len(drawers), 3.8), dpi=130, layout="constrained")
    for drawer, axes in zip(drawers, figure.subplots(1, len(drawers), squeeze=False)[0], strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        drawer(axes, folder, scores)
    save_figure(path, figure, "medsd run")


def _draw_training(axes: Axes, folder: Path, _scores: dict[str, Any]) -> None:
    history = read_table(folder / "training" / "history.csv", ("epoch", "validation_auc"))
    history = history.replace("", np.nan).astype(float)  # epochs without a term, or not validated
    epochs = history["epoch"]
    for name, colour, words in _TERMS:
        if name in history:
            axes.plot(epochs, history[name], "-o", ms=3, color=colour, label=words)
    axes.set(xlabel="epoch", ylabel="loss term (training)", title="Training", ylim=(0, None), xticks=epochs)
    other = axes.twinx()
    other.plot(epochs, history["validation_auc"], "--s", ms=3, color="#2ca02c", label="AUC")
    other.set(ylabel="validation AUC (dashed)", ylim=(0.4, 1.02))
    other.spines["top"].set_visible(False)
    # Below the axes: both curves may pass anywhere inside them.
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2, fontsize="small")


def _draw_roc(axes: Axes, folder: Path, scores: dict[str, Any]) -> None:
    with np.load(folder / "test_tiles.npz", allow_pickle=False) as tiles:
        false_positives, sensitivity, _ = roc_curve(tiles["label"], tiles["log_odds"])
    area = scores["tiles"]["patch_auc_by_group"]
    text = f"AUC {area['value']:.3f}"
    if area["low"] is not None and area["high"] is not None:
        text += f"\n95 % over groups:\n{area['low']:.3f} to {area['high']:.3f}"
    axes.plot([0, 1], [0, 1], ":", color="#999999")
    axes.plot(false_positives, sensitivity, color=_INK)
    axes.text(0.97, 0.05, text, ha="right")
    title = f"{scores['tiles']['items']} held-out tiles"
    axes.set(xlabel="1 - specificity", ylabel="sensitivity", title=title, aspect="equal")


def _draw_slides(axes: Axes, _folder: Path, scores: dict[str, Any]) -> None:
    slides, area = scores["slides"]["slides"], scores["slides"]["slide_auc"]
    names = sorted(slides, key=lambda name: slides[name][1])
    for word, colour, wanted in ((_target(scores), _TARGET, True), (scores.get("other", "normal"), _OTHER, False)):
        places = [(slides[name][1], row) for row, name in enumerate(names) if bool(slides[name][0]) == wanted]
        axes.plot(*np.reshape(places, (-1, 2)).T, "o", color=colour, label=word)
    axes.set(xlabel="slide score", xlim=(-0.02, 1.02), yticks=range(len(names)), yticklabels=names)
    axes.set_title("Held-out slides" if area is None else f"Held-out slides, AUC {area:.2f}")
    axes.legend(frameon=False, fontsize="small")
    _as_they_are(axes)


def _draw_pointing(axes: Axes, _folder: Path, scores: dict[str, Any]) -> None:
    pointing = scores["slides"]["pointing"]
    masks, target = scores["slides"].get("quantity") == "mask", _target(scores)
    names = sorted(pointing)
    rows = np.arange(len(names))
    for offset, key, colour, word in (
        (0.2, "positive_inside", _TARGET, f"{'open masks' if masks else 'positive saliency'} in {target}"),
        (-0.2, "area_share", "#bbbbbb", f"tissue that is {target}"),
    ):
        axes.barh(rows + offset, [pointing[name][key] or 0 for name in names], 0.38, color=colour, label=word)
    axes.set(xlabel="share", xlim=(0, 1), yticks=rows, yticklabels=names)
    axes.set_title("Where the masks are open" if masks else "Where the saliency lies")
    axes.legend(frameon=False, fontsize="small", loc="lower right")
    _as_they_are(axes)


def _target(scores: dict[str, Any]) -> str:
    """The class that is scored; runs of before do not say."""
    return str(scores.get("target", "tumour"))


def draw_froc(
    path: str | Path, judged: Mapping[str, Sequence[JudgedSlide]], scores: LesionScores, target: str = "tumour"
) -> None:
    """Draw the FROC curves and the slides' ROC curves of a model's maps and of the controls; nothing without either.

    `target` is the class whose lesions they are, in words.

    Raises:
        OutputError: the figure cannot be written.
    """
    curves = {name: curve for name, slides in judged.items() if (curve := curve_of(slides)) is not None}
    both = {one.label for one in judged[MODEL]} == {0, 1}
    if not curves and not both:
        return
    figure = Figure(figsize=(11, 4.6), dpi=130, layout="constrained")
    froc, roc = figure.subplots(1, 2, width_ratios=(1.5, 1))
    for (name, found), (colour, marker) in zip(scores.maps.items(), RUN_STYLES, strict=False):
        # Curves of controls may lie on the model's: it shows through their gaps.
        line = "-" if name == MODEL else "--"
        if name in curves:
            curve, area = curves[name], found.froc
            label = f"{name}: {area:.2f}"
            places = np.append(curve.false_per_slide, max(RATES[-1], curve.false_per_slide[-1]))
            froc.plot(places, np.append(curve.sensitivity, curve.sensitivity[-1]), line, color=colour)
            froc.plot(RATES, curve.at(), marker, color=colour, mfc=_face(name, colour), ms=5, label=label)
        if both and name != PEAKS:
            rates = roc_curve([one.label for one in judged[name]], [one.score for one in judged[name]])
            area = found.slide_auc
            label = f"{name}: {area:.2f}"
            roc.plot(*rates[:2], line, marker=marker, ms=4, color=colour, mfc=_face(name, colour), label=label)
    title = f"{scores.lesions} lesions of {target} ({scores.isolated} more are isolated cells, left out)"
    froc.set(
        xlabel="false positives a slide", ylabel="lesions found", title=title, xlim=(-0.1, 8.2), ylim=(-0.02, 1.05)
    )
    title = f"{scores.target_slides} of {scores.slides} slides with {target}"
    roc.set(xlabel="1 - specificity", ylabel="sensitivity", title=title, xlim=(-0.02, 1.02), ylim=(-0.02, 1.05))
    for axes, heading in ((froc, "mean at the markers"), (roc, "area under the curve")):
        axes.spines[["top", "right"]].set_visible(False)
        heading = f"{heading} (95 % interval over slides)"
        if axes.get_legend_handles_labels()[0]:
            axes.legend(title=heading, frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.16), fontsize="small")
    save_figure(path, figure, "medsd lesions")


def _face(name: str, colour: str) -> str:
    """What fills a marker: nothing where it may lie on one of the model's."""
    return colour if name == MODEL else "none"


def _as_they_are(axes: Axes) -> None:
    """Names on the axis, in the title and the legend are no formulae, whatever dollar signs are in them."""
    found = axes.get_legend()
    legend = [] if found is None else found.get_texts()
    for label in (axes.title, *axes.get_yticklabels(), *legend):
        label.set_parse_math(False)


def draw_comparison(path: str | Path, runs: Sequence[Run]) -> None:
    """Draw runs side by side: accuracy under masking with its random control, and bars with 95 % intervals.

    Raises:
        OutputError: the figure cannot be written.
    """
    pointing, chance, of = "explanations.maps.gradient.pointing", "explanations.area_share", "tiles"
    if not any(run.estimate(pointing) for run in runs):
        pointing, chance, of = "slide_pointing.saliency.positive_inside", "slide_pointing.saliency.area_share", "slides"
    features = "explanations.features"
    by_chance = f"{features}.correlation_by_chance"
    panels = (
        ("patch AUC, over groups\n(dotted: chance)", "tiles.patch_auc_by_group", "higher", None),
        ("masking gap", "explanations.maps.gradient.gap", "higher", None),
        (f"energy pointing, {of}\n(dotted: chance)", pointing, "higher", chance),
        ("|correlation| of features\n(dotted: chance)", f"{features}.mean_abs_correlation", "lower", by_chance),
        ("training,\nseconds a step", "training.seconds_per_step", "lower", None),
    )
    heights = (1.4 + 2.4 * -(-len(runs) // _COLUMNS), 1.3 + 0.6 * len(runs))
    figure = Figure(figsize=(13, sum(heights)), dpi=120, layout="constrained")
    top, bottom = np.asarray(figure.subfigures(2, 1, height_ratios=heights)).tolist()
    _draw_masking(top, runs)
    grid = bottom.subplots(1, len(panels), sharey=True)
    for axes, (title, key, better, beside) in zip(grid, panels, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        _draw_bars(axes, runs, key, beside)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel(_DIRECTION[better], fontsize="small")
    first = grid[0]
    first.set_yticks(range(len(runs)), [textwrap.fill(run.label, 26) for run in runs])
    _as_they_are(first)
    first.invert_yaxis()
    first.set(xlim=(0, 1.3), xticks=[0, 0.5, 1])
    first.axvline(0.5, color="#999999", ls=":", lw=1)
    save_figure(path, figure, "medsd comparison of runs")


def _draw_masking(part: SubFigure, runs: Sequence[Run]) -> None:
    """A panel a run: what counts is each curve against its own control."""
    columns = min(len(runs), _COLUMNS)
    grid = part.subplots(-(-len(runs) // columns), columns, sharex=True, sharey=True, squeeze=False).ravel()
    for axes in grid[len(runs) :]:
        axes.axis("off")
    for number, (axes, run) in enumerate(zip(grid, runs, strict=False)):
        colour, marker = RUN_STYLES[number % len(RUN_STYLES)]
        axes.spines[["top", "right"]].set_visible(False)
        axes.set_title(textwrap.fill(run.label, 26), fontsize="small")
        _as_they_are(axes)
        axes.set(xlabel="pixels masked, %", ylim=(0, 1.02))
        shares = run.node("explanations.shares")
        saliency = run.node("explanations.maps.gradient.accuracy")
        control = run.node("explanations.random.accuracy")
        if not (shares and _drawable(saliency, len(shares)) and _drawable(control, len(shares))):
            axes.text(0.5, 0.5, "– not measured", ha="center", color="#777777", transform=axes.transAxes)
            continue
        percent = 100 * np.asarray(shares)
        # Where all tiles are right there is no interval.
        bounds = [[step["value"] if step[end] is None else step[end] for step in saliency] for end in ("low", "high")]
        axes.fill_between(percent, *bounds, color=colour, alpha=0.18, lw=0)
        axes.plot(percent, [step["value"] for step in saliency], marker + "-", color=colour, ms=5)
        axes.plot(percent, [step["value"] for step in control], "--", color=_INK, lw=1.5)
    grid[0].set_ylabel("accuracy")
    lines = [Line2D([], [], color=_INK, ls=style) for style in ("-", "--")]
    part.suptitle("Accuracy under masking: a faithful map has its solid line far below the dashed one")
    words = ("most salient pixels first (band: 95 %)", "random pixels, the control")
    part.legend(lines, words, frameon=False, loc="outside lower center", ncols=2, fontsize="small")


def _drawable(steps: Any, count: int) -> bool:
    """Whether these are `count` intervals of numbers."""
    return (
        isinstance(steps, list)
        and len(steps) == count
        and all(isinstance(step, dict) and step.get("value") is not None for step in steps)
        and all({"low", "high"} <= step.keys() for step in steps)
    )


def _draw_bars(axes: Axes, runs: Sequence[Run], key: str, chance: str | None) -> None:
    found = [run.estimate(key) for run in runs]
    ends = [0.0]
    for row, (run, estimate) in enumerate(zip(runs, found, strict=True)):
        if estimate is None:
            axes.text(0, row, " – not measured", va="center", color="#777777", fontsize="small")
            continue
        low, high = (estimate.value if math.isnan(end) else end for end in (estimate.low, estimate.high))
        ends += [low, high]
        axes.barh(row, estimate.value, 0.6, color=RUN_STYLES[row % len(RUN_STYLES)][0], alpha=0.75)
        axes.plot([low, high], [row, row], color="black", lw=1.5)
        axes.text(max(high, 0), row, f"  {number_text(estimate.value, max(high, -low))}", va="center", fontsize="small")
        by_chance = None if chance is None else run.estimate(chance)
        if by_chance is not None:
            ends.append(by_chance.value)
            axes.plot([by_chance.value] * 2, [row - 0.4, row + 0.4], color="black", lw=1.5, ls=":")
    axes.axvline(0, color=_INK, lw=0.8)
    span = max(ends) - min(ends) or 1.0
    axes.set_xlim(min(ends) - 0.05 * span * (min(ends) < 0), max(ends) + 0.4 * span)
    axes.locator_params(axis="x", nbins=4)
