"""An encoder alone maps slides without classes: label-free maps, and nothing that is judged."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from medsd.cohort.entry import SlideEntry
from medsd.errors import ConfigError, NetworkError
from medsd.heatmap.cohort import map_slides, read_results, read_slide_record
from medsd.heatmap.dense import DenseEngine
from medsd.heatmap.engine import make_engine
from medsd.heatmap.maps import MapSettings
from medsd.heatmap.model import MapRequest, load_map_model
from medsd.heatmap.tiff import read_ome_tiff
from medsd.heatmap.tiled import TiledEngine
from medsd.networks.classifier import TileClassifier
from medsd.networks.start import save_encoder
from medsd.networks.weights import load_classifier, save_classifier
from medsd.phantom import PhantomSpec, write_phantom
from medsd.slides.slide import open_slide
from medsd.slides.tissue import find_tissue

REQUEST = MapRequest(("tsm", "eigencam"), "layer2", network_mpp=1.0)


@pytest.fixture(scope="module")
def classifier() -> TileClassifier:
    torch.manual_seed(3)
    return TileClassifier("test_resnet", input_mean=(0.5, 0.6, 0.7), input_std=(0.5, 0.4, 0.3)).eval()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory, classifier) -> Path:
    path = tmp_path_factory.mktemp("encoder") / "encoder.safetensors"
    save_encoder(path, classifier.encoder, "test_resnet", "a test", classifier.normalise)
    return path


@pytest.fixture(scope="module")
def slide(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("slides") / "slide.tif"
    write_phantom(PhantomSpec(seed=5, tumour=False, size_px=1024), path)
    return path


def test_its_maps_are_those_of_a_classifier_with_it(encoder, classifier, slide, tmp_path):
    (row,) = map_slides([SlideEntry("slide", slide)], encoder, tmp_path, REQUEST, isolate=False)
    assert (row.status, row.score, row.regions, row.region_area_mm2) == ("ok", None, None, None)
    folder = tmp_path / "slide"
    assert sorted(path.name for path in folder.iterdir()) == [
        "eigencam.ome.tif",
        "overlay.png",
        "record.json",
        "report.html",
        "saliency.ome.tif",
    ]
    with open_slide(slide) as opened:
        engine = make_engine(classifier, 64, 1.0, settings=MapSettings(REQUEST.methods, "layer2", "none"))
        maps = engine.map(opened, find_tissue(opened))
    for name, file in (("tsm", "saliency.ome.tif"), ("eigencam", "eigencam.ome.tif")):
        found, expected = read_ome_tiff(folder / file), maps.explanations[name]
        np.testing.assert_array_equal(found.seen, expected.seen)
        scale = np.nanmax(np.abs(expected.values))
        np.testing.assert_allclose(found.values, expected.values, rtol=0, atol=1e-5 * scale)
        assert found.target == "no class" and "at layer2" in found.method
    record = read_slide_record(folder)
    assert len(record["methods"]) == 2 and record["recipe"]["network_mpp"] == 1.0
    page = (folder / "report.html").read_text("utf-8")
    assert "has learned no classes" in page and "Probability" not in page
    assert [result.score for result in read_results(tmp_path)] == [None]


def test_the_last_stage_is_mapped_unasked_and_another_scale_is_another_map(encoder, slide, tmp_path):
    for mpp in (1.0, 2.0):
        map_slides([SlideEntry("slide", slide)], encoder, tmp_path, MapRequest(network_mpp=mpp), isolate=False)
        assert read_ome_tiff(tmp_path / "slide" / "saliency.ome.tif").mpp == 32 * mpp
    assert "MTSM b at layer4" in read_slide_record(tmp_path / "slide")["methods"][0]


def test_what_does_not_fit_is_one_line(encoder, green_weights, slide, tmp_path):
    for weights, request, error, words in (
        (
            encoder,
            MapRequest(("tsm",)),
            ConfigError,
            "network_mpp: .*encoder.safetensors is an encoder and does not say",
        ),
        (encoder, MapRequest(("tsm", "deeplift"), network_mpp=1.0), ConfigError, "'deeplift' explains a class, .*tsm"),
        (encoder, MapRequest(("mask",), network_mpp=1.0), ConfigError, "mask"),
        (encoder, MapRequest(layer="layer9", network_mpp=1.0), NetworkError, "no such layer"),
        (green_weights, MapRequest(layer="layer1"), ConfigError, "layer=layer1: .*green.safetensors says it itself"),
        (green_weights, MapRequest(network_mpp=1.0), ConfigError, "network_mpp=1.0: .*says it itself"),
    ):
        with pytest.raises(error, match=words) as refused:
            map_slides([SlideEntry("slide", slide)], weights, tmp_path / "out", request, isolate=False)
        assert "\n" not in str(refused.value) and not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="network_mpp=0"):
        MapRequest(network_mpp=0)


def test_an_encoder_whose_features_see_the_whole_image_is_refused(slide, tmp_path):
    save_encoder(
        tmp_path / "se.safetensors", TileClassifier("test_efficientnet").encoder, "test_efficientnet", "a test"
    )
    with pytest.raises(NetworkError, match="no dense map"):
        map_slides([SlideEntry("slide", slide)], tmp_path / "se.safetensors", tmp_path, MapRequest(network_mpp=1.0))


@pytest.mark.parametrize("way", ["auto", "tiled"])
def test_weights_say_the_way(green_classifier, green_weights, tmp_path, way):
    _, card, _ = load_classifier(green_weights)
    card = replace(card, calibration=replace(card.calibration, way=way))
    save_classifier(tmp_path / "w.safetensors", green_classifier, card)
    model = load_map_model(tmp_path / "w.safetensors", MapRequest(), torch.device("cpu"))
    assert isinstance(model.engine, TiledEngine if way == "tiled" else DenseEngine)
