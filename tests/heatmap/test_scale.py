from __future__ import annotations

import colorsys

import matplotlib
import numpy as np
import pytest

from medsd.errors import ConfigError
from medsd.heatmap.scale import ColourScale, explanation_scale, probability_scale, saliency_scale


def test_zero_has_the_middle_colour_of_a_diverging_scale() -> None:
    scale = saliency_scale(0.037, "logit")
    middle = np.round(np.array(matplotlib.colormaps[scale.colormap](0.5)[:3]) * 255)
    colour = scale.rgba(np.zeros((1, 1)))[0, 0]
    assert np.abs(colour[:3] - middle).max() <= 2
    assert colour[3] == 255
    assert colorsys.rgb_to_hsv(*(colour[:3] / 255))[1] < 0.05


def test_nan_is_transparent_and_all_else_is_opaque() -> None:
    rgba = probability_scale().rgba(np.array([[np.nan, 0.0], [1.0, np.inf]]))
    assert rgba.dtype == np.uint8
    assert rgba[..., 3].tolist() == [[0, 255], [255, 255]]


def test_values_beyond_the_limits_take_the_end_colours() -> None:
    scale = saliency_scale(2.0, "")
    low, end, high, other_end = scale.rgba(np.array([[-9.0, -2.0, 9.0, 2.0]]))[0]
    assert (low == end).all()
    assert (high == other_end).all()
    assert (low != high).any()


def test_a_colour_depends_on_the_value_alone() -> None:
    scale = probability_scale()
    alone = scale.rgba(np.array([[0.3]]))[0, 0]
    in_company = scale.rgba(np.array([[0.3, 0.9, 0.0]]))[0, 0]
    assert (alone == in_company).all()


def test_probability_is_viridis_from_0_to_1() -> None:
    values = np.array([[0.0, 0.25, 0.5, 1.0]])
    expected = matplotlib.colormaps["viridis"](values, bytes=True)
    assert np.abs(probability_scale().rgba(values).astype(int) - expected.astype(int)).max() <= 3


def test_both_halves_of_the_saliency_scale_differ_from_stained_tissue() -> None:
    # Haematoxylin and eosin lie between blue-violet and pink: hues 240 to 345 degrees.
    scale = saliency_scale(1.0, "")
    for value in (-1.0, -0.6, 0.6, 1.0):
        hue = colorsys.rgb_to_hsv(*(scale.rgba(np.array([[value]]))[0, 0, :3] / 255))[0] * 360
        assert not 230 < hue < 350


def test_title_names_the_unit() -> None:
    assert saliency_scale(1.0, "logit").title == "Saliency (logit)"
    assert probability_scale().title == "Probability"


@pytest.mark.parametrize("limit", [0.0, -1.0, float("nan"), float("inf")])
def test_refuses_limits_that_are_none(limit: float) -> None:
    with pytest.raises(ConfigError, match="validation slides"):
        saliency_scale(limit, "")


def test_refuses_an_unknown_colormap_and_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="did you mean 'viridis'"):
        ColourScale(0.0, 1.0, "viridi", "x", "")


def test_masks_run_from_0_to_1_whatever_the_limit_and_saliency_is_centred() -> None:
    mask, saliency = (explanation_scale(method, 0.3, "unit") for method in ("mask", "gradient"))
    first, positive = (explanation_scale(method, 0.3, "unit") for method in ("eigencam", "tsm"))
    assert (first.vmin, first.vmax, positive.vmin, positive.vmax) == (-0.3, 0.3, 0.0, 0.3)
    assert first.colormap == positive.colormap not in (mask.colormap, saliency.colormap)
    assert (mask.vmin, mask.vmax) == (0.0, 1.0)
    assert (saliency.vmin, saliency.vmax) == (-0.3, 0.3) and saliency.title == "Saliency (unit)"
    assert len({scale.colormap for scale in (mask, saliency, probability_scale())}) == 3
    brightness = mask.colours().astype(int).sum(axis=1)
    assert (np.diff(brightness) <= 0).all()  # sequential: no light middle that would pass for a zero
