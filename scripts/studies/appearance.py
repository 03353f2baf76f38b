"""Is the warning of odd looks worth anything? How often it comes, beside what changed looks cost the classifier.

`pcam`: frozen EfficientNet-Lite0 and a logistic regression on PatchCamelyon, clusters dealt six times; the range is
that of the validation clusters, and each test cluster is taken for a slide, as it is and with its looks changed. Deals
share clusters: one counts once for each deal that tests on it.
`others`: fields and slides of other scanners and organs beside the range of all of PatchCamelyon, and the other way.
"""

from __future__ import annotations

import argparse
import io
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from scipy.ndimage import gaussian_filter
from sklearn.linear_model import LogisticRegression
from studies.fields import imagenet_lite0
from studies.redealt import difference_of, ratio_of
from torch import Tensor

from medsd.cohort.patches import PatchTable, read_patch_table, split_groups
from medsd.evaluate.scores import auc
from medsd.heatmap.appearance import usual_appearance
from medsd.slides.slide import open_slide
from medsd.slides.stain.augment import RUIFROK, restain

PARTS = ("pcam", "others")
VERSION = 2
_SHARES, _DEALS = (0.15, 0.25), 6  # as configs/pcam.json
_SIDE_PX, _MPP = 96, 0.97
_LEAST = 8  # patches of a cluster


def _blurred(images: Tensor, sigma: float) -> Tensor:
    return torch.from_numpy(gaussian_filter(images.numpy().astype(np.float32), (0, 0, sigma, sigma)).round()).byte()


def _stained(images: Tensor, haematoxylin: float, eosin: float) -> Tensor:
    factors = torch.tensor([[haematoxylin, eosin]]).expand(len(images), 2)
    return restain(images, torch.tensor(RUIFROK), factors, torch.zeros(len(images), 2))


def _darker(images: Tensor, light: float) -> Tensor:
    return (images * light).round().byte()


def _enlarged(images: Tensor, times: int) -> Tensor:
    """As a slide whose scale is said wrong, or that is coarser than it should be."""
    side = images.shape[-1] // times
    start = (images.shape[-1] - side) // 2
    middle = images[..., start : start + side, start : start + side].float()
    return F.interpolate(middle, size=images.shape[2:], mode="bilinear").round().byte()


def _jpeg(images: Tensor, quality: int) -> Tensor:
    made = []
    for image in images.permute(0, 2, 3, 1).numpy():
        data = io.BytesIO()
        Image.fromarray(image).save(data, "JPEG", quality=quality)
        made.append(np.asarray(Image.open(data)))
    return torch.from_numpy(np.stack(made)).permute(0, 3, 1, 2)


CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "as it is": lambda images: images,
    "blurred, 0.5 px": partial(_blurred, sigma=0.5),
    "blurred, 1 px": partial(_blurred, sigma=1.0),
    "blurred, 2 px": partial(_blurred, sigma=2.0),
    "haematoxylin x 0.5": partial(_stained, haematoxylin=0.5, eosin=1.0),
    "haematoxylin x 2": partial(_stained, haematoxylin=2.0, eosin=1.0),
    "eosin x 0.5": partial(_stained, haematoxylin=1.0, eosin=0.5),
    "eosin x 3": partial(_stained, haematoxylin=1.0, eosin=3.0),
    "light x 0.6": partial(_darker, light=0.6),
    "twice as large": partial(_enlarged, times=2),
    "JPEG quality 30": partial(_jpeg, quality=30),
    "JPEG quality 10": partial(_jpeg, quality=10),
}


@dataclass(frozen=True)
class Job:
    """A deal of the clusters, or all sets beside each other."""

    part: str
    deal: int
    data: str

    @property
    def name(self) -> str:
        """Of its file."""
        return str(self.deal)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of this study alone."""
    parser.add_argument("data", type=Path, help="Holds pcam_patches, ebhi_seg and the like.")


def jobs_of(arguments: argparse.Namespace, _folder: Path) -> list[Job]:
    """Deals of the clusters, and one job of all sets."""
    deals = [Job("pcam", deal, str(arguments.data)) for deal in range(_DEALS)]
    return [job for job in (*deals, Job("others", 0, str(arguments.data))) if job.part in arguments.part]


def prepare(_arguments: argparse.Namespace, _folder: Path) -> None:
    """Nothing is."""


def key_of(job: Job) -> tuple[str, int]:
    """What the tables find a job's results by."""
    return job.part, job.deal


def dealt(job: Job) -> dict[str, float]:
    """See `studies.redealt.RATIOS`."""
    if job.part != "pcam":
        return {}
    training, _, test = split_groups(
        read_patch_table(Path(job.data, "pcam_patches"), "stain_cluster"), _SHARES, job.deal
    )
    return {"testing": float(test.sum() / training.sum())}


def recipe_of(_job: Job) -> dict[str, Any]:
    """What the results of a job depend on."""
    return {"version": VERSION, "changes": list(CHANGES)}


def run_job(job: Job) -> tuple[Job, dict[str, Any]]:
    """Warnings, and what the classifier is worth."""
    return job, (_deal if job.part == "pcam" else _others)(Path(job.data), job.deal)


@lru_cache(maxsize=1)
def _patches(data: Path) -> tuple[PatchTable, Tensor]:
    table = read_patch_table(data / "pcam_patches", "stain_cluster")
    return table, torch.from_numpy(np.stack([table.pixels(row) for row in range(len(table.paths))])).permute(0, 3, 1, 2)


def _deal(data: Path, seed: int) -> dict[str, Any]:
    table, images = _patches(data)
    training, validation, test = split_groups(table, _SHARES, seed)
    usual = usual_appearance(images[validation])
    assert usual is not None
    labels = np.asarray(table.label)
    network = imagenet_lite0(data)
    learnt = _features(network, images[training])
    middle, width = learnt.mean(axis=0), learnt.std(axis=0) + 1e-6
    head = LogisticRegression(C=1e-3, max_iter=2000).fit((learnt - middle) / width, labels[training])
    found: dict[str, Any] = {}
    for name, change in CHANGES.items():
        changed = change(images[test])
        scores = head.decision_function((_features(network, changed) - middle) / width)
        clusters = {}
        for cluster in np.unique(table.group[test]):
            own = table.group[test] == cluster
            check = usual.compare(changed[own])
            if check is not None and own.sum() >= _LEAST:
                clusters[str(cluster)] = {"odd": check.odd, "auc": _auc(labels[test][own], scores[own])}
        found[name] = {"auc": _auc(labels[test], scores), "clusters": clusters}
    return found


def _auc(labels: npt.NDArray[Any], scores: npt.NDArray[np.float64]) -> float | None:
    return auc(labels, scores) if len(np.unique(labels)) > 1 else None


def _features(network: Any, images: Tensor) -> npt.NDArray[np.float32]:
    parts = []
    with torch.no_grad():
        for some in images.split(64):
            x = (some.float() / 255 - 0.5) / 0.5
            parts.append(network.forward_head(network.forward_features(x), pre_logits=True).numpy())
    return np.concatenate(parts)


def _others(data: Path, _deal: int) -> dict[str, Any]:
    sets = {"lymph node, PatchCamelyon": list(_patches(data)[1])}
    for words, folder, mpp in (
        ("lymph node, CAMELYON17, {}", "camelyon17_five_centres/*.jpeg", 0.25),
        ("lymph node, {}", "camelyon_tiles_tumour_masks/images/*.jpg", _MPP),
        ("breast, BCSS {}", "bcss_tumour_regions/images/*.jpg", 0.25),
        ("skin, {}", "wsi/CMU-1-Small-Region.svs", None),
    ):
        for path in sorted(data.glob(folder))[:5]:
            sets[words.format(path.stem)] = _tiles(path, mpp)
    biopsies = sorted((data / "ebhi_seg" / "images").glob("*/*.webp"))
    sets["colon biopsies, EBHI-Seg"] = [
        _small(torch.from_numpy(np.asarray(Image.open(path).convert("RGB")).copy()).permute(2, 0, 1))
        for path in biopsies[::3]
    ]
    found: dict[str, Any] = {}
    for reference in ("lymph node, PatchCamelyon", "colon biopsies, EBHI-Seg"):
        usual = usual_appearance(sets[reference])
        assert usual is not None
        found[reference] = {}
        for name, tiles in sets.items():
            if name != reference and (check := usual.compare(torch.stack(tiles))) is not None:
                found[reference][name] = {"tiles": check.tiles, "odd": check.odd}
    return found


def _small(image: Tensor) -> Tensor:
    """Half as large, as the recipe of EBHI-Seg takes them, and its middle."""
    half = F.avg_pool2d(image[None].float(), 2)[0].round().byte()
    top, left = ((side - _SIDE_PX) // 2 for side in half.shape[1:])
    return half[:, top : top + _SIDE_PX, left : left + _SIDE_PX]


def _tiles(path: Path, mpp: float | None) -> list[Tensor]:
    with open_slide(path, mpp=mpp) as slide:
        width, height = (int(side * slide.mpp / _MPP) for side in slide.dimensions)
        pixels = torch.from_numpy(slide.read(0, 0, width, height, mpp=_MPP)).permute(2, 0, 1)
    tiles = pixels.unfold(1, _SIDE_PX, _SIDE_PX).unfold(2, _SIDE_PX, _SIDE_PX)
    return list(tiles.permute(1, 2, 0, 3, 4).flatten(0, 1))


def tables(results: dict[tuple[str, int], dict[str, Any]]) -> str:
    """Warnings by change, then by set."""
    lines: list[str] = []
    deals = [scores for (part, _), scores in results.items() if part == "pcam"]
    if deals:
        lines += ["| test clusters, as dealt | AUC | change | warned of |", "|---" * 4 + "|"]
        for name in CHANGES:
            clusters = [one for deal in deals for one in deal[name]["clusters"].values()]
            lost = np.array([deal[name]["auc"] - deal["as it is"]["auc"] for deal in deals])
            mean = np.mean([deal[name]["auc"] for deal in deals])
            lines.append(
                f"| {name} | {mean:.3f} | {difference_of(lost, 3, ratio_of(deals))} | "
                f"{sum(bool(one['odd']) for one in clusters)} of {len(clusters)} |"
            )
        numbers = [set(deal["as it is"]["clusters"]) for deal in deals]
        lines += [
            "",
            f"{sum(map(len, numbers))} clusters in {len(deals)} deals, {len(set().union(*numbers))} different.",
        ]
        same = [one for deal in deals for one in deal["as it is"]["clusters"].values() if one["auc"] is not None]
        for word, odd in (("warned of", True), ("not warned of", False)):
            values = [one["auc"] for one in same if bool(one["odd"]) == odd]
            if values:
                lines.append(f"\nClusters as they are, {word}: {len(values)}, mean AUC {np.mean(values):.3f}")
    for (part, _), scores in results.items():
        if part == "others":
            lines += ["", "| range of | beside it | tiles | warning |", "|---" * 4 + "|"]
            lines += [
                f"| {reference} | {name} | {one['tiles']} | {', '.join(one['odd']) or 'none'} |"
                for reference, rows in scores.items()
                for name, one in rows.items()
            ]
    return "\n".join(lines) + "\n"


def draw(_results: dict[tuple[str, int], dict[str, Any]], _folder: Path) -> None:
    """No figure."""
