"""Segmentation of a slide against brute-force stitching, borders of blocks, runs that are stopped, damaged files."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from medsd.errors import ConfigError
from medsd.heatmap.store import BlockStore
from medsd.segment.network import SegmentationNetwork
from medsd.segment.stitch import SlideLabels, SlideSegmenter
from medsd.slides.tissue import TissueMask

PIXELS = np.random.default_rng(3).integers(0, 256, (250, 330, 3), dtype=np.uint8)
CLASSES = ("background", "tumour", "necrosis")


@pytest.fixture(scope="module")
def network() -> SegmentationNetwork:
    torch.manual_seed(0)
    made = SegmentationNetwork("test_resnet", CLASSES, "fpn")
    for module in made.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.data.uniform_(0.5, 1.5)
            module.running_mean.normal_(0, 0.2)
    with torch.no_grad():  # untrained, one class would be the likeliest everywhere
        logits = made.eval()(torch.from_numpy(PIXELS).permute(2, 0, 1)[None])
    head = next(module for module in reversed(list(made.modules())) if isinstance(module, nn.Conv2d))
    head.bias.data -= logits.mean(dim=(0, 2, 3))
    head.weight.data *= 3 / logits.std()
    head.bias.data *= 3 / logits.std()
    return made


class Small(SlideSegmenter):
    """With blocks of 64 px."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.block_px = 64


def everywhere(height: int = 250, width: int = 330) -> TissueMask:
    return TissueMask(np.ones((height // 8 + 1, width // 8 + 1), bool), 8.0)


def brute_force(network: nn.Module, pixels: np.ndarray, tile: int, step: int) -> np.ndarray:
    """Weighted mean (K, H, W) of the softmax of all tiles, in double precision."""
    height, width = pixels.shape[:2]
    offset = np.minimum(np.arange(tile) + 0.5, tile - np.arange(tile) - 0.5)
    window = np.sin(np.pi / 2 * np.clip(offset / max(tile - step, 1e-9), 0, 1)) ** 2
    sums, weights = np.zeros((len(CLASSES), height, width)), np.zeros((height, width))
    places = [[*range(0, length - tile, step), length - tile] for length in (height, width)]
    for y in places[0]:
        for x in places[1]:
            image = torch.from_numpy(pixels[y : y + tile, x : x + tile].copy()).permute(2, 0, 1)[None]
            with torch.no_grad():
                probability = network(image).double().softmax(dim=1)[0].numpy()
            weight = np.outer(window, window)
            sums[:, y : y + tile, x : x + tile] += probability * weight
            weights[y : y + tile, x : x + tile] += weight
    return sums / weights


def content(labels: SlideLabels) -> tuple[bytes, bytes, tuple[int, ...], float, int]:
    numbers, probabilities = (np.asarray(array[...]).tobytes() for array in (labels.numbers, labels.probabilities))
    return numbers, probabilities, labels.pixels, labels.unseen, labels.tiles


@pytest.mark.parametrize("overlap", [0.5, 0.3])
@pytest.mark.parametrize("kind", [SlideSegmenter, Small])
def test_it_is_brute_force_stitching_wherever_blocks_end(network, array_slide, tmp_path, kind, overlap):
    segmenter = kind(network, 64, 1.0, overlap, probabilities=True, batch=5)
    labels = segmenter.segment(array_slide(PIXELS), everywhere(), tmp_path)
    expected = brute_force(network, PIXELS, 64, segmenter.step_px)
    found = np.asarray(labels.probabilities[...]) / 255
    assert np.abs(found - expected).max() <= 0.5 / 255 + 1e-5
    top = np.sort(expected, axis=0)
    sure = top[-1] - top[-2] > 1e-4
    numbers = np.asarray(labels.numbers[...])
    assert sure.mean() > 0.99 and (numbers - 1 == expected.argmax(axis=0))[sure].all()
    assert set(np.unique(numbers)) == {1, 2, 3}
    assert labels.pixels == tuple(int((numbers == number).sum()) for number in (1, 2, 3))
    areas = [count / 4e6 for count in labels.pixels]
    assert list(replace(labels, mpp=0.5).areas_mm2.values()) == pytest.approx(areas)
    # Each tile once.
    assert labels.tiles == np.prod([-(-(length - 64) // segmenter.step_px) + 1 for length in (250, 330)])


def test_a_network_that_looks_at_pixels_alone_has_no_seams(array_slide, tmp_path):
    class Redness(nn.Module):
        classes, device = ("background", "red"), torch.device("cpu")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.stack([x[:, 1].float(), x[:, 0].float()], dim=1) / 20

    labels = Small(Redness(), 48, 1.0, 0.4).segment(array_slide(PIXELS), everywhere(), tmp_path)
    red, green = (PIXELS[..., channel].astype(int) for channel in (0, 1))
    apart = red != green
    assert (np.asarray(labels.numbers[...]) - 1 == (red > green))[apart].all()


def test_a_slide_smaller_than_a_tile_is_segmented(network, array_slide, tmp_path):
    labels = SlideSegmenter(network, 64, 1.0).segment(array_slide(PIXELS[:40, :50]), everywhere(40, 50), tmp_path)
    assert labels.tiles == 1 and labels.numbers.shape == (40, 50) and sum(labels.pixels) == 2000
    padded = np.full((64, 64, 3), 255, np.uint8)
    padded[:40, :50] = PIXELS[:40, :50]
    with torch.no_grad():
        expected = network(torch.from_numpy(padded).permute(2, 0, 1)[None])[0, :, :40, :50].argmax(dim=0)
    assert (np.asarray(labels.numbers[...]) - 1 == expected.numpy()).mean() > 0.999


def test_only_tissue_is_read_and_judged(network, array_slide, tmp_path):
    read = []

    class Watched(array_slide):
        def read_seen(self, x, y, width, height, mpp=None):
            read.append((x, y))
            return super().read_seen(x, y, width, height, mpp)

    big = np.tile(PIXELS, (8, 8, 1))[:2000, :2600]
    mask = np.zeros((250, 325), bool)
    mask[130:134, 70:76] = True
    labels = SlideSegmenter(network, 64, 1.0).segment(Watched(big), TissueMask(mask, 8.0), tmp_path)
    numbers = np.asarray(labels.numbers[...])
    assert (numbers > 0).sum() == sum(labels.pixels) == 32 * 48
    assert (numbers[1040:1072, 560:608] > 0).all()
    assert len(set(read)) <= 4 and labels.tiles <= 4 * 5 and labels.unseen == 0
    around = brute_force(network, big[896:1216, 416:752], 64, 32)[:, 144:176, 144:192]
    assert (numbers[1040:1072, 560:608] - 1 == around.argmax(axis=0)).mean() > 0.999
    empty = SlideSegmenter(network, 64, 1.0).segment(
        Watched(big), TissueMask(np.zeros((250, 325), bool), 8.0), tmp_path / "empty"
    )
    assert empty.tiles == 0 and empty.pixels == (0, 0, 0) and empty.unseen == 0


@pytest.fixture
def damaged(array_slide):
    class Damaged(array_slide):
        def read_seen(self, x, y, width, height, mpp=None):
            rows, columns = np.arange(height) + y, np.arange(width) + x
            seen = ~(((rows >= 96) & (rows < 128))[:, None] & ((columns >= 64) & (columns < 128))[None])
            return self.read(x, y, width, height, mpp), None if seen.all() else seen

    return Damaged(PIXELS)


def test_what_cannot_be_decoded_has_no_class(network, damaged, tmp_path):
    labels = Small(network, 64, 1.0).segment(damaged, everywhere(), tmp_path)
    hole = np.asarray(labels.numbers[...]) == 0
    assert hole[96:128, 64:128].all() and hole.sum() == 32 * 64
    assert labels.unseen == pytest.approx(32 * 64 / (250 * 330))


def test_a_run_that_is_stopped_goes_on_and_ends_the_same(network, damaged, tmp_path, monkeypatch):
    segmenter = Small(network, 64, 1.0, probabilities=True)
    expected = content(segmenter.segment(damaged, everywhere(), tmp_path / "whole"))
    write, names, stop_at = BlockStore.write, [], [0]

    def counted(store, name, **arrays):
        if len(names) == stop_at[0]:
            raise KeyboardInterrupt
        names.append(name)
        write(store, name, **arrays)

    monkeypatch.setattr(BlockStore, "write", counted)
    for stop_at[0] in (3, 11, 11, 20):
        with pytest.raises(KeyboardInterrupt):
            segmenter.segment(damaged, everywhere(), tmp_path / "stopped")
    stop_at[0] = -1
    assert content(segmenter.segment(damaged, everywhere(), tmp_path / "stopped")) == expected
    assert len(names) == len(set(names)) == 4 * 6


def test_less_is_computed_at_once_where_memory_runs_out(network, array_slide, tmp_path, caplog):
    slide, room = array_slide(PIXELS), 3
    expected = np.asarray(SlideSegmenter(network, 64, 1.0).segment(slide, everywhere(), tmp_path / "a").numbers[...])

    class Tight(nn.Module):
        classes, device = CLASSES, torch.device("cpu")

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if len(x) > room:
                raise torch.OutOfMemoryError("no room")
            return network(x)

    segmenter = SlideSegmenter(Tight(), 64, 1.0)
    found = np.asarray(segmenter.segment(slide, everywhere(), tmp_path / "b").numbers[...])
    assert segmenter.batch == 2 and (found == expected).mean() > 0.999 and "2 tile(s) at once" in caplog.text
    room = 0
    with pytest.raises(torch.OutOfMemoryError):
        segmenter.segment(slide, everywhere(), tmp_path / "c")


@pytest.mark.parametrize(
    ("options", "words"),
    [({"overlap": 0.6}, r"overlap=0\.6"), ({"batch": 0}, "batch=0"), ({"workers": 0}, "workers=0")],
)
def test_bad_requests_are_named(network, options, words):
    with pytest.raises(ConfigError, match=words):
        SlideSegmenter(network, 64, 1.0, **options)
