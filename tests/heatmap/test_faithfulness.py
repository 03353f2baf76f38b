"""Hiding places of a slide whose network is linear, so that what each place is worth is known."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from medsd.heatmap import faithfulness
from medsd.heatmap.faithfulness import Faithfulness, _above, judge_map, randomised_card, randomised_check
from medsd.heatmap.maps import MapSettings
from medsd.heatmap.sample import MOST_TILES, sample_tiles
from medsd.heatmap.value_map import ValueMap
from medsd.intervals import Interval
from medsd.networks.classifier import Normalise, TileClassifier
from medsd.networks.weights import Calibration
from medsd.saliency.metrics.agreement import rank_correlation
from medsd.saliency.metrics.perturb import baseline_image
from medsd.saliency.metrics.randomisation import randomised_cascade
from medsd.saliency.registry import make_method
from medsd.tables import read_table

TILE, STRIDE = 40, 4  # a tenth of a tile is 10 of its 100 map pixels


def judge(engine: Any, slide: Any, saliency: ValueMap, most: int = MOST_TILES) -> Faithfulness | None:
    return judge_map(engine, sample_tiles(engine, slide, saliency, most))


class Linear(nn.Module):
    """Log-odds: the sum of the pixels, each times its own weight."""

    device, classes = torch.device("cpu"), ("normal", "tumour")

    def __init__(self) -> None:
        super().__init__()
        self.normalise = Normalise()
        self.weight = torch.randn(3, TILE, TILE, generator=torch.Generator().manual_seed(0))

    def forward(self, x: Tensor) -> Tensor:
        worth = (x * self.weight).sum(dim=(1, 2, 3))
        return torch.stack([torch.zeros_like(worth), worth], dim=1)


@pytest.fixture(scope="module")
def engine() -> Any:
    return SimpleNamespace(
        tile_px=TILE,
        strides=(TILE, STRIDE),
        mpp=1.0,
        settings=MapSettings(),
        classifier=Linear(),
        evidence=lambda rows: rows[:, 1] - rows[:, 0],
    )


@pytest.fixture(scope="module")
def known(engine: Any, array_slide: Any) -> tuple[Any, ValueMap, np.ndarray]:
    """A slide of 4 x 5 tiles and glass, what each of its map pixels is worth against blur, and that tile by tile."""
    pixels = np.random.default_rng(0).integers(0, 256, (4 * TILE, 6 * TILE, 3), dtype=np.uint8)
    values = np.full((4 * TILE // STRIDE, 6 * TILE // STRIDE), np.nan, np.float32)
    tiles, side = [], TILE // STRIDE
    for row in range(4):
        for column in range(5):
            part = pixels[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]
            x = engine.classifier.normalise(torch.from_numpy(part.copy()).permute(2, 0, 1)[None])
            worth = ((x - baseline_image(x, "blur"))[0] * engine.classifier.weight).sum(dim=0)
            tiles.append(worth.view(side, STRIDE, side, STRIDE).sum(dim=(1, 3)).numpy())
            values[row * side : (row + 1) * side, column * side : (column + 1) * side] = tiles[-1]
    return array_slide(pixels), ValueMap(values, STRIDE, STRIDE, "saliency", "tumour", "exact", ""), np.stack(tiles)


def test_drops_are_what_the_hidden_places_are_worth(engine: Any, known: tuple[Any, ValueMap, np.ndarray]) -> None:
    slide, value_map, tiles = known
    found = judge(engine, slide, value_map)
    assert found is not None and found.tiles == 16  # of 20
    every = judge(SimpleNamespace(**vars(engine)), slide, value_map, most=3)
    assert every is None  # fewer than are worth an interval
    ranked = np.sort(tiles.reshape(20, -1), axis=1)
    highest, lowest = ranked[:, -10:].sum(axis=1), ranked[:, :10].sum(axis=1)
    assert highest.min() - 1e-2 <= found.brightest.value <= highest.max() + 1e-2
    assert lowest.min() - 1e-2 <= found.lowest.value <= lowest.max() + 1e-2
    assert found.brightest.low <= found.brightest.value <= found.brightest.high
    assert found.gained.value == pytest.approx(found.brightest.value - found.random.value)
    # The map is worth against blur: its sums are not the log-odds.
    assert replace(found, sure=0, agreeing=0).warning == ""
    assert "the 10 % brightest of the evidence map lowers the log-odds by" in found.words
    assert judge(engine, slide, value_map) == found


def test_all_tiles_of_a_slide_by_hand(
    engine: Any, known: tuple[Any, ValueMap, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    slide, value_map, tiles = known
    monkeypatch.setattr("medsd.heatmap.sample._ONE_IN", 1)
    found = judge(engine, slide, value_map)
    assert found is not None and found.tiles == 20
    ranked = np.sort(tiles.reshape(20, -1), axis=1)
    assert found.brightest.value == pytest.approx(ranked[:, -10:].sum(axis=1).mean(), abs=1e-2)
    assert found.lowest.value == pytest.approx(ranked[:, :10].sum(axis=1).mean(), abs=1e-2)
    # Random places are worth a tenth of the tile, give or take.
    spread = tiles.reshape(20, -1).std(axis=1).mean() * np.sqrt(10 / 20)
    assert abs(found.random.value - 0.1 * tiles.sum(axis=(1, 2)).mean()) < 4 * spread


def test_a_map_that_says_the_opposite_is_told(engine: Any, known: tuple[Any, ValueMap, np.ndarray]) -> None:
    slide, value_map, _ = known
    opposite = ValueMap(-value_map.values, STRIDE, STRIDE, "saliency", "tumour", "wrong", "")
    found = judge(engine, slide, opposite)
    assert found is not None and found.gained.high < 0
    assert "Do not believe the evidence map" in found.warning
    assert "the 10 % brightest of the evidence map raises the log-odds by" in found.words


@pytest.mark.parametrize(("method", "called"), [("mask", "mask"), ("gradcam", "saliency"), ("tsm", "strength")])
def test_a_map_is_called_what_its_title_says(
    engine: Any, known: tuple[Any, ValueMap, np.ndarray], method: str, called: str
) -> None:
    slide, value_map, _ = known
    other = SimpleNamespace(**vars(engine) | {"settings": replace(engine.settings, methods=(method,))})
    found = judge(other, slide, replace(value_map, values=-value_map.values))
    assert found is not None and f"Do not believe the {called} map:" in found.warning
    assert f"brightest of the {called} map" in found.words


@pytest.mark.parametrize("sign", [1, -1])
def test_sums_that_contradict_the_tiles_are_told(
    engine: Any, known: tuple[Any, ValueMap, np.ndarray], sign: int
) -> None:
    slide, value_map, _ = known
    values, side = value_map.values.copy(), TILE // STRIDE
    for row in range(4):
        for column in range(5):
            place = np.s_[row * side : (row + 1) * side, column * side : (column + 1) * side]
            pixels = torch.from_numpy(slide.read(column * TILE, row * TILE, TILE, TILE)).permute(2, 0, 1)[None]
            log_odds = float(engine.evidence(engine.classifier(engine.classifier.normalise(pixels)))[0])
            values[place] += (sign * log_odds - values[place].sum()) / side**2  # the order stays
    found = judge(engine, slide, ValueMap(values, STRIDE, STRIDE, "saliency", "tumour", "exact", ""))
    assert found is not None and found.sure > 8 and found.gained.low > 0
    assert found.agreeing == (found.sure if sign > 0 else 0)
    assert f"In {found.agreeing} of {found.sure} of them" in found.words
    assert replace(found, sure=7, agreeing=0).warning == ""  # a few at a border say nothing
    assert found.warning == "" if sign > 0 else f"{found.sure} of {found.sure} tiles that the network" in found.warning


@pytest.mark.parametrize(
    ("gained", "sure", "agreeing", "begins"),
    [
        ((0.3, 0.1, 0.5), 12, 12, ""),
        ((-0.1, -0.4, 0.2), 12, 12, ""),  # its sums are right; that places of normal tissue do not matter is no fault
        ((-0.1, -0.4, 0.2), 5, 5, "The evidence map may mean nothing here"),
        ((-0.1, -0.4, 0.2), 0, 0, "The evidence map may mean nothing here"),
        ((-0.5, -0.8, -0.2), 12, 12, "Do not believe the evidence map:"),
        ((-0.1, -0.4, 0.2), 12, 4, "Do not believe the maps:"),
        ((0.3, 0.1, 0.5), 12, 4, "Do not believe the maps:"),
    ],
)
def test_when_a_reader_is_warned(gained: tuple[float, ...], sure: int, agreeing: int, begins: str) -> None:
    drop, no = Interval(1.0, 0.5, 1.5), Interval(*gained)
    found = Faithfulness("evidence", 20, drop, drop, drop, no, sure=sure, agreeing=agreeing)
    assert found.warning.startswith(begins) and bool(found.warning) == bool(begins)
    assert ("not told apart from random places" in found.words) == (gained[1] <= 0 <= gained[2])


def test_only_tiles_that_the_network_is_sure_of_are_asked_for_their_sign(
    engine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clean, nothing = np.array([2.0, -2.0, 0.5, -0.5] * 4), np.zeros(16)
    drops = dict.fromkeys(("brightest", "random", "lowest", "gained"), nothing)
    monkeypatch.setattr(faithfulness, "_drops", lambda *_: (clean, drops))
    found = judge_map(engine, SimpleNamespace(images=torch.zeros(16, 3, 4, 4), maps=torch.ones(16, 2, 2)))  # type: ignore[arg-type]
    assert found is not None and (found.sure, found.agreeing) == (8, 4)


def test_a_slide_with_few_tiles_is_not_judged(engine: Any, known: tuple[Any, ValueMap, np.ndarray]) -> None:
    slide, value_map, _ = known
    values = value_map.values.copy()
    values[10:] = np.nan  # 5 tiles are left
    assert judge(engine, slide, ValueMap(values, STRIDE, STRIDE, "saliency", "tumour", "exact", "")) is None


def test_a_map_of_what_lies_below_does_not_depend_on_what_lies_above() -> None:
    torch.manual_seed(0)
    images = torch.randint(0, 256, (6, 3, 64, 64), dtype=torch.uint8)
    network = TileClassifier("test_resnet").eval()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    for method, bounds in (("channel_energy", (1 - 1e-6, 1.0)), ("gradient_x_activation", (-0.9, 0.9))):
        found = randomised_check(network, method, "layer2", None, images)
        assert bounds[0] <= found.correlation <= bounds[1], method
        assert found.tiles == 6 and found.layers == ("head", "encoder.layer4", "encoder.layer3")
        assert "with random weights in head, encoder.layer4, encoder.layer3" in found.words
    stages = randomised_cascade(
        network,
        lambda copy: make_method("gradient_x_activation", copy, "encoder.layer2", "evidence"),
        *(network.normalise(images), 1, found.layers),
    )
    alike = rank_correlation(stages[0].maps, stages[3].maps)
    assert found.correlation == pytest.approx(float(alike.mean()))
    tiles, labels = [{"image": image} for image in images], np.array([0, 0, 0, 1, 1, 1])
    of = Calibration(0.5, {"gradient_x_activation": 1.0}, "layer2", "none", "")
    assert randomised_card(network, of, tiles, labels) == asdict(found)
    for method in ("mask", "tsm"):
        assert randomised_card(network, replace(of, limits={method: 1.0}), tiles, labels) is None
    assert all(torch.equal(before[name], tensor) for name, tensor in network.state_dict().items())


def test_what_lies_above_a_layer_within_a_row() -> None:
    layers = _above(TileClassifier("test_efficientnet"), "blocks.2")
    assert layers[0] == "head" and layers[-1] == "encoder.blocks.3" and "encoder.conv_head" in layers
    assert not any(name in layers for name in ("encoder.blocks.2", "encoder.conv_stem", "encoder.blocks.1"))


def test_it_stands_in_report_record_and_table(mapped: Path) -> None:
    import json

    judged = json.loads((mapped / "record.json").read_text())["result"]
    content = json.loads((mapped / "record.json").read_text())
    drops = content["faithfulness"] if "faithfulness" in content else judged["faithfulness"]
    (row,) = read_table(mapped.parent / "slides.csv").to_dict("records")
    for name in ("brightest", "random", "lowest"):
        assert float(row[f"drop_{name}"]) == pytest.approx(drops[name]["value"])
    page = (mapped / "report.html").read_text().replace("\u00a0", " ")
    assert f"On {drops['tiles']} tiles of this slide, hiding the 10 % brightest of the saliency map" in page
