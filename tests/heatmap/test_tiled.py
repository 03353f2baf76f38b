"""The tiled engine against tiles one by one, the dense engine and known places."""

from __future__ import annotations

import copy
import logging

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from medsd.errors import ConfigError, NetworkError
from medsd.heatmap.dense import DenseEngine
from medsd.heatmap.engine import make_engine
from medsd.heatmap.maps import MapSettings
from medsd.heatmap.tiled import TiledEngine, blend_window
from medsd.networks.aim import AimClassifier
from medsd.networks.classifier import TileClassifier
from medsd.networks.symmetry import turned, turned_back
from medsd.saliency.neutral import NeutralReference
from medsd.slides.tissue import TissueMask
from tests.heatmap.made_up import spread

MASK = MapSettings(("mask",))


@pytest.fixture(scope="module")
def squeezing() -> TileClassifier:
    """A network with squeeze-excite."""
    torch.manual_seed(0)
    network = spread(TileClassifier("test_efficientnet"))
    network.head.weight.data *= 20  # probabilities that differ
    return network


@pytest.fixture(scope="module")
def masking() -> AimClassifier:
    torch.manual_seed(0)
    network = spread(AimClassifier("test_resnet", feature_width=16, mask_width=8))
    for estimator in network.mask_estimators.values():
        torch.nn.init.constant_(estimator.spatial.bias, 0.0)
    network.head.weight.data *= 20
    # Masks neither all open nor all closed, or the tests would compare constants.
    with torch.no_grad():
        x = torch.from_numpy(noise(96, 96)).permute(2, 0, 1)[None]
        features = dict(enumerate(network.encoder.forward_intermediates(network.normalise(x), intermediates_only=True)))
        for name, estimator in network.mask_estimators.items():
            estimator.spatial.bias -= estimator(features[int(name) + 1]).median()
    return network


def all_tissue(slide) -> TissueMask:
    width, height = slide.dimensions
    return TissueMask(np.ones((height // 8 + 8, width // 8 + 8), bool), 8.0)  # beyond the last map pixel


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Blots of all sizes: plain noise looks alike to every tile."""
    rng = np.random.default_rng(seed)
    sizes = [(1, 1, 1), (8, 8, 4), (64, 64, 16)]
    picture = sum(
        np.kron(rng.normal(size=(-(-height // a), -(-width // b), 3)), np.ones((a, b, 1)))[:height, :width] * 15
        for a, b, _ in sizes
    )
    return np.clip(picture + 128, 0, 255).astype(np.uint8)


def starts(engine: TiledEngine, pixels: int, cells: int) -> list[int]:
    """Tiles from the first on, until both maps are covered to their last pixel's middle."""
    found = [engine.origin_px]
    while (
        found[-1] + engine.tile_px <= (pixels - 0.5) * engine.stride
        or found[-1] + engine.hidden.centre + engine.tile_px
        < (cells - 0.5) * engine.hidden.stride + engine.hidden.stride / 2
    ):
        found.append(found[-1] + engine.step_px)
    return found


def brute_force(engine: TiledEngine, pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both maps in float64, each map pixel from a plain loop over every tile that touches the picture."""
    tile, step, stride, hidden = engine.tile_px, engine.step_px, engine.stride, engine.hidden.stride
    height, width = pixels.shape[:2]
    padded = np.pad(pixels, ((2 * tile, 2 * tile), (2 * tile, 2 * tile), (0, 0)), constant_values=255)
    results = []
    for side in (stride, hidden):
        results.append(np.zeros((2, -(-height // side), -(-width // side))))
    for top in starts(engine, *(total.shape[1] for total in results)):
        for left in starts(engine, *(total.shape[2] for total in results)):
            image = padded[top + 2 * tile : top + 3 * tile, left + 2 * tile : left + 3 * tile]
            probability, saliency = engine.run(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])
            cell = (
                round((top + engine.hidden.centre) / hidden - 0.5),
                round((left + engine.hidden.centre) / hidden - 0.5),
            )
            for (total, weight), side, is_probability in zip(results, (stride, hidden), (True, False), strict=True):
                for row, column in np.ndindex(total.shape):
                    if is_probability:
                        x, y = (column + 0.5) * side - left, (row + 0.5) * side - top
                        value = probability[0]
                    else:
                        j, i = row - cell[0], column - cell[1]
                        x, y = (i + 0.5) * side, (j + 0.5) * side
                        value = saliency[0, j, i] if 0 <= j < saliency.shape[1] > i >= 0 else 0.0
                    if 0 < x < tile and 0 < y < tile:
                        share = np.prod([min(1.0, 0.5 - 0.5 * np.cos(np.pi * min(z, tile - z) / (tile - step)))
                                         if min(z, tile - z) < tile - step else 1.0 for z in (x, y)])  # fmt: skip
                        total[row, column] += share * value
                        weight[row, column] += share
    return tuple(total / weight for total, weight in results)


@given(cells=st.integers(1, 40), stride=st.integers(1, 64), fraction=st.floats(0, 1, exclude_max=True))
def test_windows_sum_to_one(cells, stride, fraction):
    tile_px, step_px = cells * stride, -(-cells // 2) * stride
    place = fraction * step_px
    offsets = np.arange(-2, 3) * step_px + place
    held = offsets[(offsets >= 0) & (offsets < tile_px)]
    weights = blend_window(held, tile_px, step_px)
    assert weights.sum() == pytest.approx(1, abs=1e-12)
    assert (weights >= 0).all()


def test_the_window_is_hann_where_tiles_overlap_by_half():
    places = np.arange(64) + 0.5
    np.testing.assert_allclose(blend_window(places, 64, 32), 0.5 - 0.5 * np.cos(2 * np.pi * places / 64), atol=1e-12)


@pytest.mark.parametrize(
    ("kind", "tile_px", "settings"),
    [
        ("squeezing", 64, MapSettings(("gradient_x_activation",), "blocks.2")),
        ("squeezing", 96, MapSettings(("gradient",), "blocks.3", "none")),
        ("masking", 64, MASK),
        ("masking", 96, MapSettings(("gradient_x_activation",), "layer2")),
    ],
)
def test_maps_equal_tiles_one_by_one(request, array_slide, kind, tile_px, settings):
    pixels = noise(100, 130)
    engine = TiledEngine(request.getfixturevalue(kind), tile_px, 1.0, settings=settings, temperature=1.7)
    slide = array_slide(pixels)
    maps = engine.map(slide, all_tissue(slide))
    for found, expected in zip((maps.probability, maps.saliency), brute_force(engine, pixels), strict=True):
        assert found.values.shape == expected.shape and np.isfinite(found.values).all()
        assert np.ptp(expected) > 1e-2 * np.abs(expected).max()
        np.testing.assert_allclose(found.values, expected, rtol=0, atol=1e-6 * max(1, np.abs(expected).max()))


def test_the_batch_size_changes_nothing(squeezing, array_slide):
    slide = array_slide(noise(150, 130))
    many, single = (
        TiledEngine(squeezing, 64, 1.0, settings=MapSettings(("gradient_x_activation",), "blocks.2", batch=batch)).map(
            slide, all_tissue(slide)
        )
        for batch in (5, 1)
    )
    assert many.blocks == single.blocks == 16
    for one, other in ((many.probability, single.probability), (many.saliency, single.saliency)):
        np.testing.assert_allclose(one.values, other.values, rtol=0, atol=1e-5 * np.abs(one.values).max())


def test_a_constant_network_gives_constant_maps(array_slide):
    torch.manual_seed(0)
    network = AimClassifier("test_resnet", feature_width=8, mask_width=8).eval()
    torch.nn.init.zeros_(network.head.weight)
    network.head.bias.data = torch.tensor([0.0, 3.0])
    for estimator in network.mask_estimators.values():
        torch.nn.init.constant_(estimator.spatial.bias, 50.0)
    slide = array_slide(noise(333, 207))
    maps = TiledEngine(network, 96, 1.0, settings=MASK, temperature=2.0).map(slide, all_tissue(slide))
    np.testing.assert_allclose(maps.probability.values, torch.tensor(1.5).sigmoid(), atol=1e-6)
    np.testing.assert_allclose(maps.saliency.values, 1.0, atol=1e-6)
    assert (maps.saliency.quantity, maps.saliency.unit) == ("mask", "share of masks open")


@pytest.mark.parametrize(("height", "width"), [(40, 50), (1, 1), (64, 300)])
def test_slides_smaller_than_a_tile(squeezing, array_slide, height, width):
    slide = array_slide(noise(height, width))
    engine = TiledEngine(squeezing, 64, 1.0, settings=MapSettings(("gradient_x_activation",), "blocks.2"))
    maps = engine.map(slide, all_tissue(slide))
    assert np.isfinite(maps.probability.values).all() and np.isfinite(maps.saliency.values).all()
    assert maps.saliency.values.shape == (-(-height // 8), -(-width // 8))
    if max(height, width) < 60:
        assert maps.blocks == 1


def test_nothing_is_read_without_tissue(squeezing, array_slide):
    slide = array_slide(noise(384, 384))
    mask = np.zeros((48, 48), bool)
    mask[16:32, 16:32] = True
    engine = TiledEngine(squeezing, 64, 1.0, settings=MapSettings(("gradient_x_activation",), "blocks.2"))
    maps = engine.map(slide, TissueMask(mask, 8.0))
    assert maps.saliency.seen.sum() == 16 * 16 and maps.saliency.seen[16:32, 16:32].all()
    assert maps.probability.seen.sum() == 4 * 4
    # Tissue of 128 px, the tiles' reach and half a stride cell on either side, at steps of 32 px.
    assert maps.blocks <= ((128 + 2 * 16 + 64) // 32 + 1) ** 2
    assert maps.pixels_read == maps.blocks * 64**2
    whole = engine.map(slide, all_tissue(slide))
    seen = maps.saliency.seen
    np.testing.assert_allclose(maps.saliency.values[seen], whole.saliency.values[seen], rtol=1e-4, atol=1e-7)
    empty = engine.map(slide, TissueMask(np.zeros((48, 48), bool), 8.0))
    assert empty.blocks == 0 and not empty.probability.seen.any() and empty.unseen == 0


def test_what_cannot_be_decoded_is_not_judged(squeezing, array_slide):
    class Damaged(array_slide):
        def read_seen(self, x, y, width, height, mpp=None):
            rows, columns = np.arange(height) + y, np.arange(width) + x
            seen = ~(((rows >= 96) & (rows < 128))[:, None] & ((columns >= 64) & (columns < 128))[None])
            return self.read(x, y, width, height, mpp), None if seen.all() else seen

    slide = Damaged(noise(256, 256))
    maps = TiledEngine(squeezing, 64, 1.0, settings=MapSettings(("gradient_x_activation",), "blocks.2")).map(
        slide, all_tissue(slide)
    )
    hole = ~maps.saliency.seen
    assert hole[12:16, 8:16].all() and hole.sum() == 4 * 8
    assert (maps.lost == hole).all() and maps.unseen == pytest.approx(32 / 32**2)
    assert (~maps.probability.seen)[3, 2:4].all() and (~maps.probability.seen).sum() == 2


@pytest.mark.parametrize(("tile_px", "symmetric"), [(32, False), (64, False), (64, True)])
def test_fiducials_are_at_their_place(green_classifier, fiducial_slide, fiducials, tile_px, symmetric):
    from medsd.slides.slide import open_slide

    network = copy.deepcopy(green_classifier)
    network.augment_at_test_time(symmetric)
    engine = make_engine(
        network,
        tile_px,
        1.0,
        settings=MapSettings(("gradient_x_activation",), "layer2", smoothing="none", way="tiled"),
    )
    with open_slide(fiducial_slide) as slide:
        # Only around the discs, to be quick.
        rows, columns = np.indices((128, 128)) * 16 + 8
        mask = np.logical_or.reduce([np.maximum(abs(columns - x), abs(rows - y)) < 192 for x, y in fiducials])
        maps = engine.map(slide, TissueMask(mask, 16.0))
    for value_map in (maps.probability, maps.saliency):
        assert 100 < value_map.seen.sum() < value_map.seen.size / 4
        values = np.nan_to_num(value_map.values)
        rows, columns = np.indices(value_map.values.shape)
        for x, y in fiducials:
            across, down = (columns + 0.5) * value_map.level0_px - x, (rows + 0.5) * value_map.level0_px - y
            near = np.hypot(across, down) < 160
            assert values[near].max() > 0.5 * values.max()
            weight = values * near
            found = [(axis * weight).sum() / weight.sum() for axis in (across, down)]
            # What a mean over the symmetries looks at lies square on its pixel.
            off = value_map is maps.probability or not symmetric
            assert np.abs(found).max() <= value_map.level0_px * (1 if off else 0.25)


def test_a_symmetric_network_maps_a_turned_slide_to_the_turned_map(squeezing, array_slide):
    pixels, symmetric = noise(128, 128), copy.deepcopy(squeezing)
    symmetric.augment_at_test_time(True)
    settings = MapSettings(("gradient_x_activation",), "blocks.2")
    change = {}
    for words, network in (("alone", squeezing), ("symmetric", symmetric)):
        engine = make_engine(network, 64, 1.0, settings=settings)
        found = []
        for number in (0, 5):
            slide = array_slide(turned(torch.from_numpy(pixels).permute(2, 0, 1), number).permute(1, 2, 0).numpy())
            maps = engine.map(slide, all_tissue(slide))
            values = (maps.probability.values, maps.saliency.values)
            found.append([turned_back(torch.from_numpy(each), number).numpy() for each in values])
        change[words] = [np.abs(one - other).max() / np.abs(one).max() for one, other in zip(*found, strict=True)]
    assert max(change["symmetric"]) < 1e-4
    assert min(change["alone"]) > 1e-2


def test_the_additive_map_of_a_symmetric_network_sums_to_its_answer(squeezing):
    network = copy.deepcopy(squeezing)
    network.augment_at_test_time(True)
    images = torch.from_numpy(np.stack([noise(64, 64, seed) for seed in range(6)])).permute(0, 3, 1, 2)
    settings = MapSettings(("deeplift",), "blocks.2", "none")
    engine = make_engine(network, 64, 1.0, settings=settings, temperature=0.05)
    with torch.no_grad():
        odds = engine.evidence(network(images))
        network.head.bias += odds.median() * 0.05 * torch.tensor([0.5, -0.5])
        odds = engine.evidence(network(images))
    engine.reference = engine.neutral([images[odds < 0]], [images[odds > 0]], "noise")
    probability, maps = engine.run(images)
    assert odds.abs().max() > 0.1
    np.testing.assert_allclose(probability, odds.sigmoid().numpy(), atol=1e-5)
    np.testing.assert_allclose(maps.sum(axis=(1, 2)), odds.numpy(), atol=1e-4)


def test_a_symmetric_network_is_mapped_tile_by_tile_and_says_so(green_classifier):
    network = copy.deepcopy(green_classifier)
    network.augment_at_test_time(True)
    engine = make_engine(network, 64, 1.0, settings=MapSettings(("gradient_x_activation",), "layer2"))
    assert isinstance(engine, TiledEngine)
    assert engine.settings.way == "tiled"
    assert engine.tiles.endswith("each seen 8 ways, turned and mirrored")
    both = make_engine(network, 64, 1.0, settings=MapSettings(("gradient_x_activation", "mtsm_b"), "layer2"))
    assert both.tiles == engine.tiles
    assert "turned" not in both.maker_of("mtsm_b").tiles
    with pytest.raises(NetworkError, match="test_time_augmentation turns tiles"):
        make_engine(network, 64, 1.0, settings=MapSettings(("gradient_x_activation",), "layer2", way="dense"))


def test_both_engines_give_the_same_values(green_classifier, array_slide):
    """Nothing but pooling lies above the last layer: its gradient is the same in every tile, and so in both maps."""
    slide = array_slide(noise(256, 256))
    settings = MapSettings(("gradient",), "layer4", "none")
    dense, tiled = (
        kind(green_classifier, 96, 1.0, settings=settings).map(slide, all_tissue(slide)).saliency.values
        for kind in (DenseEngine, TiledEngine)
    )
    assert dense.min() > 0
    np.testing.assert_allclose(tiled, dense, rtol=1e-5)


def test_both_engines_agree_away_from_borders(green_classifier, array_slide):
    """Below the last layer the dense engine also counts tiles that end just before the place: a little more."""
    slide = array_slide(noise(384, 384))
    settings = MapSettings(("gradient_x_activation",), "layer3", smoothing="none")
    dense, tiled = (
        kind(green_classifier, 256, 1.0, settings=settings).map(slide, all_tissue(slide)).saliency.values[6:-6, 6:-6]
        for kind in (DenseEngine, TiledEngine)
    )
    assert np.corrcoef(dense.ravel(), tiled.ravel())[0, 1] > 0.7
    assert 0.7 < np.median(tiled / dense) < 1.05


def test_the_engine_follows_the_network(caplog, green_classifier, squeezing, masking):
    auto = MapSettings(("gradient_x_activation",), "layer2")
    assert isinstance(make_engine(green_classifier, 64, 1.0, settings=auto), DenseEngine)
    with caplog.at_level(logging.INFO):
        assert isinstance(
            make_engine(squeezing, 64, 1.0, settings=MapSettings(("gradient_x_activation",), "blocks.2")), TiledEngine
        )
    assert "mapped tile by tile" in caplog.text
    assert isinstance(make_engine(masking, 64, 1.0, settings=MASK), TiledEngine)
    assert make_engine(masking, 64, 1.0, settings=MASK, temperature=2.5).temperature == 2.5


def test_bad_requests_are_named(green_classifier, squeezing, masking):
    with pytest.raises(NetworkError, match="global operations"):
        make_engine(squeezing, 64, 1.0, settings=MapSettings(("gradient_x_activation",), "blocks.2", way="dense"))
    with pytest.raises(NetworkError, match="use 'tiled'"):
        make_engine(masking, 64, 1.0, settings=MapSettings(("mask",), way="dense"))
    with pytest.raises(NetworkError, match=r"did you mean 'blocks\.2'"):
        make_engine(squeezing, 64, 1.0, settings=MapSettings(("gradient_x_activation",), "block.2"))
    with pytest.raises(NetworkError, match="no masks"):
        make_engine(AimClassifier("test_resnet", masking=False), 64, 1.0, settings=MASK)
    for network in (green_classifier, squeezing):
        with pytest.raises(NetworkError, match="no masks"):
            make_engine(network, 64, 1.0, settings=MASK)
        with pytest.raises(NetworkError, match="multiple of the network's stride, 32"):
            make_engine(
                network,
                90,
                1.0,
                settings=MapSettings(
                    ("gradient_x_activation",), "layer2" if network is green_classifier else "blocks.2"
                ),
            )
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(ConfigError, match="temperature"):
            make_engine(
                squeezing,
                64,
                1.0,
                settings=MapSettings(("gradient_x_activation",), "blocks.2"),
                temperature=temperature,
            )
    with pytest.raises(ConfigError, match="did you mean 'tiled'"):
        MapSettings(way="tilde")
    with pytest.raises(ConfigError, match="batch=0"):
        MapSettings(batch=0)


def test_hooks_are_gone_and_modes_kept(masking):
    masking.train()
    engine = TiledEngine(masking, 64, 1.0, settings=MapSettings(("gradient_x_activation",), "layer2"))
    tiles = torch.zeros(2, 3, 64, 64, dtype=torch.uint8)
    assert engine.patch_saliency(tiles).shape == (2, 8, 8)
    assert masking.training
    masking.eval()
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in masking.modules())
    assert all(parameter.grad is None for parameter in masking.parameters())


def test_mask_maps_are_the_stages_masks(masking):
    tiles = torch.from_numpy(noise(64, 64)).permute(2, 0, 1)[None]
    masks = masking.masked(tiles).masks
    found = TiledEngine(masking, 64, 1.0, settings=MASK).run(tiles)[1]
    expected = (F.interpolate(masks[0], scale_factor=2, mode="nearest") + masks[1])[:, 0] / 2
    np.testing.assert_array_equal(found, expected.numpy())
    assert 0 < found.mean() < 1


@pytest.mark.parametrize(("kind", "layer", "channels"), [("squeezing", "blocks.2", 32), ("masking", "layer2", 48)])
@pytest.mark.parametrize("smoothing", ["none", "backward_hook"])
def test_deeplift_sums_to_the_log_odds_of_each_tile(request, kind, layer, channels, smoothing):
    """Against any reference, whatever masks and squeeze-excite leave."""
    network = request.getfixturevalue(kind)
    engine = TiledEngine(
        network,
        64,
        1.0,
        settings=MapSettings(("deeplift", "gradient"), layer, smoothing),
        temperature=1.7,
        offset=(0.5, -1.2),
        reference=NeutralReference(layer, (0.3,) * channels, 0.0, 0.5, "tile", "made up"),
    )
    tiles = torch.from_numpy(np.stack([noise(64, 64, seed) for seed in (1, 2, 3)])).permute(0, 3, 1, 2)
    probability, maps = engine.run(tiles)
    with torch.no_grad():
        logits = network(tiles).double() / 1.7 + torch.tensor([0.5, -1.2])
    size = np.abs(maps).sum(axis=(1, 2))
    assert maps.std() > 0
    assert (np.abs(maps.sum(axis=(1, 2)) - (logits[:, 1] - logits[:, 0]).numpy()) <= 1e-4 * size).all()
    moved = np.array([engine._run(tile[None])[2] for tile in tiles])
    assert (moved[:, 0] >= 0).all()
    np.testing.assert_allclose(moved[:, 1], size, rtol=1e-4)
    np.testing.assert_allclose(probability, logits.softmax(dim=1)[:, 1], rtol=1e-4, atol=1e-7)


def test_masks_are_asked_for_alone(masking):
    for methods in (("mask", "gradient"), ("gradient", "mask")):
        with pytest.raises(ConfigError, match="'mask' has a grid of its own; ask for it alone"):
            TiledEngine(masking, 64, 1.0, settings=MapSettings(methods, "layer2"))
