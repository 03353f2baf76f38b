"""Normalised slides: one fit a slide, kept between runs, and reads that join without a seam."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest

from medsd.errors import ConfigError, NoTissueError, SlideError
from medsd.slides.slide import Slide, open_slide
from medsd.slides.stain import LabColours, StainProfile, TwoStains
from medsd.slides.stain import slide as stain_slide
from medsd.slides.stain.slide import NormalisedSlide, StainNormaliser, fit_slide

SOURCE = TwoStains("macenko", (0.70, 0.62, 0.35), (0.12, 0.87, 0.47), (2.9, 1.8))
TARGET = TwoStains("macenko", (0.65, 0.70, 0.29), (0.20, 0.95, 0.24), (1.5, 2.0))
LAB = LabColours((56.0, 24.8, -10.4), (23.7, 14.3, 8.8))


def drawn_tissue(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Pixels of haematoxylin, eosin and mixtures."""
    generator = np.random.default_rng(seed)
    share = generator.choice([0.0, 0.2, 0.5, 1.0], (height, width))
    strength = generator.uniform(0.4, 1.4, (height, width))
    concentrations = strength[..., None] * np.stack([share, 1 - share], -1)
    return np.rint(255 * np.exp(-concentrations @ [TARGET.haematoxylin, TARGET.eosin])).astype(np.uint8)


@pytest.fixture
def skin(shared_data: Path, tmp_path: Path) -> Path:
    """A copy of a real slide."""
    return Path(shutil.copy(shared_data / "wsi" / "CMU-1-Small-Region.svs", tmp_path / "skin.svs"))


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Puts a constant in the place of the fit; the methods asked for, in order."""
    asked: list[str] = []

    def fit(slide: Slide, method: str, tissue: object = None) -> StainProfile:
        asked.append(method)
        return LAB if method == "reinhard" else SOURCE

    monkeypatch.setattr(stain_slide, "fit_slide", fit)
    return asked


def test_a_real_slide_is_fitted_the_same_each_time(skin: Path) -> None:
    with open_slide(skin) as first, open_slide(skin) as second:
        profile = fit_slide(first, "macenko")
        assert fit_slide(second, "macenko") == profile
    assert isinstance(profile, TwoStains)
    # Haematoxylin absorbs red most of the two, eosin green far more than red.
    assert profile.haematoxylin[0] > 0.5 > 0.2 > profile.eosin[0]
    assert 1 < profile.strongest[1] < profile.strongest[0] < 5


def test_glass_around_the_tissue_has_no_say(array_slide: type) -> None:
    tissue = drawn_tissue(512, 512)
    framed = np.full((1536, 2048, 3), 243, np.uint8)
    framed[490:1002, 790:1302] = tissue
    profile = fit_slide(array_slide(framed), "reinhard")
    whole = stain_slide.fit_picture(tissue, "reinhard")
    assert isinstance(profile, LabColours) and isinstance(whole, LabColours)
    assert np.allclose(profile.mean, whole.mean, atol=0.4)
    assert np.allclose(profile.std, whole.std, atol=0.4)


def test_a_pen_stroke_beside_the_tissue_has_no_say(array_slide: type) -> None:
    clean = np.full((1536, 2048, 3), 243, np.uint8)
    clean[490:1002, 790:1302] = drawn_tissue(512, 512)
    marked = clean.copy()
    marked[490:1002, 1302:1500] = (40, 140, 90)
    profile, other = (fit_slide(array_slide(pixels), "reinhard") for pixels in (clean, marked))
    assert isinstance(profile, LabColours) and isinstance(other, LabColours)
    assert np.allclose(profile.mean, other.mean, atol=0.4)
    assert np.allclose(profile.std, other.std, atol=0.4)


def test_what_is_not_seen_has_no_say(array_slide: type) -> None:
    tissue = drawn_tissue(512, 512)
    slide = array_slide(tissue)
    profile = fit_slide(slide, "reinhard")

    class HalfSeen(array_slide):  # type: ignore[misc, valid-type]
        def read_seen(self, x, y, width, height, mpp=None):  # type: ignore[no-untyped-def]
            pixels = self.read(x, y, width, height, mpp)
            seen = np.arange(width) % 2 == np.zeros((height, 1))
            pixels[~seen] = 255
            return pixels, seen

    half = fit_slide(HalfSeen(tissue), "reinhard")
    assert isinstance(profile, LabColours) and isinstance(half, LabColours)
    assert np.allclose(profile.mean, half.mean, atol=0.5)


def test_a_slide_without_tissue_or_of_one_colour_is_named(array_slide: type) -> None:
    blank = array_slide(np.full((700, 900, 3), 243, np.uint8))
    with pytest.raises(NoTissueError, match="array: no tissue"):
        fit_slide(blank, "macenko")
    pink = array_slide(np.full((700, 900, 3), (200, 120, 180), np.uint8))
    with pytest.raises(NoTissueError, match="array: stain 'macenko'"):
        fit_slide(pink, "macenko")


def test_blocks_tiles_and_the_whole_are_equal_pixels(skin: Path) -> None:
    with NormalisedSlide(open_slide(skin), SOURCE, TARGET) as slide:
        whole = slide.read(800, 1200, 512, 384)
        tiles = [
            np.concatenate([slide.read(800 + x, 1200 + y, 128, 128) for x in range(0, 512, 128)], axis=1)
            for y in range(0, 384, 128)
        ]
        assert np.array_equal(np.concatenate(tiles), whole)
        with open_slide(skin) as raw:
            assert np.abs(whole.astype(int) - raw.read(800, 1200, 512, 384)).mean() > 10


def test_it_is_a_slide(skin: Path) -> None:
    raw = open_slide(skin)
    slide: Slide = NormalisedSlide(raw, SOURCE, TARGET)
    for name in ("path", "dimensions", "mpp", "mpp_source", "mpp_doubt", "reader"):
        assert getattr(slide, name) == getattr(raw, name)
    outside = slide.read(-500, -500, 64, 64)
    assert outside.min() == 255
    again = pickle.loads(pickle.dumps(slide))
    assert np.array_equal(again.read(900, 1500, 100, 100, 1.0), slide.read(900, 1500, 100, 100, 1.0))
    slide.close()
    with pytest.raises(SlideError, match="closed"):
        slide.read(0, 0, 8, 8)
    again.close()
    with pytest.raises(ConfigError, match="one method"):
        NormalisedSlide(raw, SOURCE, LAB)


def test_what_is_not_seen_is_passed_on(array_slide: type) -> None:
    tissue = drawn_tissue(64, 64)
    slide = NormalisedSlide(array_slide(tissue), SOURCE, TARGET)
    pixels, seen = slide.read_seen(0, 0, 64, 64)
    assert seen is None
    assert np.array_equal(pixels, slide.read(0, 0, 64, 64))

    class Torn(array_slide):  # type: ignore[misc, valid-type]
        def read_seen(self, x, y, width, height, mpp=None):  # type: ignore[no-untyped-def]
            return np.full((height, width, 3), 255, np.uint8), np.zeros((height, width), bool)

    pixels, seen = NormalisedSlide(Torn(tissue), SOURCE, TARGET).read_seen(0, 0, 9, 8)
    assert pixels.min() == 255
    assert seen is not None and not seen.any()


def test_a_slide_is_fitted_once(skin: Path, tmp_path: Path, fits: list[str]) -> None:
    folder = tmp_path / "stains"
    for _ in range(2):
        normaliser = StainNormaliser(TARGET, folder)
        for _ in range(2):
            with normaliser.slide(open_slide(skin)) as slide:
                assert (slide.source, slide.target) == (SOURCE, TARGET)
    copied = pickle.loads(pickle.dumps(StainNormaliser(TARGET, folder)))
    with open_slide(skin) as slide:
        assert copied.fit(slide) == SOURCE
        StainNormaliser(LAB, folder).fit(slide)
        assert fits == ["macenko", "reinhard"]
        StainNormaliser(TARGET).fit(slide)
        assert fits == ["macenko", "reinhard", "macenko"]
    assert len(list(folder.iterdir())) == 2


def test_another_file_or_scale_is_fitted_anew(skin: Path, tmp_path: Path, fits: list[str]) -> None:
    normaliser = StainNormaliser(TARGET, tmp_path / "stains")
    with open_slide(skin) as slide:
        normaliser.fit(slide)
    os.utime(skin, ns=(1, 1))
    with open_slide(skin) as slide:
        normaliser.fit(slide)
    with open_slide(skin, mpp=0.25) as slide:
        normaliser.fit(slide)
    assert len(fits) == 3


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", '{"recipe": 1}', "recipe", "stain", "method", "bytes"])
def test_a_damaged_fit_is_made_again(skin: Path, tmp_path: Path, fits: list[str], damage: str) -> None:
    folder = tmp_path / "stains"
    with open_slide(skin) as slide:
        StainNormaliser(TARGET, folder).fit(slide)
        (path,) = folder.iterdir()
        content, whole = (json.loads(path.read_bytes()) for _ in range(2))
        if damage == "stain":
            content["stain"] = None
            path.write_text(json.dumps(content))
        elif damage == "recipe":
            path.write_text(json.dumps({**content, "recipe": {**content["recipe"], "slide": "another"}}))
        elif damage == "method":
            content["stain"]["strongest"] = [0, "x"]
            path.write_text(json.dumps(content))
        elif damage == "bytes":
            path.write_bytes(b"\xff\xfe\x00")
        else:
            path.write_text(damage)
        for _ in range(2):  # what the first of them writes, the second takes as whole
            assert StainNormaliser(TARGET, folder).fit(slide) == SOURCE
    assert len(fits) == 2
    own = dict.fromkeys(("made", "record_sha256"))  # the second it was made in, and the digest over it
    assert {**json.loads(path.read_bytes()), **own} == {**whole, **own}


def test_a_slide_that_is_gone_is_named(array_slide: type) -> None:
    with pytest.raises(SlideError, match="array: cannot be read"):
        StainNormaliser(TARGET).fit(array_slide(drawn_tissue(64, 64)))


def test_single_pictures_are_fitted_alone_and_blank_ones_given_back() -> None:
    normaliser = StainNormaliser(TARGET)
    blank = np.full((64, 64, 3), 244, np.uint8)
    assert np.array_equal(normaliser.picture(blank), blank)
    weak = np.rint(255 * (drawn_tissue(96, 96) / 255.0) ** 0.6).astype(np.uint8)
    strong = normaliser.picture(weak)
    assert strong.mean() < weak.mean() - 20
