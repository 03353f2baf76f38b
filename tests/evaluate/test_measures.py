"""One batch of maps measured: what is asked for, of what is there to compare with, whoever else is in the batch."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from medsd.errors import ConfigError
from medsd.evaluate.measures import MEASURES, MeasureSettings, agreement, measure_maps
from medsd.saliency.metrics.masking import masking_curve, random_masking_curve
from medsd.saliency.metrics.scoring import Perturbation

SIDE = 16
QUICK = MeasureSettings(draws=1, steps=5, seed=2)


@pytest.fixture(scope="module")
def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(3 * SIDE * SIDE, 2)).eval()


@pytest.fixture(scope="module")
def x() -> torch.Tensor:
    return torch.randn(3, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(1))


def random_maps(seed: int, side: int = SIDE) -> torch.Tensor:
    return torch.randn(3, side, side, generator=torch.Generator().manual_seed(seed))


def top_half() -> torch.Tensor:
    region = torch.zeros(3, SIDE, SIDE, dtype=torch.bool)
    region[0, : SIDE // 2] = True
    region[1] = True  # fills the image: nothing to tell apart, as in the empty third
    return region


def test_every_measure_is_made_where_there_is_what_it_needs(network, x):
    target = network(x).argmax(dim=1)
    found = measure_maps(network, x, target, {"a": random_maps(0, 4)}, list(MEASURES), top_half(), QUICK)
    assert list(found.of["a"]) == list(MEASURES)
    assert found.of["a"]["area_share"].isnan().tolist() == [False, True, True]
    for name, values in found.of["a"].items():
        assert values.shape == (3,) and (MEASURES[name].kind == "localisation" or values.isfinite().all())
    without = measure_maps(network, x, target, {"a": random_maps(0, 4)}, list(MEASURES), None, QUICK)
    assert all(MEASURES[name].kind != "localisation" for name in without.of["a"])
    encoder = measure_maps(nn.Flatten(), x, None, {"a": random_maps(0, 4)}, list(MEASURES), None, QUICK)
    assert encoder.control is None and not {"gap", "masking_gap", "masking_area"} & set(encoder.of["a"])
    with pytest.raises(ConfigError, match="did you mean 'gini'"):
        measure_maps(network, x, target, {}, ["ginni"])


def test_the_masking_gap_is_of_what_is_predicted(network, x):
    other = 1 - network(x).argmax(dim=1)
    other[0] = 1 - other[0]
    found = measure_maps(network, x, other, {"a": random_maps(0)}, ["gap", "masking_gap", "masking_area"], None, QUICK)
    measured, control = found.of["a"], found.control
    assert control is not None
    torch.testing.assert_close(measured["gap"], control.area - measured["masking_area"])
    assert measured["masking_gap"].isnan().tolist() == [False, True, True]
    assert measured["masking_gap"][0] == measured["gap"][0]


def test_pixels_are_filled_as_the_settings_say(network, x):
    target, maps = network(x).argmax(dim=1), random_maps(0)
    found = measure_maps(network, x, target, {"a": maps}, ["gap"], None, replace(QUICK, fill="zero"))
    drawn = Perturbation("zero", generator=torch.Generator().manual_seed(2))
    control = random_masking_curve(network, x, target, 1, drawn)
    curve = masking_curve(network, x, target, maps, drawn)
    for one, other in ((found.control, control), (found.masking["a"], curve)):
        torch.testing.assert_close(one.probability, other.probability)


def test_from_a_seed_a_maps_measures_do_not_depend_on_those_beside_it(network, x):
    target, names = network(x).argmax(dim=1), ["insertion", "deletion", "masking_gap"]
    blocks = random_maps(0, 2)  # many equal pixels, which go in random order
    alone = measure_maps(network, x, target, {"a": blocks}, names, None, QUICK).of["a"]
    beside = measure_maps(network, x, target, {"b": random_maps(1, 2), "a": blocks}, names, None, QUICK).of["a"]
    torch.testing.assert_close(beside, alone, rtol=0, atol=0)
    generator = torch.Generator().manual_seed(2)
    going_on = measure_maps(network, x, target, {"b": blocks, "a": blocks}, names, None, QUICK, generator).of
    assert (going_on["a"]["insertion"] != going_on["b"]["insertion"]).any()


def test_small_maps_are_measured_as_large_ones(network, x):
    names = ["variation", "nyquist", "energy_pointing", "pointing_game", "best_iou"]
    large, small = (
        measure_maps(network, x, None, {"a": random_maps(0) * scale}, names, top_half(), QUICK).of["a"]
        for scale in (1.0, 1e-12)
    )
    torch.testing.assert_close(small, large, equal_nan=True)


def test_maps_of_two_sizes_agree_where_the_larger_repeats_the_smaller():
    small = torch.rand(2, 3, 2, generator=torch.Generator().manual_seed(0))
    large = small.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2)
    found = agreement({"small": small, "large": large, "inverse": -small})
    torch.testing.assert_close(found[:, 0], torch.tensor([[1.0, 1, -1]] * 2, dtype=torch.float64))
