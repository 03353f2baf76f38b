"""The dense engine against whole-image passes, explicit tiling and known places."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from medsd.errors import ConfigError, NetworkError
from medsd.heatmap.cascade import Inner
from medsd.heatmap.dense import DenseEngine
from medsd.heatmap.maps import MapSettings
from medsd.heatmap.partition import Rect
from medsd.heatmap.windows import window_mean
from medsd.networks.classifier import TileClassifier
from medsd.saliency.neutral import NeutralReference
from medsd.slides.tissue import TissueMask
from tests.heatmap.made_up import all_tissue, noise, trained_looking


@pytest.fixture(scope="module")
def classifier() -> TileClassifier:
    return trained_looking("test_resnet")


@pytest.mark.parametrize(
    ("encoder", "tile_px", "layer", "attribution", "smoothing"),
    [
        ("test_resnet", 96, "layer1", "gradient", "backward_hook"),
        ("test_resnet", 64, "layer2", "gradient", "none"),
        ("resnet10t", 96, "layer3", "gradient_x_activation", "backward_hook"),
        ("test_resnet", 288, "layer4", "gradient_x_activation", "backward_hook"),
        ("resnet18", 96, "layer2", "gradient", "backward_hook"),
    ],
)
def test_blocks_equal_one_piece(array_slide, encoder, tile_px, layer, attribution, smoothing):
    slide = array_slide(noise(600, 640))
    settings = MapSettings((attribution,), layer, smoothing, block_px=2048)
    engine = DenseEngine(trained_looking(encoder), tile_px, 1.0, settings=settings)
    whole = engine.map(slide, all_tissue(slide))
    engine.settings = replace(settings, block_px=320)
    parts = engine.map(slide, all_tissue(slide))
    assert whole.blocks == 1 and parts.blocks >= 4
    for one, many in ((whole.saliency, parts.saliency), (whole.probability, parts.probability)):
        assert np.isfinite(one.values).all() and np.isfinite(many.values).all()
        assert np.abs(one.values - many.values).max() <= 1e-5 * np.abs(one.values).max()


def test_a_halo_too_small_is_seen(classifier, array_slide, monkeypatch):
    """The equality above can fail: with a third of the halo it does."""
    slide = array_slide(noise(500, 600))
    engine = DenseEngine(classifier, 96, 1.0, settings=MapSettings(("gradient_x_activation",)))
    whole = engine.map(slide, all_tissue(slide)).saliency.values
    engine.settings = MapSettings(("gradient_x_activation",), block_px=256)
    monkeypatch.setattr(engine.cascade, "top", replace(engine.cascade.top, halo=0))
    cut = engine.map(slide, all_tissue(slide)).saliency.values
    assert np.abs(whole - cut).max() > 1e-3 * np.abs(whole).max()


def test_behind_a_block_less_of_the_map_is_computed(array_slide, monkeypatch):
    """As much as the layers behind it look at, no cell less; that the map stays the same is tested above."""
    slide, network = array_slide(noise(400, 420)), trained_looking("resnet18")
    engine = DenseEngine(network, 96, 1.0, settings=MapSettings(("gradient_x_activation",), block_px=2048))
    whole = engine.map(slide, all_tissue(slide)).saliency.values
    top = engine.cascade.top
    assert top.inner == (Inner("layer4.0", 2, 2),)  # two convolutions of 3 x 3
    # At the canvas's left edge there is no more.
    assert top.kept(Rect(10, 10, 14, 16), Rect(10, 6, 18, 20))["layer4.0"] == (slice(2, 12), slice(0, 6))
    sizes: set[torch.Size] = set()
    engine.settings = replace(engine.settings, block_px=160)
    handle = network.encoder.layer4[1].conv1.register_forward_hook(lambda _m, x, _o: sizes.add(x[0].shape))
    cut = engine.map(slide, all_tissue(slide)).saliency.values
    handle.remove()
    assert max(size[2] for size in sizes) < 5 + 2 * top.halo
    assert np.abs(whole - cut).max() <= 1e-5 * np.abs(whole).max()
    monkeypatch.setattr(engine.cascade, "top", replace(top, inner=(Inner("layer4.0", 1, 1),)))
    assert np.abs(whole - engine.map(slide, all_tissue(slide)).saliency.values).max() > 1e-3 * np.abs(whole).max()


@pytest.mark.parametrize("window", [1, 2, 3, 4])
def test_maps_are_means_over_every_tile_position(classifier, window):
    """Probability and gradient against windows placed one by one on the feature map."""
    images = torch.from_numpy(noise(256, 256)).permute(2, 0, 1)[None]
    engine = DenseEngine(classifier, 32 * window, 1.0, settings=MapSettings(("gradient",), "layer2", "none"))
    probability, saliency = engine.run(images)

    activations = []
    handle = classifier.encoder.layer2.register_forward_hook(lambda _m, _i, out: activations.append(out))
    features = classifier.feature_map(images)
    handle.remove()
    cells = features.shape[2]
    total, logits = torch.zeros(()), {}
    for top in range(1 - window, cells):
        for left in range(1 - window, cells):
            rows, columns = slice(max(0, top), top + window), slice(max(0, left), left + window)
            tile = features[:, :, rows, columns]
            logit = classifier.head(tile.sum((2, 3)) / window**2)  # a tile over the edge sees zeros there
            total = total + (logit[0, 1] - logit[0, 0]) / window**2
            logits[top, left] = classifier.head(tile.mean((2, 3)))[0].detach()
    (gradient,) = torch.autograd.grad(total, activations[0])
    expected = gradient.mean(1)[0].numpy()
    np.testing.assert_allclose(saliency[0], expected, atol=1e-6 * np.abs(expected).max(), rtol=1e-4)
    row, column = 4, 3
    if window % 2:
        placed = logits[row - window // 2, column - window // 2]
    else:
        placed = sum(logits[row - window // 2 + a, column - window // 2 + b] for a in (0, 1) for b in (0, 1)) / 4
    assert probability[0, row, column] == pytest.approx(float(placed.softmax(0)[1]), abs=1e-6)


def test_window_mean_of_a_constant_is_the_constant_also_at_borders():
    for window in (1, 2, 3, 4, 5):
        torch.testing.assert_close(window_mean(torch.full((2, 2, 7, 9), 3.0), window), torch.full((2, 2, 7, 9), 3.0))


@pytest.mark.parametrize(
    ("encoder", "layer", "tolerance"),
    [("resnet18", "layer2", 0.2), ("resnet18", "layer3", 0.1), ("resnet10t", "layer2", 0.3)],
)
def test_the_map_is_where_the_image_is(array_slide, encoder, layer, tolerance):
    """A lone spot raises the activation at its own map pixel: the centre of the response lies on it.

    Shortcuts that average 2 x 2 pixels (resnet10t) look to the right and below of what the rest of the cell sees.
    Tolerances in map pixels.
    """
    classifier = TileClassifier(encoder).eval()
    # Positive weights and open gates make a blurring network: the response is a blob around what each cell looks at.
    for module in classifier.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.weight.data = torch.ones_like(module.weight) / module.weight[0].numel()
        if isinstance(module, torch.nn.BatchNorm2d):
            module.weight.data = torch.ones_like(module.weight)
    flat = np.full((800, 800, 3), 200, np.uint8)
    classifier.head.weight.data[0] = 0
    with torch.no_grad():  # a logit near 1, so that the probability does not saturate
        classifier.head.weight.data[1] /= classifier(torch.from_numpy(flat).permute(2, 0, 1)[None])[0, 1]
    engine = DenseEngine(classifier, 32, 1.0, settings=MapSettings(("gradient_x_activation",), layer, smoothing="none"))
    background = engine.map(array_slide(flat), all_tissue(array_slide(flat)))
    for x, y in ((300, 420), (517, 333)):
        pixels = flat.copy()
        pixels[y - 4 : y + 4, x - 4 : x + 4] = 255
        maps = engine.map(array_slide(pixels), all_tissue(array_slide(pixels)))
        for spot, empty in ((maps.saliency, background.saliency), (maps.probability, background.probability)):
            response = np.abs(spot.values.astype(np.float64) - empty.values)
            rows, columns = np.indices(response.shape)
            for axis, centre in ((columns, x), (rows, y)):
                found = ((axis + 0.5) * spot.level0_px * response).sum() / response.sum()
                assert abs(found - centre) <= tolerance * spot.level0_px


def test_nothing_is_read_without_tissue(classifier, array_slide):
    slide = array_slide(noise(1024, 1024))
    mask = np.zeros((128, 128), bool)
    mask[:16, :16] = True
    engine = DenseEngine(classifier, 96, 1.0, settings=MapSettings(("gradient_x_activation",), block_px=256))
    maps = engine.map(slide, TissueMask(mask, 8.0))
    assert maps.blocks == 1
    assert maps.saliency.seen.sum() == 8 * 8 and maps.saliency.seen[:8, :8].all()
    # What cells and the windows around them look at, in whole cells, and those that a map pixel lies between.
    seen_px = engine.cascade.features.size / 2 + 64 + 32 * (engine.share > 0)
    assert maps.pixels_read <= (128 + 64 + 2 * seen_px) ** 2
    empty = engine.map(slide, TissueMask(np.zeros((128, 128), bool), 8.0))
    assert empty.blocks == 0 and not empty.probability.seen.any()


def test_maps_tell_their_place_and_scale(classifier, array_slide):
    slide = array_slide(noise(600, 500), mpp=0.5)
    maps = DenseEngine(classifier, 96, 1.0, settings=MapSettings(("gradient_x_activation",))).map(
        slide, all_tissue(slide)
    )
    assert maps.saliency.level0_px == 32 and maps.saliency.mpp == 16
    assert maps.probability.level0_px == 64 and maps.probability.mpp == 32
    assert maps.saliency.values.shape == (19, 16) and maps.probability.values.shape == (10, 8)
    seen = maps.probability.values[maps.probability.seen]
    assert len(seen) >= 70 and (seen >= 0).all() and (seen <= 1).all()


def test_hooks_are_gone_and_no_gradient_stays(classifier):
    engine = DenseEngine(classifier, 96, 1.0, settings=MapSettings(("gradient_x_activation",)))
    engine.run(torch.zeros(1, 3, 96, 96, dtype=torch.uint8))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in classifier.modules())
    assert all(p.grad is None and p.requires_grad for p in classifier.parameters())


def test_bad_requests_are_named(classifier):
    with pytest.raises(NetworkError, match="did you mean 'layer2'"):
        DenseEngine(classifier, 96, 1.0, settings=MapSettings(layer="layr2"))
    with pytest.raises(NetworkError, match="multiple"):
        DenseEngine(classifier, 90, 1.0)
    with pytest.raises(ConfigError, match="gradient"):
        MapSettings(("gradeint",))


def test_bad_methods_are_named(classifier, array_slide):
    for methods in ((), "deeplift", ("gradient", "gradient"), ["deeplift", "gradient", "deeplift"]):
        with pytest.raises(ConfigError, match="list of different names"):
            MapSettings(methods)
    with pytest.raises(ConfigError, match=r"'captum\.Saliency': explains images and no layer"):
        MapSettings(("captum.Saliency",))
    with pytest.raises(ConfigError, match="did you mean 'deeplift'"):
        MapSettings(("gradient", "deeplit"))
    slide = array_slide(noise(64, 64))
    vector = (0.0,) * 32
    others = (("layer3", vector, 0.0, 0.5, "plane"), ("layer2", vector, 0.0, 0.5, "tile"))
    for reference in (None, *(NeutralReference(*of, "noise") for of in others)):
        engine = DenseEngine(classifier, 96, 1.0, settings=MapSettings(layer="layer2"), reference=reference)
        with pytest.raises(
            ConfigError,
            match=r"no neutral reference at layer 'layer2' for maps that are dense; run the stage 'finetune'",
        ):
            engine.map(slide, all_tissue(slide))


def test_a_slide_of_the_models_own_scale_is_read_pixel_by_pixel(classifier, array_slide, monkeypatch):
    """Between pixels it would be blurred, and the classifier would see another image."""
    slide = array_slide(noise(256, 320))
    places = []
    read = slide.read_seen
    monkeypatch.setattr(
        slide, "read_seen", lambda x, y, *rest, **named: places.append((x, y)) or read(x, y, *rest, **named)
    )
    DenseEngine(classifier, 96, 1.0, settings=MapSettings(("gradient",))).map(slide, all_tissue(slide))
    assert places and all(float(place).is_integer() for corner in places for place in corner)
