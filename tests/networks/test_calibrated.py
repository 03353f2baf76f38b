"""Prevalence in the logits: Bayes' rule on drawn class densities, and the card that keeps it."""

from __future__ import annotations

import json
import math
from dataclasses import asdict

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsd.networks.calibrated import (
    Calibration,
    LesionPoint,
    SlideCutOff,
    calibrated,
    logit_adjustment,
    read_calibration,
)

shares = st.lists(st.floats(0.01, 1), min_size=3, max_size=3)


@given(shares, shares, st.integers(0, 100))
@settings(max_examples=25, deadline=None)
def test_logits_of_one_prevalence_become_those_of_another(drawn: list[float], tissue: list[float], seed: int) -> None:
    """Exact where a network has learnt p(class | place): the same densities, other shares of the classes."""
    p, q = (np.array(values) / sum(values) for values in (drawn, tissue))
    density = np.random.default_rng(seed).dirichlet(np.ones(7), size=3)  # of 7 places, a row a class
    learnt, wanted = (share[:, None] * density / (share @ density) for share in (p, q))
    logits = torch.from_numpy(3.0 * np.log(learnt.T))  # three times as sure as they should be
    found = calibrated(logits, 3.0, logit_adjustment(p.tolist(), q.tolist())).softmax(dim=1)
    np.testing.assert_allclose(found.T, wanted, rtol=1e-9, atol=1e-12)
    maps = logits.T.reshape(1, 3, 7, 1)
    torch.testing.assert_close(calibrated(maps, 3.0, (0.0, 1.0, 2.0))[0, :, :, 0].T, logits / 3 + torch.arange(3.0))


def test_log_odds_move_by_the_difference_of_the_logits_of_the_shares() -> None:
    logits = torch.tensor([[0.3, 1.5]], dtype=torch.float64)
    ((normal, tumour),) = calibrated(logits, 1.5, logit_adjustment((0.5, 0.5), (0.96, 0.04)))
    assert float(tumour - normal) == pytest.approx(1.2 / 1.5 + math.log(0.04 / 0.96))
    assert logit_adjustment((0.5, 0.5), ()) == () and torch.equal(calibrated(logits, 1.5), logits / 1.5)


def test_a_calibration_through_json_is_the_same() -> None:
    cut_off = SlideCutOff(0.4, 10, 10, 9, 1, (1.0, 0.69, 1.0), (0.89, 0.52, 1.0))
    point = LesionPoint(0.5, 9, 4, 20, 19)
    shares = {"drawn_shares": (0.5, 0.5), "tissue_shares": (0.9, 0.1), "bias": (0.25, -0.25)}
    full = Calibration(0.3, {}, "layer3", "none", "a test", 2.0, **shares, lesions=point, cut_off=cut_off)
    assert read_calibration(json.loads(json.dumps(asdict(full)))) == full
    assert full.offset == pytest.approx((math.log(1.8) + 0.25, math.log(0.2) - 0.25))
    old = {"threshold": 0.3, "limits": {}, "layer": "layer3", "smoothing": "none", "source": "a test"}
    assert read_calibration(old) == Calibration(0.3, {}, "layer3", "none", "a test")
    assert read_calibration(old).offset == () and read_calibration(old).cut_off is None
    called = {"having": "tumour", "without": "normal"}  # before there were other classes
    fields = {called.get(name, name): value for name, value in asdict(cut_off).items()}
    assert read_calibration({**old, "cut_off": fields}).cut_off == cut_off
    with pytest.raises(KeyError):
        read_calibration({**old, "cut_off": {"score": 0.4}})
