"""Tables and figure of the study of label-free maps, from its results alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from studies.saliency_tables import by_group, interval, ratio

from medsd.evaluate.scores import bootstrap_mean
from medsd.files import atomic_path
from medsd.tables import write_table

Results = dict[tuple[str, str, str], dict[str, Any]]

_REFERENCE = "EigenCAM, reference"
_MEASURES = {
    "adcc": "ADCC",
    "average_drop": "average drop",
    "increase": "increase",
    "coherency": "coherency",
    "complexity": "complexity",
    "pointing": "energy pointing",
    "pixel_auc": "pixel AUC",
}
NETWORKS = {
    "lite0": "EfficientNet-Lite0",
    "squeezenet": "SqueezeNet 1.0",
    "densenet": "DenseNet-121 (H&E)",
    "without labels, probe": "pre-trained without labels, probe",
    "without labels, similarity": "pre-trained without labels, cosine",
}


def tables(results: Results) -> str:
    """ADCC of every map over its layers' mean, what it is made of, and pointing, in Markdown."""
    parts = []
    for part in dict.fromkeys(part for part, _, _ in results):
        networks = list(dict.fromkeys(network for of, network, _ in results if of == part))
        for network in networks:
            found = _over_layers([value for (of, name, _), value in results.items() if (of, name) == (part, network)])
            layers = ", ".join(layer for of, name, layer in results if (of, name) == (part, network))
            parts.append(_table(f"{NETWORKS[network]}, {part}; mean over {layers}", found))
    return "\n\n".join(parts) + "\n"


def _over_layers(found: list[dict[str, Any]]) -> dict[str, Any]:
    """Values of images as means over layers."""
    maps = {
        name: {kind: np.mean([layer["maps"][name][kind] for layer in found], axis=0) for kind in values}
        for name, values in found[0]["maps"].items()
    }
    return {**found[0], "maps": maps}


def _table(title: str, found: dict[str, Any]) -> str:
    groups = np.unique(np.asarray(found["groups"]), return_inverse=True)[1]
    kinds = [kind for kind in _MEASURES if kind in found["maps"][_REFERENCE]]
    lines = [f"#### {title}", "", f"{len(groups)} images in {len(set(groups))} groups.", ""]
    lines.append("| map | ADCC, times reference EigenCAM | " + " | ".join(_MEASURES[kind] for kind in kinds) + " |")
    lines.append("|---" * (len(kinds) + 2) + "|")
    reference = np.asarray(found["maps"][_REFERENCE]["adcc"])
    for name, values in found["maps"].items():
        times = "" if name == _REFERENCE else ratio(np.asarray(values["adcc"]), reference, groups)
        cells = [
            interval(np.asarray(values[kind]), groups, 3)
            if kind in ("adcc", "pointing", "pixel_auc")
            else f"{by_group(np.asarray(values[kind]), groups).mean():.2f}"
            for kind in kinds
        ]
        lines.append(f"| {name} | {times} | " + " | ".join(cells) + " |")
    if "area_share" in found:
        share = interval(np.asarray(found["area_share"]), groups, 3)
        lines += ["", f"Energy pointing of a constant map, which is the tumour's share of the area: {share}."]
    return "\n".join(lines)


def draw(results: Results, folder: Path) -> None:
    """`label_free.png`: ADCC of every map, and where masks are, pixel AUC; `label_free.csv`: every layer's figures."""
    if not results:
        return
    write_table(folder / "label_free.csv", _rows(results))
    columns = list(dict.fromkeys((part, network) for part, network, _ in results))
    figure = Figure(figsize=(2.9 * len(columns) + 2.4, 4.6), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(columns), squeeze=False)[0]
    # Grad-CAM is not there without classes, but rows are the same everywhere.
    rows = list(dict.fromkeys(name for value in results.values() for name in value["maps"]))
    for axes, (part, network) in zip(panels, columns, strict=True):
        found = _over_layers([value for (of, name, _), value in results.items() if (of, name) == (part, network)])
        groups = np.unique(np.asarray(found["groups"]), return_inverse=True)[1]
        for offset, kind, colour in ((-0.15, "adcc", "#0072B2"), (0.15, "pixel_auc", "#D55E00")):
            for row, name in enumerate(rows):
                if kind in found["maps"].get(name, {}):
                    known = bootstrap_mean(by_group(np.asarray(found["maps"][name][kind]), groups))
                    axes.plot((known.low, known.high), (row + offset,) * 2, color=colour, lw=1.2)
                    label = None if row else _MEASURES[kind]
                    axes.plot(known.value, row + offset, "o", color=colour, ms=4, label=label)
        axes.set(title=f"{NETWORKS[network]},\n{part}", xlim=(0, 1), ylim=(len(rows) - 0.5, -0.5))
        axes.title.set_fontsize(8)
        axes.set_yticks(range(len(rows)), rows if axes is panels[0] else [], fontsize="small")
        axes.axvline(0.5, color="#999999", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].legend(frameon=False, fontsize="small", loc="lower left")
    with atomic_path(folder / "label_free.png") as temporary:
        figure.savefig(temporary)


def _rows(results: Results) -> Iterator[dict[str, Any]]:
    for (part, network, layer), found in results.items():
        groups = np.unique(np.asarray(found["groups"]), return_inverse=True)[1]
        for name, values in found["maps"].items():
            for kind, numbers in values.items():
                known = bootstrap_mean(by_group(np.asarray(numbers), groups))
                about = {"part": part, "network": NETWORKS[network], "layer": layer, "map": name, "measure": kind}
                yield about | {"mean": f"{known.value:.4f}", "low": f"{known.low:.4f}", "high": f"{known.high:.4f}"}
