"""Works timed in turns, so that what else a machine does falls on all of them."""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

Seconds = npt.NDArray[np.float64]


def in_turns(works: dict[str, Callable[[], object]], rounds: int) -> dict[str, Seconds]:
    """Seconds of each work in each round; the first call of each is not counted."""
    seconds: dict[str, list[float]] = {words: [] for words in works}
    for number in range(rounds + 1):
        for words, work in works.items():
            started = time.perf_counter()
            work()
            if number:
                seconds[words].append(time.perf_counter() - started)
    return {words: np.array(times) for words, times in seconds.items()}


def line(words: str, ours: Seconds, against: str, theirs: Seconds, wanted: str) -> str:
    """A row of a table: medians, and the ratio with its range against what is wanted, such as "<= 1.1"."""
    ratios, (sign, limit) = ours / theirs, wanted.split()
    times = float(np.median(ratios))
    verdict = "met" if (times <= float(limit) if sign == "<=" else times >= float(limit)) else "MISSED"
    span = f"{times:.2f} ({ratios.min():.2f} to {ratios.max():.2f})"
    shown = [f"{np.median(each):.3g}" for each in (ours, theirs)]
    return f"| {words} | {shown[0]} | {against}, {shown[1]} s | {span} | {wanted}: {verdict} |"
