"""Progress: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from typing import Any

from tqdm import tqdm

logger = logging.getLogger(__name__)

Progress = Callable[[Iterable[Any], int, str], Iterator[Any]]
"""Takes items, their number and the name of one, and gives the items on."""

_LINE_EVERY_S = 30.0


class Pixels(int):
    """An item that stands for so many pixels, of which progress tells the rate."""


def no_progress(items: Iterable[Any], _total: int, _unit: str) -> Iterator[Any]:
    """Shows nothing."""
    return iter(items)


def progress_bar(description: str) -> Progress:
    """A tqdm bar with rate and time left; where standard error is no terminal, a logged line every 30 s.

    Of items that are `Pixels` the rate is in Mpx/s. What stands before a comma in the name of an item goes before it:
    "case_01, block" is a block of the slide.
    """

    def show(items: Iterable[Any], total: int, unit: str) -> Iterator[Any]:
        if sys.stderr is None or not sys.stderr.isatty():
            return _lines(description, items, total, unit)
        return _bar(description, items, total, unit)

    return show


def _bar(description: str, items: Iterable[Any], total: int, unit: str) -> Iterator[Any]:
    of, _, word = unit.rpartition(", ")
    shown = f"{description} {of}" if of else description
    started, pixels = time.monotonic(), 0
    with tqdm(items, shown, total, unit=f" {word}", leave=False, dynamic_ncols=True) as bar:
        for item in bar:
            yield item
            if isinstance(item, Pixels):
                pixels += item
                bar.set_postfix_str(_mpx(pixels, time.monotonic() - started), refresh=False)


def _mpx(pixels: int, seconds: float) -> str:
    return f"{pixels / max(seconds, 1e-3) / 1e6:.3g} Mpx/s"


def _lines(description: str, items: Iterable[Any], total: int, unit: str) -> Iterator[Any]:
    started = told = time.monotonic()
    pixels, word = 0, unit.rpartition(", ")[2]
    for done, item in enumerate(items, 1):
        yield item
        pixels += item if isinstance(item, Pixels) else 0
        now = time.monotonic()
        if now - told >= _LINE_EVERY_S and done < total:
            told = now
            left = timedelta(seconds=round((total - done) * (now - started) / done))
            rate = done / (now - started)
            pace = f"{rate:.3g} {word}s a second" if rate >= 1 else f"{1 / rate:.3g} s a {word}"
            pace = _mpx(pixels, now - started) if pixels else pace
            share = f"{unit} {done} of {total} ({100 * done // total} %)"
            logger.info("%s: %s, %s, %s left", description, share, pace, left)
