"""Scores of explanations on networks that are known to look at one place, and the bootstrap of means."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medsd.errors import ConfigError, DatasetError
from medsd.evaluate import explanations as module
from medsd.evaluate.explanations import ExplanationSettings, explanation_maps, score_explanations
from medsd.evaluate.features import feature_health
from medsd.evaluate.scores import bootstrap_mean
from medsd.files import as_json
from medsd.networks.aim import AimClassifier
from medsd.networks.classifier import TileClassifier

SIDE = 16
SETTINGS = ExplanationSettings(items=12, draws=2, steps=4)


class Corner(nn.Module):
    """Calls a tile tumour where its top left quarter is darker than 128, as its features (quarter, whole) say."""

    def __init__(self) -> None:
        super().__init__()
        self.classes = ("normal", "tumour")
        self.head = nn.Linear(2, 2)
        with torch.no_grad():
            self.head.weight[:] = torch.tensor([[4.0, 0.0], [-4.0, 0.0]])
            self.head.bias[:] = torch.tensor([0.2, 0.0])  # grey is normal

    def normalise(self, images: Tensor) -> Tensor:
        return images.float() / 127.5 - 1

    def features(self, x: Tensor) -> Tensor:
        x = self.normalise(x) if x.dtype == torch.uint8 else x
        half = x.shape[-1] // 2
        return torch.stack([x[..., :half, :half].mean(dim=(1, 2, 3)), x.mean(dim=(1, 2, 3))], dim=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


def tiles(count: int = 20, side: int = SIDE, seed: int = 0) -> list[dict[str, Tensor]]:
    """Tiles whose top left corner tells their label: a fifth is tumour, dark there.

    The bottom half is the inverse of the top one, so that every tile's mean is that of every other.
    """
    rng = np.random.default_rng(seed)
    items = []
    for number in range(count):
        label = int(number % 5 == 0)
        top = rng.integers(0, 128, (2, 3, side // 2, side // 2)).astype(np.uint8)
        top[0] += 128 * (1 - label)
        image = np.concatenate([np.concatenate(list(half), axis=2) for half in (top, 255 - top)], axis=1)
        items.append({"image": torch.from_numpy(image), "label": torch.tensor(label)})
    return items


def corner(_number: int) -> np.ndarray:
    inside = np.zeros((SIDE, SIDE), bool)
    inside[: SIDE // 2, : SIDE // 2] = True
    return inside


@pytest.fixture(scope="module")
def scores():
    return score_explanations(Corner().train(), tiles(), SETTINGS, corner)


def test_a_map_of_the_deciding_corner_is_faithful_and_points_there(scores):
    maps = scores.maps["gradient"]
    assert maps["pointing"].value == maps["pointing_game"].value == 1
    assert scores.area_share.value == 0.25 and scores.pointed == 4
    assert maps["accuracy"][0].value == 1 and scores.random["accuracy"][0].value == 1
    # Once the salient quarter is filled with the tile's mean all tiles are called normal; 4 of 12 are not.
    assert [step.value for step in maps["accuracy"][3:]] == pytest.approx([8 / 12] * 7)
    assert maps["gap"].value > 0.05 and maps["gap"].low > 0
    assert maps["deletion"].value < maps["insertion"].value
    assert maps["gap"].value == pytest.approx(
        scores.random["masking_area"].value - maps["masking_area"].value, abs=1e-6
    )


def test_the_gradient_is_the_evidences(scores):
    """Evidence is 8 * the corner's mean, whose gradient is 8 / (3 * 64) at each of its pixels and channels."""
    maps = scores.maps["gradient"]
    assert maps["magnitude"].value == pytest.approx(8 / 192 / 4, rel=1e-5)
    assert maps["gini"].value == pytest.approx(0.75)  # a quarter of the pixels holds everything, evenly
    assert maps["entropy"].value == pytest.approx(math.log(64) / math.log(256))
    assert maps["total_variation"].value == pytest.approx(16 / 480 * 4)  # 16 edges of 480 around the corner


def test_counts_and_features_are_of_all_items_maps_of_an_even_draw(scores):
    network = Corner()
    assert (scores.items, scores.judged) == (20, 12)  # 4 tumour, 8 normal: as even as there are
    features = torch.cat([network.features(tile["image"][None]) for tile in tiles()])
    health = feature_health(features)
    assert scores.features.effective_rank == pytest.approx(health.effective_rank, rel=1e-6)
    assert scores.features.dead_channels == health.dead_channels
    assert scores.random["masking_area"].resamples == 2000


def test_features_that_are_there_are_not_computed_again(scores):
    features = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
    collected = features, np.array([int(tile["label"]) for tile in tiles()])
    found = score_explanations(Corner(), tiles(), SETTINGS, corner, collected=collected)
    assert found.features == feature_health(features) and found.maps == scores.maps


def test_the_same_seed_gives_the_same_scores_and_json_holds_them(scores):
    again = score_explanations(Corner(), tiles(), SETTINGS, corner)
    assert again == scores
    content = json.loads(json.dumps(as_json(scores), allow_nan=False))
    assert content["settings"]["steps"] == 4
    assert content["maps"]["gradient"]["gap"]["value"] == scores.maps["gradient"]["gap"].value
    assert len(content["maps"]["gradient"]["accuracy"]) == len(content["shares"]) == 10
    assert set(content["maps"]) == {"gradient"}


@pytest.mark.parametrize(
    "region", [None, lambda _: np.zeros((SIDE, SIDE), bool), lambda _: np.ones((SIDE, SIDE), bool)]
)
def test_without_a_region_to_tell_apart_pointing_is_undefined(region):
    scores = score_explanations(Corner(), tiles(6), SETTINGS, region)
    assert scores.pointed == 0 and math.isnan(scores.maps["gradient"]["pointing"].value)
    assert as_json(scores)["maps"]["gradient"]["pointing"]["value"] is None


def test_an_empty_map_points_at_nothing_and_counts(monkeypatch):
    """Else a network with empty masks would be judged by the few tiles where they are not."""
    chances = iter([1.0, 0.0, 0.0, 0.0])

    def maps(_classifier, x, labels):
        values = torch.zeros(len(x), SIDE, SIDE)
        for row in torch.nonzero(labels).flatten():
            values[row, 0, 0] = next(chances)
        return {"gradient": values}

    monkeypatch.setattr(module, "explanation_maps", maps)
    found = score_explanations(Corner(), tiles(), SETTINGS, corner).maps["gradient"]
    assert found["pointing"].value == found["pointing_game"].value == 0.25


def test_regions_of_normal_tiles_do_not_count():
    asked = []
    score_explanations(Corner(), tiles(10), SETTINGS, lambda number: asked.append(number) or corner(number))
    assert sorted(asked) == [0, 5]


def test_evidence_of_three_classes_is_the_logit_above_the_mean_of_the_others():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 3))
    x, labels = torch.randn(2, 3, 4, 4), torch.tensor([2, 0])
    weight = network[1].weight.view(3, 3, 4, 4)
    expected = [weight[2] - (weight[0] + weight[1]) / 2, weight[0] - (weight[1] + weight[2]) / 2]
    found = explanation_maps(network, x, labels)["gradient"]
    torch.testing.assert_close(found, torch.stack(expected).mean(dim=1).abs().detach())
    assert not found.requires_grad and all(p.grad is None for p in network.parameters())


def test_real_classifiers_are_left_as_they_were():
    network = TileClassifier("resnet10t").train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    scores = score_explanations(network, tiles(6, 32), ExplanationSettings(items=4, draws=1, steps=2))
    assert set(scores.maps) == {"gradient"} and network.training
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in network.parameters())


def test_a_classifiers_own_masks_are_judged_too():
    torch.manual_seed(0)
    network = AimClassifier("resnet10t", feature_width=8, mask_width=4).eval()
    batch = network.normalise(torch.stack([tile["image"] for tile in tiles(2, 64)]))
    masks = network.masked(batch).masks
    assert [mask.shape[-1] for mask in masks] == [2, 4]
    maps = explanation_maps(network, batch, torch.tensor([1, 0]))
    known = np.stack(
        [np.kron(mask[:, 0].numpy(), np.ones((1, 64 // s, 64 // s))) for mask, s in zip(masks, (2, 4), strict=True)]
    )
    np.testing.assert_array_equal(maps["mask"], known.mean(axis=0))
    assert set(maps) == {"gradient", "mask"}
    scores = score_explanations(network, tiles(4, 64), ExplanationSettings(items=2, draws=1, steps=2))
    assert 0 <= scores.maps["mask"]["magnitude"].value <= 1


def test_bad_input_is_named():
    with pytest.raises(DatasetError, match="at least 2"):
        score_explanations(Corner(), tiles(1), SETTINGS)
    wrong = tiles(4)
    wrong[2]["label"] = torch.tensor(-1)
    with pytest.raises(DatasetError, match="label -1; give tiles of the classes normal, tumour"):
        score_explanations(Corner(), wrong, SETTINGS)
    with pytest.raises(DatasetError, match=r"tile 0 is \(16, 16\) px, its region \(8, 8\)"):
        score_explanations(Corner(), tiles(6), SETTINGS, lambda _: np.ones((8, 8), bool))
    with pytest.raises(ConfigError, match="target=2: must be a whole number from 0 to 1; a class's number"):
        score_explanations(Corner(), tiles(4), replace(SETTINGS, target=2))
    with pytest.raises(ConfigError, match="target='tumour'"):
        replace(SETTINGS, target="tumour")
    for name in ("items", "draws", "steps", "batch_size"):
        with pytest.raises(ConfigError, match=f"{name}=0"):
            ExplanationSettings(**{name: 0})


# ---- bootstrap of a mean


def test_bootstrap_of_a_mean_covers_like_the_normal_law():
    values = np.random.default_rng(0).normal(3, 2, 400)
    interval = bootstrap_mean(values)
    half = 1.96 * values.std() / 20
    assert interval.value == pytest.approx(values.mean())
    assert (interval.low, interval.high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.02)
    assert bootstrap_mean(values) == interval != bootstrap_mean(values, seed=1)


def test_bootstrap_of_nothing_and_of_bad_values():
    assert math.isnan(bootstrap_mean([]).value) and bootstrap_mean([]).resamples == 0
    assert np.isnan(bootstrap_mean([2.0]).low) and bootstrap_mean([2.0]).value == 2
    for wrong in ([1.0, math.nan], [[1.0]], [math.inf]):
        with pytest.raises(DatasetError, match="mean of"):
            bootstrap_mean(wrong)
    with pytest.raises(ConfigError, match="resamples=0"):
        bootstrap_mean([1.0], resamples=0)
