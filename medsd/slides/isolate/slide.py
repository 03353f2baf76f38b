"""A slide read in a child process: a decoder that dies, hangs or takes all memory costs that process only."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from operator import index
from pathlib import Path
from typing import Any

import numpy as np

import medsd.errors
from medsd.errors import MedsdError, SlideError
from medsd.slides.isolate.process import ChildError, ChildProcess
from medsd.slides.readers.base import RGB, Bools, Handles
from medsd.slides.slide import Area, Level, Slide, level_for

logger = logging.getLogger(__name__)

# Neighbouring tiles that share one deadly tile of the file die one after the other; more than that is the whole file.
_MOST_DEATHS_IN_A_ROW = 8


@dataclass(frozen=True)
class Limits:
    """What reading one slide may take (our choice).

    Attributes:
        open_s: seconds for starting the child and opening the slide; Python itself may come from a slow disk, and other
            programs may leave it little of the processor.
        read_s: seconds for a read, more where it has many pixels.
        px_per_s: pixels of the pyramid's level that a read may take a second for; the slowest formats on a local disk
            give several times as many.
        memory_gib: memory of the child in GiB (not enforced on macOS).
    """

    open_s: float = 60.0
    read_s: float = 20.0
    px_per_s: float = 1e6
    memory_gib: float = 2.0


@dataclass
class _Here:
    """What belongs to one process: a fork shares neither the lock nor the child."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    child: ChildProcess | None = None
    deaths_in_a_row: int = 0


class IsolatedSlide(Slide):
    """A `Slide` that a child process has open; the same pixels as `open_slide` gives.

    A read whose decoder dies, hangs or needs too much memory raises SlideError (`read`) or is not seen as a whole
    (`read_seen`), and the next read starts a new child. After eight reads in a row that cost a child, further ones are
    refused.

    Safe to share between threads, which wait for each other; to fork; and to pickle, which opens it again. The child
    ends with `close`, with this process however that ends, and with the limit of its read.

    Args:
        path: the slide's file.
        mpp: micrometres per level-0 pixel where the file does not know it, or knows it wrong.
        reader: name of a reader, or None to choose by the file (see `open_slide`).
        limits: what a read may take.

    Attributes:
        levels: see `FileSlide`.

    Raises:
        SlideError: the slide cannot be opened, or not within the limits.
        MedsdError: whatever else `open_slide` raises.
    """

    def __init__(
        self, path: str | Path, mpp: float | None = None, reader: str | None = None, limits: Limits = Limits()
    ) -> None:
        self.path = Path(path)
        self._opening = {
            "path": str(path),
            "mpp": None if mpp is None else float(mpp),
            "reader": reader,
            "memory_bytes": round(limits.memory_gib * 2**30),
        }
        self._limits = limits
        self._closed = False
        self._handles = Handles(_Here)
        here = self._handles.here()
        here.child, self._description = self._start()
        width, height = self._description["dimensions"]
        self.dimensions, self.mpp = (width, height), float(self._description["mpp"])
        self.mpp_source, self.reader = self._description["mpp_source"], self._description["reader"]
        self.mpp_doubt = self._description["mpp_doubt"]
        self.levels = tuple(Level(*level) for level in self._description["levels"])
        self.bounds = tuple(self._description["bounds"])

    def close(self) -> None:
        """End the child of this process when its read, if any, has ended; reading afterwards raises SlideError."""
        self._closed = True
        here = self._handles.here()
        with here.lock:
            if here.child is not None:
                here.child.kill()
                here.child = None

    def _read(self, area: Area, strict: bool) -> tuple[RGB, Bools | None]:
        # As JSON can hold it, checked here: what the child raises is blamed on the file.
        x, y, width, height = float(area.x), float(area.y), index(area.width), index(area.height)
        area = Area(x, y, width, height, None if area.mpp is None else float(area.mpp))
        here = self._handles.here()
        with here.lock:
            if self._closed:
                raise SlideError(f"{self.path}: the slide was closed; open it again")
            if here.deaths_in_a_row >= _MOST_DEATHS_IN_A_ROW:
                raise SlideError(
                    f"{self.path}: its decoder failed {here.deaths_in_a_row} times in a row; copy it again from its "
                    "source"
                )
            try:
                return self._ask(area, here, strict)
            except _UndecodableError as error:
                here.deaths_in_a_row += here.child is None
                if strict:
                    raise
                logger.warning("%s", error)
        return np.full((height, width, 3), 255, np.uint8), np.zeros((height, width), np.bool_)

    def _ask(self, area: Area, here: _Here, strict: bool) -> tuple[RGB, Bools | None]:
        """The child's answer; it is started if there is none."""
        child, here.child = here.child, None  # not kept where anything goes wrong
        if child is None:
            child, description = self._start()
            if description != self._description:
                raise SlideError(f"{self.path}: is no longer the slide that was opened; open it again")
        with _deaths_named(self.path):
            question = {"area": area, "strict": strict}
            answer, pixels, seen = child.ask(question, self._limit_s(area), (area.width, area.height))
        here.child, here.deaths_in_a_row = child, 0
        if "error" in answer:
            raise self._error(answer, f"reading {area.width} x {area.height} px")
        return pixels, seen

    def _limit_s(self, area: Area) -> float:
        """Seconds that a read may take: by the pixels of the level that it needs, or of its result if more."""
        ratio = 1.0 if area.mpp is None else area.mpp / self.mpp
        downsample = self.levels[level_for(self.levels, ratio)].downsample_x
        level_px = area.width * area.height * max(1.0, ratio / downsample) ** 2
        return max(self._limits.read_s, level_px / self._limits.px_per_s)

    def _start(self) -> tuple[ChildProcess, dict[str, Any]]:
        """A new child, with the slide open, and what it says of the slide (see `child.DESCRIBED`)."""
        with _deaths_named(self.path):
            child = ChildProcess()
            answer = child.ask(self._opening, self._limits.open_s)[0]
        if "error" in answer:
            child.kill()
            raise self._error(answer, "opening")
        return child, answer["slide"]

    def _error(self, answer: dict[str, Any], what: str) -> MedsdError:
        """The error that the child answered with: of the same class, where it is one of medsd's."""
        for name in answer["error"]:
            kind: type[MedsdError] | None = getattr(medsd.errors, name, None)
            if kind is not None:
                return kind(answer["message"])
        name, message = answer["error"][0], " ".join(answer["message"].split())
        if "MemoryError" in answer["error"]:
            return _UndecodableError(
                f"{self.path}: more than {self._limits.memory_gib:g} GiB of memory needed for {what}; "
                "convert it to a tiled pyramidal TIFF, or allow more (memory_gib)"
            )
        return _UndecodableError(f"{self.path}: {what} failed ({name}: {message}); copy it again from its source")


class _UndecodableError(SlideError):
    """An area that cannot be read."""


@contextmanager
def _deaths_named(path: Path) -> Iterator[None]:
    try:
        yield
    except ChildError as error:
        raise _UndecodableError(f"{path}: the process that reads it {error}") from error
