"""Tables and figures of the saliency study, from its results alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from medsd.evaluate.scores import bootstrap_mean
from medsd.files import atomic_path

SALIENCY_COLORMAP = "BrBG_r"
Results = dict[tuple[str, str], dict[str, Any]]
Floats = npt.NDArray[np.float64]

NETWORKS = {
    "squeezenet": "SqueezeNet 1.0, photographs",
    "pcam-resnet18": "ResNet-18, PatchCamelyon",
    "pcam": "ResNet-18-D (the default), PatchCamelyon",
    "camelyon-resnet18": "ResNet-18, phantoms",
    "camelyon": "ResNet-10-T (the default), phantoms",
}
_SCORES = {
    "insertion": "insertion, from blur",
    "deletion": "deletion, to zero",
    "deletion_blur": "deletion, to blur",
    "pointing": "energy pointing %",
}
_RESAMPLES = 2000
_LINES = ("#000000", "#E69F00", "#56B4E9", "#009E73", "#CC79A7", "#D55E00", "#0072B2", "#999999", "#8B5A2B", "#6A3D9A")


def tables(results: Results) -> str:
    """All tables in Markdown."""
    parts = [_smoothing(name, found) for (part, name), found in results.items() if part == "smoothing"]
    cascades = {name: found for (part, name), found in results.items() if part == "cascade"}
    if cascades:
        parts.append(_cascade(cascades))
    return "\n\n".join(parts) + "\n"


def draw(results: Results, folder: Path) -> None:
    """`smoothing.png`: examples; `cascade.png`: agreement as weights get random."""
    examples = {name: found["example"] for (part, name), found in results.items() if part == "smoothing"}
    if examples:
        _draw_examples(examples, folder / "smoothing.png")
    cascades = {name: found for (part, name), found in results.items() if part == "cascade"}
    if cascades:
        _draw_cascades(cascades, folder / "cascade.png")


def _smoothing(name: str, found: dict[str, Any]) -> str:
    groups = np.asarray(found["groups"])
    keys = [key.split("/") for key in found if "/" in key]
    layers = list(dict.fromkeys(key[0] for key in keys))
    scores = {name: words for name, words in _SCORES.items() if name in found["/".join(keys[0])]}
    columns = ["TV", "cut %", "Nyquist energy %", *scores.values()]
    lines = [
        f"### {NETWORKS[name]}: mean over {', '.join(layers)}",
        "",
        f"{len(groups)} images; means over {len(set(groups.tolist()))} groups, intervals by resampling them.",
        "",
        "| method | smoothing | " + " | ".join(columns) + " |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for method, way in dict.fromkeys((method, way) for _, method, way in keys):
        plain, smoothed = (_of_layers(found, layers, method, which) for which in ("none", way))
        cells = [f"{_mean(smoothed['variation'], groups):.3f}", "" if way == "none" else _cut(plain, smoothed, groups)]
        cells.append(f"{100 * _mean(smoothed['nyquist'], groups):.2f}")
        for score in scores:
            scale = 100 if score == "pointing" else 1
            difference = scale * (smoothed[score] - plain[score]).mean(axis=0)
            change = "" if way == "none" else f" ({_signed(difference, groups)})"
            cells.append(f"{scale * _mean(smoothed[score], groups):.{1 if scale > 1 else 3}f}{change}")
        lines.append(f"| {method} | {way} | " + " | ".join(cells) + " |")
    constant = found["constant"]
    worst = {boundary: max(ratios.values()) for boundary, ratios in constant.items()}
    words = ", ".join(f"{boundary} {ratio:.1e}" for boundary, ratio in worst.items())
    lines += [
        "",
        f"Nyquist energy left for equal gradients above, worst of {len(constant['circular'])} convolutions: {words}.",
    ]
    if "surrogate" in found:
        lines += ["", _surrogate(found["surrogate"])]
    return "\n".join(lines)


def _surrogate(scores: dict[str, Any]) -> str:
    errors = [point["relative_l1"] for point in scores["points"].values()]
    return (
        f"Surrogates on {scores['items']} validation tiles: accuracy {scores['accuracy']:.3f} to "
        f"{scores['surrogate_accuracy']:.3f}, AUC {scores['patch_auc']:.3f} to {scores['surrogate_patch_auc']:.3f}, "
        f"change of the softmax {scores['softmax_change']:.3f}, relative L1 {min(errors):.2f} to {max(errors):.2f}."
    )


def _of_layers(found: dict[str, Any], layers: Sequence[str], method: str, way: str) -> dict[str, Floats]:
    """Measures as (layers, images)."""
    parts = [found[f"{layer}/{method}/{way}"] for layer in layers]
    return {name: np.array([part[name] for part in parts], np.float64) for name in parts[0]}


def _cut(plain: dict[str, Floats], smoothed: dict[str, Floats], groups: npt.NDArray[np.int64]) -> str:
    """1 - mean over layers of TV over that without smoothing, in percent, with an interval over groups."""
    before, after = (by_group(values["variation"].T, groups) for values in (plain, smoothed))
    random = np.random.default_rng(0)
    drawn = random.integers(len(before), size=(_RESAMPLES, len(before)))
    cuts = 100 * (1 - (after[drawn].mean(axis=1) / before[drawn].mean(axis=1)).mean(axis=1))
    value = 100 * (1 - (after.mean(axis=0) / before.mean(axis=0)).mean())
    low, high = np.quantile(cuts, (0.025, 0.975))
    return f"{value:.1f} ({low:.1f} to {high:.1f})"


def _mean(values: Floats, groups: npt.NDArray[np.int64]) -> float:
    """Of (layers, images), every group of images weighing the same."""
    return float(by_group(values.T, groups).mean())


def by_group(values: Floats, groups: npt.NDArray[np.int64]) -> Floats:
    """Means of (images, ...) by group."""
    return np.stack([values[groups == group].mean(axis=0) for group in np.unique(groups)])


def _signed(differences: Floats, groups: npt.NDArray[np.int64]) -> str:
    found = bootstrap_mean(by_group(differences, groups), _RESAMPLES)
    digits = 1 if abs(found.high - found.low) > 1 else 3
    return f"{found.value:+.{digits}f}, {found.low:+.{digits}f} to {found.high:+.{digits}f}"


def ratio(values: Floats, reference: Floats, groups: npt.NDArray[np.int64]) -> str:
    """Ratio of the means, with an interval over groups, the same drawn for both."""
    pairs = np.stack([by_group(part, groups) for part in (values, reference)])
    drawn = np.random.default_rng(0).integers(pairs.shape[1], size=(_RESAMPLES, pairs.shape[1]))
    resampled = pairs[:, drawn].mean(axis=2)
    low, high = np.quantile(resampled[0] / resampled[1], (0.025, 0.975))
    return f"x{pairs[0].mean() / pairs[1].mean():.2f} ({low:.2f} to {high:.2f})"


def interval(values: Floats, groups: npt.NDArray[np.int64], digits: int, sign: str = "") -> str:
    found = bootstrap_mean(by_group(values, groups), _RESAMPLES)
    return f"{found:{sign}.{digits}f}"


def _cascade(found: dict[str, dict[str, Any]]) -> str:
    lines = [
        "### Randomised weights: mean rank correlation with the trained network's map",
        "",
        "First stage random; *all* random; abs.: the mean of absolute correlations, all random, and in brackets that "
        "with the map of another image.",
        "",
        "| method | " + " | ".join(NETWORKS[name] for name in found) + " |",
        "|---" * (len(found) + 1) + "|",
    ]
    for method in next(iter(found.values())):
        cells = []
        for of_network in found.values():
            ranks, others = (
                [np.asarray(stage, np.float64) for stage in of_network[method][kind]]
                for kind in ("rank_correlation", "other_image")
            )
            constant = sum(np.isnan(stage).sum() for stage in ranks)
            cells.append(
                f"{_defined(ranks[1]):.2f}; *{_defined(ranks[-1]):.2f}*; abs. {_defined(np.abs(ranks[-1])):.2f} "
                f"({_defined(np.abs(others[-1])):.2f})" + (f"; {constant} constant maps left out" if constant else "")
            )
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _defined(values: Floats) -> float:
    """The mean of what is no nan; nan of a constant map."""
    known = values[~np.isnan(values)]
    return float(known.mean()) if len(known) else np.nan


def _draw_examples(examples: dict[str, Any], path: Path) -> None:
    """A row a network: the image, then its DeepLift map in one layer under each smoothing, each on a scale of its own.

    What lies on every second pixel is paler when it is spread, so one scale would hide the shapes.
    """
    ways = list(dict.fromkeys(way for example in examples.values() for way in example["maps"]))
    figure = Figure(figsize=(2.1 * (len(ways) + 1), 2.3 * len(examples)), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(examples), len(ways) + 1, squeeze=False)
    for row, (name, example) in zip(grid, examples.items(), strict=True):
        maps = {way: np.asarray(values) for way, values in example["maps"].items()}
        row[0].imshow(np.asarray(example["image"], np.uint8))
        row[0].set_title(NETWORKS[name].replace(", ", "\n"), fontsize=8)
        for axes, way in zip(row[1:], ways, strict=True):
            if way in maps:
                limit = float(np.quantile(np.abs(maps[way]), 0.99))
                axes.imshow(maps[way], cmap=SALIENCY_COLORMAP, vmin=-limit, vmax=limit, interpolation="nearest")
                axes.set_title(f"{example['words']}\n{way}, ±{limit:.1g}", fontsize=8)
        for axes in row:
            axes.set_axis_off()
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def _draw_cascades(found: dict[str, dict[str, Any]], path: Path) -> None:
    figure = Figure(figsize=(5 * len(found), 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (name, methods) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        _draw_cascade(axes, NETWORKS[name], methods)
    with atomic_path(path) as temporary:
        figure.savefig(temporary)


def _draw_cascade(axes: Axes, title: str, methods: dict[str, Any]) -> None:
    for (method, stages), colour in zip(methods.items(), _LINES, strict=False):
        means = [_defined(np.asarray(stage, np.float64)) for stage in stages["rank_correlation"]]
        axes.plot(means, "o-", color=colour, label=method, lw=1.2, ms=3)
        names = stages["stages"]
    axes.axhline(0, color="#999999", lw=0.8)
    axes.set_xticks(range(len(names)), names, rotation=60, ha="right", fontsize="small")
    axes.set(title=title, ylim=(-1, 1.05), ylabel="rank correlation with the trained network's map")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="x-small", ncols=2, loc="lower left")
