"""Tables and the picture of the study of segmentation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from scipy import stats
from studies.pretrain_tables import WORDS, difference_of, mean_of

from medsd.drawing import save_figure

# Part, setting and seed; settings are of `studies.segment`, which takes its tables from here.
Results = dict[tuple[str, Any, int], dict[str, Any]]

_PARTS = {
    "ebhi": "EBHI-Seg, glands and lesions, patients apart",
    "nuinsseg": "NuInsSeg, nuclei, organs apart",
    "weak": "Phantom slides, tumour",
}
_BASES = {"ebhi": "moco", "nuinsseg": "moco", "weak": "masks"}
# What a start is compared with, if not with its part's base.
_BASE_OF = {"saliencydecor": "ce"}
_STARTS = {
    **WORDS,
    "ce": "MoCo v2, then CE on labels",
    "saliencydecor": "MoCo v2, then SaliencyDecor on labels",
    "lite0": "EfficientNet-Lite0, ImageNet",
    "masks": "real masks",
    "weak": "evidence alone",
    "weak then masks": "evidence, then real masks",
}
# Words, colour and marker of a protocol (or decoder) and share of masks.
_MARKS = {
    ("linear", 1.0): ("linear decoder, last map, dilated to stride 8", "#7f2704", "s"),
    ("linear8", 1.0): ("linear decoder, own map of stride 8", "#d94801", "X"),
    ("linear16", 1.0): ("linear decoder, own map of stride 16", "#fd8d3c", "P"),
    ("full", 0.0): ("no mask", "#636363", "D"),
    ("full", 0.01): ("all learns, 1 % of masks", "#9ecae1", "v"),
    ("full", 0.1): ("all learns, 10 %", "#4292c6", "^"),
    ("full", 0.5): ("all learns, 50 %", "#2171b5", ">"),
    ("full", 1.0): ("all learns, 100 %", "#08306b", "o"),
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
    to = f"'{_STARTS[base]}'" + ", of SaliencyDecor to CE," * (part != "weak")
    yield (
        f"Mean and standard error over {len(seeds)} seed(s), each with its own split; differences of Dice to {to} of "
        "the same protocol, decoder and share, paired by seed, with the 95 % interval of Student's t."
    )
    yield ""
    heads = [
        "start",
        "protocol or decoder",
        "masks",
        *(title for _, title, _ in _COLUMNS),
        "validation Dice",
        "difference",
    ]
    yield "| " + " | ".join(heads) + " |"
    yield "|---" * len(heads) + "|"
    for setting in settings:
        cells = [mean_of(_values(results, part, setting, key, seeds), digits) for key, _, digits in _COLUMNS]
        cells.append(mean_of(_values(results, part, setting, "validation", seeds), 3))
        paired = ""
        if setting.start != base and (other := _like(settings, setting, _BASE_OF.get(setting.start, base))) is not None:
            found = (_values(results, part, one, "dice", seeds) for one in (setting, other))
            paired = difference_of(next(found) - next(found), 3)
        words = _STARTS[setting.start]
        if setting.start == "weak":
            words += f", sure {setting.sure:g}, {setting.fill.replace('_', ' ')}"
        share = f"{100 * setting.fraction:g} %"
        yield "| " + " | ".join([words, setting.kind, share, *cells, paired]) + " |"
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
    """`segment.png`: a panel a part, a row a start, a mark a protocol or decoder and share of masks, with errors."""
    parts = [part for part in _PARTS if any(key[0] == part for key in results)]
    if not parts:
        return
    figure = Figure(figsize=(6.4 * len(parts), 4.4), dpi=120, layout="constrained")
    for axes, part in zip(np.atleast_1d(figure.subplots(1, len(parts))), parts, strict=True):
        of_part = {key: value for key, value in results.items() if key[0] == part}
        starts = [start for start in _STARTS if any(key[1].start == start for key in of_part)]
        seeds = sorted({key[2] for key in of_part})
        for setting in _shown(of_part, seeds):
            words, colour, marker = _MARKS[setting.kind, setting.fraction]
            found = _values(of_part, part, setting, "dice", seeds)
            error = stats.sem(found, nan_policy="omit") if np.isfinite(found).sum() > 1 else 0.0
            beside = 0.1 * (list(_MARKS).index((setting.kind, setting.fraction)) - 3)  # so that none is hidden
            place = np.nanmean(found), starts.index(setting.start) + beside
            axes.errorbar(*place, xerr=error, color=colour, marker=marker, ms=6, capsize=2, ls="", label=words)
        handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
        ordered = [words for words, *_ in _MARKS.values() if words in handles]
        below = {"loc": "upper center", "bbox_to_anchor": (0.4, -0.16), "ncols": 2, "frameon": False}
        axes.legend([handles[words] for words in ordered], ordered, fontsize="small", **below)
        axes.set_yticks(range(len(starts)), [_STARTS[start] for start in starts])
        axes.invert_yaxis()
        axes.set(xlabel=f"Dice, test part, mean of {len(seeds)} seed(s)", xlim=(None, 1))
        axes.grid(axis="x", color="#dddddd")
        axes.set_axisbelow(True)
        axes.set_title(_PARTS[part], fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(folder / "segment.png", figure, "medsd study of segmentation")


def _shown(results: Results, seeds: list[int]) -> list[Any]:
    """The settings; of masks of evidence alone the one that validation prefers."""
    settings = list(dict.fromkeys(key[1] for key in results))
    alone = [one for one in settings if not one.fraction]
    if not alone:
        return settings
    best = max(alone, key=lambda one: float(np.nanmean(_values(results, "weak", one, "validation", seeds))))
    return [best, *(one for one in settings if one.fraction)]
