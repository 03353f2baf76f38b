"""Label-free maps of a slide gathered in parts, against the decomposition of all features at once."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from medsd.heatmap.dense import DenseEngine
from medsd.heatmap.features import FeatureStore
from medsd.heatmap.grid import MapGrid
from medsd.heatmap.label_free import LABEL_FREE, slide_maps
from medsd.heatmap.maps import MapSettings
from medsd.heatmap.partition import Rect
from medsd.heatmap.store import BlockStore
from medsd.saliency import label_free
from medsd.saliency.registry import METHODS
from medsd.slides.tissue import TissueMask
from tests.heatmap.made_up import all_tissue, noise, trained_looking


def features(channels: int = 12, side: int = 10) -> torch.Tensor:
    """Of unlike strengths, so that the first vectors are well apart."""
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(channels, side, side, generator=generator, dtype=torch.float64)
    return values * torch.linspace(3, 0.1, channels)[:, None, None] + 1


def of_one_image(name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    card = METHODS[name]
    return partial(getattr(label_free, card.home.rpartition(".")[2]), **card.options)


@pytest.mark.parametrize("name", LABEL_FREE)
def test_parts_equal_the_whole(name):
    whole = features()
    parts = [(part, torch.ones(part.shape[1:], dtype=torch.bool)) for part in whole.split((3, 5, 2), dim=2)]
    found = np.concatenate(slide_maps([name], parts)[name], axis=1)
    expected = of_one_image(name)(whole[None])[0].numpy()
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())


def test_only_the_tissue_is_decomposed():
    """Glass of any kind beside the tissue changes nothing in it."""
    whole = features()
    inside = torch.zeros(whole.shape[1:], dtype=torch.bool)
    inside[:, :6] = True
    changed = whole.clone()
    changed[:, ~inside] = 50.0
    one, other = (slide_maps(["eigencam", "mtsm"], [(values, inside)]) for values in (whole, changed))
    for name, maps in one.items():
        np.testing.assert_array_equal(maps[0][inside.numpy()], other[name][0][inside.numpy()])


def test_no_tissue_gives_zeros():
    (drawn,) = slide_maps(["tsm"], [(features(), torch.zeros(10, 10, dtype=torch.bool))])["tsm"]
    assert not drawn.any()


@pytest.mark.parametrize("block_px", [None, 256])
def test_a_slide_equals_the_decomposition_of_its_stitched_features(array_slide, tmp_path, block_px):
    slide = array_slide(noise(512, 576))
    settings = MapSettings(LABEL_FREE, "layer3", block_px=block_px)
    engine = DenseEngine(trained_looking("test_resnet"), 96, 1.0, settings=settings)
    maps = engine.map(slide, all_tissue(slide), store=tmp_path)
    assert list(maps.explanations) == list(LABEL_FREE)
    assert all(shown.target == "no class" and "no evidence" in shown.meaning for shown in maps.explanations.values())
    # The stitched features, of the cells that are tissue: a rectangle here.
    grids = [MapGrid.over(slide, 1.0, stride) for stride in engine.strides]
    plan, store = (
        engine._plan(grids, all_tissue(slide)),
        BlockStore(tmp_path / f"blocks-{block_px or 'auto'}"),
    )
    assert len(plan.nodes) > 1 or block_px is None
    scale, size = engine.cascade.top.taken, Rect(0, 0, *plan.size)
    stitched = torch.zeros(1, engine.cascade.channels[-1], size.height * scale, size.width * scale)
    for at, node in enumerate(plan.nodes):
        kept = torch.from_numpy(store.read(f"features-{at}")["features"])
        stitched[..., *node.rect.times(scale).within(size.times(scale))] = kept
    rows, columns = (np.flatnonzero(plan.tissue.any(axis=axis)) for axis in (1, 0))
    assert plan.tissue[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1].all()
    place = Rect(int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1).times(scale)
    inside = place.within(size.times(scale))
    for name, found in engine._label_free(plan, FeatureStore(store, 0)).items():
        expected = of_one_image(name)(stitched[..., *inside].double())[0].numpy()
        np.testing.assert_allclose(found[inside], expected, atol=1e-4 * np.abs(expected).max())
        shown = maps.explanations[name].values
        drawn = grids[1].placed(found, engine._hidden_shift)
        assert np.array_equal(shown[np.isfinite(shown)], drawn[np.isfinite(shown)])


def test_nothing_is_kept_of_glass_alone(array_slide):
    slide = array_slide(noise(256, 256))
    engine = DenseEngine(trained_looking("test_resnet"), 96, 1.0, settings=MapSettings(("eigencam",), "layer3"))
    maps = engine.map(slide, TissueMask(np.zeros((32, 32), bool), 8.0))
    assert not maps.saliency.seen.any()
