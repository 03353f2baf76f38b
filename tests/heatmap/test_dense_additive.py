"""Dense maps that add up: to the log-odds of every tile, whatever the blocks, from a reference between the classes."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import spearmanr

from medsd.errors import NetworkError
from medsd.heatmap.additive import blurred, change_of_sums
from medsd.heatmap.dense import DenseEngine
from medsd.heatmap.grid import MapGrid
from medsd.heatmap.maps import Assembled, MapSettings
from medsd.networks.classifier import TileClassifier
from medsd.saliency.neutral import NeutralReference
from medsd.slides.tissue import TissueMask
from tests.heatmap.made_up import all_tissue, noise, trained_looking

OFFSET = (0.7, -0.4, 0.2)


def additive(classifier: TileClassifier, window: int, layer: str, smoothing: str = "none", **settings) -> DenseEngine:
    """With the mean of noise as the reference: sums are exact against any, and for any prevalence."""
    engine = DenseEngine(
        classifier,
        32 * window,
        1.0,
        settings=MapSettings(("deeplift",), layer, smoothing, **settings),
        temperature=2.0,
        offset=OFFSET[: len(classifier.classes)],
    )
    with torch.no_grad():
        hidden = engine.cascade.whole(torch.from_numpy(noise(96, 96, seed=9)).permute(2, 0, 1)[None])
    vector = tuple(hidden.mean(dim=(0, 2, 3)).tolist())
    engine.reference = NeutralReference(layer, vector, 0.0, 0.5, "plane", "noise")
    return engine


def log_odds(logits: torch.Tensor, temperature: float, offset: tuple[float, ...] = OFFSET) -> torch.Tensor:
    """Of class 1 against the mean of the others (B, ...), of logits (B, K, ...)."""
    others = [number for number in range(logits.shape[1]) if number != 1]
    added = offset[1] - np.mean([offset[number] for number in others])
    return (logits[:, 1] - logits[:, others].mean(dim=1)).detach().double() / temperature + added


def cell_evidence(engine: DenseEngine, slide) -> torch.Tensor:
    """Of each probability pixel's place between cells (h, w), from one pass over the slide in one piece."""
    grids = [MapGrid.over(slide, 1.0, stride) for stride in engine.strides]
    width, height = engine._plan(grids, all_tissue(slide)).size
    pixels = slide.read(engine.origin_px, engine.origin_px, width * 32, height * 32)
    features = engine.classifier.feature_map(torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None])
    logits = engine.classifier.head(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    evidence, share = log_odds(logits, engine.temperature)[0], engine.share
    first, (rows, columns) = -engine._shift, grids[0].shape
    corners = [(0, 0, (1 - share) ** 2), (1, 0, share * (1 - share)), (0, 1, share * (1 - share)), (1, 1, share**2)]
    return sum(
        weight * evidence[first - up : first - up + rows, first - left : first - left + columns]
        for up, left, weight in corners
    )


@pytest.mark.parametrize(
    ("encoder", "layer", "window", "smoothing", "classes"),
    [
        ("test_resnet", "layer2", 3, "backward_hook", 2),
        ("test_resnet", "layer4", 2, "none", 3),
        ("resnet10t", "layer3", 3, "none", 2),
        ("resnet18", "layer2", 2, "backward_hook", 2),
        ("resnet18", "layer3", 3, "none", 2),
        ("convnext_atto", "stages.2", 3, "backward_hook", 3),
        ("efficientnet_lite0", "blocks.2", 2, "backward_hook", 2),
    ],
)
def test_deeplift_sums_to_the_log_odds_of_every_tile(array_slide, encoder, layer, window, smoothing, classes):
    classifier = trained_looking(encoder, ("normal", "tumour", "other")[:classes])
    images = torch.from_numpy(np.stack([noise(32 * window, 32 * window, seed) for seed in (5, 6)])).permute(0, 3, 1, 2)
    with torch.no_grad():  # probabilities that can be turned back
        classifier.head.bias -= classifier(images).mean(dim=0) + torch.tensor([0.2, -0.3, 0.1])[:classes]
        expected = log_odds(classifier(images), 2.0)
    engine = additive(classifier, window, layer, smoothing)
    _, maps = engine.run(images)
    found, size = maps.sum(axis=(1, 2), dtype=np.float64), np.abs(maps).sum(axis=(1, 2))
    assert (np.abs(found - expected.numpy()) <= 1e-4 * size).all()

    slide = array_slide(noise(256, 288))
    maps = engine.map(slide, all_tissue(slide))
    values = torch.from_numpy(maps.saliency.values).double()
    assert values.isfinite().all() and values.std() > 0 and 0 < maps.moved < 100
    side = engine.strides[0] // engine.strides[1]
    squares, sizes = (F.avg_pool2d(part[None], side)[0] * side**2 for part in (values, values.abs()))
    cells = cell_evidence(engine, slide) / window**2
    rounding = 1e-5 * cells.abs().max()  # the pass in one piece sums in another layout; a cell may be next to 0
    assert ((squares - cells).abs() <= 1e-4 * sizes + rounding).all()
    if classes == 2:
        taps = torch.tensor({1: [1.0], 2: [0.5, 1, 0.5], 3: [1.0, 1, 1]}[window], dtype=torch.float64)
        kernel, rim = torch.outer(taps, taps)[None, None], len(taps) // 2
        sums, sizes = (F.conv2d(part[None, None], kernel)[0, 0] for part in (squares, sizes))
        wanted = torch.from_numpy(maps.probability.values).double().logit()[rim:-rim, rim:-rim]
        assert wanted.abs().max() < 6
        # A probability in float32 holds its log-odds to about 1e-5 here.
        assert ((sums - wanted).abs() <= 1e-4 * sizes + 3e-5).all()


@pytest.fixture(scope="module", params=["layer2", "layer3"])
def adding(request) -> DenseEngine:
    """At `layer3` a probability lies between cells."""
    engine = additive(trained_looking("test_resnet"), 3, request.param, "backward_hook")
    assert (engine.share > 0) == (request.param == "layer3")
    return engine


def tissue_of(shape: str) -> TissueMask:
    mask = np.zeros((60, 68), bool)
    if shape == "islands":
        mask[2:17, 3:20] = mask[37:55, 45:64] = True
    elif shape == "ring":
        mask[8:52, 9:58] = True
        mask[20:37, 21:44] = False
    else:
        mask[:] = True
    return TissueMask(mask, 8.0)


@pytest.mark.parametrize("shape", ["islands", "ring", "all"])
def test_another_grid_of_blocks_changes_nothing(adding, array_slide, shape):
    slide = array_slide(noise(480, 544))
    found = []
    for block_px in (2048, None, 320, 224):
        adding.settings = replace(adding.settings, block_px=block_px)
        found.append(adding.map(slide, tissue_of(shape)))
    whole = found[0].saliency.values
    assert max(maps.blocks for maps in found) > 1
    assert np.isfinite(whole).all() if shape == "all" else 0.05 < np.isfinite(whole).mean() < 0.9
    for maps in found[1:]:
        np.testing.assert_allclose(maps.saliency.values, whole, rtol=0, atol=1e-5 * np.nanmax(np.abs(whole)))
        one = found[0].probability.values
        np.testing.assert_allclose(maps.probability.values, one, rtol=0, atol=1e-6)


def test_a_finished_map_is_smoothed_in_micrometres_and_what_tiles_lose_is_told(adding, array_slide, monkeypatch):
    slide, rng = array_slide(np.zeros((192, 288, 3), np.uint8)), np.random.default_rng(0)
    coarse, fine = (MapGrid.over(slide, adding.mpp, stride) for stride in adding.strides)
    probability, exact = (rng.normal(size=grid.shape).astype(np.float32) for grid in (coarse, fine))
    made = Assembled(probability, {"deeplift": exact}, np.zeros((0, 2), np.int32), 1, 1)
    for um in (0.0, 24.0):
        monkeypatch.setattr(adding, "settings", replace(adding.settings, smooth_um=um))
        maps = adding._finished(slide, all_tissue(slide), made)
        smoothed = blurred(exact, um / (fine.stride * adding.mpp))
        np.testing.assert_allclose(maps.saliency.values, smoothed)
        assert maps.missed == pytest.approx(change_of_sums(exact, smoothed, adding.tile_px // fine.stride))


def test_random_weights_destroy_the_map(adding, array_slide):
    slide = array_slide(noise(480, 544))
    others = [trained_looking("test_resnet", seed=seed) for seed in (1, 2)]
    engines = [adding, *(additive(other, 3, adding.settings.layer, "backward_hook") for other in others)]
    first, *rest = (engine.map(slide, all_tissue(slide)).saliency.values.ravel() for engine in engines)
    assert all(abs(spearmanr(first, other).statistic) < 0.3 for other in rest)


def test_the_neutral_reference_lies_between_the_classes():
    """At the last layer the evidence of a uniform map is linear, so its zero is known."""
    classifier = trained_looking("test_resnet")
    rng = np.random.default_rng(4)
    groups = [
        torch.from_numpy(np.clip(rng.normal(level, 40, (3, 3, 96, 96)), 0, 255).astype(np.uint8)) for level in (70, 180)
    ]
    with torch.no_grad():
        low, high = (log_odds(classifier(tiles), 2.0, (0.0, 0.6)).mean() for tiles in groups)
        classifier.head.bias[1] -= 2.0 * float(0.75 * low + 0.25 * high)
    settings = MapSettings(("deeplift",), "layer4", "none")
    engine = DenseEngine(classifier, 96, 1.0, settings=settings, temperature=2.0, offset=(0.0, 0.6))
    reference = engine.neutral(groups[0].split(2), [groups[1]], "noise")
    assert reference.position == pytest.approx(0.25, abs=1e-3)
    assert abs(reference.log_odds) < 1e-4 * abs(float(high - low))
    assert (reference.layer, reference.extent, reference.source) == ("layer4", "plane", "noise")
    with torch.no_grad():
        classifier.head.weight.zero_()
    with pytest.raises(NetworkError, match="and not 0 near that line"):
        engine.neutral([groups[0]], [groups[1]], "noise")
