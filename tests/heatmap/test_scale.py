from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from skimage.color import rgb2lab

from medsd.drawing import pale
from medsd.errors import ConfigError
from medsd.heatmap.scale import (
    AGAINST,
    FOR,
    OPACITY,
    TUMOUR,
    ColourScale,
    explanation_scale,
    probability_scale,
    saliency_scale,
)

# Machado, Oliveira, Fernandes 2009, severity 1, on linear RGB.
EYES = {
    "all cones": np.eye(3),
    "deuteranopia": np.array(
        [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]]
    ),
    "protanopia": np.array(
        [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]]
    ),
    "tritanopia": np.array(
        [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]]
    ),
}
GREYS = (140, 190, 240)


def seen(colour: npt.ArrayLike, eye: str) -> npt.NDArray[np.float64]:
    """An sRGB colour in CIELAB, as an eye sees it."""
    value = np.asarray(colour, float) / 255
    linear = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
    linear = (EYES[eye] @ linear).clip(0, 1)
    value = np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)
    lab: npt.NDArray[np.float64] = rgb2lab(value[np.newaxis, np.newaxis])[0, 0]
    return lab


def apart(one: npt.ArrayLike, other: npt.ArrayLike, eye: str) -> float:
    return float(np.linalg.norm(seen(one, eye) - seen(other, eye)))


def laid(ink: npt.ArrayLike, share: float, grey: float) -> npt.NDArray[np.float64]:
    return share * np.asarray(ink, float) + (1 - share) * grey


@pytest.mark.parametrize("eye", EYES)
@pytest.mark.parametrize("grey", GREYS)
def test_for_and_against_are_told_apart_and_from_the_grey_slide_by_every_eye(eye: str, grey: float) -> None:
    """A just noticeable difference is about 2.3."""
    ends = [laid(ink, OPACITY, grey) for ink in (FOR, AGAINST, TUMOUR)]
    assert apart(ends[0], ends[1], eye) > 40
    assert min(apart(end, [grey] * 3, eye) for end in ends) > 20


def test_steps_look_even_and_both_sides_alike() -> None:
    ends = {}
    for ink in (FOR, AGAINST, TUMOUR):
        steps = [apart(laid(ink, share * OPACITY, 190), [190] * 3, "all cones") for share in (0.25, 0.5, 0.75, 1)]
        assert np.diff([0, *steps]) == pytest.approx(steps[-1] / 4, rel=0.25)
        ends[ink] = steps[-1]
    assert ends[FOR] == pytest.approx(ends[AGAINST], rel=0.15)


def test_inks_are_not_those_of_the_stain() -> None:
    """Haematoxylin and eosin by Ruifrok and Johnston's vectors, alone and mixed, pale to dark."""
    vectors = np.array([[0.65, 0.70, 0.29], [0.07, 0.99, 0.11]])
    for mix in ([1, 0], [0, 1], [1, 1], [2, 1], [1, 2]):
        density = np.array(mix) @ vectors
        for strength in (0.15, 0.3, 0.6, 0.9, 1.2):
            stain = 255 * 10 ** (-strength * density / np.linalg.norm(density))
            assert min(apart(ink, stain, "all cones") for ink in (FOR, AGAINST, TUMOUR)) > 30


def test_zero_and_nan_leave_the_slide_alone_and_limits_are_opaque() -> None:
    scale = saliency_scale(2.0, "")
    values = np.array([[0.0, np.nan, 2.0, -2.0, 1.0, -9.0, np.inf, -np.inf]])
    rgba = scale.rgba(values)
    assert rgba.dtype == np.uint8
    assert rgba[0, :, 3].tolist() == [0, 0, 255, 255, 128, 255, 255, 255]
    assert rgba[0, [2, 4, 6], :3].tolist() == [list(FOR)] * 3 and rgba[0, [3, 5, 7], :3].tolist() == [list(AGAINST)] * 3
    pixels = np.random.default_rng(0).integers(0, 256, (1, 8, 3), dtype=np.uint8)
    assert (scale.over(pixels, values)[0, :2] == pixels[0, :2]).all()
    assert (scale.over(pixels, values, 0.0) == pixels).all()


def test_a_probability_is_tinted_as_strongly_as_it_is_high() -> None:
    rgba = probability_scale().rgba(np.array([[0.0, 0.2, 1.0, -0.1]]))
    assert rgba[0, :, 3].tolist() == [0, 51, 255, 0]


@pytest.mark.parametrize("scale", [probability_scale(), saliency_scale(0.5, "")])
def test_the_bar_holds_every_colour_that_a_slide_can_show(scale: ColourScale) -> None:
    rng = np.random.default_rng(1)
    values = np.linspace(scale.vmin, scale.vmax, 257)[rng.integers(0, 257, (40, 40))]
    shown = scale.over(pale(rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)), values, 0.7)
    bar = {tuple(colour) for colour in scale.bar(0.7).reshape(-1, 3).tolist()}
    assert {tuple(colour) for colour in shown.reshape(-1, 3).tolist()} <= bar


def test_a_bar_says_its_values_and_title() -> None:
    assert saliency_scale(0.5, "logit").ticks == ["-0.5", "-0.25", "0", "+0.25", "+0.5"]
    assert probability_scale().ticks == ["0", "0.25", "0.5", "0.75", "1"]
    assert saliency_scale(1.0, "logit").title == "Saliency (logit)"
    assert probability_scale().title == "Probability"


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_limits_that_are_none(limit: float) -> None:
    with pytest.raises(ConfigError, match="validation slides"):
        saliency_scale(limit, "")


def test_what_speaks_of_a_class_has_hues_of_its_own() -> None:
    names = ("mask", "gradient", "deeplift", "eigencam", "tsm")
    mask, saliency, evidence, signed, positive = (explanation_scale(name, 0.3, "unit") for name in names)
    assert (mask.vmin, mask.vmax) == (0.0, 1.0)
    assert (saliency.vmin, saliency.vmax) == (signed.vmin, signed.vmax) == (-0.3, 0.3)
    assert (positive.vmin, positive.vmax) == (0.0, 0.3)
    # Only what adds up to the answer is called evidence.
    assert (evidence.label, saliency.label) == ("Evidence", "Saliency")
    assert "against" in evidence.hues and "against" not in saliency.hues
    assert signed.above == positive.above and len({mask.above, saliency.above, signed.above, TUMOUR}) == 4
