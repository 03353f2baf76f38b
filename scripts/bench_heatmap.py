#!/usr/bin/env python
"""What a slide's map costs: operations over those of the tissue's own pixels, time, and memory.

python scripts/bench_heatmap.py --part operations
python scripts/bench_heatmap.py --part time captum --threads 1 --rounds 3
python scripts/bench_heatmap.py --part peers --rounds 3
python scripts/bench_heatmap.py --part blocks
python scripts/bench_heatmap.py --memory

Probability and DeepLift at layer3 of a ResNet-18 with random weights, which cost what trained ones do. The slide is a
phantom of 4,096 px at 0.5 um/px, the network's own scale; larger ones are its pixels repeated, for operations follow
from where the tissue is, not from what it looks like.
"""

from __future__ import annotations

import argparse
import copy
import math
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
from studies.slide_peers import Tiles, by_monai, by_tiatoolbox
from studies.timing import in_turns, line
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from medsd.heatmap.cascade import Cascade, Node
from medsd.heatmap.dense import DenseEngine
from medsd.heatmap.grid import MapGrid
from medsd.heatmap.maps import MapSettings
from medsd.heatmap.partition import Rect, grown
from medsd.heatmap.value_map import Floats
from medsd.networks.classifier import TileClassifier
from medsd.phantom import PhantomSpec, draw_phantom
from medsd.phantom.files import write_pyramid
from medsd.saliency.neutral import NeutralReference
from medsd.slides.slide import Slide, open_slide
from medsd.slides.tissue import TissueMask, find_tissue

SMALL_PX, LARGE_PX, MPP = 4096, 16384, 0.5
TILE_PX = 224  # of the peers
# Most operations over those of the tissue's own pixels that we want.
WANTED = {SMALL_PX: 1.4, LARGE_PX: 1.25}
BLOCKS_OF = {
    "resnet18": ("layer1", "layer2", "layer3"),
    "resnet50": ("layer1", "layer2", "layer3"),
    "resnet101": ("layer2", "layer3"),
    "tf_efficientnet_lite0": ("blocks.1", "blocks.2", "blocks.3", "blocks.4", "blocks.5"),
    "mobilenetv2_100": ("blocks.2", "blocks.3", "blocks.5"),
    "regnetx_032": ("s2", "s3"),
    "vgg16_bn": ("features.23", "features.33"),
    "densenet121": ("features.transition1", "features.transition2", "features.denseblock3", "features.transition3"),
    "convnext_tiny": ("stages.0", "stages.1", "stages.2"),
}
WANTED_PEAK, WANTED_GIB = 1.3, 4
_BATCH = 8
Options = argparse.Namespace


def main() -> None:
    """Run the parts and print tables."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--part", choices=PARTS, nargs="*", default=[])
    parser.add_argument("--memory", action="store_true", help="Peak memory of a small and a large slide.")
    parser.add_argument("--slide", type=Path, help="Map this slide and print the peak; --memory calls it.")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    if options.slide:
        peak_of(options.slide)
        return
    with tempfile.TemporaryDirectory() as folder:
        print(f"CPU, {options.threads} thread(s), torch {torch.__version__}")
        image = draw_phantom(PhantomSpec(0, True, SMALL_PX, MPP)).image
        path = Path(folder, f"{SMALL_PX}.tif")
        write_pyramid(path, image, MPP, 2)
        for part in options.part:
            with open_slide(path) as slide:
                PARTS[part](slide, options)
        if options.memory:
            large = Path(folder, f"{LARGE_PX}.tif")
            factor = LARGE_PX // SMALL_PX
            write_pyramid(large, image.repeat(factor, 0).repeat(factor, 1), MPP, 2)
            memory([path, large], options.threads)


def engine_of(kind: type[DenseEngine] = DenseEngine, tile_px: int = 64, method: str = "deeplift") -> DenseEngine:
    """An engine with random weights; a reference costs the same whatever it is."""
    torch.manual_seed(0)
    engine = kind(TileClassifier("resnet18").eval(), tile_px, MPP, settings=MapSettings((method,)))
    vector = tuple(torch.rand(engine.cascade.channels[-1]).tolist())
    engine.reference = NeutralReference(engine.settings.layer, vector, 0.0, 0.5, "plane", "random numbers")
    return engine


def operations(slide: Slide, _options: Options) -> None:
    """Counted while the small slide is mapped; that the plan's areas give the same number carries over to the large."""
    engine, tissue = engine_of(), find_tissue(slide)
    # What the reference gives above the layer is computed once for all slides.
    engine.run(torch.zeros(1, 3, 64, 64, dtype=torch.uint8))
    with FlopCounterMode(display=False) as counter:
        engine.map(slide, tissue)
    cell = stage_costs(engine)
    print("\n| slide | tissue | operations over the tissue's own | wanted |\n|---|---|---|---|")
    lines = []
    for size in (SMALL_PX, LARGE_PX):
        wider = TissueMask(tissue.mask, tissue.level0_px * size / SMALL_PX)
        crops, rects, cells, total = planned(engine, size, wider)
        if size == SMALL_PX:
            np.testing.assert_allclose(total, counter.get_total_flops(), rtol=1e-5)
        own = tissue.mask.mean() * (size / engine.strides[0]) ** 2
        ratio = total / (own * sum(cell))
        verdict = "met" if ratio <= WANTED[size] else "MISSED"
        print(f"| {size} px | {tissue.mask.mean():.0%} | {ratio:.3f} | <= {WANTED[size]}: {verdict} |")
        least = bound(engine, cells)
        for number, name in enumerate([*(stage.network.end for stage in engine.cascade.stages), "above, both ways"]):
            parts = least[number], sum(rects[number]), sum(crops[number])
            figures = " | ".join(f"{part / own:.2f}" for part in parts)
            lines.append(f"| {size} px | {name} | {cell[number] / sum(cell):.0%} | {len(crops[number])} | {figures} |")
        floor = sum(a * b for a, b in zip(least, cell, strict=True)) / (own * sum(cell))
        lines.append(f"| {size} px | all | | | {floor:.3f} | | {ratio:.3f} |")
    print("\n| slide | up to | share | rectangles | needed, any shape | given by rectangles | computed |")
    print("|---|---|---|---|---|---|---|", *lines, sep="\n")


def stage_costs(engine: DenseEngine) -> list[int]:
    """Operations of each stage for a feature cell; of the last, both ways."""
    counts = []
    for side in (4, 8):
        x, found = torch.zeros(1, 3, side * engine.strides[0], side * engine.strides[0]), []
        for stage in engine.cascade.stages:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                x = stage.network(x)
            found.append(counter.get_total_flops())
        with FlopCounterMode(display=False) as counter:
            engine._explained(engine.settings.methods[0], x)
        counts.append([*found, counter.get_total_flops()])
    return [(large - small) // (8**2 - 4**2) for small, large in zip(*counts, strict=True)]


def planned(
    engine: DenseEngine, size: int, tissue: TissueMask
) -> tuple[list[list[int]], list[list[int]], np.ndarray, float]:
    """Feature cells of each crop and of what each gives, by stage; the tissue's cells; operations of all."""

    class Empty:
        dimensions, mpp = (size, size), MPP

    grids = [MapGrid.over(Empty(), MPP, stride) for stride in engine.strides]  # type: ignore[arg-type]
    plan = engine._plan(grids, tissue)
    cascade = engine.cascade
    stages = [*cascade.stages, cascade.top]
    pairs: list[tuple[int, Rect, Rect]] = [(len(stages) - 1, *pair) for pair in plan.rects]
    pairs += [(node.stage, node.rect, node.crop) for node in all_nodes(plan.nodes)]
    crops = [[crop.area for stage, _, crop in pairs if stage == number] for number, _ in enumerate(stages)]
    rects = [[rect.area for stage, rect, _ in pairs if stage == number] for number, _ in enumerate(stages)]
    total = sum(counted(cascade, number, rect, crop) for number, rect, crop in pairs)
    return crops, rects, plan.tissue, total


def counted(cascade: Cascade, number: int, rect: Rect, crop: Rect) -> float:
    """Operations of one rectangle of a stage, from the shapes alone."""
    stages, channels = [*cascade.stages, cascade.top], [3, *cascade.channels]
    stage, place = stages[number], crop.times(stages[number].taken)
    network, head = (
        copy.deepcopy(it).to("meta").requires_grad_(False) for it in (stage.network, cascade.classifier.head)
    )
    x = torch.empty(1, channels[number], place.height, place.width, device="meta")
    with FlopCounterMode(display=False) as counter:
        features = network(x.requires_grad_(stage is cascade.top), stage.kept(rect, crop))
        if stage is cascade.top:
            torch.nn.functional.conv2d(features, head.weight[:, :, None, None]).sum().backward()
    return float(counter.get_total_flops())


def all_nodes(nodes: Iterable[Node]) -> Iterator[Node]:
    for node in nodes:
        yield node
        yield from all_nodes(node.parts)


def bound(engine: DenseEngine, cells: np.ndarray) -> list[int]:
    """Feature cells that each stage would compute if parts of any shape cost nothing but what they need."""
    needed, counts = grown(cells, engine.window // 2), []
    for stage in (engine.cascade.top, *reversed(engine.cascade.stages)):
        needed = grown(needed, stage.halo)
        counts.append(int(needed.sum()))
    return counts[::-1]


class ForwardOnly(DenseEngine):
    """The same engine without the backward pass: its probability is right, its saliency empty."""

    def _explained(self, name: str, hidden: Tensor) -> tuple[Tensor, Floats]:
        with torch.no_grad():
            cells = self._windows.cells(hidden) + self.classifier.head.bias[:, None, None]
        return cells, np.zeros((1, *hidden.shape[2:]), np.float32)


def timing(slide: Slide, options: Options) -> None:
    """A map from the file against the network on the same blocks in memory, and against probability alone."""
    engine, forward, tissue = engine_of(), engine_of(ForwardOnly), find_tissue(slide)
    works = {
        "map": lambda: engine.map(slide, tissue).probability.values,
        "network": network_alone(engine, slide, tissue),
        "probability": lambda: forward.map(slide, tissue).probability.values,
    }
    np.testing.assert_allclose(works["map"](), works["probability"](), rtol=0, atol=1e-5)
    seconds = in_turns(works, options.rounds)
    print("\n| what | seconds | against | times (range) | wanted |\n|---|---|---|---|---|")
    for words, against, wanted in (("map", "network", 1.10), ("map", "probability", 1.4)):
        print(line(words, seconds[words], against, seconds[against], f"<= {wanted}"))


def network_alone(engine: DenseEngine, slide: Slide, tissue: TissueMask) -> Callable[[], object]:
    """The passes that a map makes, with the pixels of its blocks in memory and nothing kept."""
    grids = [MapGrid.over(slide, MPP, stride) for stride in engine.strides]
    plan = engine._plan(grids, tissue)
    lost: list[np.ndarray] = []
    leaves = (leaf.crop for node in plan.nodes for leaf in node.leaves())
    images = list(engine._images(slide, leaves, grids[1], lost))
    scale, channels = engine.cascade.top.taken, engine.cascade.channels[-1]

    def run() -> None:
        waiting = iter(images)
        for node in plan.nodes:
            with torch.no_grad():
                engine.cascade.compute(node, waiting)
        for _, crop in plan.rects:
            engine._explained(
                engine.settings.methods[0], torch.ones(1, channels, crop.height * scale, crop.width * scale)
            )

    return run


def captum(slide: Slide, options: Options) -> None:
    """Model time alone: the dense passes against tiles of half overlap through captum, timed on one batch."""
    from captum.attr import LayerGradientXActivation

    side = TILE_PX
    engine, tissue = engine_of(tile_px=side, method="gradient_x_activation"), find_tissue(slide)
    network = engine.classifier
    starts = np.arange(0, slide.dimensions[0] - side + 1, side // 2)
    left, top = (places.ravel() for places in np.meshgrid(starts, starts))
    held = np.flatnonzero(tissue.share(left, top, side) > 0)
    chosen = held[np.linspace(0, len(held) - 1, _BATCH).astype(int)]
    tiles = torch.stack([torch.from_numpy(slide.read(left[n], top[n], side, side)).permute(2, 0, 1) for n in chosen])
    method = LayerGradientXActivation(lambda x: logit_difference(network(x)), network.encoder.layer3)

    def batch() -> Tensor:
        with torch.no_grad():  # captum gives no logits
            network(tiles)
        attributed: Tensor = method.attribute(network.normalise(tiles))
        return attributed.detach().mean(dim=1)

    plain = DenseEngine(network, side, MPP, settings=MapSettings(("gradient_x_activation",), smoothing="none"))
    theirs = batch().numpy()
    np.testing.assert_allclose(plain.run(tiles)[1], theirs, rtol=0, atol=1e-4 * np.abs(theirs).max())
    seconds = in_turns({"dense": network_alone(engine, slide, tissue), "batch": batch}, options.rounds)
    whole = seconds["batch"] * (len(held) / _BATCH)
    print("\n| what | seconds | against | times (range) | wanted |\n|---|---|---|---|---|")
    words = f"captum, {len(held)} tiles, from a batch of {_BATCH}"
    print(line(words, whole, "dense", seconds["dense"], ">= 10"))


def peers(slide: Slide, options: Options) -> None:
    """Probability with the tissue mask, from the file to the map, against others' tiles of half overlap."""
    engine, folder = engine_of(ForwardOnly, tile_px=TILE_PX), Path(tempfile.mkdtemp(dir=slide.path.parent))
    network = engine.classifier
    found: dict[str, Tiles] = {}

    def keep(name: str, make: Callable[[], Tiles]) -> None:
        found[name] = make()

    works = {
        "medsd": lambda: engine.map(slide, find_tissue(slide)).probability.values,
        "tiatoolbox": lambda: keep("tiatoolbox", lambda: by_tiatoolbox(network, slide.path, TILE_PX, MPP, folder)),
        "monai": lambda: keep("monai", lambda: by_monai(network, slide.path, TILE_PX)),
    }
    seconds, ours, tissue = in_turns(works, options.rounds), works["medsd"](), find_tissue(slide)
    print("\n| what | seconds | against | times (range) | wanted |\n|---|---|---|---|---|")
    for name, tiles in found.items():
        held = np.flatnonzero(tissue.share(*tiles.corners.T, TILE_PX) > 0)
        for at in held[:: max(1, len(held) // 4)]:  # they read the same pixels and put them at the same place
            image = torch.from_numpy(slide.read(*map(int, tiles.corners[at]), TILE_PX, TILE_PX)).permute(2, 0, 1)[None]
            with torch.no_grad():
                probability = network(network.normalise(image)).softmax(dim=1)[0, 1]
            np.testing.assert_allclose(tiles.probability[at], probability, rtol=0, atol=1e-4)
        column, row = ((tiles.corners[held] + TILE_PX / 2) / engine.strides[0] - 0.5).round().astype(int).T
        known = np.flatnonzero((row < ours.shape[0]) & (column < ours.shape[1]))
        pair = ours[row[known], column[known]], tiles.probability[held[known]]
        seen = ~np.isnan(pair[0])
        alike = np.corrcoef(pair[0][seen], pair[1][seen])[0, 1]
        # MONAI looks at glass as well, which is not counted.
        share = len(held) / len(tiles.corners) if name == "monai" else 1.0
        words = f"{name}, {len(held) if name == 'monai' else len(tiles.corners)} tiles, correlation {alike:.3f}"
        print(line(words, seconds[name] * share, "medsd", seconds["medsd"], ">= 10"))


def logit_difference(logits: Tensor) -> Tensor:
    return logits[:, 1] - logits[:, 0]


def memory(slides: list[Path], threads: int) -> None:
    """Peak memory of processes that map one slide each."""
    command = [sys.executable, __file__, "--threads", str(threads), "--slide"]
    peaks = [float(subprocess.check_output([*command, str(slide)], text=True)) for slide in slides]
    ratio = peaks[1] / peaks[0]
    verdicts = ["met" if met else "MISSED" for met in (ratio <= WANTED_PEAK, max(peaks) < WANTED_GIB)]
    print("\n| slides | peak, GiB | ratio | wanted |\n|---|---|---|---|")
    print(
        f"| {' and '.join(slide.stem for slide in slides)} px | {peaks[0]:.2f}, {peaks[1]:.2f} | {ratio:.2f} "
        f"| <= {WANTED_PEAK}: {verdicts[0]}; < {WANTED_GIB} GiB: {verdicts[1]} |"
    )


def peak_of(path: Path) -> None:
    """Print the most memory that this process held, in GiB, when it has mapped a slide."""
    with open_slide(path) as slide:
        engine_of().map(slide, find_tissue(slide))
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def blocks(_slide: Slide, _options: Options) -> None:
    """How often a cell is computed above a layer in dense blocks that fit a CPU's memory; tiles do so four times."""
    print(
        "\n| network | layer | looked at around a cell, px | most px a side at once | computed |\n|---|---|---|---|---|"
    )
    for name, layers in BLOCKS_OF.items():
        classifier = TileClassifier(name).eval()
        for layer in layers:
            cascade, cpu = Cascade(classifier, layer, smoothed=False), torch.device("cpu")
            around, stride = cascade.top.halo, cascade.features.stride
            side = math.isqrt(cascade.top.largest(None, stride, cpu))
            cost = cascade.top.cost(cpu)
            words = "no room for a cell" if math.isinf(cost) else f"{cost:.1f} times"
            print(f"| {name} | {layer} | {around * stride} | {side * stride} | {words} |", flush=True)


PARTS: dict[str, Callable[[Slide, Options], None]] = {
    "operations": operations,
    "blocks": blocks,
    "time": timing,
    "captum": captum,
    "peers": peers,
}


if __name__ == "__main__":
    main()
