"""`medsd.view`: the picture of `overlay.png`, of maps in memory."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

import medsd
from medsd.errors import ConfigError, DatasetError
from medsd.heatmap.cohort import read_slide_record
from medsd.heatmap.legend import NO_CLASS
from medsd.heatmap.maps import SlideMaps
from medsd.heatmap.model import MapRequest, load_map_model
from medsd.heatmap.tiff import read_ome_tiff
from medsd.heatmap.value_map import ValueMap
from medsd.slides.slide import open_slide
from medsd.slides.tissue import find_tissue


def test_of_an_engine_and_its_model_it_is_the_overlay(mapped, fiducial_slide, green_weights):
    model = load_map_model(green_weights, MapRequest(), torch.device("cpu"))
    with open_slide(fiducial_slide) as slide:
        shown = medsd.view(slide, model.engine.map(slide, find_tissue(slide)), model)
    assert read_slide_record(mapped)["misfits"] == []
    with Image.open(mapped / "overlay.png") as overlay:
        np.testing.assert_array_equal(np.asarray(shown.picture.image), np.asarray(overlay))
    with Image.open(io.BytesIO(shown._repr_jpeg_())) as jpeg:
        assert (jpeg.format, jpeg.size) == ("JPEG", shown.picture.image.size)


def _sides(picture: Image.Image) -> list[bool]:
    """Of the second of two panels: whether a quarter of the way in, and three quarters, it is rather red than blue."""
    pixels = np.asarray(picture).astype(int)
    row = pixels[300, :, 0] - pixels[300, :, 2]
    half = len(row) // 2
    return [bool(row[half + part * half // 8 : half + (part + 1) * half // 8].mean() > 0) for part in (2, 5)]


def test_of_maps_alone_it_says_that_their_colours_are_the_slides_own(mapped, fiducial_slide, tmp_path):
    kept = read_ome_tiff(mapped / "saliency.ome.tif")
    against, for_it = np.hsplit(np.full((16, 16), 0.01, np.float32), 2)
    halves = ValueMap(np.hstack([-against, for_it]), 128.0, 64.0, "saliency", "tumour", "drawn", "log-odds")
    assert _sides(medsd.view(fiducial_slide, {"deeplift": halves}).picture.image) == [False, True]
    medsd.view(fiducial_slide, {"gradient_x_activation": kept}).save(tmp_path / "view.png")
    with Image.open(tmp_path / "view.png") as picture:
        assert "esearch use only" in str(picture.info)


def test_what_cannot_be_shown_is_refused(fiducial_slide):
    unseen = ValueMap(np.full((4, 4), np.nan, np.float32), 512.0, 256.0, "saliency", "tumour", "drawn", "")
    with pytest.raises(ConfigError, match=r"maps: give those of an engine, or a dictionary"):
        medsd.view(fiducial_slide, {})
    with pytest.raises(ConfigError, match=r"maps: give those of an engine, or a dictionary"):
        medsd.view(fiducial_slide, unseen)
    with pytest.raises(ConfigError, match=r"maps\['deeplift'\]: has no values"):
        medsd.view(fiducial_slide, {"deeplift": unseen})
    with pytest.raises(ConfigError, match=r"method 'depplift': use one of .*; did you mean 'deeplift'\?"):
        medsd.view(fiducial_slide, {"depplift": ValueMap(np.ones((4, 4), np.float32), 512.0, 256.0, "s", "t", "m", "")})


def _drawn(value: float, quantity: str = "saliency", target: str = "tumour") -> ValueMap:
    return ValueMap(np.full((4, 4), value, np.float32), 64.0, 64.0, quantity, target, "drawn", "log-odds")


def test_the_probability_of_an_encoder_alone_which_is_1_everywhere_is_not_shown(array_slide):
    slide = array_slide(np.full((256, 256, 3), 190, np.uint8))
    of_classifier = SlideMaps(_drawn(0.5, "probability"), {"tsm": _drawn(1.0)}, 1, 1)
    of_encoder = replace(of_classifier, probability=_drawn(1.0, "probability", NO_CLASS))
    shown = [repr(medsd.view(slide, maps)) for maps in (of_classifier, of_encoder)]
    assert ["probability of tumour" in words for words in shown] == [True, False]
    assert all("saliency of tumour" in words for words in shown)


def test_what_was_not_decoded_is_striped_without_a_model_too(array_slide):
    slide = array_slide(np.full((256, 256, 3), 190, np.uint8))
    whole = SlideMaps(_drawn(0.5, "probability"), {"deeplift": _drawn(1.0)}, 1, 1)
    damaged = replace(whole, lost=np.arange(16).reshape(4, 4) == 0)
    before, after = (np.asarray(medsd.view(slide, maps).picture.image).astype(int) for maps in (whole, damaged))
    changed = np.abs(before - after).max(axis=2)[:500, :600] > 40  # the slide's own panel
    assert changed[:, :200].any() and not changed[:, 250:].any()


def test_maps_of_a_slide_of_another_size_are_refused(array_slide):
    slide = array_slide(np.full((200, 256, 3), 190, np.uint8))
    medsd.view(slide, {"deeplift": _drawn(1.0)})  # the last row of map pixels reaches beyond it
    for level0_px in (32.0, 90.0):
        with pytest.raises(DatasetError, match=r"maps\['deeplift'\]: covers .* level-0 px, but array has 256 x 200"):
            medsd.view(slide, {"deeplift": replace(_drawn(1.0), level0_px=level0_px)})
