"""Best IoU against every threshold by brute force, and maps whose answer is known."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from medsd.errors import DatasetError
from medsd.saliency.metrics.pointing import area_share, best_iou

VALUES = st.lists(st.integers(-3, 3), min_size=12, max_size=12)
INSIDE = st.lists(st.booleans(), min_size=12, max_size=12)


@given(VALUES, INSIDE.filter(any))
@settings(max_examples=150, deadline=None)
def test_equals_trying_every_threshold(values, inside):
    maps = torch.tensor(values, dtype=torch.float64).view(1, 3, 4)
    region = torch.tensor(inside).view(1, 3, 4)
    tried = {}
    for threshold in sorted(set(values), reverse=True):
        cut = maps >= threshold
        tried[threshold] = float((cut & region).sum() / (cut | region).sum())
    best = max(tried.values())
    assert float(best_iou(maps, region)) == pytest.approx(best, abs=1e-6)
    assert best >= float(area_share(region)) - 1e-6


def test_known_maps():
    region = torch.zeros(4, 6, 8, dtype=torch.bool)
    region[:3, 1:4, 2:6] = True
    maps = torch.stack([region[0] * 2.0 - 5, torch.ones(6, 8), -region[0].float(), torch.rand(6, 8)])
    scores = best_iou(maps, region)
    assert scores[:3].tolist() == pytest.approx([1, 12 / 48, 12 / 48])  # the inverted map is best taken whole
    assert math.isnan(scores[3])


def test_scale_does_not_count():
    generator = torch.Generator().manual_seed(1)
    maps, region = torch.randn(3, 7, 7, generator=generator), torch.rand(3, 7, 7, generator=generator) < 0.4
    assert torch.equal(best_iou(maps, region), best_iou(maps * 8 + 2, region))
    assert torch.equal(best_iou(maps, region)[1:2], best_iou(maps[1:2], region[1:2]))


def test_bad_input_is_named():
    with pytest.raises(DatasetError, match="give a bool region"):
        best_iou(torch.rand(1, 6, 7), torch.ones(1, 6, 8, dtype=torch.bool))
    with pytest.raises(DatasetError, match="finite"):
        best_iou(torch.full((1, 2, 2), math.inf), torch.ones(1, 2, 2, dtype=torch.bool))
