#!/usr/bin/env python
"""What a step of each objective costs, against plain cross-entropy in the same run.

python scripts/bench_finetune.py --encoder resnet18 --tile-px 96 --batch-size 32
python scripts/bench_finetune.py --memory --encoder tf_efficientnet_lite0 --tile-px 192 --channels-last

With --memory, on the CPU: a step of cross-entropy whose freed memory is kept, as in a training, against one whose
memory goes back to the system; processes of their own in turns.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch

from medsd.networks.aim import AimClassifier
from medsd.networks.classifier import Classifier, TileClassifier
from medsd.networks.memory import freed_memory_kept
from medsd.objectives.aim import AimObjective
from medsd.objectives.saliency_decor import SaliencyDecor
from medsd.training.terms import Objective

BASE = "cross-entropy"
# Dense bfloat16 without sparsity, from the makers' data sheets, by a part of the device's name.
_PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0}


def main() -> None:
    """Time the objectives in turns and print medians of the ratios."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--encoder", nargs="+", default=["resnet10t", "resnet18"])
    parser.add_argument("--tile-px", type=int, default=96)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=1, help="Steps in a round; more where a step takes milliseconds.")
    parser.add_argument("--amp", choices=["none", "bfloat16", "float16"], default="none")
    parser.add_argument("--channels-last", action="store_true")
    parser.add_argument("--compiled", action="store_true")
    parser.add_argument("--threads", type=int, default=0, help="0: torch's choice.")
    parser.add_argument("--memory", action="store_true", help="What it is worth that freed memory is kept.")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {torch.get_num_threads()} thread(s)"
    print(
        f"{name}; tiles {options.tile_px} px, batch {options.batch_size}, amp {options.amp}, torch {torch.__version__}"
    )
    for encoder in options.encoder:
        (compare_memory if options.memory else compare)(encoder, device, options)


def compare_memory(encoder: str, device: torch.device, options: argparse.Namespace) -> None:
    """Processes of their own, since what a process did before decides what its C library gives back."""
    seconds: dict[bool, list[float]] = {True: [], False: []}
    peaks: dict[bool, list[float]] = {True: [], False: []}
    context = multiprocessing.get_context("spawn")
    for _ in range(options.rounds):
        for kept in seconds:
            with context.Pool(1) as pool:
                took, peak = pool.apply(step_in_process, (encoder, device, options, kept))
            seconds[kept].append(took)
            peaks[kept].append(peak)
    ratios = sorted(given / kept for kept, given in zip(seconds[True], seconds[False], strict=True))
    print(f"\n{encoder}\n{'freed memory':<20}{'images/s':>10}{'times as long (range)':>26}{'peak GiB':>10}")
    for kept, words in ((True, "kept"), (False, "given back")):
        span = "" if kept else f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        speed = options.batch_size / statistics.median(seconds[kept])
        print(f"{words:<20}{speed:>10.0f}{span:>26}{statistics.median(peaks[kept]):>10.2f}")


def step_in_process(encoder: str, device: torch.device, options: argparse.Namespace, kept: bool) -> tuple[float, float]:
    """Seconds a step of cross-entropy, after a first one, and the process's peak memory in GiB."""
    if options.threads:
        torch.set_num_threads(options.threads)
    run = Steps(*objectives(encoder)[BASE], device, options)
    with freed_memory_kept() if kept else nullcontext():
        run()
        return run(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def compare(encoder: str, device: torch.device, options: argparse.Namespace) -> None:
    cases = objectives(encoder)
    runs = {words: Steps(network, objective, device, options) for words, (network, objective) in cases.items()}
    seconds: dict[str, list[float]] = {words: [] for words in runs}
    with freed_memory_kept():
        for run in runs.values():
            run()  # kernels are chosen, and compiled, at the first
        for _ in range(options.rounds):
            for words, run in runs.items():
                seconds[words].append(run())
    print(f"\n{encoder}\n{'objective':<42}{'images/s':>10}{'times CE (range)':>24}{'peak share':>12}")
    for words, times in seconds.items():
        ratios = sorted(a / b for a, b in zip(times, seconds[BASE], strict=True))
        middle = statistics.median(times)
        span = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
        share = peak_share(encoder, middle, device, options) if words == BASE else ""
        print(f"{words:<42}{options.batch_size / middle:>10.0f}{span:>24}{share:>12}")


def objectives(encoder: str) -> dict[str, tuple[Callable[[], Classifier], Objective]]:
    """What is timed; every one on a network of its own."""

    def tile() -> Classifier:
        return TileClassifier(encoder)

    return {
        BASE: (tile, SaliencyDecor(0, 0)),
        "decorrelation alone, cov": (tile, SaliencyDecor(0, 0.1)),
        "SGT": (tile, SaliencyDecor(1, 0)),
        "SaliencyDecor, cov": (tile, SaliencyDecor()),
        "SaliencyDecor, zca": (tile, SaliencyDecor(mode="zca")),
        "SaliencyDecor, cov, shared saliency pass": (tile, SaliencyDecor(saliency_pass="shared")),
        "AIM, stages 3 and 2": (lambda: AimClassifier(encoder), AimObjective(10)),
    }


class Steps:
    """Training steps on random images."""

    def __init__(
        self, make: Callable[[], Classifier], objective: Objective, device: torch.device, options: argparse.Namespace
    ) -> None:
        torch.manual_seed(0)
        self.network, self.objective, self.device, self.options = make().to(device).train(), objective, device, options
        if options.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        if options.compiled:
            self.network.encoder.compile()
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=1e-4)
        side = options.tile_px
        self.images = torch.randint(256, (options.batch_size, 3, side, side), dtype=torch.uint8, device=device)
        self.labels = torch.arange(options.batch_size, device=device) % 2
        self.draws = torch.Generator(device).manual_seed(0)
        self.scaler = torch.amp.GradScaler(device.type, enabled=options.amp == "float16")

    def __call__(self) -> float:
        """Seconds a step."""
        self._wait()
        started = time.perf_counter()
        for _ in range(self.options.steps):
            self._step()
        self._wait()
        return (time.perf_counter() - started) / self.options.steps

    def _step(self) -> None:
        amp = {"none": None, "bfloat16": torch.bfloat16, "float16": torch.float16}[self.options.amp]
        self.optimizer.zero_grad()
        with torch.autocast(self.device.type, amp, enabled=amp is not None):
            terms = self.objective(self.network, self.network.normalise(self.images), self.labels, 6.0, self.draws)
        self.scaler.scale(terms.total).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def peak_share(encoder: str, seconds: float, device: torch.device, options: argparse.Namespace) -> str:
    """Share of the card's bfloat16 peak that plain training reaches; three times the forward pass's operations."""
    peak = peak_tflops(device)
    if peak is None:
        return "-"
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        TileClassifier(encoder).eval()(torch.zeros(1, 3, options.tile_px, options.tile_px))
    return f"{3 * counter.get_total_flops() * options.batch_size / seconds / (peak * 1e12):.1%}"


def peak_tflops(device: torch.device) -> float | None:
    """The card's dense bfloat16 peak; None for what is not in the list."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((peak for part, peak in _PEAK_TFLOPS.items() if part in name), None)


if __name__ == "__main__":
    main()
