"""Fluorescence, dark field and inverted pictures are refused; bright field of every kind is not."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from skimage.color import hed2rgb, rgb2hed

from medsd.errors import NotBrightFieldError, SlideError
from medsd.slides.slide import open_slide
from medsd.slides.tissue import find_tissue
from medsd.slides.tissue.brightfield import what_else
from medsd.slides.tissue.saturation import coarsen

Bytes = np.ndarray[Any, np.dtype[np.uint8]]

GREEN_PEN = ("no-tissue-green-pen", "medium-nuclei-score-green-pen-level1")
BLANK = ("almost-white-1", "no-tissue", "no-tissue-line", "no-tissue-green-pen")


def rgb(path: Path) -> Bytes:
    picture = Image.open(path).convert("RGBA")
    return np.asarray(Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB"))


@pytest.fixture(scope="session")
def pictures(shared_data: Path) -> dict[str, Bytes]:
    """Every real bright-field picture at hand, at about 8 um per pixel (the scale of he_tiles is a guess)."""
    found = {}
    for file in sorted((shared_data / "he_tiles").glob("*.png")):
        mpp = {"level2": 8.0, "level0": 0.5, "diagnostic": 40.0}
        found[file.stem] = coarsen(rgb(file), next((mpp[name] for name in mpp if name in file.stem), 2.0))[0]
    folder = shared_data / "pcam_patches"
    files = {file.stem: file for file in (folder / "images").rglob("*.*")}
    names = [row["id"] for row in csv.DictReader((folder / "labels.csv").read_text().splitlines())]
    for first in range(0, 800, 100):
        rows = [np.hstack([rgb(files[name]) for name in names[i : i + 10]]) for i in range(first, first + 100, 10)]
        found[f"pcam {first}"] = coarsen(np.vstack(rows), 0.97)[0]
    for file in sorted((shared_data / "nuclei_masks_dsb2018" / "images").glob("*.png"))[::3]:
        found[file.stem] = coarsen(rgb(file), 0.5)[0]
    with open_slide(shared_data / "wsi" / "CMU-1-Small-Region.svs") as slide:
        found["CMU-1-Small-Region"] = slide.read(0, 0, 139, 186, mpp=8.0)
    return found


def framed(image: Bytes, black: float) -> Bytes:
    """The image in the top left corner of a black one, that is black to this share."""
    scale = (1 - black) ** -0.5
    out = np.zeros((round(image.shape[0] * scale), round(image.shape[1] * scale), 3), np.uint8)
    out[: image.shape[0], : image.shape[1]] = image
    return out


def scaled(image: Bytes, light: float) -> Bytes:
    return np.rint(image * light).astype(np.uint8)


def glow(image: Bytes, colour: tuple[int, int, int]) -> Bytes:
    """Fluorescence where the image is dark."""
    signal = np.clip((235.0 - image.min(axis=2, keepdims=True)) / 180, 0, 1) ** 1.5
    return (signal * colour).astype(np.uint8)


def refused(pictures: dict[str, Bytes]) -> dict[str, str]:
    answers = {name: what_else(image) for name, image in pictures.items()}
    return {name: answer for name, answer in answers.items() if answer is not None}


# ---- bright field


def test_real_pictures_are_bright_field(pictures: dict[str, Bytes]) -> None:
    assert len(pictures) > 35
    assert refused(pictures) == {}


@pytest.mark.parametrize("black", [0.1, 0.3, 0.6, 0.8])
def test_black_frames_around_real_pictures(black: float, pictures: dict[str, Bytes]) -> None:
    assert refused({name: framed(image, black) for name, image in pictures.items()}) == {}


@pytest.mark.parametrize("light", [0.8, 0.6, 0.5])
def test_dark_scans(light: float, pictures: dict[str, Bytes]) -> None:
    """Tiles that are half green ink are taken for something else when dark; no slide is half green ink."""
    dark = {name: scaled(image, light) for name, image in pictures.items() if name not in GREEN_PEN}
    assert refused(dark) == {}
    if light > 0.5:
        assert refused({name: framed(image, 0.8) for name, image in dark.items()}) == {}


@pytest.mark.parametrize("strength", [0.5, 0.25, 0.1, 0.0])
def test_pale_stains(strength: float, pictures: dict[str, Bytes]) -> None:
    assert refused({name: 255 - scaled(255 - image, strength) for name, image in pictures.items()}) == {}


def test_dab_on_haematoxylin(pictures: dict[str, Bytes]) -> None:
    """Eosin replaced by brown DAB (skimage's stain vectors), on purple and on blue counterstain."""
    for name, image in pictures.items():
        if name in BLANK:
            continue
        stains = rgb2hed(image)
        brown = (hed2rgb(np.stack([stains[..., 0], 0 * stains[..., 1], stains[..., 1]], axis=2)) * 255).astype(np.uint8)
        density = np.maximum(stains[..., :2], 0) @ np.array([[4.8, 3.3, 1.2], [0.8, 1.7, 2.3]])
        blue = (255 * np.exp(-density)).astype(np.uint8)
        for stained in (brown, blue, framed(blue, 0.8)):
            assert what_else(stained) is None, name


@pytest.mark.parametrize("level", [255, 242, 200, 120])
def test_blank_slides_are_bright_field(level: int) -> None:
    blank = np.full((200, 300, 3), level, np.uint8)
    assert what_else(blank) is None
    assert what_else(framed(blank, 0.95)) is None


def test_what_was_not_seen_has_no_say() -> None:
    image = np.zeros((50, 50, 3), np.uint8)
    seen = np.zeros((50, 50), np.bool_)
    assert what_else(image, seen) is None
    image[:10], seen[:10] = 240, True
    assert what_else(image, seen) is None
    assert what_else(255 - image, seen) is not None


# ---- not bright field


def test_inverted_pictures(pictures: dict[str, Bytes]) -> None:
    """All but one: green ink inverted is as red as stains, and that tile is half ink with no ground."""
    inverted = {name: 255 - image for name, image in pictures.items()}
    assert set(inverted) - set(refused(inverted)) <= {GREEN_PEN[1]}
    faint = {name: scaled(image, 0.5) for name, image in inverted.items()}
    assert set(faint) - set(refused(faint)) <= {GREEN_PEN[1]}


@pytest.mark.parametrize("colour", [(40, 60, 255), (0, 255, 40), (255, 20, 30), (255, 160, 0), (0, 200, 255)])
def test_glow_in_one_colour(colour: tuple[int, int, int], pictures: dict[str, Bytes]) -> None:
    glowing = {name: glow(image, colour) for name, image in pictures.items()}
    assert set(refused(glowing)) == set(glowing)


@pytest.mark.parametrize("colour", [(255, 60, 200), (255, 120, 180), (255, 255, 255)])
def test_glow_in_the_colour_of_stains_and_dark_field(colour: tuple[int, int, int], pictures: dict[str, Bytes]) -> None:
    """Known by their dark ground alone."""
    glowing = {name: glow(image, colour) for name, image in pictures.items() if "level2" in name}
    assert len(glowing) == 3
    assert set(refused(glowing)) == set(glowing)


def test_black_is_refused() -> None:
    assert what_else(np.full((200, 300, 3), 12, np.uint8)) == "nearly all of it is black"


def test_real_fluorescence_slide(shared_data: Path) -> None:
    path = shared_data / "wsi" / "test3-DAPI-2-(387).ndpi"
    with open_slide(path) as slide:
        with pytest.raises(NotBrightFieldError) as caught:
            find_tissue(slide)
        assert isinstance(caught.value, SlideError)
        assert str(path) in str(caught.value)
        assert "fluorescence" in str(caught.value)
        assert "force=True" in str(caught.value)
        assert "\n" not in str(caught.value)
        assert find_tissue(slide, force=True).mask.shape == (139, 114)
