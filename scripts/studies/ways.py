"""Dense or tile by tile: does a slide's map say what the classifier says of its tiles, each shown alone?

Fields of lymph nodes with tumour masks (as in the study of maps), the additive map of one layer made both ways. Beside
it what `engine_for_slides` finds on validation patches alone, which is how the way is chosen when weights are made.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from studies import fields, maps
from studies.saliency_tables import interval

from medsd.files import sha256_of
from medsd.heatmap.engine import Engine, engine_for_slides, make_engine
from medsd.heatmap.maps import MapSettings
from medsd.networks.classifier import TileClassifier
from medsd.networks.weights import ModelCard
from medsd.slides.slide import open_slide
from medsd.slides.tissue import TissueMask

PARTS = ("camelyon",)
WAYS: tuple[Literal["dense", "tiled"], ...] = ("dense", "tiled")
LAYERS = {"resnet18d": "layer3", "lite0": "blocks.5", "densenet": "features.transition2"}
_ASKED_OF_CLASS = 24  # as when weights are made
VERSION = 1

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
    return {"version": VERSION, "weights": sha256_of(weights) if weights.is_file() else None}


def run_job(job: Job) -> tuple[Job, dict[str, Any]]:
    """Measures of the map either way."""
    torch.set_num_threads(1)
    field = next(one for one in fields.GROUPS[job.part](Path(job.data)) if one.name == job.field)
    classifier, card, engines, chosen = _engines(job.data, job.weights, job.network)
    found: dict[str, Any] = {"chosen": chosen, "ways": {}}
    with open_slide(maps.slide_of(Path(job.folder), job.part, field.name)) as slide:
        judged = maps.Judged(slide, field, classifier, card)
        everything = TissueMask(np.ones((1, 1), np.bool_), 2.0 * max(slide.dimensions))
        for way, engine in engines.items():
            made = engine.map(slide, everything)
            found["ways"][way] = judged.measures(judged.at_places(made.saliency), made.saliency)
            found["ways"][way]["probability_auc"] = judged.measures(
                judged.at_places(made.probability, linear=True), None
            )["auc"]
    return job, found


@lru_cache(maxsize=1)
def _engines(data: str, weights: str, network: str) -> tuple[TileClassifier, ModelCard, dict[str, Engine], str]:
    classifier, card = fields.load_subject(Path(weights))
    images, labels = fields.patches(Path(data), 1, fields.SUBJECTS[network].scale)
    settings = MapSettings(layer=LAYERS[network], smoothing="none")
    rest = card.tile_px, card.mpp, 1
    asked = torch.cat([images[labels == label][:_ASKED_OF_CLASS] for label in (0, 1)])
    chosen = engine_for_slides(make_engine(classifier, *rest, settings), asked).settings.way
    engines = {}
    for way in WAYS:
        engine = make_engine(classifier, *rest, replace(settings, way=way))
        normal, tumour = (images[labels == label].split(32) for label in (0, 1))
        engine.reference = engine.neutral(normal, tumour, "PatchCamelyon, validation patches")
        engines[way] = engine
    return classifier, card, engines, "dense" if chosen == "auto" else chosen


def tables(results: dict[tuple[str, str], dict[str, Any]]) -> str:
    """A row a network and way."""
    lines = [
        "| network | way | sign right, of tiles with abs. log-odds above 1 | sums apart from tiles | pixel AUC of the "
        "additive map | of the probability | chosen on patches |",
        "|---|---|---|---|---|---|---|",
    ]
    for network in dict.fromkeys(name for name, _ in results):
        found = [value for (name, _), value in results.items() if name == network]
        groups = np.arange(len(found))
        for way in WAYS:
            of_way = [one["ways"][way] for one in found]
            right, sure = (sum(one.get(kind, 0) for one in of_way) for kind in ("sign", "sure"))
            aucs = [interval(np.array([one[kind] for one in of_way]), groups, 3) for kind in ("auc", "probability_auc")]
            apart = np.mean([one["apart"] for one in of_way])
            lines.append(
                f"| {fields.SUBJECTS[network].words}, {LAYERS[network]} | {way} | {right / max(sure, 1):.1%} of "
                f"{sure:.0f} | {apart:.0%} | {aucs[0]} | {aucs[1]} | {'yes' if found[0]['chosen'] == way else ''} |"
            )
    return "\n".join(lines) + f"\n\n{len(results)} maps of fields; intervals over fields.\n"


def draw(results: dict[tuple[str, str], dict[str, Any]], folder: Path) -> None:
    """Nothing: the table says it."""
