"""Stain transforms: an analytic recovery, scikit-image's L*a*b* as reference, glass, and every shape of pixels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from skimage.color import lab2rgb, rgb2lab

from medsd.slides.stain import LabColours, StainProfile, TwoStains, transform_between

HAEMATOXYLIN, EOSIN = (0.65, 0.70, 0.29), (0.07, 0.99, 0.11)
MACENKO = (
    TwoStains("macenko", (0.70, 0.62, 0.35), (0.12, 0.87, 0.47), (2.9, 1.8)),
    TwoStains("macenko", HAEMATOXYLIN, EOSIN, (1.5, 2.0)),
)
# As tiatoolbox's Vahadane fits them: one vector with negative parts.
VAHADANE = (
    TwoStains("vahadane", (0.34, 0.81, 0.48), (0.90, -0.38, -0.22), (4.0, 1.0)),
    TwoStains("vahadane", (0.46, 0.64, 0.61), (0.88, -0.34, -0.33), (2.0, 0.1)),
)
REINHARD = (
    LabColours((56.0, 24.8, -10.4), (23.7, 14.3, 8.8)),
    LabColours((70.0, 15.0, -14.0), (12.0, 9.0, 6.0)),
)
PAIRS = {"macenko": MACENKO, "vahadane": VAHADANE, "reinhard": REINHARD}


@pytest.fixture(params=PAIRS)
def pair(request: pytest.FixtureRequest) -> tuple[StainProfile, StainProfile]:
    return PAIRS[request.param]


def stained_colours(count: int = 40_000, seed: int = 0) -> np.ndarray:
    """Random colours of which no one is pale."""
    pixels = np.random.default_rng(seed).integers(0, 256, (count, 3), dtype=np.uint8)
    return np.minimum(pixels, [255, 190, 255]).astype(np.uint8)


def picture_of(concentrations: np.ndarray, stains: np.ndarray) -> np.ndarray:
    """Beer and Lambert: (n, 2) concentrations to (n, 3) light, not rounded."""
    return 255 * np.exp(-concentrations @ stains)


@settings(max_examples=30, deadline=None)
@given(gain_h=st.floats(0.5, 2.0), gain_e=st.floats(0.5, 2.0), turn=st.floats(-0.15, 0.15), seed=st.integers(0, 10**6))
def test_stains_of_known_strength_and_hue_are_recovered(gain_h: float, gain_e: float, turn: float, seed: int) -> None:
    target = np.array([HAEMATOXYLIN, EOSIN])
    source = target + turn * np.array([[0.3, -0.2, 0.5], [0.4, 0.0, 0.6]])
    concentrations = np.random.default_rng(seed).uniform(0.4, 1.0, (500, 2))
    gains = np.array([gain_h, gain_e])
    picture = np.rint(picture_of(concentrations * gains, source)).astype(np.uint8)
    fits = [
        TwoStains("macenko", tuple(matrix[0]), tuple(matrix[1]), tuple(strongest))
        for matrix, strongest in ((source, gains), (target, np.ones(2)))
    ]
    # Rounded light of one grey in 255 is off by half a grey; weak stains strengthened twice carry it along.
    assert np.abs(transform_between(*fits)(picture) - picture_of(concentrations, target)).max() < 4


@pytest.mark.parametrize("wider", [False, True])
def test_reinhard_is_scikit_images_lab_scaled_and_shifted(wider: bool) -> None:
    pixels = stained_colours()
    source, target = REINHARD
    if wider:  # L leaves 0 to 100, where tiatoolbox and we hold it
        pixels = np.random.default_rng(0).integers(60, 190, (40_000, 1)) + np.array([20, 0, 15])
        pixels = pixels.astype(np.uint8)
        source, target = LabColours((55, 10, -5), (10, 5, 5)), LabColours((55, 12, -6), (25, 5, 5))
    lab = rgb2lab(pixels / 255)
    lab = (lab - source.mean) * np.divide(target.std, source.std) + target.mean
    lab[:, 0] = lab[:, 0].clip(0, 100)
    expected = 255 * lab2rgb(lab)
    error = np.abs(transform_between(source, target)(pixels) - expected)
    assert error.max() < 1.5  # the two libraries' sRGB matrices differ in the fourth digit
    assert error.mean() < 0.3


def test_the_same_stain_changes_nothing_by_reinhard() -> None:
    pixels = stained_colours()
    same = transform_between(REINHARD[0], REINHARD[0])(pixels)
    assert np.abs(same.astype(int) - pixels).max() <= 1


def test_glass_is_left_alone(pair: tuple[StainProfile, StainProfile]) -> None:
    grey = np.repeat(np.arange(225, 256), 3).reshape(-1, 3)
    dusty = grey - np.random.default_rng(0).integers(0, 3, grey.shape)
    glass = np.concatenate([grey[3:], dusty[12:]]).astype(np.uint8)
    for transform in (transform_between(*pair), transform_between(*pair[::-1])):
        assert np.array_equal(transform(glass), glass)
        assert np.array_equal(transform(np.full((9, 7, 3), 255, np.uint8)), np.full((9, 7, 3), 255))


def test_from_glass_to_stain_there_is_no_jump() -> None:
    """A step of one grey between neighbouring pixels must not become an edge."""
    tint = np.linspace([255, 255, 255], [225, 165, 215], 400)
    ramp = np.rint(tint).astype(np.uint8)
    for source, target in PAIRS.values():
        steps = np.abs(np.diff(transform_between(source, target)(ramp).astype(int), axis=0))
        assert steps.max() <= 6


def test_extremes_give_pixels_without_a_warning(pair: tuple[StainProfile, StainProfile]) -> None:
    corners = np.array([[r, g, b] for r in (0, 1, 255) for g in (0, 1, 255) for b in (0, 1, 255)], np.uint8)
    with np.errstate(all="raise"):
        for transform in (transform_between(*pair), transform_between(*pair[::-1])):
            assert transform(corners).dtype == np.uint8
            assert np.ptp(transform(np.full((50, 3), (180, 90, 150), np.uint8)), axis=0).max() == 0


def test_stains_hardly_apart_stay_finite() -> None:
    """Of these, infinity times zero came out as black where there was white, and the reverse."""
    near = TwoStains("macenko", (0.70, 0.62, 0.35), (0.70, 0.62, 0.52), (0.01, 0.01))
    with np.errstate(all="raise", under="ignore"):
        transform_between(near, MACENKO[0])(stained_colours())


def test_each_pixel_on_its_own(pair: tuple[StainProfile, StainProfile]) -> None:
    """More pixels than a strip, in every shape and order, give what each gives alone."""
    transform = transform_between(*pair)
    pixels = np.random.default_rng(1).integers(0, 256, (190, 200, 3), dtype=np.uint8)
    before = pixels.copy()
    whole = transform(pixels)
    assert np.array_equal(pixels, before)
    assert whole.shape == pixels.shape
    halves = np.concatenate([transform(pixels[:, :77]), transform(pixels[:, 77:])], axis=1)
    assert np.array_equal(whole, halves)
    assert np.array_equal(transform(pixels[::-1, ::-1]), whole[::-1, ::-1])
    assert np.array_equal(transform(pixels[5, 6]), whole[5, 6])
    assert transform(pixels[:0]).shape == (0, 200, 3)
