"""Dense or tile by tile: does a slide's map say what the classifier says of its tiles, each shown alone?

Fields of lymph nodes with tumour masks (as in the study of maps), the additive map of one layer made both ways, and
tile by tile with test-time augmentation, whose tiles alone are augmented, too. Beside it what `engine_for_slides` finds
on validation patches alone, which is how the way is chosen when weights are made.
"""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from studies import fields, maps
from studies.saliency_tables import interval

from medsd.files import sha256_of
from medsd.heatmap.additive import blurred
from medsd.heatmap.engine import Engine, engine_for_slides, make_engine
from medsd.heatmap.maps import MapSettings
from medsd.networks.weights import ModelCard
from medsd.slides.slide import open_slide
from medsd.slides.tissue import TissueMask

PARTS = ("camelyon",)
WAYS: dict[str, tuple[Literal["dense", "tiled"], bool]] = {
    "dense": ("dense", False),
    "tiled": ("tiled", False),
    "tiled, test-time augmentation": ("tiled", True),
}
"""Ways by their words, and whether answers are means over the square's symmetries."""
MEASURES = {"auc": "additive map", "after_auc": "additive map with its Gaussian", "probability_auc": "probability"}
LAYERS = {"resnet18d": "layer3", "lite0": "blocks.5", "densenet": "features.transition2"}
_ASKED_OF_CLASS = 24  # as when weights are made
VERSION = 2

add_arguments, prepare = maps.add_arguments, maps.prepare


@dataclass(frozen=True)
class Job(maps.Job):
    """One field, and one network."""


def jobs_of(arguments: argparse.Namespace, folder: Path) -> list[Job]:
    """Every field for the networks asked for."""
    return [Job(**vars(job)) for job in maps.jobs_of(arguments, folder)]


def key_of(job: Job) -> tuple[str, str]:
    """What the tables find a job's results by."""
    return job.network, job.field


def recipe_of(job: Job) -> dict[str, Any]:
    """What the results of a job depend on."""
    weights = Path(job.weights)
    return {
        "version": VERSION,
        "layer": LAYERS[job.network],
        "after_um": maps.AFTER_UM,
        "weights": sha256_of(weights) if weights.is_file() else None,
    }


def run_job(job: Job) -> tuple[Job, dict[str, Any]]:
    """Measures of the map either way."""
    torch.set_num_threads(1)
    field = next(one for one in fields.GROUPS[job.part](Path(job.data)) if one.name == job.field)
    card, engines, chosen = _engines(job.data, job.weights, job.network)
    found: dict[str, Any] = {"chosen": chosen, "ways": {}}
    with open_slide(maps.slide_of(Path(job.folder), job.part, field.name)) as slide:
        everything = TissueMask(np.ones((1, 1), np.bool_), 2.0 * max(slide.dimensions))
        for way, engine in engines.items():
            judged = maps.Judged(slide, field, engine.classifier, card)
            made = engine.map(slide, everything)
            exact = made.saliency
            smoothed = replace(exact, values=blurred(exact.values, maps.AFTER_UM / exact.mpp))
            after, probability = judged.at_places(smoothed), judged.at_places(made.probability, linear=True)
            found["ways"][way] = judged.measures(judged.at_places(exact), exact) | {
                "after_auc": judged.measures(after, None)["auc"],
                "probability_auc": judged.measures(probability, None)["auc"],
            }
    return job, found


@lru_cache(maxsize=1)
def _engines(data: str, weights: str, network: str) -> tuple[ModelCard, dict[str, Engine], str]:
    classifier, card = fields.load_subject(Path(weights))
    images, labels = fields.patches(Path(data), 1, fields.SUBJECTS[network].scale)
    settings = MapSettings(layer=LAYERS[network], smoothing="none")
    rest = card.tile_px, card.mpp, 1
    asked = torch.cat([images[labels == label][:_ASKED_OF_CLASS] for label in (0, 1)])
    chosen = engine_for_slides(make_engine(classifier, *rest, settings), asked).settings.way
    engines = {}
    for words, (way, augmented) in WAYS.items():
        classifier = copy.copy(classifier)
        classifier.augment_at_test_time(augmented)
        engine = make_engine(classifier, *rest, replace(settings, way=way))
        normal, tumour = (images[labels == label].split(32) for label in (0, 1))
        engine.reference = engine.neutral(normal, tumour, "PatchCamelyon, validation patches")
        engines[words] = engine
    return card, engines, "dense" if chosen == "auto" else chosen


def tables(results: dict[tuple[str, str], dict[str, Any]]) -> str:
    """A row a network and way, and what augmentation adds on the same fields."""
    lines = [
        "| network | way | sign right, of tiles with abs. log-odds above 1 | sums apart from tiles | "
        + "".join(f"pixel AUC, {words} | " for words in MEASURES.values())
        + "chosen on patches |",
        "|---" * (5 + len(MEASURES)) + "|",
    ]
    for network in dict.fromkeys(name for name, _ in results):
        found = [value for (name, _), value in results.items() if name == network]
        groups = np.arange(len(found))
        for way in WAYS:
            of_way = [one["ways"][way] for one in found]
            right, sure = (sum(one.get(kind, 0) for one in of_way) for kind in ("sign", "sure"))
            aucs = [interval(np.array([one[kind] for one in of_way]), groups, 3) for kind in MEASURES]
            apart = np.mean([one["apart"] for one in of_way])
            lines.append(
                f"| {fields.SUBJECTS[network].words}, {LAYERS[network]} | {way} | {right / max(sure, 1):.1%} of "
                f"{sure:.0f} | {apart:.0%} | {' | '.join(aucs)} | {'yes' if found[0]['chosen'] == way else ''} |"
            )
        _, before, after = WAYS
        gains = {
            kind: np.array([one["ways"][after][kind] - one["ways"][before][kind] for one in found]) for kind in MEASURES
        }
        cells = [f"{interval(gain, groups, 3, sign='+')}, above 0 in {(gain > 0).sum()}" for gain in gains.values()]
        lines.append(f"| | *augmented less tiled* | | | {' | '.join(cells)} | |")
    return "\n".join(lines) + f"\n\n{len(results)} maps of fields; intervals over fields.\n"


def draw(results: dict[tuple[str, str], dict[str, Any]], folder: Path) -> None:
    """Nothing: the table says it."""
