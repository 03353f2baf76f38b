"""Files that are either whole or not there."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import secrets
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from medsd.errors import OutputError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

# Of a process whose life cannot be asked for, as that of another machine (our choice).
_DEAD_AFTER_S = 86_400.0


def _machine() -> str:
    """This machine and what of its processes can be seen from here: containers share names and process numbers."""
    seen = [platform.node()]
    with suppress(OSError):  # Linux only
        seen += [Path("/proc/sys/kernel/random/boot_id").read_text("ascii"), os.readlink("/proc/self/ns/pid")]
    return f"{re.sub(r'[^A-Za-z0-9_.]', '_', seen[0])[:40]}~{hashlib.sha256(repr(seen).encode()).hexdigest()[:8]}"


MACHINE = _machine()
"""A name of this machine (and container, since it was started) that has neither blanks nor separators."""


def json_of(data: str | bytes) -> Any:
    """The content of a JSON text.

    Raises:
        ValueError: no JSON, not UTF-8, a number of thousands of digits, or thousands of nested brackets.
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error


def read_json(path: str | Path) -> Any:
    """The content of a JSON file; `json_of` says what is raised of it, besides OSError."""
    return json_of(Path(path).read_text("utf-8"))


def make_folder(folder: str | Path) -> Path:
    """Create `folder` with its parents, and make sure that files can be written there.

    Raises:
        OutputError: `folder` cannot be created or written to.
    """
    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".medsd-{os.getpid()}@{MACHINE}"
        probe.touch()
        probe.unlink(missing_ok=True)
    except OSError as error:
        raise OutputError(f"{folder}: cannot write here ({error.strerror}); choose another output folder") from error
    return folder


def check_new(path: str | Path) -> None:
    """Raise OutputError where there is something at a path that a user wants written."""
    path = Path(path)
    if path.exists() or path.is_symlink():
        raise OutputError(f"{path}: is there already and is left as it is; choose another name, or remove it first")


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`, renamed to it when the block ends well and removed when it does not.

    What is renamed is on disk: a machine that loses power leaves no empty file of that name. The suffix is kept
    (writers choose their format by it); the folder is created.

    Raises:
        OutputError: the folder cannot be written to, or the disk is full.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OutputError(f"{path.parent}: cannot be created ({error.strerror})") from error
    # By process and machine: others may write into this folder at the same time, see `remove_leftovers`.
    temporary = path.with_name(f".{os.getpid()}@{MACHINE}-{secrets.token_hex(4)}-{path.name}")
    try:
        yield temporary
        with open(temporary, "rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder: str | Path) -> None:
    """Remove what `atomic_path` left in `folder` where its process was killed; what a living one writes stays."""
    for path in Path(folder).glob(".*"):
        named = re.match(r"\.(\d+)[@-](?!.*\.claim(\.[0-9a-f]{16})?$)", path.name)
        if named and not _alive(int(named[1]), path):
            path.unlink(missing_ok=True)


def _alive(process: int, temporary: Path) -> bool:
    """Whether the process that writes a file lives; one of another machine does while the file changes."""
    if temporary.name.startswith((f".{process}@{MACHINE}-", f".{process}-")) and os.name != "nt":
        return process_lives(process)
    try:
        return time.time() - temporary.stat().st_mtime < _DEAD_AFTER_S
    except FileNotFoundError:
        return False


def process_lives(process: int) -> bool:
    """Whether a process of this machine is there; on Windows, where asking ends it, it is taken to be."""
    try:
        if os.name != "nt":
            os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # it is another user's
    try:  # one that ended, but that its parent has not asked for (as in many containers), is still there by its number
        return Path(f"/proc/{process}/stat").read_text("ascii", "replace").rpartition(")")[2].split()[0] != "Z"
    except (OSError, IndexError):
        return True  # no Linux


def write_text(path: str | Path, text: str) -> None:
    """Write `text` (UTF-8) to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as indented JSON to `path` atomically; NaN is refused (it is not JSON)."""
    write_text(path, json.dumps(content, indent=2, allow_nan=False) + "\n")


def as_json(found: DataclassInstance) -> dict[str, Any]:
    """A data class, of scores above all, as JSON values; what is not finite becomes null."""
    plain: dict[str, Any] = json.loads(json.dumps(asdict(found)), parse_constant=lambda _name: None)
    return plain


def printable(text: str) -> str:
    """`text` on one line, control characters and bytes that are no text as question marks."""
    return "".join(character if character.isprintable() else "?" for character in text)


def sha256_of(path: str | Path) -> str:
    """The SHA-256 of a file as hexadecimal digits."""
    with open(path, "rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
