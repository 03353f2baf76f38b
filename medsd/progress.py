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


def no_progress(items: Iterable[Any], _total: int, _unit: str) -> Iterator[Any]:
    """Shows nothing."""
    return iter(items)


def progress_bar(description: str) -> Progress:
    """A tqdm bar with rate and time left; where standard error is no terminal, a logged line every 30 s."""

    def show(items: Iterable[Any], total: int, unit: str) -> Iterator[Any]:
        if sys.stderr is None or not sys.stderr.isatty():
            return _lines(description, items, total, unit)
        return iter(tqdm(items, description, total, unit=f" {unit}", leave=False, dynamic_ncols=True))

    return show


def _lines(description: str, items: Iterable[Any], total: int, unit: str) -> Iterator[Any]:
    started = told = time.monotonic()
    for done, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - told >= _LINE_EVERY_S and done < total:
            told = now
            left = timedelta(seconds=round((total - done) * (now - started) / done))
            rate = done / (now - started)
            pace = f"{rate:.3g} {unit}s a second" if rate >= 1 else f"{1 / rate:.3g} s a {unit}"
            share = f"{unit} {done} of {total} ({100 * done // total} %)"
            logger.info("%s: %s, %s, %s left", description, share, pace, left)
