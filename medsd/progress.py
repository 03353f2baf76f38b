"""Progress on a terminal; nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import tqdm

Progress = Callable[[Iterable[Any], int, str], Iterator[Any]]
"""Takes items, their number and the name of one, and gives the items on."""


def no_progress(items: Iterable[Any], _total: int, _unit: str) -> Iterator[Any]:
    """Shows nothing."""
    return iter(items)


def progress_bar(description: str) -> Progress:
    """A tqdm bar with rate and time left, off when standard error is not a terminal."""

    def show(items: Iterable[Any], total: int, unit: str) -> Iterator[Any]:
        # disable=None is tqdm's word for "off when not a terminal".
        return iter(tqdm(items, description, total, unit=f" {unit}", leave=False, disable=None, dynamic_ncols=True))

    return show
