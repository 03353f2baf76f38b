"""Tables and the picture of the study of objectives."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from scipy import stats
from studies.redealt import difference_of, mean_of, ratio_of

from medsd.files import atomic_path

WORDS = {
    "frozen": "frozen features, logistic regression, no temperature",
    "ce": "cross-entropy (CE)",
    "mixup": "CE, images mixed in pairs",
    "sgt": "SGT",
    "decorrelation": "CE + decorrelation, `cov`",
    "saliencydecor": "SaliencyDecor, `cov`",
    "saliencydecor-0.3": "SaliencyDecor, `cov`, weight 0.3",
    "saliencydecor-1": "SaliencyDecor, `cov`, weight 1",
    "saliencydecor-zca": "SaliencyDecor, `zca`",
    "saliencydecor-corr": "SaliencyDecor, `corr`",
    "saliencydecor-corr-1": "SaliencyDecor, `corr`, weight 1",
    "as-built": "SaliencyDecor, `cov`, noise, share 0.5, `bn` shared",
}
_SHORT = {
    "mixup": "mixup",
    "sgt": "SGT",
    "decorrelation": "decorrelation",
    "saliencydecor": "SaliencyDecor, cov",
    "saliencydecor-0.3": "SaliencyDecor, cov 0.3",
    "saliencydecor-1": "SaliencyDecor, cov 1",
    "saliencydecor-zca": "SaliencyDecor, zca",
    "saliencydecor-corr": "SaliencyDecor, corr",
    "saliencydecor-corr-1": "SaliencyDecor, corr 1",
    "as-built": "as built",
}
_TITLES = {
    "pcam": "PatchCamelyon",
    "ebhi": "EBHI-Seg",
    "lite0": "EfficientNet-Lite0",
    "lite0-x2": "EfficientNet-Lite0, twice as large",
    "densenet": "DenseNet-121",
    "densenet-x2": "DenseNet-121, twice as large",
    "resnet10t": "ResNet-10-t from scratch",
}
COLUMNS = {
    "auc": ("AUC", 1.0, 3),
    "auc_held": ("AUC, held-out side", 1.0, 3),
    "auc_turned": ("AUC, mean of 8 symmetries", 1.0, 3),
    "accuracy": ("accuracy %", 100.0, 1),
    "ece": ("ECE, tempered", 1.0, 3),
    "ece_turned": ("ECE, tempered, mean of 8 symmetries", 1.0, 3),
    "auc_half": ("AUC, weights halfway to the start", 1.0, 3),
    "auc_turned_half": ("AUC, halfway, mean of 8 symmetries", 1.0, 3),
    "accuracy_half": ("accuracy %, halfway", 100.0, 1),
    "ece_half": ("ECE, tempered, halfway", 1.0, 3),
    "ece_turned_half": ("ECE, halfway, mean of 8 symmetries", 1.0, 3),
    "pixel_auc_half": ("pixel AUC in masks, halfway", 1.0, 3),
    "pixel_auc_other_half": ("pixel AUC, CAMELYON16, halfway", 1.0, 3),
    "ece_oracle": ("ECE, temperature of the test side", 1.0, 3),
    "ece_by_chance": ("ECE by chance", 1.0, 3),
    "masking_area": ("masking area", 1.0, 3),
    "gap": ("masking gap", 1.0, 3),
    "insertion": ("insertion", 1.0, 3),
    "deletion": ("deletion", 1.0, 3),
    "correlation": ("mean abs. correlation", 1.0, 3),
    "correlation_by_chance": ("correlation by chance", 1.0, 3),
    "rank": ("effective rank", 1.0, 1),
    "pixel_auc": ("pixel AUC in masks", 1.0, 3),
    "energy": ("energy in masks %", 100.0, 1),
    "pixel_auc_other": ("pixel AUC, CAMELYON16", 1.0, 3),
}
# Results do not name their fields of CAMELYON16: the place of each (`fields.camelyon16_places`), by how many have both
# kinds of tissue left at a network's scale.
OTHER_PLACES = {11: (0, 0, 0, 1, 1, 2, 3, 4, 5, 6, 7), 12: (0, 0, 0, 1, 1, 1, 2, 3, 4, 5, 6, 7)}

Results = dict[tuple[str, str, str, int, int], dict[str, Any]]


def tables(results: Results) -> str:
    """Means over trainings; paired differences from CE with 95 % intervals, see `studies.redealt.half_width`."""
    lines: list[str] = []
    for part, encoder in dict.fromkeys(key[:2] for key in results):
        of = {key[2:]: scores for key, scores in results.items() if key[:2] == (part, encoder)}
        lines += [
            f"### {part}, {encoder}",
            "",
            "| method | trainings | " + " | ".join(c[0] for c in COLUMNS.values()) + " |",
        ]
        lines.append("|---" * (len(COLUMNS) + 2) + "|")
        done = [method for method in WORDS if any(key[0] == method for key in of)]
        for method in done:
            rows = [scores for key, scores in of.items() if key[0] == method]
            cells = [_cell([row.get(column) for row in rows], column) for column in COLUMNS]
            lines.append(f"| {WORDS[method]} | {len(rows)} | " + " | ".join(cells) + " |")
        for method in done:
            folds = [key[1:] for key in of if key[0] == method and ("ce", *key[1:]) in of]
            if method == "ce" or not folds:
                continue
            ratio = ratio_of(of[(method, *fold)] for fold in folds)
            cells = [_cell(_differences(of, method, folds, column), column, ratio) for column in COLUMNS]
            lines.append(f"| *{WORDS[method]} less CE* | {len(folds)} | " + " | ".join(cells) + " |")
        for method in done:
            rows = [scores for key, scores in of.items() if key[0] == method and "auc_half" in scores]
            if rows:
                ratio = ratio_of(rows)
                cells = [_cell([_half_less_whole(row, column) for row in rows], column, ratio) for column in COLUMNS]
                lines.append(f"| *{WORDS[method]}, halfway less whole* | {len(rows)} | " + " | ".join(cells) + " |")
        lines += ["", *(line for method in done if method != "ce" for line in _by_field(of, method))]
        missing = [WORDS[method] for method in WORDS if method not in done]
        lines += [f"Not run: {', '.join(missing) or 'nothing'}.", ""]
    return "\n".join(lines)


def _half_less_whole(scores: dict[str, Any], column: str) -> float | None:
    """What the way back to the start changes of a training's score."""
    half, whole = scores.get(f"{column}_half"), scores.get(column)
    return None if half is None or whole is None else float(half) - float(whole)


def _differences(
    of: dict[tuple[str, int, int], dict[str, Any]], method: str, trained: list[tuple[int, int]], column: str
) -> list[float | None]:
    """Each training's difference from CE on the same fold."""
    pairs = [[of[(name, *key)].get(column) for name in (method, "ce")] for key in trained]
    return [None if None in pair else float(pair[0]) - float(pair[1]) for pair in pairs]


def _by_field(of: dict[tuple[str, int, int], dict[str, Any]], method: str) -> Iterator[str]:
    """What a method's map gains in fields with masks, in the mean of trainings; the interval is over their places."""
    for column, words in (("pixel_auc_each", "fields"), ("pixel_auc_other_each", "fields of CAMELYON16")):
        folds = [key[1:] for key in of if key[0] == method and column in of[key]]
        pairs = [[of.get((name, *key), {}).get(column) for name in (method, "ce")] for key in folds]
        known = [np.subtract(*pair) for pair in pairs if None not in pair]
        if not known:
            continue
        gains = np.mean(known, axis=0)
        places = OTHER_PLACES[len(gains)] if column == "pixel_auc_other_each" else range(len(gains))
        # Fields of one place err together; where each has its own this is the mean's standard error.
        errors, count = np.bincount(places, gains - gains.mean()), len(set(places))
        error = math.sqrt(count / (count - 1) * np.square(errors).sum()) / len(gains)
        low, high = stats.t.interval(0.95, count - 1, gains.mean(), error)
        over = "fields" if count == len(gains) else f"their {count} places"
        yield (
            f"{WORDS[method]} less CE, pixel AUC in each of {len(gains)} {words}, mean of {len(known)} trainings: "
            f"{gains.mean():+.3f} ({low:+.3f} to {high:+.3f}) over {over}, above 0 in {(gains > 0).sum()} fields."
        )
        yield ""


def _cell(values: list[float | None], column: str, ratio: float | None = None) -> str:
    """Mean and standard error, or, with a ratio, mean difference with its 95 % interval, see `studies.redealt`.

    A dash where nothing was measured; how many trainings have the measure, in brackets, where not all of the row have.
    """
    _, scale, digits = COLUMNS[column]
    found = scale * np.array([math.nan if value is None else value for value in values], np.float64)
    known = int(np.isfinite(found).sum())
    shown = mean_of(found, digits) if ratio is None else difference_of(found, digits, ratio)
    return (shown or "-") + (f" ({known})" if 0 < known < len(found) else "")


def draw(results: Results, folder: Path) -> None:
    """One figure, `objectives.png`: differences from CE by fold, in AUC, masking gap and pixel AUC."""
    shown = ("auc", "gap", "pixel_auc")
    methods = {
        group: [m for m in _SHORT if any(key[:3] == (*group, m) for key in results)]
        for group in dict.fromkeys(key[:2] for key in results)
    }
    methods = {group: names for group, names in methods.items() if names}
    if not methods:
        return
    counts = [len(names) for names in methods.values()]
    size = 4.2 * len(shown), 0.7 * len(counts) + 0.35 * sum(counts) + 0.6
    figure = Figure(figsize=size, dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle("Less cross-entropy on the same fold. Ring: a fold. Orange: mean.", fontsize="medium")
    grid = figure.subplots(len(counts), len(shown), squeeze=False, sharex="col", height_ratios=[n + 1 for n in counts])
    for row, ((part, encoder), names) in zip(grid, methods.items(), strict=True):
        row[1].set_title(f"{_TITLES[part]}, {_TITLES[encoder]}", fontsize="medium")
        for axes, column in zip(row, shown, strict=True):
            for place, method in enumerate(names):
                pairs = [
                    (results[key].get(column), results.get((part, encoder, "ce", *key[3:]), {}).get(column))
                    for key in results
                    if key[:3] == (part, encoder, method)
                ]
                values = [ours - theirs for ours, theirs in pairs if ours is not None and theirs is not None]
                axes.plot(values, [place] * len(values), "o", color="#333333", mfc="none", ms=4)
                if values:
                    axes.plot(np.mean(values), place, "|", color="#D55E00", ms=14, mew=2)
            axes.axvline(0, color="#999999", ls=":", lw=1)
            axes.spines[["top", "right"]].set_visible(False)
            axes.set_ylim(len(names) - 0.3, -0.7)
            axes.set_yticks(range(len(names)), [_SHORT[m] if axes is row[0] else "" for m in names])
    for axes, column in zip(grid[-1], shown, strict=True):
        axes.set_xlabel(COLUMNS[column][0])
    with atomic_path(folder / "objectives.png") as temporary:
        figure.savefig(temporary)
