"""What libraries raise at damaged files, told as one line that names the file."""

from __future__ import annotations

import lzma
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from openslide import OpenSlideError
from PIL.Image import DecompressionBombError
from shapely.errors import GEOSException

from medsd.errors import SlideError

DAMAGED = (
    *(OSError, ValueError, RuntimeError, ArithmeticError, LookupError, TypeError, AttributeError, EOFError),
    *(MemoryError, struct.error, zlib.error, lzma.LZMAError, OpenSlideError, DecompressionBombError),
    SyntaxError,  # how PIL's plugins say that a header is not theirs
)
"""What readers' libraries raise for damaged bytes (codec errors are RuntimeErrors)."""

UNFORESEEN = (OSError, RuntimeError, ValueError, ArithmeticError, LookupError, MemoryError, GEOSException)
"""What a damaged file or a full memory can raise where nobody foresaw it, and that must cost one slide only."""

Place = tuple[int, int, int]
"""A level, and the column and row of one of its pixels."""


@contextmanager
def damage_named(path: Path, place: Place | None = None) -> Iterator[None]:
    """What is raised inside becomes a SlideError: at `place` nothing can be decoded, or without, nothing can be opened.

    Errors of medsd itself pass as they are.
    """
    try:
        yield
    except DAMAGED as error:
        raise damage(path, error, place) from error


def damage(path: Path, error: Exception, place: Place | None = None) -> SlideError:
    """The error of a file that cannot be opened, or of a place in it that cannot be decoded."""
    where = "" if place is None else f" at level {place[0]}, near its pixel ({place[1]}, {place[2]})"
    if isinstance(error, MemoryError):
        return SlideError(f"{path}: needs more memory than there is{where}; convert it to a tiled pyramidal TIFF")
    reason = " ".join(str(error).split()) or type(error).__name__
    what = "cannot be decoded" if where else "damaged slide"
    return SlideError(f"{path}: {what}{where} ({reason}); copy it again from its source")


def in_one_line(path: Path, error: Exception) -> str:
    """The reason why a slide failed for an unforeseen error: its file, the kind of error and its words."""
    return f"{path}: {type(error).__name__}: {' '.join(str(error).split())}"
