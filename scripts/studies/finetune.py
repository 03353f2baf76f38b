"""AIM against cross-entropy and its twin without masks where a shortcut goes with the label, over seeds.

`phantoms`: tiles of phantom slides whose surroundings tell the label in training. `patches`: PatchCamelyon patches
whose stain cluster tells the label in training. What SaliencyDecor does: `objectives`.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from studies import data
from studies.data import Items, Split
from timm.models import build_model_with_cfg, register_model
from timm.models.resnet import BasicBlock, ResNet

from medsd.cohort.dataset import Sample
from medsd.evaluate.explanations import ExplanationSettings, score_explanations
from medsd.evaluate.scores import auc
from medsd.evaluate.summary import as_json
from medsd.files import atomic_path, sha256_of
from medsd.networks.aim import AimClassifier
from medsd.networks.classifier import Classifier, TileClassifier
from medsd.networks.modes import evaluating
from medsd.networks.start import load_encoder, save_encoder
from medsd.objectives.aim import AimObjective
from medsd.objectives.saliency_decor import SaliencyDecor
from medsd.training.augment import augment
from medsd.training.network import parameter_groups
from medsd.training.terms import Objective

PARTS = ("phantoms", "patches")
ENCODER = "resnet10t_half"
EXPLAINED = ExplanationSettings(items=64, draws=2, batch_size=256)


@register_model  # type: ignore[no-untyped-call]
def resnet10t_half(pretrained: bool = False, pretrained_cfg: None = None, **options: Any) -> ResNet:
    """timm's ResNet-10-t with half its channels: 1.2 million parameters, for many trainings on a CPU."""
    made: ResNet = build_model_with_cfg(
        *(ResNet, ENCODER, pretrained, {"first_conv": "conv1.0", "classifier": "fc"}),
        block=BasicBlock,
        layers=(1, 1, 1, 1),
        channels=(32, 64, 128, 256),
        stem_width=16,
        stem_type="deep_tiered",
        avg_down=True,
        **options,
    )
    return made


@dataclass(frozen=True)
class Recipe:
    """How every method of a part trains."""

    epochs: int
    lr: float
    encoder_lr: float
    batch_size: int = 32
    weight_decay: float = 0.01
    stain: float = 0.1
    start: str = ""


@dataclass(frozen=True)
class Method:
    """A network and an objective."""

    words: str
    objective: Callable[[int], Objective]
    network: Callable[[], Classifier] = lambda: TileClassifier(ENCODER)
    version: dict[str, Any] = field(default_factory=dict)


RECIPES = {
    "phantoms": Recipe(epochs=3, lr=1e-3, encoder_lr=3e-4, start="phantoms"),
    "patches": Recipe(epochs=8, lr=1e-3, encoder_lr=3e-4, start="phantoms"),
}


def _aim(target: float, masking: bool = True) -> Method:
    return Method(
        f"AIM, tau {target:g}" if masking else "AIM's twin without masks",
        lambda epochs: AimObjective(epochs, target, mask_weight=6.0 if masking else 0.0),
        lambda: AimClassifier(ENCODER, end_stage=1, feature_width=64, mask_width=16, masking=masking),
        {"mask_target": target, "mask_weight": 6.0, "masking": masking, "end_stage": 1},
    )


METHODS = {
    "ce": Method("cross-entropy (CE)", lambda _epochs: SaliencyDecor(0, 0)),
    "twin": _aim(1.0, masking=False),
    "aim-25": _aim(0.25),
    "aim-15": _aim(0.15),
}


@dataclass(frozen=True)
class Job:
    """One training."""

    part: str
    method: str
    seed: int
    patches: str
    folder: str

    @property
    def name(self) -> str:
        """What its results are kept by, within the part."""
        return f"{self.method}-{self.seed}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this study alone."""
    parser.add_argument("patches", type=Path, help="Folder of PatchCamelyon patches with labels.csv.")
    parser.add_argument("--seeds", type=int, default=5)


def jobs_of(arguments: argparse.Namespace, folder: Path) -> list[Job]:
    """Every training of the parts asked for, seed by seed."""
    return [
        Job(part, method, seed, str(arguments.patches), str(folder))
        for seed in range(arguments.seeds)
        for part in arguments.part
        for method in METHODS
    ]


def key_of(job: Job) -> tuple[str, str, int]:
    """What the tables find a job's results by."""
    return job.part, job.method, job.seed


def recipe_of(job: Job) -> dict[str, Any]:
    """What the results of a job depend on."""
    patches = sha256_of(Path(job.patches) / "labels.csv")
    fixed = {"encoder": ENCODER, "data": data.VERSION, "patches": patches, "explained": asdict(EXPLAINED)}
    return {**asdict(RECIPES[job.part]), **METHODS[job.method].version, **fixed}


def start_worker() -> None:
    """One thread a process."""
    torch.set_num_threads(1)


def run_job(job: Job) -> tuple[Job, dict[str, Any]]:
    """Train, and score on the test side (and on the validation side, which chose the recipes)."""
    start_worker()
    split = split_of(job.part, Path(job.patches), Path(job.folder), job.seed)
    recipe, method = RECIPES[job.part], METHODS[job.method]
    torch.manual_seed(job.seed)
    network = method.network()
    if recipe.start:
        load_encoder(network.encoder, pretrained_encoder(Path(job.folder)))
    train(network, method.objective(recipe.epochs), split.training, recipe, job.seed)
    scores: dict[str, Any] = {}
    for name, items in (("validation", split.validation), ("testing", split.testing)):
        scores |= {f"{name}_{key}": value for key, value in score(network, items).items()}
    return job, scores | explain(network, split.testing, job.part == "phantoms")


def split_of(part: str, patches: Path, folder: Path, seed: int) -> Split:
    """The sides of a part under a seed."""
    if part == "patches":
        return data.patches_with_shortcut(patches, seed)
    return data.phantoms_with_shortcut(folder / "slides", seed)


def pretrained_encoder(folder: Path) -> Path:
    """The file of the encoder that the two shortcut parts start from; see `prepare`."""
    return folder / f"encoder-{data.VERSION}.safetensors"


def prepare(_arguments: argparse.Namespace, folder: Path) -> None:
    """Draw the phantom slides and pre-train the encoder, once.

    It learns tumour from normal nests on slides of its own, in surroundings whose tint is drawn at random: what
    ImageNet is to Waterbirds, a start that knows the objects and owes nothing to the shortcut.
    """
    for number in data.SLIDES:
        data.draw_slide(folder / "slides", number)
    if not pretrained_encoder(folder).is_file():
        torch.manual_seed(0)
        network = TileClassifier(ENCODER)
        items = data.phantoms_without_shortcut(folder / "slides")
        train(network, SaliencyDecor(0, 0), items, Recipe(epochs=6, lr=2e-3, encoder_lr=2e-3, stain=0.2), seed=0)
        save_encoder(pretrained_encoder(folder), network.encoder, ENCODER, "phantom tiles, tint at random")


def train(network: Classifier, objective: Objective, items: Items, recipe: Recipe, seed: int) -> None:
    """Train for all epochs; the last network is kept."""
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    encoder = {id(parameter) for parameter in network.encoder.parameters()}
    (group,) = parameter_groups(network, recipe.lr, recipe.weight_decay)
    groups = [
        {"params": [p for p in group["params"] if id(p) in encoder], "lr": recipe.encoder_lr},
        {"params": [p for p in group["params"] if id(p) not in encoder], "lr": recipe.lr},
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=recipe.weight_decay)
    steps = len(items) // recipe.batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, [recipe.encoder_lr, recipe.lr], total_steps=recipe.epochs * steps
    )
    # Two generators, so that every method sees the same images in the same order.
    orders, draws = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed)
    network.train()
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(items), generator=orders)
        for step in range(steps):
            rows = order[step * recipe.batch_size : (step + 1) * recipe.batch_size]
            x = network.normalise(augment(items.images[rows], orders, recipe.stain))
            optimizer.zero_grad()
            objective(network, x, items.labels[rows], epoch + step / steps, draws).total.backward()
            optimizer.step()
            schedule.step()
    network.eval()


def score(network: Classifier, items: Items) -> dict[str, float]:
    """Accuracy, AUC, and the least accuracy of the groups (label, cue) that the items hold."""
    with evaluating(network), torch.inference_mode():
        logits = torch.cat([network(batch) for batch in items.images.split(128)])
    correct = (logits.argmax(dim=1) == items.labels).float()
    groups = 2 * items.labels + items.cue
    by_group = {f"group_{int(group)}": float(correct[groups == group].mean()) for group in groups.unique()}
    return {
        "accuracy": float(correct.mean()),
        "auc": auc(items.labels.numpy(), (logits[:, 1] - logits[:, 0]).numpy()),
        "worst_group": min(by_group.values()),
        **by_group,
    }


def explain(network: Classifier, items: Items, pointing: bool) -> dict[str, Any]:
    """Faithfulness of the input gradient (and of AIM's masks), and health of the features."""
    samples: list[Sample] = [
        {"image": image, "label": label} for image, label in zip(items.images, items.labels, strict=True)
    ]
    masks = items.masks.numpy() if pointing and items.masks is not None else None
    found = score_explanations(network, samples, EXPLAINED, None if masks is None else masks.__getitem__)
    content = as_json(found)
    features, area = content["features"], content["area_share"]
    scores: dict[str, Any] = {
        "correlation": features["mean_abs_correlation"],
        "rank": features["effective_rank"],
        "dead": features["dead_channels"],
        "random_area": content["random"]["masking_area"]["value"],
        "chance_pointing": None if area is None else area["value"],
    }
    for name, of_map in content["maps"].items():
        for measure in (
            "masking_area",
            "gap",
            "deletion",
            "insertion",
            "total_variation",
            "gini",
            "entropy",
            "pointing",
        ):
            scores[f"{name}_{measure}"] = None if of_map[measure] is None else of_map[measure]["value"]
    return scores


def tables(results: dict[tuple[str, str, int], dict[str, Any]]) -> str:
    """The study's tables in Markdown: mean and standard error over seeds, and differences paired by seed."""
    parts = []
    for part in dict.fromkeys(part for part, _, _ in results):
        methods = list(dict.fromkeys(method for of, method, _ in results if of == part))
        seeds = sorted({seed for of, _, seed in results if of == part})
        columns = [c for c in COLUMNS[part] if any(_values(results, part, method, seeds, c.key) for method in methods)]
        lines = [f"### {part} (seeds 0 to {max(seeds)})", ""]
        lines.append("| method | " + " | ".join(column.words for column in columns) + " |")
        lines.append("|---" * (len(columns) + 1) + "|")
        for method in methods:
            cells = [_cell(_values(results, part, method, seeds, column.key), column) for column in columns]
            lines.append(f"| {METHODS[method].words} | " + " | ".join(cells) + " |")
        for base, others in PAIRS[part]:
            for method in others:
                cells = [
                    _cell(_difference(results, part, (method, base), seeds, column.key), column, sign=True)
                    for column in columns
                ]
                words = f"{METHODS[method].words} less {METHODS[base].words}, paired"
                lines.append(f"| *{words}* | " + " | ".join(cells) + " |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


@dataclass(frozen=True)
class Column:
    """A measure in a table; `scale` 100 writes percent."""

    key: str
    words: str
    scale: float = 1.0
    digits: int = 3


_COMMON = [
    Column("gradient_gap", "masking gap"),
    Column("gradient_deletion", "deletion"),
    Column("gradient_insertion", "insertion"),
    Column("correlation", "mean abs. correlation"),
    Column("rank", "effective rank (of 256; AIM and twin 64)", digits=1),
    Column("dead", "dead channels", digits=1),
    Column("gradient_total_variation", "TV"),
    Column("gradient_gini", "Gini"),
]
_GROUPS = [
    Column("testing_worst_group", "worst-group accuracy %", 100, 1),
    Column("testing_accuracy", "accuracy %", 100, 1),
]
COLUMNS = {
    "phantoms": [
        *_GROUPS,
        Column("gradient_pointing", "energy pointing, gradient %", 100, 1),
        Column("mask_pointing", "energy pointing, masks %", 100, 1),
        Column("chance_pointing", "chance %", 100, 1),
        *_COMMON,
    ],
    "patches": [*_GROUPS, *_COMMON],
}
PAIRS = {
    "phantoms": [("twin", ["aim-25", "aim-15"])],
    "patches": [("twin", ["aim-25", "aim-15"])],
}


def _values(
    results: dict[tuple[str, str, int], dict[str, Any]], part: str, method: str, seeds: list[int], key: str
) -> list[float]:
    values = [results[part, method, seed].get(key) for seed in seeds if (part, method, seed) in results]
    return [float(value) for value in values if value is not None]


def _difference(
    results: dict[tuple[str, str, int], dict[str, Any]], part: str, pair: tuple[str, str], seeds: list[int], key: str
) -> list[float]:
    pairs = [[results.get((part, method, seed), {}).get(key) for method in pair] for seed in seeds]
    return [float(first) - float(second) for first, second in pairs if first is not None and second is not None]


def _cell(values: list[float], column: Column, sign: bool = False) -> str:
    """Mean and standard error over seeds; a dash where a method has no such measure."""
    if not values:
        return "-"
    scaled = column.scale * np.array(values)
    mean = f"{scaled.mean():{'+' if sign else ''}.{column.digits}f}"
    return mean if len(scaled) < 2 else f"{mean} ± {scaled.std(ddof=1) / np.sqrt(len(scaled)):.{column.digits}f}"


def draw(results: dict[tuple[str, str, int], dict[str, Any]], folder: Path) -> None:
    """One figure, `finetune.png`: the worst groups."""
    if not results:
        return
    figure = Figure(figsize=(10, 3.4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    parts = list(dict.fromkeys(part for part, _, _ in results))
    for axes, part in zip(np.atleast_1d(figure.subplots(1, len(parts))), parts, strict=True):
        methods = list(dict.fromkeys(method for of, method, _ in results if of == part))
        seeds = sorted({seed for of, _, seed in results if of == part})
        axes.spines[["top", "right"]].set_visible(False)
        _draw_groups(axes, results, part, methods, seeds)
    with atomic_path(folder / "finetune.png") as temporary:
        figure.savefig(temporary)


def _draw_groups(axes: Axes, results: Any, part: str, methods: list[str], seeds: list[int]) -> None:
    for row, method in enumerate(methods):
        values = 100 * np.array(_values(results, part, method, seeds, "testing_worst_group"))
        axes.barh(row, values.mean(), color="#cccccc")
        axes.plot(values, np.full(len(values), row), "o", color="#333333", ms=4, mfc="none")
    axes.axvline(50, color="#999999", ls=":", lw=1)
    title = {"phantoms": "Phantoms, tint goes with the label", "patches": "PCam, stain cluster goes with the label"}
    axes.set(xlabel="worst-group accuracy % (a ring a seed)", xlim=(0, 100), title=title[part])
    axes.set_yticks(range(len(methods)), [METHODS[method].words for method in methods])
    axes.invert_yaxis()
