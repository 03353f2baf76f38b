"""What every reader of slide files offers, and what they share."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from medsd.errors import SlideError

RGB = npt.NDArray[np.uint8]
Bools = npt.NDArray[np.bool_]
Size = tuple[int, int]
Handle = TypeVar("Handle")

# Where a reader cannot say which of its tiles is damaged, an area is halved down to about this side (level pixels).
_SMALLEST_UNSEEN_PX = 128


class Handles(Generic[Handle]):
    """What each process, or each of its threads, has open of one file: opened when first asked for, pickled without.

    Args:
        open_one: opens the file; can be pickled.
        by_thread: whether each thread has its own.
        first: that of this process, where it is open already.
    """

    def __init__(self, open_one: Callable[[], Handle], by_thread: bool = False, first: Handle | None = None) -> None:
        self._open_one, self._by_thread = open_one, by_thread
        self._kept: dict[tuple[int, int], Handle] = {} if first is None else {self._key(): first}

    def here(self) -> Handle:
        """That of the calling process or thread."""
        kept = self._kept.get(self._key())
        # Of two threads that open one at once, both get the first.
        return self._kept.setdefault(self._key(), self._open_one()) if kept is None else kept

    def forget(self) -> None:
        """Open anew next time in this thread."""
        self._kept.pop(self._key(), None)

    def close(self) -> None:
        """Let go of this process's; those that are in use live until they are no longer."""
        for key in list(self._kept):
            if key[0] == os.getpid():  # a parent's are not ours to close
                self._kept.pop(key, None)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": {}}

    def _key(self) -> tuple[int, int]:
        return os.getpid(), threading.get_ident() if self._by_thread else 0


class LevelReader(ABC):
    """The levels of one file, read in whole pixels. Safe for threads, for fork and for pickling.

    Attributes:
        name: the library that decodes the file.
        path: the file.
        sizes: (width, height) of each level in its own pixels, level 0 first.
        properties: what the file says of itself; the scale is looked up here (see `mpp.resolve_mpp`).
    """

    name: ClassVar[str]
    path: Path
    sizes: tuple[Size, ...]
    properties: Mapping[str, str]
    _handles: Handles[Any]

    @abstractmethod
    def read(self, level: int, column: int, row: int, columns: int, rows: int) -> RGB:
        """Pixels (rows, columns, 3) of a rectangle that lies inside the level, transparency on white.

        Raises:
            SlideError: the rectangle cannot be decoded.
        """

    def read_seen(self, level: int, column: int, row: int, columns: int, rows: int) -> tuple[RGB, Bools | None]:
        """Like `read`, with what cannot be decoded white, and (rows, columns) bool False there; None where whole.

        A reader that fails as a whole has the area halved until its damage is fenced in.
        """
        try:
            return self.read(level, column, row, columns, rows), None
        except SlideError:
            if max(columns, rows) <= _SMALLEST_UNSEEN_PX:
                return np.full((rows, columns, 3), 255, np.uint8), np.zeros((rows, columns), np.bool_)
        return read_halves(partial(self.read_seen, level), column, row, columns, rows)

    def close(self) -> None:
        """Let go of this process's handles; a later read opens new ones."""
        self._handles.close()


def read_halves(
    read: Callable[..., tuple[RGB, Bools | None]], x: Any, y: Any, width: int, height: int, step: float | int = 1
) -> tuple[RGB, Bools | None]:
    """An area by two reads of (x, y, width, height), halves of its longer side; `step` moves x and y by a pixel."""
    axis, half = (1, width // 2) if width >= height else (0, height // 2)
    if axis == 1:
        parts = [read(x, y, half, height), read(x + half * step, y, width - half, height)]
    else:
        parts = [read(x, y, width, half), read(x, y + half * step, width, height - half)]
    pixels = np.concatenate([part for part, _ in parts], axis)
    if all(seen is None for _, seen in parts):
        return pixels, None
    masks = [np.ones(part.shape[:2], np.bool_) if seen is None else seen for part, seen in parts]
    return pixels, np.concatenate(masks, axis)


def check_file(path: Path) -> None:
    """Raise SlideError where `path` is not a file that can be read."""
    if not path.exists():
        raise SlideError(f"{path}: no such file; check the path")
    if path.is_dir():
        raise SlideError(f"{path}: is a folder, not a slide; name a slide file in it")
    if not path.is_file():
        raise SlideError(f"{path}: is a pipe or device, not a slide; name a file")
    if not os.access(path, os.R_OK):
        raise SlideError(f"{path}: cannot be read (no permission); change its permissions")
