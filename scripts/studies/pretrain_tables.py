"""Tables and the picture of the study of pre-training."""

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
from medsd.evaluate.plots import RUN_STYLES

Results = dict[tuple[str, str, int], dict[str, Any]]

WORDS = {
    "start": "no pre-training, BatchNorm settled",
    "moco": "MoCo v2",
    "local": "+ local",
    "w2": "+ decorrelation (W2)",
    "med-moco": "Med-MoCo, both",
    "corr": "+ penalty on correlation",
    "corr-4": "+ penalty of 4",
    "local-corr": "+ local + penalty",
    "local-corr-4": "+ local + penalty of 4",
    "local-corr-16": "+ local + penalty of 16",
    "moco-t0.1": "MoCo v2, temperature 0.1",
    "moco-t0.4": "MoCo v2, temperature 0.4",
    "local-corr-4-t0.4": "+ local + penalty of 4, temperature 0.4",
    "med-moco-t0.1": "Med-MoCo, temperature 0.1",
    "med-moco-t0.4": "Med-MoCo, temperature 0.4",
    "med-moco-g16": "Med-MoCo, groups of 16",
    "med-moco-g32": "Med-MoCo, groups of 32",
}
_START, _BASE = "start", "moco"
_PARTS = {
    "pcam-resnet10t": "PatchCamelyon, half-width ResNet-10-t from random weights",
    "pcam-resnet10t-colour": "PatchCamelyon, half-width ResNet-10-t, views in colour and sharp",
    "pcam-resnet10t-adamw": "PatchCamelyon, half-width ResNet-10-t, AdamW",
    "pcam-resnet10t-adamw-colour": "PatchCamelyon, half-width ResNet-10-t, AdamW, views in colour and sharp",
    "pcam-resnet18": "PatchCamelyon, ResNet-18 from random weights",
    "pcam-resnet18-adamw": "PatchCamelyon, ResNet-18 from random weights, AdamW",
    "pcam-lite0": "PatchCamelyon, EfficientNet-Lite0 from ImageNet",
    "pcam-lite0-adamw": "PatchCamelyon, EfficientNet-Lite0 from ImageNet, AdamW",
    "ebhi-resnet18": "EBHI-Seg, ResNet-18 from random weights",
    "ebhi-lite0": "EBHI-Seg, EfficientNet-Lite0 from ImageNet",
}


class Column(NamedTuple):
    """A measure: its key and title, the digits that are shown, whether variants are compared by it, what it is of."""

    key: str
    title: str
    digits: int
    compared: bool = True
    side: str = "testing"


COLUMNS = (
    Column("rank", "effective rank", 1),
    Column("participation", "participation ratio", 1, compared=False),
    Column("correlation", "mean abs correlation", 2, compared=False),
    Column("embedding_rank", "rank of embeddings", 1, compared=False),
    Column("probe", "probe AUC", 3),
    Column("probe_white", "probe AUC, whitened", 3),
    Column("knn", "k-NN AUC", 3),
    Column("knn_white", "k-NN AUC, whitened", 3, compared=False),
    Column("dice", "decoder Dice", 3, side="masks"),
    Column("oracle", "oracle Dice", 3, compared=False, side="masks"),
    Column("finetune_10", "fine-tuned AUC, 10 %", 3),
    Column("finetune_100", "fine-tuned AUC, 100 %", 3),
    Column("validation_rank", "effective rank, validation", 1, compared=False, side="validation"),
    Column("validation_probe", "probe AUC, validation", 3, side="validation"),
)


def tables(results: Results) -> str:
    """Tables in Markdown: means over seeds, then differences to the start and to each MoCo v2 that was run.

    At the end each other schedule of the first part, see `_schedules`.
    """
    parts = list(dict.fromkeys(part for part, _, _ in results))
    pieces = ["\n".join(_part(part, results)) for part in parts]
    others = [part for part in parts[1:] if part.startswith(parts[0])]
    if others:
        pieces.append("\n".join(_schedules(parts[0], others, results)))
    return "\n\n".join(pieces) + "\n"


def _schedules(first: str, others: list[str], results: Results) -> Iterator[str]:
    """What MoCo v2 has more by another schedule, on the same images from the same weights, seed by seed."""
    compared = [column for column in COLUMNS if column.compared]
    yield "### MoCo v2 by another schedule, less MoCo v2 by the first, paired by seed"
    yield ""
    yield "| " + " | ".join(["", "seeds", *(column.title for column in compared)]) + " |"
    yield "|---" * (len(compared) + 2) + "|"
    for part in others:
        seeds = [seed for at, name, seed in results if (at, name) == (part, _BASE) and (first, _BASE, seed) in results]
        found = [[results[at, _BASE, seed] for seed in seeds] for at in (part, first)]
        cells = [_compared(*found, column) for column in compared]
        yield "| " + " | ".join([_PARTS[part], str(len(seeds)), *cells]) + " |"


def _part(part: str, results: Results) -> Iterator[str]:
    variants = [variant for variant in WORDS if any(key[:2] == (part, variant) for key in results)]
    seeds = sorted({seed for at, _, seed in results if at == part})
    yield f"### {_PARTS[part]}"
    yield ""
    yield f"Mean and standard error over {len(seeds)} seeds, each with its own split."
    yield ""
    yield "| " + " | ".join(["", *(column.title for column in COLUMNS)]) + " |"
    yield "|---" * (len(COLUMNS) + 1) + "|"
    for variant in variants:
        cells = [mean_of(_values(results, part, variant, column.key, seeds), column.digits) for column in COLUMNS]
        yield "| " + " | ".join([_words_seeds(part, variant, results, seeds), *cells]) + " |"
    for base in (variant for variant in variants if variant.startswith((_START, _BASE))):
        yield from _differences(part, results, base, [variant for variant in variants if variant != base], seeds)


def _words(part: str, variant: str) -> str:
    return "ImageNet alone" if variant == _START and "from ImageNet" in _PARTS[part] else WORDS[variant]


def _words_seeds(part: str, variant: str, results: Results, seeds: list[int]) -> str:
    """A variant's words, with its seeds where they are fewer than those of others."""
    held = sum((part, variant, seed) in results for seed in seeds)
    return _words(part, variant) + (f" ({held} seeds)" if held < len(seeds) else "")


def _differences(part: str, results: Results, base: str, variants: list[str], seeds: list[int]) -> Iterator[str]:
    """A table of what variants have more than a base."""
    compared = [column for column in COLUMNS if column.compared]
    yield ""
    yield f"Difference to {_words(part, base)}, paired by seed, with its 95 % interval over deals; ratio of ranks:"
    yield ""
    yield "| " + " | ".join(["", *(column.title for column in compared), "times its rank"]) + " |"
    yield "|---" * (len(compared) + 2) + "|"
    for variant in variants:
        both = [seed for seed in seeds if {(part, variant, seed), (part, base, seed)} <= results.keys()]
        if not both:
            continue
        found = [[results[part, name, seed] for seed in both] for name in (variant, base)]
        cells = [_compared(*found, column) for column in compared]
        ours, theirs = (np.array([each["rank"] for each in of]) for of in found)
        times = difference_of(ours / theirs, 2, ratio_of(found[0])).replace("+", "")
        yield "| " + " | ".join([_words_seeds(part, variant, results, seeds), *cells, times]) + " |"


def _compared(ours: list[dict[str, Any]], theirs: list[dict[str, Any]], column: Column) -> str:
    """What a measure has more in the first results than in the second, of the same deals; empty where none has it."""
    pairs = [[each.get(column.key, np.nan) for each in found] for found in (ours, theirs)]
    differences = np.subtract(*pairs, dtype=np.float64)
    if not np.isfinite(differences).any():
        return ""
    return difference_of(differences, column.digits, ratio_of(ours, column.side))


def _values(results: Results, part: str, variant: str, key: str, seeds: list[int]) -> npt.NDArray[np.float64]:
    """A measure by seed, nan where it is missing."""
    return np.array([results.get((part, variant, seed), {}).get(key, np.nan) for seed in seeds], np.float64)


def draw(results: Results, folder: Path) -> None:
    """`pretrain.png`: the singular values of held-out features, a panel a part."""
    parts = list(dict.fromkeys(part for part, _, _ in results))
    if not parts:
        return
    figure = Figure(figsize=(5.5 * len(parts), 4.6), dpi=120, layout="constrained")
    for axes, part in zip(np.atleast_1d(figure.subplots(1, len(parts))), parts, strict=True):
        _panel(axes, part, results)
    save_figure(folder / "pretrain.png", figure, "medsd study of pre-training")


def _panel(axes: Axes, part: str, results: Results) -> None:
    shown = [variant for variant in WORDS if any(key[:2] == (part, variant) for key in results)]
    # What learnt nothing comes first, and is none of the runs.
    numbers = range(0 if _START in shown else 1, len(WORDS) + 1)
    for number, variant in zip(numbers, shown, strict=False):
        found = [each["singular"] for (at, name, _), each in results.items() if (at, name) == (part, variant)]
        shares = np.exp(np.mean([np.log(np.maximum(each, 1e-12) / each[0]) for each in found], axis=0))
        shares = shares[shares > 1e-6]
        colour, marker = RUN_STYLES[(number - 1) % len(RUN_STYLES)] if number else ("#444444", "")
        style = "-" if number else ":"
        axes.plot(
            np.arange(1, len(shares) + 1), shares, style, color=colour, marker=marker, markevery=(number * 4, 40), ms=4,
            label=_words(part, variant),
        )  # fmt: skip
    axes.set(yscale="log", xlabel="direction, strongest first", ylabel="singular value, share of the first")
    axes.set_title(_PARTS[part], fontsize="medium")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize="x-small", frameon=False)
