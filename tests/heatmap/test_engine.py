"""Each method of a slide goes its best way, and all share a grid."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.models import resnet18

from medsd.errors import ChannelsCancelError, NetworkError
from medsd.heatmap import cascade
from medsd.heatmap.dense import DenseEngine
from medsd.heatmap.engine import engine_for_slides, make_engine
from medsd.heatmap.maps import MapSettings
from medsd.heatmap.tiled import TiledEngine
from medsd.networks.classifier import TileClassifier
from medsd.networks.start import load_encoder
from medsd.saliency.neutral import NeutralReference
from medsd.slides.tissue import TissueMask

METHODS = ("gradcam", "deeplift", "tsm", "captum.LayerGradientXActivation")


@pytest.fixture(scope="module")
def classifier() -> TileClassifier:
    torch.manual_seed(0)
    return TileClassifier("test_resnet").eval()


@pytest.fixture(scope="module")
def reference(classifier) -> NeutralReference:
    channels = classifier.encoder.feature_info[-3]["num_chs"]
    vector = torch.rand(channels, generator=torch.Generator().manual_seed(1))
    return NeutralReference("layer2", tuple(vector.tolist()), 0.0, 0.5, "plane", "noise")


def test_methods_of_either_way_stand_side_by_side_as_they_are_alone(classifier, reference, array_slide):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 264, 3), dtype=np.uint8)
    slide, tissue = array_slide(pixels), TissueMask(np.ones((1, 1), bool), 512.0)
    engine = make_engine(classifier, 64, 1.0, settings=MapSettings(METHODS, "layer2"), reference=reference)
    maps = engine.map(slide, tissue)
    assert tuple(maps.explanations) == METHODS and maps.seam is None
    assert len({(shown.values.shape, shown.level0_px, shown.mpp) for shown in maps.explanations.values()}) == 1
    whole = DenseEngine(
        classifier, 64, 1.0, settings=MapSettings(("deeplift", "tsm"), "layer2"), reference=reference
    ).map(slide, tissue)
    tiles = TiledEngine(classifier, 64, 1.0, settings=MapSettings((METHODS[0], METHODS[3]), "layer2")).map(
        slide, tissue
    )
    for alone, words in ((whole, "dense"), (tiles, "tiled")):
        for name, shown in alone.explanations.items():
            np.testing.assert_array_equal(maps.explanations[name].values, shown.values)
            assert (name == "tsm") or words in maps.explanations[name].method
    np.testing.assert_array_equal(maps.probability.values, whole.probability.values)
    assert maps.blocks == whole.blocks + tiles.blocks and maps.pixels_read == whole.pixels_read + tiles.pixels_read
    assert maps.moved == whole.moved


def test_a_gpu_has_the_cpus_maps(gpu, classifier, reference, array_slide):
    """Dense and tile by tile."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 264, 3), dtype=np.uint8)
    slide, tissue = array_slide(pixels), TissueMask(np.ones((1, 1), bool), 512.0)
    settings = MapSettings(METHODS, "layer2", smoothing="backward_hook")
    on_cpu, on_gpu = (
        make_engine(network, 64, 1.0, settings=settings, reference=reference).map(slide, tissue)
        for network in (classifier, deepcopy(classifier).to(gpu))
    )
    np.testing.assert_array_equal(on_gpu.probability.values, on_cpu.probability.values)
    for name, shown in on_cpu.explanations.items():
        np.testing.assert_array_equal(on_gpu.explanations[name].values, shown.values)


@pytest.mark.parametrize("methods", [("gradcam",), ("gradcam", "smoothgrad"), ("gradcam", "gradient"), ("tsm",)])
def test_the_probability_is_the_same_whatever_shows_it(classifier, array_slide, methods):
    """Thresholds hold for one; whole-tile methods alone once took the tiles' own."""
    pixels = np.random.default_rng(0).integers(0, 256, (200, 264, 3), dtype=np.uint8)
    slide, tissue = array_slide(pixels), TissueMask(np.ones((1, 1), bool), 512.0)
    found, usual = (
        make_engine(classifier, 64, 1.0, settings=MapSettings(names, "layer2")).map(slide, tissue)
        for names in (methods, ("gradient",))
    )
    assert tuple(found.explanations) == methods
    np.testing.assert_array_equal(found.probability.values, usual.probability.values)
    tiles = TiledEngine(classifier, 64, 1.0, settings=MapSettings(("gradient",), "layer2")).map(slide, tissue)
    assert np.nanmax(np.abs(tiles.probability.values - usual.probability.values)) > 1e-3  # so that it can fail


@pytest.mark.parametrize("methods", [("tsm", "deeplift", "gradcam"), ("eigencam",)])
def test_label_free_maps_of_a_network_that_goes_by_tiles_are_the_dense_ones(
    classifier, reference, array_slide, methods
):
    pixels = np.random.default_rng(0).integers(0, 256, (200, 264, 3), dtype=np.uint8)
    slide, tissue = array_slide(pixels), TissueMask(np.ones((1, 1), bool), 512.0)
    of_tiles, free = ("deeplift", "gradcam"), methods[0]
    reference = replace(reference, extent="tile")
    maps = make_engine(
        classifier, 64, 1.0, settings=MapSettings(methods, "layer2", way="tiled"), reference=reference
    ).map(slide, tissue)
    assert tuple(maps.explanations) == methods
    assert len({(shown.values.shape, shown.level0_px, shown.mpp) for shown in maps.explanations.values()}) == 1
    whole = DenseEngine(classifier, 64, 1.0, settings=MapSettings((free,), "layer2")).map(slide, tissue)
    tiles = TiledEngine(classifier, 64, 1.0, settings=MapSettings(of_tiles, "layer2"), reference=reference).map(
        slide, tissue
    )
    np.testing.assert_array_equal(maps.explanations[free].values, whole.explanations[free].values)
    for name in methods[1:]:
        np.testing.assert_array_equal(maps.explanations[name].values, tiles.explanations[name].values)
    np.testing.assert_array_equal(maps.probability.values, tiles.probability.values)
    assert maps.moved == (tiles.moved if "deeplift" in methods else None) and maps.seam is None


def test_tiles_and_references_are_asked_of_the_way_that_a_method_goes(classifier, reference):
    settings = MapSettings(METHODS, "layer2")
    engine = make_engine(classifier, 64, 1.0, settings=settings)
    tiles = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    engine.reference = reference  # as calibration gives it, after the engine was made
    for name, kind in (("gradcam", TiledEngine), ("deeplift", DenseEngine)):
        alone = kind(classifier, 64, 1.0, settings=MapSettings((name,), "layer2"), reference=reference)
        np.testing.assert_array_equal(engine.patch_saliency(tiles, name), alone.patch_saliency(tiles, name))


def test_a_network_without_dense_maps_goes_by_tiles_with_all_its_methods():
    engine = make_engine(
        TileClassifier("test_efficientnet"), 64, 1.0, settings=MapSettings(("gradient", "gradcam"), "blocks.1")
    )
    assert isinstance(engine, TiledEngine)


def test_a_network_of_others_is_refused_with_the_way_to_its_weights(tmp_path):
    others = resnet18()
    with pytest.raises(
        NetworkError, match=r"^ResNet: slides are mapped by medsd's classifiers; .*load_encoder"
    ) as error:
        make_engine(others, 64, 1.0)
    assert "\n" not in str(error.value)
    torch.save(others.state_dict(), tmp_path / "others.pt")
    ours = TileClassifier("resnet18")
    load_encoder(ours.encoder, tmp_path / "others.pt")
    assert torch.equal(ours.encoder.layer4[1].conv2.weight, others.layer4[1].conv2.weight)


def test_tiles_with_their_surroundings_are_the_middle_of_a_larger_image(classifier):
    engine = make_engine(classifier, 64, 1.0, 1, MapSettings(("gradient",), "layer2", way="dense"))
    images = torch.randint(0, 256, (2, 3, 192, 192), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = classifier.feature_map(classifier.normalise(images))
        first = engine.window
        pooled = features[:, :, first : 2 * first, first : 2 * first].mean(dim=(2, 3))
        wanted = engine.evidence(classifier.head(pooled))
    torch.testing.assert_close(engine.with_surroundings(images), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("share", [1.0, 0.97, 0.5])
def test_a_network_that_surroundings_turn_round_is_mapped_tile_by_tile(classifier, monkeypatch, caplog, share):
    settings = MapSettings(("gradient",), "layer2")
    images = torch.randint(0, 256, (40, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    offset = (-3.0, 3.0)  # sure of every tile
    engine = make_engine(classifier, 64, 1.0, 1, settings, offset=offset)
    answers = iter([1.0] * round(40 * share) + [-1.0] * (40 - round(40 * share)))
    monkeypatch.setattr(DenseEngine, "with_surroundings", lambda self, mosaic: torch.tensor([next(answers)]))
    found = engine_for_slides(engine, images)
    if share > 0.95:
        assert found is engine and not caplog.text
    else:
        assert isinstance(found, TiledEngine) and found.settings.way == "tiled" and found.offset == offset
        assert "20 of 40 tiles that the network is sure of are answered the other way" in caplog.text
    chosen = make_engine(classifier, 64, 1.0, 1, MapSettings(("gradient",), "layer2", way="dense"), offset=offset)
    assert engine_for_slides(chosen, images) is chosen  # who says a way gets it


def test_a_network_that_is_sure_of_nothing_keeps_its_way(classifier):
    engine = make_engine(classifier, 64, 1.0, 1, MapSettings(("gradient",), "layer2"), 1e6)
    assert engine_for_slides(engine, torch.zeros((20, 3, 64, 64), dtype=torch.uint8)) is engine


@pytest.mark.parametrize(("room", "way"), [(3.0, "tiled"), (5.0, "auto")])
def test_a_layer_whose_blocks_cost_more_than_tiles_is_mapped_tile_by_tile(classifier, monkeypatch, caplog, room, way):
    caplog.set_level("INFO")
    settings = MapSettings(("gradient",), "layer2")
    engine = make_engine(classifier, 64, 1.0, 1, settings, 1e6)
    top = engine.cascade.top
    assert top.halo > 0
    # Squares of so many halos: of 3 a third of each side is wanted, so that every cell is computed 9 times; of 5, 2.8.
    monkeypatch.setattr(cascade, "_CPU_BYTES", (room * top.halo) ** 2 * top.cell_bytes * 1.001)
    assert top.cost(torch.device("cpu")) == pytest.approx((room / (room - 2)) ** 2, rel=0.05)
    images = torch.zeros((20, 3, 64, 64), dtype=torch.uint8)
    assert engine_for_slides(engine, images).settings.way == way
    assert ("above layer 'layer2' blocks would compute each cell 9 times, tiles do 4" in caplog.text) == (
        way == "tiled"
    )
    chosen = make_engine(classifier, 64, 1.0, 1, MapSettings(("gradient",), "layer2", block_px=64), 1e6)
    assert engine_for_slides(chosen, images) is chosen  # who gives room for blocks has it


def test_a_layer_that_leaves_no_room_for_a_cell_is_refused_before_anything_is_computed(
    classifier, monkeypatch, array_slide
):
    slide, tissue = array_slide(np.zeros((128, 128, 3), np.uint8)), TissueMask(np.ones((1, 1), bool), 256.0)
    engine = make_engine(classifier, 64, 1.0, 1, MapSettings(("gradient",), "layer2"))
    monkeypatch.setattr(cascade, "_CPU_BYTES", (2 * engine.cascade.top.halo) ** 2 * engine.cascade.top.cell_bytes)
    with pytest.raises(NetworkError, match=r"layer 'layer2': a dense map has no room .* way 'tiled', or block_px"):
        engine.map(slide, tissue)


def test_where_channels_cancel_other_methods_have_their_maps(array_slide):
    """A gradient that nobody asked for once stood in for a probability's map; a LayerNorm's is refused by name."""
    torch.manual_seed(0)
    network = TileClassifier("convnext_atto").eval()
    pixels = np.random.default_rng(0).integers(0, 256, (96, 96, 3), dtype=np.uint8)
    slide, tissue = array_slide(pixels), TissueMask(np.ones((1, 1), bool), 512.0)
    for way, methods in (("auto", ("gradcam",)), ("tiled", ("tsm",))):
        engine = make_engine(network, 64, 1.0, settings=MapSettings(methods, "stages.2", way=way))
        assert tuple(engine.map(slide, tissue).explanations) == methods
    for way in ("auto", "tiled"):
        engine = make_engine(network, 64, 1.0, settings=MapSettings(("gradient",), "stages.2", way=way))
        with pytest.raises(ChannelsCancelError, match=r"Gradient at '.*': its channels cancel"):
            engine.map(slide, tissue)
