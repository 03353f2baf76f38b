#!/usr/bin/env python
"""What a whole step of Med-MoCo costs, against plain MoCo v2, and that against `lightly`'s modules, in one run.

pip install "medsd[lightly]"
python scripts/bench_pretrain.py --images PATCHES
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, RandomSampler

from medsd.cohort.patches import PatchDataset, PatchTable
from medsd.errors import MedsdError
from medsd.pretrain.images import UnlabelledImages, read_images
from medsd.pretrain.med_moco import MedMoCoSettings
from medsd.pretrain.start import EncoderStart
from medsd.pretrain.step import PretrainStep
from medsd.pretrain.views import ViewSettings, draw_views

BASE = "MoCo v2"
CASES = {
    BASE: MedMoCoSettings(local=0.0, decorrelation="none"),
    "+ local": MedMoCoSettings(decorrelation="none"),
    "+ W2": MedMoCoSettings(local=0.0),
    "Med-MoCo: local and W2": MedMoCoSettings(),
    "+ W1": MedMoCoSettings(local=0.0, decorrelation="w1"),
    "+ penalty": MedMoCoSettings(local=0.0, decorrelation="corr"),
}
Step = Callable[[Tensor], None]


def main() -> None:
    """Time the steps in turns and print medians of the ratios; then what of a training is waiting for images."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--encoder", default="resnet18")
    parser.add_argument("--local-layer", default="layer3")
    parser.add_argument("--side-px", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--images", help="Folder of images: the share of waiting for them is printed, too.")
    options = parser.parse_args()
    try:
        files = read_images([options.images]) if options.images else None  # before the minutes of timing
    except MedsdError as error:
        parser.error(str(error))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(f"{name}, torch {torch.__version__}; {options.encoder}, {options.side_px} px, batch {options.batch_size}")
    steps = {words: ours(settings, device, options) for words, settings in CASES.items()}
    try:
        steps["lightly's modules"] = lightly(device, options)
    except ModuleNotFoundError as error:
        print(f"lightly is left out: no module named {error.name}")
    images = torch.randint(256, (options.batch_size, 3, options.side_px, options.side_px), dtype=torch.uint8)
    seconds: dict[str, list[float]] = {words: [] for words in steps}
    for round_ in range(options.rounds + 1):  # the first chooses kernels
        for words, step in steps.items():
            taken = timed(lambda step=step: step(images), device)
            seconds[words] += [taken] * (round_ > 0)
    print(f"\n{'step, its views included':<28}{'images/s':>10}{'speed of MoCo v2 (range)':>28}")
    for words, times in seconds.items():
        ratios = sorted(b / a for a, b in zip(times, seconds[BASE], strict=True))
        span = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        print(f"{words:<28}{options.batch_size / statistics.median(times):>10.0f}{span:>28}")
    if files is not None:
        waiting(steps["Med-MoCo: local and W2"], files, options)


def timed(act: Callable[[], Any], device: torch.device) -> float:
    """Seconds that an act takes, the device's work included."""
    started = time.perf_counter()
    act()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def ours(settings: MedMoCoSettings, device: torch.device, options: argparse.Namespace) -> Step:
    """The step that the bundles run."""
    chosen = replace(settings, queue=8 * options.batch_size, local_layer=options.local_layer)
    network = EncoderStart(options.encoder).network(chosen, device)
    optimizer = sgd(network)
    state = SimpleNamespace(device=device, iteration=1, epoch=1, epoch_length=1000, max_epochs=1)
    engine: Any = SimpleNamespace(state=state, network=network, optimizer=optimizer)
    step = PretrainStep(views=ViewSettings(options.side_px))
    groups = torch.zeros(options.batch_size, dtype=torch.int64)

    def run(images: Tensor) -> None:
        step(engine, {"image": images, "group": groups})

    return run


def lightly(device: torch.device, options: argparse.Namespace) -> Step:
    """MoCo v2 of `lightly`'s modules as its example puts them together, on our views."""
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import batch_shuffle, batch_unshuffle, deactivate_requires_grad, update_momentum

    made = EncoderStart(options.encoder).network(CASES[BASE], device)
    query = nn.Sequential(made.encoder, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    head = MoCoProjectionHead(made.feature_dim, made.feature_dim, CASES[BASE].dim).to(device)
    key, key_head = copy.deepcopy(query), copy.deepcopy(head)
    for part in (key, key_head):
        deactivate_requires_grad(part)
    loss = NTXentLoss(CASES[BASE].temperature, memory_bank_size=(8 * options.batch_size, CASES[BASE].dim)).to(device)
    both = nn.ModuleList([query, head])
    optimizer, draws, views = sgd(both), torch.Generator().manual_seed(0), ViewSettings(options.side_px)

    def run(images: Tensor) -> None:
        first, second = (made.normalise(draw_views(images.to(device), draws, views).images) for _ in range(2))
        update_momentum(query, key, m=0.99)
        update_momentum(head, key_head, m=0.99)
        queries = head(query(first))
        with torch.no_grad():
            dealt, order = batch_shuffle(second)
            keys = batch_unshuffle(key_head(key(dealt)), order)
        optimizer.zero_grad()
        loss(queries, keys).backward()
        optimizer.step()

    return run


def sgd(network: nn.Module) -> torch.optim.SGD:
    """As the bundles pre-train."""
    learnt = [each for each in network.parameters() if each.requires_grad]
    return torch.optim.SGD(learnt, 0.03, momentum=0.9, weight_decay=1e-4)


def waiting(step: Step, files: PatchTable, options: argparse.Namespace, batches: int = 20) -> None:
    """Print the share of the time that steps wait for images from their files."""
    images = UnlabelledImages(PatchDataset(files, options.side_px))
    sampler = RandomSampler(images, num_samples=batches * options.batch_size)
    loader = DataLoader(images, options.batch_size, sampler=sampler, num_workers=options.workers)
    started = last = time.perf_counter()
    waited = 0.0
    for batch in loader:
        waited += time.perf_counter() - last
        step(batch["image"])
        last = time.perf_counter()
    share = waited / (last - started)
    print(f"\nwaiting for images of {options.images}: {share:.1%} of the time, {options.workers} reader processes")


if __name__ == "__main__":
    main()
