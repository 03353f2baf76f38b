"""A slide read in a child process: a decoder that dies, hangs or takes all memory costs that process only."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections import deque
from dataclasses import astuple, dataclass, field
from operator import index
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from medsd.errors import MedsdError, SlideError
from medsd.slides.isolate.child import Description
from medsd.slides.isolate.process import ChildError, ChildProcess, named_error
from medsd.slides.readers.base import RGB, Bools
from medsd.slides.slide import check_area

logger = logging.getLogger(__name__)

# Damage is fenced in down to this side (output pixels). A smaller one costs a child process for each further halving.
_SMALLEST_UNSEEN_PX = 256
# One read_seen fences in with at most so many dead children, and in so many times the limit of the whole area's read.
_MOST_DEATHS = 16
_MOST_LIMITS = 6
_DEATHS_IN_A_ROW = 3


class UndecodableError(SlideError):
    """An area cannot be read as a whole; parts of it may be."""


class DecoderDiedError(UndecodableError):
    """An area that cost the child."""


@dataclass(frozen=True)
class Limits:
    """What reading one slide may take (our choice).

    Attributes:
        open_s: seconds for starting the child and opening the slide.
        read_s: seconds for a read, more where it has many pixels.
        px_per_s: pixels of the pyramid's level that a read may take a second for; the slowest formats on a local disk
            give several times as many.
        memory_gib: memory of the child in GiB (not enforced on macOS).
    """

    open_s: float = 10.0
    read_s: float = 10.0
    px_per_s: float = 1e6
    memory_gib: float = 2.0


class IsolatedSlide:
    """A `Slide` that a child process has open; the same pixels as `open_slide` gives.

    A read whose decoder dies, hangs or needs too much memory raises SlideError (`read`) or leaves a small white place
    that was not seen (`read_seen`), and the next read starts a new child. After three reads in a row that cost a child
    and saw nothing, further ones
    are refused.

    Safe to share between threads, which wait for each other; to fork; and to pickle, which opens it again. The child
    ends with `close`, with this process however that ends, and with the limit of its read.

    Args:
        path: the slide's file.
        mpp: micrometres per level-0 pixel where the file does not know it, or knows it wrong.
        reader: name of a reader, or None to choose by the file (see `open_slide`).
        limits: what a read may take.

    Attributes:
        levels, bounds: see `FileSlide`.

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
        self._by_process: dict[int, _Here] = {}
        here = self._here()
        here.child, self._description = self._start()
        self.dimensions = self._description.dimensions
        self.mpp, self.mpp_source = self._description.mpp, self._description.mpp_source
        self.reader = self._description.reader
        self.levels, self.bounds = self._description.levels, self._description.bounds

    def read(self, x: float, y: float, width: int, height: int, mpp: float | None = None) -> RGB:
        """See `Slide.read`."""
        area = _area(x, y, width, height, mpp)
        here = self._here()
        with here.lock:
            self._check(here)
            return self._counted(area, here, self._limit_s(area), strict=True)[0]

    def read_seen(
        self, x: float, y: float, width: int, height: int, mpp: float | None = None
    ) -> tuple[RGB, Bools | None]:
        """See `Slide.read_seen`; areas that cost the child are fenced in down to 256 px.

        Takes at most six times the limit of one read, and that of an opening.
        """
        area = _area(x, y, width, height, mpp)
        here = self._here()
        with here.lock:
            self._check(here)
            limit_s = self._limit_s(area)
            deadline = time.monotonic() + _MOST_LIMITS * limit_s
            try:
                return self._counted(area, here, limit_s, strict=False)
            except UndecodableError as error:
                logger.warning("%s", error)
            pixels, seen = self._fence_in(area, here, deadline)
            if seen.any():
                here.deaths_in_a_row = 0
            return pixels, seen

    def close(self) -> None:
        """End the child of this process when its read, if any, has ended; reading afterwards raises SlideError."""
        self._closed = True
        here = self._here()
        with here.lock:
            if here.child is not None:
                here.child.kill()
                here.child = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_by_process": {}}

    def _here(self) -> _Here:
        return self._by_process.setdefault(os.getpid(), _Here())

    def _check(self, here: _Here) -> None:
        if self._closed:
            raise SlideError(f"{self.path}: the slide was closed; open it again")
        if here.deaths_in_a_row >= _DEATHS_IN_A_ROW:
            raise SlideError(
                f"{self.path}: its decoder failed {here.deaths_in_a_row} times in a row; copy it again from its source"
            )

    def _limit_s(self, area: _Area) -> float:
        """Seconds that a read may take: by the pixels of the level that it needs, or of its result if more."""
        ratio = 1.0 if area.mpp is None else area.mpp / self.mpp
        fitting = [level.downsample_x for level in self.levels if level.downsample_x <= ratio * (1 + 1e-6)]
        level_px = area.width * area.height * max(1.0, ratio / max(fitting, default=1.0)) ** 2
        return max(self._limits.read_s, level_px / self._limits.px_per_s)

    def _counted(self, area: _Area, here: _Here, limit_s: float, strict: bool) -> tuple[RGB, Bools | None]:
        """`_read`, with deaths in a row counted."""
        try:
            result = self._read(area, here, limit_s, strict)
        except DecoderDiedError:
            here.deaths_in_a_row += 1
            raise
        here.deaths_in_a_row = 0
        return result

    def _read(self, area: _Area, here: _Here, limit_s: float, strict: bool) -> tuple[RGB, Bools | None]:
        """Read by the child, started if there is none.

        Raises:
            UndecodableError: the area fails as a whole.
        """
        child, here.child = here.child, None  # not kept where anything goes wrong
        if child is None:
            child, description = self._start()
            if description != self._description:
                raise SlideError(f"{self.path}: is no longer the slide that was opened; open it again")
        question = {"area": astuple(area), "strict": strict}
        try:
            answer, pixels, seen = child.ask(question, limit_s, (area.width, area.height))
        except ChildError as error:
            raise DecoderDiedError(f"{self.path}: the process that reads it {error}") from error
        here.child = child
        if "error" in answer:
            raise self._error(answer, f"reading {area.width} x {area.height} px")
        return pixels, seen

    def _start(self) -> tuple[ChildProcess, Description]:
        """A new child, with the slide open."""
        try:
            child = ChildProcess()
            answer = child.ask(self._opening, self._limits.open_s)[0]
        except ChildError as error:
            raise DecoderDiedError(f"{self.path}: the process that reads it {error}") from error
        if "error" in answer:
            child.kill()
            raise self._error(answer, "opening")
        return child, Description.from_json(answer)

    def _error(self, answer: dict[str, Any], what: str) -> MedsdError:
        """The error that the child answered with."""
        named = named_error(answer)
        if named is not None:
            return named
        name, message = answer["error"][0], " ".join(answer["message"].split())
        if "MemoryError" in answer["error"]:
            return UndecodableError(
                f"{self.path}: more than {self._limits.memory_gib:g} GiB of memory needed for {what}; "
                "convert it to a tiled pyramidal TIFF, or allow more (memory_gib)"
            )
        return UndecodableError(f"{self.path}: {what} failed ({name}: {message}); copy it again from its source")

    def _fence_in(self, area: _Area, here: _Here, deadline: float) -> tuple[RGB, Bools]:
        """An area that fails as a whole, read in ever smaller parts, the larger ones first."""
        pixels = np.full((area.height, area.width, 3), 255, np.uint8)
        seen = np.zeros((area.height, area.width), np.bool_)
        ratio = 1.0 if area.mpp is None else area.mpp / self.mpp
        parts = deque(_quarters(0, 0, area.width, area.height))
        deaths = 1
        while parts and deaths < _MOST_DEATHS:
            left, top, width, height = parts.popleft()
            part = _Area(area.x + left * ratio, area.y + top * ratio, width, height, area.mpp)
            limit_s = min(self._limit_s(part), deadline - time.monotonic())
            if limit_s <= 0:
                break
            try:
                read, read_seen = self._read(part, here, limit_s, strict=False)
            except UndecodableError as error:
                deaths += isinstance(error, DecoderDiedError)
                parts.extend(_quarters(left, top, width, height))
                continue
            place = np.s_[top : top + height, left : left + width]
            pixels[place], seen[place] = read, True if read_seen is None else read_seen
        return pixels, seen


@dataclass
class _Here:
    """What belongs to one process: a fork shares neither the lock nor the child."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    child: ChildProcess | None = None
    deaths_in_a_row: int = 0


@dataclass(frozen=True)
class _Area:
    """The arguments of a read, as JSON can hold them."""

    x: float
    y: float
    width: int
    height: int
    mpp: float | None


def _area(x: float, y: float, width: int, height: int, mpp: float | None) -> _Area:
    """The area, checked here: what the child raises is blamed on the file."""
    check_area(x, y, width, height, mpp)
    return _Area(float(x), float(y), index(width), index(height), None if mpp is None else float(mpp))


def _quarters(left: int, top: int, width: int, height: int) -> list[tuple[int, int, int, int]]:
    """The halves of each side that is longer than the smallest; nothing where none is."""
    if max(width, height) <= _SMALLEST_UNSEEN_PX:
        return []
    columns, rows = _halves(left, width), _halves(top, height)
    return [(column, row, across, down) for row, down in rows for column, across in columns]


def _halves(start: int, length: int) -> list[tuple[int, int]]:
    if length <= _SMALLEST_UNSEEN_PX:
        return [(start, length)]
    half = length // 2
    return [(start, half), (start + half, length - half)]
