"""Tables and the picture of the study of AIM where a tint goes with the label."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from studies.redealt import difference_of, mean_of, ratio_of

from medsd.drawing import save_figure

Results = dict[tuple[str, str, int], dict[str, Any]]

WORDS = {
    "ce": "cross-entropy (CE)",
    "saliencydecor": "SaliencyDecor",
    "twin": "AIM's twin without masks",
    "aim-35": "AIM, tau 0.35",
    "aim-25": "AIM, tau 0.25",
    "aim-15": "AIM, tau 0.15",
    "no-shortcut": "CE, tint at random",
}
_BASES = {"ce": "CE", "twin": "its twin"}
_PARTS = {
    "phantoms": "Phantoms, tint around the nest",
    "pcam": "PatchCamelyon, tint all over",
    "ebhi": "EBHI-Seg, tint outside the glands",
}


class Column(NamedTuple):
    """A measure: its key, its title, the digits that are shown, and its scale, 100 for percent."""

    key: str
    title: str
    digits: int = 3
    scale: float = 1.0


COLUMNS = (
    Column("testing_worst_group", "worst-group accuracy %", 1, 100),
    Column("testing_accuracy", "accuracy %", 1, 100),
    Column("testing_auc", "AUC"),
    Column("gradient_pointing", "energy pointing, gradient %", 1, 100),
    Column("mask_pointing", "energy pointing, masks %", 1, 100),
    Column("chance_pointing", "chance %", 1, 100),
    Column("open_3", "open, deepest mask %", 1, 100),
    Column("open_2", "open, next mask %", 1, 100),
    Column("open_1", "open, finest mask %", 1, 100),
    Column("gradient_gap", "masking gap"),
    Column("gradient_deletion", "deletion"),
    Column("gradient_insertion", "insertion"),
    Column("correlation", "mean abs. correlation"),
    Column("rank", "effective rank", 1),
    Column("dead", "dead channels", 1),
    Column("gradient_total_variation", "TV"),
    Column("gradient_gini", "Gini"),
    Column("validation_worst_group", "worst group, validation %", 1, 100),
)


def tables(results: Results) -> str:
    """A table of means and one of paired differences for each part, in Markdown."""
    parts = list(dict.fromkeys(part for part, _, _ in results))
    return "\n\n".join("\n".join(_part(part, results)) for part in parts) + "\n"


def _part(part: str, results: Results) -> Iterator[str]:
    methods = [method for method in WORDS if any(key[:2] == (part, method) for key in results)]
    seeds = sorted({seed for at, _, seed in results if at == part})
    ratio = ratio_of(scores for (at, _, _), scores in results.items() if at == part)
    columns = [
        column
        for column in COLUMNS
        if any(np.isfinite(_values(results, part, method, column, seeds)).any() for method in methods)
    ]
    head = ["| " + " | ".join(["", *(column.title for column in columns)]) + " |", "|---" * (len(columns) + 1) + "|"]
    yield f"### {_PARTS[part]}"
    yield ""
    yield f"Mean and standard error over {len(seeds)} seed(s), each with its own split."
    yield ""
    yield from head
    for method in methods:
        held = sum((part, method, seed) in results for seed in seeds)
        words = WORDS[method] + (f" ({held} seeds)" if held < len(seeds) else "")
        cells = [mean_of(_values(results, part, method, column, seeds), column.digits) for column in columns]
        yield "| " + " | ".join([words, *cells]) + " |"
    for base, of in _BASES.items():
        others = [method for method in methods if method != base and (base == "ce" or method.startswith("aim"))]
        if base not in methods or not others:
            continue
        yield ""
        yield f"Less {of}, paired by seed, with the 95 % interval over deals:"
        yield ""
        yield from head
        for method in others:
            cells = [
                difference_of(
                    _values(results, part, method, column, seeds) - _values(results, part, base, column, seeds),
                    column.digits,
                    ratio,
                )
                for column in columns
            ]
            yield "| " + " | ".join([WORDS[method], *cells]) + " |"


def _values(results: Results, part: str, method: str, column: Column, seeds: list[int]) -> npt.NDArray[np.float64]:
    """A measure by seed, nan where it is missing."""
    found = [results.get((part, method, seed), {}).get(column.key) for seed in seeds]
    return column.scale * np.array([np.nan if value is None else value for value in found], np.float64)


def draw(results: Results, folder: Path) -> None:
    """`finetune.png`: the worst groups, a panel a part."""
    parts = list(dict.fromkeys(part for part, _, _ in results))
    if not parts:
        return
    figure = Figure(figsize=(5.2 * len(parts), 3.4), dpi=120, layout="constrained")
    figure.suptitle("Bar: mean. Ring: a seed. Dotted: a coin tossed. Hatched: no shortcut.", fontsize="small")
    for axes, part in zip(np.atleast_1d(figure.subplots(1, len(parts))), parts, strict=True):
        _panel(axes, part, results)
    save_figure(folder / "finetune.png", figure, "medsd study of AIM and the shortcut")


def _panel(axes: Axes, part: str, results: Results) -> None:
    methods = [method for method in WORDS if any(key[:2] == (part, method) for key in results)]
    seeds = sorted({seed for at, _, seed in results if at == part})
    for row, method in enumerate(methods):
        values = _values(results, part, method, COLUMNS[0], seeds)
        hatch = "///" if method == "no-shortcut" else ""
        axes.barh(row, np.nanmean(values), color="#ffffff" if hatch else "#cccccc", edgecolor="#bbbbbb", hatch=hatch)
        axes.plot(values, np.full(len(values), row), "o", color="#333333", ms=4, mfc="none")
    axes.axvline(50, color="#999999", ls=":", lw=1)
    axes.set(xlabel=COLUMNS[0].title, xlim=(0, 100), title=_PARTS[part])
    axes.set_yticks(range(len(methods)), [WORDS[method] for method in methods])
    axes.spines[["top", "right"]].set_visible(False)
    axes.invert_yaxis()
