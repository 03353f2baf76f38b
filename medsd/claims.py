"""Who works on what, where processes and machines share a folder: a file that a living process holds."""

from __future__ import annotations

import os
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from medsd.errors import OutputError
from medsd.files import MACHINE, process_lives

_HEARTBEAT_S = 20.0
# Without a heartbeat for so long, a claim of another machine is nobody's any more; its clock may be some minutes off,
# and a disk may be slow (our choice).
_STALE_S = 600.0
_PATIENCE_S = 0.5
# A claim is written as soon as it is made; empty for longer, its process was killed in between (our choice).
_EMPTY_S = 2.0


class Claim:
    """What this process holds, until another one takes it for dead and takes it over."""

    def __init__(self, path: Path, token: str) -> None:
        self._path, self._token = path, token
        self._ended = threading.Event()
        threading.Thread(target=self._beat, name=f"claim {path}", daemon=True).start()

    @property
    def held(self) -> bool:
        """Whether it is still ours: what belongs to another process now must not be written."""
        return _read(self._path) == self._token

    def check(self) -> None:
        """Raises OutputError: it is another one's now."""
        if not self.held:
            raise OutputError(f"{self._path}: another run took over while this one stood still; run again")

    def release(self) -> None:
        """Let it go."""
        self._ended.set()
        if self.held:
            self._path.unlink(missing_ok=True)

    def _beat(self) -> None:
        while not self._ended.wait(_HEARTBEAT_S) and self.held:
            with suppress(OSError):  # the next one may go well
                os.utime(self._path)


@contextmanager
def claimed(path: str | Path, wait: bool = False) -> Iterator[Claim | None]:
    """Hold the file `path` for the length of a block, so that no other process does, on any machine.

    It holds host, process and a random part, and a thread touches it. A claim whose process is dead, that stays empty,
    or that nobody has touched for ten minutes is taken over. Programs that do not ask are not kept out.

    Args:
        path: the file, in a folder that all share; gone afterwards.
        wait: until it is free, instead of giving None.

    Raises:
        OutputError: the file cannot be made.

    Example:
        >>> with claimed(".slide.claim") as first, claimed(".slide.claim") as second:
        ...     first.held, second is None
        (True, True)
    """
    path = Path(path)
    token = f"{MACHINE} {os.getpid()} {secrets.token_hex(8)}"
    claim = None
    try:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            while not (taken := _take(path, token)) and wait:
                time.sleep(_PATIENCE_S)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written ({error.strerror or error})") from error
        claim = Claim(path, token) if taken else None
        yield claim
    finally:
        if claim is not None:
            claim.release()
        elif _read(path) == token:  # stopped while it was being taken
            path.unlink(missing_ok=True)


def forget_abandoned(path: str | Path) -> None:
    """Take away the claim of a process that was killed, where nobody will claim `path` again: its work was done."""
    path = Path(path)
    holder = _read(path)
    # An empty one may be in the making.
    if holder and _is_abandoned(path, holder):
        _bury(path, holder, secrets.token_hex(8))


def _take(path: Path, token: str) -> bool:
    """Whether the claim is ours now."""
    for _ in range(2):
        try:
            with open(path, "x", encoding="utf-8") as handle:
                handle.write(token)
            return True
        except FileExistsError:
            holder = _read(path)
        if holder == "":
            time.sleep(_EMPTY_S)
            holder = _read(path)
        if holder is None or not _is_abandoned(path, holder) or not _bury(path, holder, token):
            return False
    return False


def _bury(path: Path, holder: str, token: str) -> bool:
    """Take an abandoned claim away; of several processes that try, one does, and a new claim is put back."""
    grave = path.with_name(f"{path.name}.{token.split()[-1]}")
    try:
        path.rename(grave)
    except FileNotFoundError:
        return False
    if ours := _read(grave) == holder:
        grave.unlink()
    else:
        with suppress(FileExistsError):
            os.link(grave, path)
        grave.unlink()
    return ours


def _is_abandoned(path: Path, holder: str) -> bool:
    if not holder:
        return True
    machine, _, rest = holder.partition(" ")
    process = rest.partition(" ")[0]
    if machine == MACHINE and process.isdecimal() and not process_lives(int(process)):
        return True
    try:
        return time.time() - path.stat().st_mtime > _STALE_S
    except FileNotFoundError:
        return False


def _read(path: Path) -> str | None:
    try:
        return path.read_text("utf-8")
    except OSError:
        return None
