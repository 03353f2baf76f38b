"""The files that a slide is made of, and what tells them from others."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, BinaryIO

from medsd.errors import SlideError
from medsd.files import sha256_of
from medsd.slides.readers.damage import DAMAGED

_PART_BYTES = 2**20
_SERIES = 0x0020_000E
# Hamamatsu's index files name the others, a key and a name a line.
_NAMED = re.compile(rb"^[^=\n]+=([^\r\n]+)", re.MULTILINE)


def files_of(path: str | Path) -> list[Path]:
    """The files of a slide, the one that names it first: with MIRAX's folder, a DICOM series, all of a Zarr folder.

    Raises:
        OSError: it is not there.
    """
    path = Path(path)
    if path.is_dir():
        return sorted(Path(base, name) for base, _, names in os.walk(path) for name in names)
    suffix = path.suffix.lower()
    others: list[Path] = []
    if suffix == ".mrxs":
        others = [other for other in path.with_suffix("").glob("*") if other.is_file()]
    elif suffix == ".dcm":
        series = dicom_series(path)
        beside = path.parent.glob(f"*{path.suffix}") if series else ()
        others = [other for other in beside if other != path and dicom_series(other) == series]
    elif suffix in (".vms", ".vmu"):
        named = (os.fsdecode(name.strip()) for name in _NAMED.findall(_part_of(path, 0)))
        others = [path.parent / name for name in named if Path(name).name == name and (path.parent / name).is_file()]
    return [path, *sorted(others)]


def slide_identity(path: str | Path) -> list[list[Any]]:
    """Name, size in bytes and time of change of a slide, all its files; gigabytes are not read to find nothing to do.

    Raises:
        OSError: it is not there.
    """
    path = Path(path)
    status = path.stat()
    first = [path.name, status.st_size, status.st_mtime_ns]
    files = files_of(path)
    if files == [path]:
        return [first]
    total, digest = 0, hashlib.sha256()
    for file in files:
        status = file.stat()
        total += status.st_size
        digest.update(os.fsencode(f"{os.path.relpath(file, path.parent)}\0{status.st_size}\0{status.st_mtime_ns}\n"))
    # A folder's own size and time say how it was written, and not what.
    return [*([] if path.is_dir() else [first]), [f"{path.name}: {len(files)} files", total, digest.hexdigest()]]


def slide_fingerprint(path: str | Path) -> str:
    """A SHA-256 of the sizes of a slide's files and of three MiB of one: that of its copies, whatever they are called.

    Of the first by name where there are several, whichever of a series names it: start, middle and end, for pictures
    without compression may begin alike. A copy that was written anew (another compression, a label taken out) has
    another.

    Raises:
        OSError: it is not there.
    """
    files = sorted(files_of(path))
    digest = hashlib.sha256(repr(sorted(file.stat().st_size for file in files)).encode())
    length = files[0].stat().st_size
    for start in (0, length // 2, length - _PART_BYTES):
        digest.update(_part_of(files[0], max(0, start)))
    return digest.hexdigest()


def slide_sha256(path: str | Path) -> str:
    """The SHA-256 of a slide's file; of several files, that of their names and SHA-256 in order."""
    path = Path(path)
    files = files_of(path)
    if files == [path]:
        return sha256_of(path)
    lines = [f"{sha256_of(file)}  {os.path.relpath(file, path.parent)}\n" for file in files]
    return hashlib.sha256(os.fsencode("".join(lines))).hexdigest()


def dicom_series(path: Path) -> str:
    """The series that a DICOM file says it belongs to; empty where it says none, or nothing that can be read."""
    try:
        status = path.stat()
        return _series(path, status.st_size, status.st_mtime_ns)
    except OSError:
        return ""


@lru_cache(maxsize=2**16)  # a folder's files are asked for again with each of its slides
def _series(path: Path, _size: int, _changed_ns: int) -> str:
    from pydicom.errors import InvalidDicomError
    from pydicom.filereader import read_partial

    try:
        # No further than its tag: places of frames come behind, and are megabytes.
        with _opened(path) as handle:
            header = read_partial(handle, lambda tag, _vr, _length: tag > _SERIES, specific_tags=[_SERIES])
        return str(header.get("SeriesInstanceUID", ""))
    # NotImplementedError and RecursionError are RuntimeErrors.
    except (SlideError, InvalidDicomError, *DAMAGED):
        return ""


def _part_of(path: Path, start: int) -> bytes:
    """A MiB of a regular file."""
    with _opened(path) as handle:
        handle.seek(start)
        return handle.read(_PART_BYTES)


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    """A regular file, to be read: pipes and devices may never answer."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with open(descriptor, "rb") as handle:
        if not stat.S_ISREG(os.fstat(handle.fileno()).st_mode):
            raise SlideError(f"{path}: is no regular file; name a slide")
        yield handle
