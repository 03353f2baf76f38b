"""A child process with limits of time and memory, in which anything may happen."""

from __future__ import annotations

import os
import resource
import select
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_WALL_S = 120
_MEMORY_BYTES = 2 * 2**30
_JUDGING = b"\0"

Work = Callable[[Callable[[], Any]], tuple[str, str]]


@dataclass(frozen=True)
class Result:
    """What came of it: outcome, in words, and the processor seconds of the child."""

    outcome: str
    words: str
    cpu_s: float


def in_child(work: Work, cpu_s: int) -> Result:
    """The outcome and words of `work`; "crash" or "hang" where the child did not come to say them.

    Args:
        work: takes a function to call when all is read and only others are asked; a death after that is "wrong", for
            nobody else bears out what was read.
        cpu_s: seconds of processor time.
    """
    answers, questions = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(answers)
        outcome, words = "crash", ""
        try:
            _limit(cpu_s)
            outcome, words = work(lambda: os.write(questions, _JUDGING))
        finally:
            with suppress(OSError):
                os.write(questions, f"{outcome}\n{words}".encode(errors="replace"))
            os._exit(0)
    os.close(questions)
    said = _hear(answers, time.monotonic() + _WALL_S)
    os.close(answers)
    if said is None:
        os.kill(child, signal.SIGKILL)
    _, status, usage = os.wait4(child, 0)
    cpu = usage.ru_utime + usage.ru_stime
    if said is None or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU):
        return Result("hang", f"over {cpu_s} s of processor time or {_WALL_S} s", cpu)
    judging, answer = said.startswith(_JUDGING), said.removeprefix(_JUDGING).decode(errors="replace")
    if answer:
        outcome, _, words = answer.partition("\n")
        return Result(outcome, words, cpu)
    how = f"died of signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "ended"
    return Result("wrong" if judging else "crash", f"other software {how}" if judging else how, cpu)


def _limit(cpu_s: int) -> None:
    """Of processor time, and of memory beyond what is there already."""
    resource.setrlimit(resource.RLIMIT_CPU, (cpu_s, cpu_s + 5))
    used = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmData"))
    most = int(used.split()[1]) * 1024 + _MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for stream in (1, 2):  # what libraries print of damaged files
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream)


def _hear(pipe: int, until: float) -> bytes | None:
    """All that is said; None where it takes too long."""
    said = b""
    while select.select([pipe], [], [], max(0.0, until - time.monotonic()))[0]:
        part = os.read(pipe, 2**16)
        if not part:
            return said
        said += part
    return None
