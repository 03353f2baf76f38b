"""Weak masks: where evidence is sure, what walkers add, where evidence lies, and a loss of what somebody speaks of."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from monai.losses import DiceCELoss

from medsd.errors import ConfigError, DatasetError
from medsd.networks.classifier import TileClassifier
from medsd.networks.effective_field import measure_effective_field
from medsd.segment.weak import IGNORED, Evidence, SureDiceCELoss, WeakLabelling


def test_what_is_not_sure_is_nobodys() -> None:
    evidence = np.array([[-5.0, -2.0, 0.0], [2.0, 2.1, -2.1]])
    mask = WeakLabelling(sure=2.0).mask(np.zeros((2, 3, 3), np.uint8), evidence)
    assert mask.tolist() == [[0, IGNORED, IGNORED], [IGNORED, 1, 0]]


def test_walkers_stop_at_edges() -> None:
    """Seeds in the middle of either half; the edge between lies nearer to one of them."""
    image = np.full((24, 48, 3), 220, np.uint8)
    image[:, 30:] = 90
    image += np.random.default_rng(0).integers(0, 9, image.shape, np.uint8)
    evidence = np.zeros((24, 48))
    evidence[8:16, 4:10], evidence[8:16, 34:44] = -5, 5
    alone = WeakLabelling().mask(image, evidence)
    filled = WeakLabelling(fill="random_walker").mask(image, evidence)
    assert (filled[alone != IGNORED] == alone[alone != IGNORED]).all()
    assert (alone == IGNORED).mean() > 0.85 and (filled == IGNORED).mean() < 0.15
    assert (filled[:, :29] != 1).all() and (filled[:, 31:] != 0).all()
    # Where one of the two is lacking, walkers could only say the other.
    only = WeakLabelling(fill="random_walker").mask(image, np.maximum(evidence, 0))
    assert set(np.unique(only)) == {1, IGNORED}


class Sampling:
    """An engine whose maps hold, in each cell, the green of the pixel that the cell looks at, and no more."""

    tile_px = 64
    settings = SimpleNamespace(layer="layer2")

    def __init__(self) -> None:
        self.classifier = TileClassifier("test_resnet").eval()
        self.field = measure_effective_field(self.classifier, "layer2")
        self.cells = self.tile_px // self.field.stride

    def patch_saliency(self, tiles: torch.Tensor) -> np.ndarray:
        places = self.field.centre + np.arange(self.cells) * self.field.stride - 0.5
        green, grid = tiles[:, 1].double().numpy(), np.arange(self.tile_px)
        rows = np.stack([[np.interp(places, grid, column) for column in one.T] for one in green])
        found = np.stack([[np.interp(places, grid, row) for row in one.transpose(1, 0)] for one in rows])
        return found.astype(np.float32) / self.cells**2


def test_evidence_lies_where_cells_look() -> None:
    """A ramp has one value a place, so a shift would show; its values are those of a whole tile."""
    ramp = np.broadcast_to(np.arange(160), (100, 160)).astype(np.uint8)
    image = np.stack([ramp * 0, ramp, ramp * 0], axis=2)
    evidence = Evidence(Sampling())
    found = evidence(image)
    assert found.shape == (100, 160)
    assert np.abs(found - ramp)[:, 8:-8].max() < 0.1  # beyond its first and last cell nothing is known
    turned = evidence(image.transpose(1, 0, 2))
    np.testing.assert_allclose(turned, found.T, atol=1e-3)


def test_images_must_hold_a_tile() -> None:
    with pytest.raises(DatasetError, match=r"60 x 100 px are smaller than the classifier's tiles \(64 px\)"):
        Evidence(Sampling())(np.zeros((100, 60, 3), np.uint8))


def test_the_loss_is_monais_of_the_pixels_that_are_known() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 12, 10, generator=generator, requires_grad=True)
    mask = torch.randint(0, 3, (2, 1, 12, 10), generator=generator).to(torch.uint8)
    usual = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)
    torch.testing.assert_close(SureDiceCELoss()(logits, mask), usual(logits, mask))
    partly = mask.clone()
    partly[:, :, :5] = IGNORED
    loss = SureDiceCELoss()(logits, partly)
    torch.testing.assert_close(loss, usual(logits[:, :, 5:], mask[:, :, 5:]))
    loss.backward()
    assert not logits.grad[:, :, :5].any() and logits.grad[:, :, 5:].any()
    nothing = SureDiceCELoss()(logits, torch.full_like(mask, IGNORED))
    assert float(nothing) == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [({"sure": -1.0}, "sure=-1"), ({"fill": "walker"}, "random_walker"), ({"beta": 0.0}, "beta=0")],
)
def test_bad_settings_are_named(options, words) -> None:
    with pytest.raises(ConfigError, match=words):
        WeakLabelling(**options)
