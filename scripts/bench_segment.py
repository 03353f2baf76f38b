#!/usr/bin/env python
"""What segmentation costs beside the network: a training step against a bare loop, a slide against its tiles alone.

python scripts/bench_segment.py --threads 1 --rounds 5

The step: `SegmentationStep` on segmentation-models-pytorch's U-Net against the loop that its users write, with the same
weights, images, loss and optimiser. The slide: a phantom at 0.5 um/px, a network of random weights at 1.0.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from monai.losses import DiceCELoss
from studies.timing import in_turns, line
from torch import Tensor, nn

from medsd.cohort.entry import SlideEntry
from medsd.heatmap.grid import MapGrid
from medsd.phantom import PhantomSpec, draw_phantom
from medsd.phantom.files import write_pyramid
from medsd.segment.network import SegmentationNetwork
from medsd.segment.slides import SegmentRequest, segment_slides
from medsd.segment.step import SegmentationStep
from medsd.segment.stitch import SlideLabels, SlideSegmenter, _Plane
from medsd.segment.weights import SegmentationCard, save_segmentation
from medsd.slides.slide import Slide, open_slide
from medsd.slides.tissue import TissueMask, find_tissue

CLASSES = ("background", "tumour")
SLIDE_MPP, MPP = 0.5, 1.0
HEADER = "\n| what | seconds | against | times (range) | wanted |\n|---|---|---|---|---|"


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, nargs="*", default=list(PARTS))
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--tile-px", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--slide-px", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice.")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(
        f"{name}; {options.encoder}, U-Net, {options.tile_px} px, batch {options.batch_size}, torch {torch.__version__}"
    )
    torch.manual_seed(0)
    network = SegmentationNetwork(options.encoder, CLASSES).to(device, memory_format=torch.channels_last)
    for part in options.part:
        PARTS[part](network, device, options)


def steps(network: SegmentationNetwork, device: torch.device, options: argparse.Namespace) -> None:
    """Our step, plain and as the bundle augments, against the bare loop."""
    batch, side = options.batch_size, options.tile_px
    items = {
        "image": torch.randint(256, (batch, 3, side, side), dtype=torch.uint8),
        "label": torch.randint(2, (batch, 1, side, side), dtype=torch.uint8),
    }
    plain, whole = SegmentationStep(stain=0, turns=False), SegmentationStep()
    works = {
        "step": ours(copy.deepcopy(network), items, device, plain),
        "step, turned and restained": ours(copy.deepcopy(network), items, device, whole),
        "bare loop": bare(copy.deepcopy(network), items, device),
    }
    for _ in range(2):  # the same work, weights after a step included
        assert abs(works["step"]() - works["bare loop"]()) < 1e-4
    seconds = in_turns(works, options.rounds)
    print(HEADER)
    for words in ("step", "step, turned and restained"):
        print(line(words, seconds[words], "bare loop", seconds["bare loop"], "<= 1.05"))


def loss_of() -> nn.Module:
    """The bundle's."""
    return DiceCELoss(include_background=False, to_onehot_y=True, softmax=True, batch=True)


def ours(
    network: SegmentationNetwork, items: dict[str, Tensor], device: torch.device, step: SegmentationStep
) -> Callable[[], float]:
    """The step that the bundle runs."""
    state = SimpleNamespace(device=device, iteration=1, epoch=1)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    engine: Any = SimpleNamespace(state=state, network=network, optimizer=optimizer, loss_function=loss_of())
    return lambda: float(step(engine, items)["loss"])


def bare(network: SegmentationNetwork, items: dict[str, Tensor], device: torch.device) -> Callable[[], float]:
    """segmentation-models-pytorch's network in the loop of its documentation."""
    model, normalise, loss = network.model.train(), network.normalise, loss_of()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def run() -> float:
        images, masks = items["image"].to(device), items["label"].to(device)
        optimizer.zero_grad()
        found = loss(model(normalise(images)), masks)
        found.backward()
        optimizer.step()
        return float(found.detach())

    return run


def slides(network: SegmentationNetwork, device: torch.device, options: argparse.Namespace) -> None:
    """A slide from its file, to classes and to all that is left of it, against the network on its tiles in memory."""
    network.eval()
    with tempfile.TemporaryDirectory() as folder:
        path, weights = Path(folder, "slide.tif"), Path(folder, "segmentation.safetensors")
        write_pyramid(path, draw_phantom(PhantomSpec(0, True, options.slide_px, SLIDE_MPP)).image, SLIDE_MPP, 2)
        card = SegmentationCard(options.encoder, "unet", CLASSES, options.tile_px, "random numbers", mpp=MPP)
        save_segmentation(weights, network, card)
        segmenter, counts = SlideSegmenter(network, options.tile_px, MPP), iter(range(1000))
        with open_slide(path) as slide:
            tissue = find_tissue(slide)
            tiles = tiles_of(segmenter, slide, tissue, Path(folder, "plan"))

            def classes() -> Any:
                return segmenter.segment(slide, find_tissue(slide), Path(folder, f"store-{next(counts)}"))

            check(segmenter, classes(), tiles)
            works = {
                "slide to classes": classes,
                "`segment_slides`: outlines, areas, pyramid, report": lambda: segment_slides(
                    [SlideEntry("slide", path)], weights, Path(folder, f"out-{next(counts)}"), SegmentRequest(), device
                ),
                "network on the same tiles": lambda: alone(network, tiles, segmenter.batch),
            }
            seconds = in_turns(works, options.rounds)
    print(HEADER)
    last = list(works)[-1]
    for words in list(works)[:-1]:
        print(line(f"{words}, {len(tiles)} tiles", seconds[words], last, seconds[last], "<= 1.15"))


def tiles_of(segmenter: SlideSegmenter, slide: Slide, tissue: TissueMask, store: Path) -> list[Placed]:
    """Every tile of the slide with its place on the plane."""
    plane = _Plane(segmenter, MapGrid.over(slide, MPP, 1), tissue, store)
    tiles, side, own = [], segmenter.tile_px, segmenter.block_px
    for block in plane.blocks():
        pixels = torch.from_numpy(plane.read(slide, block).pixels).permute(2, 0, 1)
        for top, left in zip(block.top.tolist(), block.left.tolist(), strict=True):
            tile = pixels[:, top : top + side, left : left + side].contiguous()
            tiles.append(Placed(block.row * own + top, block.column * own + left, tile))
    return tiles


def alone(network: SegmentationNetwork, tiles: list[Placed], batch: int) -> list[Tensor]:
    """Probabilities of the tiles, of which nothing is kept on disk."""
    found = []
    with torch.inference_mode():
        for start in range(0, len(tiles), batch):
            images = torch.stack([tile.pixels for tile in tiles[start : start + batch]])
            images = images.to(network.device, memory_format=torch.channels_last)
            found.append(network(images).float().softmax(dim=1).cpu())
    return found


def check(segmenter: SlideSegmenter, labels: SlideLabels, tiles: list[Placed]) -> None:
    """The slide's classes are those of these tiles, blended."""
    side, window = segmenter.tile_px, torch.from_numpy(np.outer(segmenter._window, segmenter._window)).float()
    sums = torch.zeros(len(CLASSES), *(length + side for length in labels.numbers.shape))
    for tile, found in zip(tiles, torch.cat(alone(segmenter.network, tiles, segmenter.batch)), strict=True):
        sums[:, tile.top : tile.top + side, tile.left : tile.left + side] += found * window
    numbers = np.asarray(labels.numbers)
    height, width = numbers.shape
    close = (sums[0] - sums[1]).abs()[:height, :width].numpy() < 1e-4
    judged = numbers > 0
    assert labels.tiles == len(tiles) and judged.any()
    assert np.array_equal(numbers[judged & ~close] - 1, sums.argmax(dim=0)[:height, :width].numpy()[judged & ~close])


class Placed(NamedTuple):
    """A tile (3, side, side) uint8 and its corner on the plane."""

    top: int
    left: int
    pixels: Tensor


PARTS: dict[str, Callable[[SegmentationNetwork, torch.device, argparse.Namespace], None]] = {
    "steps": steps,
    "slides": slides,
}


if __name__ == "__main__":
    main()
