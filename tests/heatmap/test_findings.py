"""What is said of a slide from its map: score, verdict, and whether it fits the network."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest

import medsd.heatmap.findings as findings
from medsd.heatmap.findings import top_mean, verdict
from medsd.heatmap.maps import SlideMaps
from medsd.heatmap.value_map import ValueMap
from medsd.networks.calibrated import Calibration, SlideCutOff
from medsd.networks.weights import ModelCard


@pytest.mark.parametrize(("mpp", "told"), [(0.25, 0), (1.1, 0), (1.2, 1)])
def test_a_slide_coarser_than_the_network_takes_does_not_fit(mpp, told):
    model = SimpleNamespace(engine=SimpleNamespace(mpp=1.0))
    words = findings.misfits(SimpleNamespace(mpp=mpp, mpp_doubt=""), model)
    assert len(words) == told and all(f"the slide has {mpp} µm per pixel, the network takes 1." in one for one in words)


def test_regions_end_where_the_slide_does(array_slide):
    values = np.ones((10, 30), np.float32)
    values[:, 28], values[1:, 29] = 0, 0  # leaves a place of a map pixel, too small to be told
    probability = ValueMap(values, 32.0, 32.0, "probability", "tumour", "", "")
    calibration = Calibration(0.5, {}, "layer3", "none", "drawings")
    card = ModelCard("test_resnet", ("normal", "tumour"), 64, 1.0, "drawings", calibration)
    maps = SlideMaps(probability, {"gradient": probability}, 1, 1)
    found = findings._findings(array_slide(np.zeros((310, 950, 3), np.uint8)), maps, card, calibration)
    assert [region.polygon.bounds for region in found.regions] == [(0, 0, 896, 310)] and found.score == 1
    assert findings.smallest_region_um2(64, 0.5) == 32**2


def test_the_slide_score_is_the_mean_of_the_top_percent():
    values = np.linspace(0, 1, 1000, dtype=np.float32)
    assert top_mean(values) == pytest.approx(values[-10:].mean(), abs=1e-6)
    assert top_mean(values[:5]) == pytest.approx(values[4])
    assert top_mean(values[:160]) == pytest.approx(values[158:160].mean())


def test_a_verdict_says_what_its_cut_off_did_and_none_is_invented():
    cut_off = SlideCutOff(0.4, 10, 10, 9, 1, (1.0, 0.69, 1.0), (8 / 9, 0.52, 0.997))
    below, sure = verdict(0.39, cut_off, "tumour")
    assert below == (
        "Below the cut-off 0.4, which found 10 of 10 validation slides with tumour and raised 1 of 9 without it."
    )
    assert sure.startswith("Sensitivity 100 % (95 % interval 69 % to 100 %), specificity 89 % (95 % interval 52 % to")
    assert verdict(0.4, cut_off, "tumour")[0].startswith("At or above the cut-off 0.4, which")
    # As many digits as tell it from the score.
    assert verdict(0.39996, cut_off, "tumour")[0].startswith("Below the cut-off 0.4, which")
    assert verdict(0.0743, replace(cut_off, score=0.0744), "tumour")[0].startswith("Below the cut-off 0.0744, which")
    no_normal = replace(cut_off, without=0, raised=0, specificity=None)
    said = " ".join(verdict(0.4, no_normal, "tumour"))
    assert "met none without it" in said and "specificity" not in said
    assert verdict(0.4, None, "tumour") == ("No cut-off is known for these weights: the slide score has no verdict.",)
