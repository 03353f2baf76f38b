"""Tables and the picture of the study of slide maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from studies.fields import SUBJECTS, camelyon16_places

from medsd.evaluate.scores import bootstrap_mean
from medsd.files import atomic_path

SALIENCY_COLORMAP = "BrBG_r"
Results = dict[tuple[str, str, str], dict[str, Any]]
Floats = npt.NDArray[np.float64]

_GROUPS = {
    "camelyon": "lymph-node tiles of 512 um",
    "camelyon16": "CAMELYON16 patches of 62 um, part tumour",
    "breast": "breast regions, another organ",
}
_WORDS = {"probability": "probability, linear between its pixels", "occlusion": "occlusion, patches of 32 px"}
_SMOOTHED = {"none": "", "backward_hook": ", gradient smoothed", "after": ", then a Gaussian"}
_SHOWN = ("deeplift/none", "deeplift/after", "gradient_x_activation/none", "gradcam/none")
_AFTER = "/after"  # ends the names of maps after the Gaussian
_FEW = 4  # fields below which an interval says nothing


def tables(results: Results) -> str:
    """All tables in Markdown."""
    parts: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for (part, network, field), found in results.items():
        parts.setdefault((part, network), {})[field] = found
    return "\n\n".join(_table(*of, found) for of, found in parts.items()) + "\n"


def _table(part: str, name: str, fields: dict[str, dict[str, Any]]) -> str:
    found = list(fields.values())
    places = camelyon16_places(list(fields)) if part == "camelyon16" else np.arange(len(found))
    chooses = np.array([of_field["chooses"] for of_field in found])
    judged = ~chooses if not chooses.all() else chooses  # a study that has only begun
    words = f"{len(chooses)} fields" + (f", {chooses.sum()} of them to choose on" if chooses.any() else "")
    known = judged & np.isfinite(_values(found, "probability", "auc"))
    if known.sum() < judged.sum():
        words += f", {known.sum()} with enough of both kinds of tissue for an AUC"
    if (of := len(set(places[known]))) < known.sum():
        words += f", of {of} places, over which intervals are"
    head = ["map", "um a pixel", *(["AUC, choosing"] if chooses.any() else []), "pixel AUC"]
    head += ["less the probability's", "less the plain probability's", "the additive map's less this"]
    head += ["energy pointing %", "sign right %", "sum apart %", "TV", "insertion", "deletion"]
    lines = [
        f"### {SUBJECTS[name].words}: {_GROUPS[part]}",
        "",
        f"{words}; tumour is {100 * np.mean([of_field['share'] for of_field in found]):.0f} % of the area.",
        "Maps with a Gaussian are compared with those with the same Gaussian, and with the plain probability.",
        "",
        "| " + " | ".join(head) + " |",
        "|---" * len(head) + "|",
    ]
    area = {key: _values(found, key, "auc") for key in found[0]["maps"]}

    def less(key: str, other: str) -> str:
        return "" if key == other else _interval((area[key] - area[other])[judged], places[judged], "+")

    for key in area:
        smoothed = key.endswith(_AFTER)
        additive = "/".join((key.partition("/")[0], "deeplift", key.rpartition("/")[2]))
        map_um = found[0]["map_um"].get(key.partition("/")[0])  # of explanations
        row = [_name(key), f"{map_um:.0f}" if map_um else ""]
        row += [f"{area[key][chooses].mean():.3f}"] if chooses.any() else []
        row += [_interval(area[key][judged], places[judged])]
        row += [less(key, "probability" + _AFTER * smoothed), less(key, "probability") if smoothed else ""]
        row.append("" if additive not in area else less(additive, key))
        row.append(f"{100 * np.nanmean(_values(found, key, 'pointing')[judged]):.1f}")
        row += _of_tiles(found, key, judged)
        row += [_mean(found, key, measure) for measure in ("insertion", "deletion")]
        lines.append("| " + " | ".join(row) + " |")
    return "\n".join(lines)


def _of_tiles(found: list[dict[str, Any]], key: str, judged: npt.NDArray[np.bool_]) -> list[str]:
    """How often tiles' sums have the sign of their log-odds, how far they are from them, and variation."""
    if "sign" not in found[0]["maps"][key]:
        return ["", "", ""]
    right, sure, apart, variation = (
        _values(found, key, measure)[judged] for measure in ("sign", "sure", "apart", "variation")
    )
    signs = f"{100 * right.sum() / sure.sum():.1f} of {sure.sum():.0f}" if sure.sum() else "none sure"
    return [signs, f"{100 * np.nanmean(apart):.0f}", f"{np.nanmean(variation):.2f}"]


def _values(found: list[dict[str, Any]], key: str, measure: str) -> Floats:
    return np.array([of_field["maps"][key].get(measure, np.nan) for of_field in found], np.float64)


def _name(key: str) -> str:
    layer, _, rest = key.partition("/")
    if layer in _WORDS:
        return _WORDS[layer] + _SMOOTHED[rest or "none"]
    method, _, smoothing = rest.partition("/")
    return f"{method.replace('_', ' ')}, {layer}{_SMOOTHED[smoothing]}"


def _interval(values: Floats, places: npt.NDArray[np.int64], sign: str = "") -> str:
    known = np.isfinite(values)
    if known.sum() < _FEW:
        return ", ".join(f"{value:{sign}.3f}" for value in values[known])
    found = bootstrap_mean(values[known], groups=places[known])
    return f"{found:{sign}.3f}"


def _mean(found: list[dict[str, Any]], key: str, measure: str) -> str:
    maps = [of_field["maps"][key] for of_field in found]
    values = [of_map[measure] for of_map in maps if measure in of_map]
    return f"{np.mean(values):.3f}" if values else ""


def draw(results: Results, folder: Path) -> None:
    """`maps.png`: real tiles with the tumour's outline, the classifier's probability and maps of the last layer.

    One scale a column for all tiles, so that tiles can be compared.
    """
    layer = SUBJECTS["resnet18d"].layers[-1]
    keys = ["probability", *(f"{layer}/{of_map}" for of_map in _SHOWN)]
    paths = sorted((folder / "camelyon").glob("resnet18d-*.npz"))
    tiles = []
    for path in paths:
        with np.load(path, allow_pickle=False) as content:
            tiles.append({key: content[key] for key in ("image", "tumour", *keys)})
    if not tiles:
        return
    figure = Figure(figsize=(2.5 * (len(keys) + 1), 2.5 * len(tiles) + 0.5), dpi=90, layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(tiles), len(keys) + 1, squeeze=False)
    for row, tile in zip(grid, tiles, strict=True):
        side = tile["image"].shape[0]
        row[0].imshow(tile["image"])
        for axes in row:
            axes.contour(tile["tumour"], [0.5], colors="#000000", linewidths=0.9)
            axes.set(xlim=(0, side), ylim=(side, 0))
            axes.set_axis_off()
    for axes, tile in zip(grid[:, 0], tiles, strict=False):
        # An outline alone does not say which side of it is tumour.
        axes.contourf(tile["tumour"], [-0.5, 0.5], colors="none", hatches=["////"])
    grid[0, 0].set_title("tile of 512 um,\nhatched: no tumour", fontsize=9)
    for column, key in enumerate(keys, start=1):
        _draw_column([row[column] for row in grid], key, [tile[key] for tile in tiles], tiles[0]["image"].shape[0])
    with atomic_path(folder / "maps.png") as temporary:
        figure.savefig(temporary, format="png")


def _draw_column(column: list[Axes], key: str, maps: list[npt.NDArray[np.float32]], side: int) -> None:
    limit = float(np.quantile(np.abs(np.stack(maps)), 0.99))
    low, high, colours = (0.0, 1.0, "viridis") if key == "probability" else (-limit, limit, SALIENCY_COLORMAP)
    for axes, values in zip(column, maps, strict=True):
        shown = axes.imshow(
            values, cmap=colours, vmin=low, vmax=high, extent=(0, side, side, 0), interpolation="nearest"
        )
    title = "probability" if key == "probability" else _name(key).replace(", ", "\n", 1)
    column[0].set_title(title, fontsize=9)
    column[0].figure.colorbar(shown, ax=column, shrink=0.5, location="bottom")
