"""Tables and the picture of the study of segmentation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy import stats
from studies.pretrain_tables import WORDS
from studies.redealt import difference_of, mean_of, ratio_of

from medsd.drawing import save_figure

# Part, setting and seed; settings are of `studies.segment`, which takes its tables from here.
Results = dict[tuple[str, Any, int], dict[str, Any]]

_PARTS = {
    "ebhi": "EBHI-Seg, glands and lesions, patients apart",
    "nuinsseg": "NuInsSeg, nuclei, stains apart",
    "weak": "Phantom slides, tumour",
}
_BASES = {"ebhi": "moco", "nuinsseg": "moco", "weak": "masks"}
# What a start is compared with, if not with its part's base.
_BASE_OF = {"saliencydecor": "ce", "med-moco-adamw": "moco-adamw"}
_STARTS = {
    **WORDS,
    "moco-adamw": "MoCo v2, by AdamW",
    "med-moco-adamw": "Med-MoCo, by AdamW",
    "ce": "MoCo v2, then CE on labels",
    "saliencydecor": "MoCo v2, then SaliencyDecor on labels",
    "lite0": "EfficientNet-Lite0, ImageNet",
    "masks": "real masks",
    "weak": "evidence alone",
    "weak then masks": "evidence, then real masks",
}
# Colour and marker of a start, and words, colour and marker of a linear decoder.
_INKS = {
    "start": ("#888888", "s"),
    "moco": ("#08519c", "o"),
    "med-moco": ("#4292c6", "^"),
    "local-corr-4": ("#9ecae1", "v"),
    "moco-adamw": ("#54278f", "o"),
    "med-moco-adamw": ("#9e9ac8", "^"),
    "ce": ("#238b45", "<"),
    "saliencydecor": ("#74c476", ">"),
    "lite0": ("#d94801", "D"),
    "masks": ("#08519c", "o"),
    "weak": ("#636363", ""),
    "weak then masks": ("#d94801", "D"),
}
_LINEAR = {
    "linear": ("linear, last map, dilated to stride 8", "#7f2704", "s"),
    "linear8": ("linear, own map of stride 8", "#d94801", "o"),
    "linear16": ("linear, own map of stride 16", "#fd8d3c", "D"),
}
_COLUMNS = (("dice", "Dice", 3), ("pooled", "Dice of all pixels", 3), ("surface_dice", "surface Dice", 3))


def tables(results: Results) -> str:
    """A table a part: means over seeds, and differences of Dice to its base, paired by seed."""
    return "\n".join(line for part in _PARTS if any(key[0] == part for key in results) for line in _part(part, results))


def _part(part: str, results: Results) -> Iterator[str]:
    settings = list(dict.fromkeys(setting for at, setting, _ in results if at == part))
    seeds = sorted({seed for at, _, seed in results if at == part})
    base = _BASES[part]
    yield f"### {_PARTS[part]}"
    yield ""
    others = ", of SaliencyDecor to CE, of Med-MoCo by AdamW to MoCo v2 so," if part != "weak" else ""
    to = f"'{_STARTS[base]}'{others}"
    yield (
        f"Mean and standard error over {len(seeds)} seed(s), each with its own split; differences of Dice to {to} of "
        "the same protocol, decoder and share, paired by seed, with the 95 % interval over deals."
    )
    yield ""
    heads = [
        "start",
        "protocol or decoder",
        "masks",
        *(title for _, title, _ in _COLUMNS),
        "validation Dice",
        "difference",
        *(["less no pre-training"] if part != "weak" else []),
    ]
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for setting in settings:
        cells = [mean_of(_values(results, part, setting, key, seeds), digits) for key, _, digits in _COLUMNS]
        cells.append(mean_of(_values(results, part, setting, "validation", seeds), 3))
        for other in (_BASE_OF.get(setting.start, base), *(["start"] if part != "weak" else [])):
            like = _like(settings, setting, other)
            compared = like is not None and like != setting
            found = [_values(results, part, one, "dice", seeds) for one in (setting, like)]
            ratio = ratio_of(scores for (at, _, _), scores in results.items() if at == part)
            cells.append(difference_of(found[0] - found[1], 3, ratio) if compared else "")
        words = _STARTS[setting.start]
        if setting.start == "weak":
            words += f", sure {setting.sure:g}, {setting.fill.replace('_', ' ')}"
        share = f"{100 * setting.fraction:g} %"
        yield "| " + " | ".join([words, setting.kind, share, *cells]) + " |"
    yield ""
    if part == "weak":
        yield from _weak_masks(settings, results, seeds)


def _weak_masks(settings: list[Any], results: Results, seeds: list[int]) -> Iterator[str]:
    """How true the masks made of evidence are."""
    yield "| masks of evidence | said of pixels | tumour where it says so | none where it says so | tumour of all |"
    yield "|---|---|---|---|---|"
    for setting in (one for one in settings if one.start == "weak"):
        rows = [found["weak"] for seed in seeds if (found := results.get(("weak", setting, seed))) is not None]
        kinds = ("said", "precision", "background", "share")
        cells = [mean_of(np.array([row[kind] for row in rows]), 3) for kind in kinds]
        yield "| " + " | ".join([f"sure {setting.sure:g}, {setting.fill.replace('_', ' ')}", *cells]) + " |"
    yield ""


def _like(settings: list[Any], setting: Any, start: str) -> Any | None:
    """The setting of another start with the same protocol, decoder and share of masks."""
    wanted = (start, setting.kind, setting.fraction)
    return next((one for one in settings if (one.start, one.kind, one.fraction) == wanted), None)


def _values(results: Results, part: str, setting: Any, key: str, seeds: list[int]) -> npt.NDArray[np.float64]:
    """A measure by seed, nan where it is missing."""
    found = [results.get((part, setting, seed), {}).get(key) for seed in seeds]
    return np.array([np.nan if one is None else one for one in found], np.float64)


def draw(results: Results, folder: Path) -> None:
    """`segment.png`: a column a part; above Dice by share of masks where all learns, below linear decoders."""
    parts = [part for part in _PARTS if any(key[0] == part for key in results)]
    if not parts:
        return
    figure = Figure(figsize=(5.6 * len(parts), 7.6), dpi=120, layout="constrained")
    grid = figure.subplots(2, len(parts), squeeze=False)
    for (above, below), part in zip(grid.T, parts, strict=True):
        of_part = {key: value for key, value in results.items() if key[0] == part}
        seeds = sorted({key[2] for key in of_part})
        _by_share(above, part, of_part, seeds)
        _frozen(below, part, of_part, seeds)
        above.set_title(_PARTS[part], fontsize="medium")
    handles: dict[str, Any] = {}
    for axes in grid.flat:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=5, fontsize="small", frameon=False
    )
    save_figure(folder / "segment.png", figure, "medsd study of segmentation")


def _by_share(axes: Axes, part: str, results: Results, seeds: list[int]) -> None:
    """A line a start."""
    settings = [one for one in dict.fromkeys(key[1] for key in results) if one.protocol == "full"]
    starts = [start for start in _STARTS if any(one.start == start for one in settings)]
    for number, start in enumerate(starts):
        own = sorted((one for one in settings if one.start == start), key=lambda one: float(one.fraction))
        colour, marker = _INKS[start]
        if not own[0].fraction:  # of masks of evidence alone the one that validation prefers
            best = max(own, key=lambda one: float(np.nanmean(_values(results, part, one, "validation", seeds))))
            height = float(np.nanmean(_values(results, part, best, "dice", seeds)))
            axes.axhline(height, color=colour, ls="--", lw=1, label=f"{_STARTS[start]}, no mask")
            continue
        means, errors = _points(results, part, own, seeds)
        beside = 1 + 0.04 * (number - len(starts) / 2)  # so that none is hidden
        shares = [100 * beside * one.fraction for one in own]
        axes.errorbar(shares, means, errors, color=colour, marker=marker, ms=5, capsize=2, lw=1, label=_STARTS[start])
    axes.set(xscale="log", xlabel="masks that are learnt from, share of patients")
    ticks = [round(100 * share) for share in sorted({one.fraction for one in settings if one.fraction})]
    axes.set_xticks(ticks, [f"{tick} %" for tick in ticks])
    axes.minorticks_off()
    axes.set_ylabel(f"Dice, test part, mean of {len(seeds)} seed(s)")
    _finish(axes)


def _frozen(axes: Axes, part: str, results: Results, seeds: list[int]) -> None:
    """A row a start, a mark a decoder."""
    settings = [one for one in dict.fromkeys(key[1] for key in results) if one.kind in _LINEAR]
    if not settings:
        axes.set_axis_off()
        return
    starts = [start for start in _STARTS if any(one.start == start for one in settings)]
    for kind, (words, colour, marker) in _LINEAR.items():
        own = [one for one in settings if one.kind == kind]
        means, errors = _points(results, part, own, seeds)
        rows = [starts.index(one.start) + 0.15 * (list(_LINEAR).index(kind) - 1) for one in own]
        axes.errorbar(means, rows, xerr=errors, color=colour, marker=marker, ms=5, capsize=2, ls="", label=words)
    axes.set_yticks(range(len(starts)), [_STARTS[start] for start in starts])
    axes.invert_yaxis()
    axes.set_xlabel("Dice, the encoder frozen, a linear decoder")
    _finish(axes)


def _points(results: Results, part: str, settings: list[Any], seeds: list[int]) -> tuple[list[float], list[float]]:
    """Dice of settings and its standard error, over seeds."""
    found = [_values(results, part, one, "dice", seeds) for one in settings]
    errors = [stats.sem(one, nan_policy="omit") if np.isfinite(one).sum() > 1 else 0.0 for one in found]
    return [float(np.nanmean(one)) for one in found], [float(error) for error in errors]


def _finish(axes: Axes) -> None:
    axes.grid(color="#dddddd")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
