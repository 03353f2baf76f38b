"""CAMELYON16 from its open bucket: what to fetch, and what is there already.

Needs no account and no client but Python's own. Files lie in the folder as in the bucket; `camelyon.find_slides` reads
that layout.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from medsd.cohort.bucket import CHECKSUMS, Advance, RemoteFile, Server, md5_of, part_of, size_of
from medsd.errors import DatasetError, MedsdError, OutputError, nearest
from medsd.files import make_folder, write_json

logger = logging.getLogger(__name__)

BASE_URL = "https://camelyon-dataset.s3.us-west-2.amazonaws.com/CAMELYON16/"
"""Where the data are, as the Registry of Open Data on AWS has it (registry.opendata.aws/camelyon; licence CC0)."""

STATE = ".medsd-download.json"

Part = Literal["training", "testing", "annotations"]
_PARTS: dict[Part, str] = {
    "training": r"(images|annotations)/(normal|tumor)_.*",
    "testing": r"(images|annotations)/test_.*",
    "annotations": r"annotations/.*",
}
# What the data are of little use without: README, licence, checksums, labels of the test slides.
_ALWAYS = re.compile(r"[^/]+|evaluation/reference\.csv")
# Masks are not fetched: medsd makes its own from the outlines.
_SLIDES = re.compile(r"(images|annotations)/(?P<slide>[^/]+)\.(tif|xml)")


@dataclass(frozen=True)
class _Kept:
    """What a file was when it was found right; one that was changed since is hashed again."""

    size: int
    mtime_ns: int
    md5: str | None

    @staticmethod
    def of(path: Path, md5: str | None) -> _Kept:
        status = path.stat()
        return _Kept(status.st_size, status.st_mtime_ns, md5)


class Folder:
    """Where files are fetched to, with a record of those found right, so that 700 GB are hashed once."""

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder)
        self._kept: dict[str, _Kept] = {}
        try:
            known = json.loads((self.path / STATE).read_text("utf-8"))
            self._kept = {name: _Kept(**kept) for name, kept in known.items()}
        except OSError:
            pass  # nothing was fetched yet
        except (ValueError, TypeError, AttributeError):
            logger.warning("%s: damaged; every file is checked again", self.path / STATE)

    def holds(self, file: RemoteFile) -> bool:
        """Whether the file is there, whole and right; hashes it unless that was done and it is as it was."""
        path = self.path / file.name
        if not path.is_file() or size_of(path) != file.size:
            return False
        if self._kept.get(file.name) == _Kept.of(path, file.md5):
            return True
        if file.md5 is not None and md5_of(path) != file.md5:
            return False
        self.keep(file)
        return True

    def keep(self, file: RemoteFile) -> None:
        """Record that the file there is right."""
        self._kept[file.name] = _Kept.of(self.path / file.name, file.md5)
        write_json(self.path / STATE, {name: asdict(kept) for name, kept in sorted(self._kept.items())})


def choose(files: Sequence[RemoteFile], part: Part | None = None, only: Sequence[str] = ()) -> list[RemoteFile]:
    """The files to fetch: slides with their outlines, and always README, licence, checksums and test labels.

    Args:
        files: those of the bucket.
        part: training slides, test slides, or all outlines without slides; None for all.
        only: names of slides (normal_001); the others are left out.

    Raises:
        DatasetError: a name in `only` is not a slide of that part.
    """
    of_part = re.compile("|".join(_PARTS.values()) if part is None else _PARTS[part])
    chosen: dict[str, list[RemoteFile]] = {}
    for file in files:
        match = _SLIDES.fullmatch(file.name)
        if match and of_part.fullmatch(file.name):
            chosen.setdefault(match["slide"], []).append(file)
    for name in only:
        if name not in chosen:
            raise DatasetError(f"slide '{name}': not there{nearest(name, chosen) or '; see the README of the data'}")
    wanted = set(only) or set(chosen)
    always = [file for file in files if _ALWAYS.fullmatch(file.name)]
    return always + [file for name, of_slide in chosen.items() if name in wanted for file in of_slide]


def missing_files(files: Sequence[RemoteFile], folder: Folder) -> list[RemoteFile]:
    """Those of `files` that are not there or not right. The first time, what is there is hashed."""
    return [file for file in files if not folder.holds(file)]


def check_space(files: Sequence[RemoteFile], folder: Folder) -> None:
    """Raise OutputError where `files` do not fit on the disk, or the folder cannot be written to."""
    make_folder(folder.path)
    needed = sum(file.size - min(file.size, size_of(part_of(file, folder.path))) for file in files)
    free = shutil.disk_usage(folder.path).free
    if needed > free:
        raise OutputError(f"{folder.path}: {needed / 1e9:.1f} GB are to come, {free / 1e9:.1f} GB are free; make room")


def download(server: Server, files: Sequence[RemoteFile], folder: Folder, advance: Advance) -> dict[str, str]:
    """Fetch the files one after the other; one that fails does not stop the others.

    Returns:
        why each file that failed did, by name.
    """
    failed: dict[str, str] = {}
    for file in files:
        if file.md5 is None and file.name != CHECKSUMS:
            logger.warning("%s: no checksum is published; its size alone is checked", file.name)
        try:
            server.fetch(file, folder.path, advance)
            folder.keep(file)
        except MedsdError as error:
            failed[file.name] = str(error)
    return failed
