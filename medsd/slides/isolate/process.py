"""A child process that reads one slide, seen from its parent; see `child` for what they say to each other."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any

import numpy as np

from medsd.slides.isolate.child import IMPORT_S, LENGTH
from medsd.slides.readers.base import RGB, Bools

_ARGUMENTS = ["-P", "-m", "medsd.slides.isolate.child"]
# One slide is read by one thread: more would only be started, and count as memory.
_ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
_LONGEST_ANSWER = 2**20
_LAST_WORDS = 4096
# A killed process that does not end within this time hangs in the system (a dead network disk): it is left to it.
_REAP_S = 1.0


class ChildError(Exception):
    """The child died, was too slow, or made no sense; it has been killed. The message says which, and the fix."""


class ChildProcess:
    """A child process with pipes to it. Not safe for threads.

    Stdin is closed with this process, however it ends, and that ends the child.

    Raises:
        ChildError: no process can be started.
    """

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._last_words = b""
        try:
            self._process = subprocess.Popen(
                [sys.executable, *_ARGUMENTS],
                bufsize=0,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**os.environ, **_ONE_THREAD},
                start_new_session=True,  # Ctrl-C is for the parent to handle
            )
        except OSError as error:
            raise ChildError(f"cannot be started ({error.strerror}); close other slides or programs") from error
        assert self._process.stdin and self._process.stdout and self._process.stderr
        self._questions = self._process.stdin
        self._answers, self._errors = self._process.stdout.fileno(), self._process.stderr.fileno()
        self._poll = select.poll()
        self._poll.register(self._answers, select.POLLIN)
        self._poll.register(self._errors, select.POLLIN)

    def ask(
        self, question: dict[str, Any], limit_s: float, size: tuple[int, int] = (0, 0)
    ) -> tuple[dict[str, Any], RGB, Bools | None]:
        """The answer to a question.

        Args:
            question: what JSON can hold.
            limit_s: seconds until the last byte of the answer.
            size: (width, height) of the pixels that the answer brings unless it is an error.

        Returns:
            the answer's JSON; pixels (height, width, 3), empty for errors; which pixels were seen, or None for all.

        Raises:
            ChildError: see there. The child is dead after this, or after any other exception.
        """
        deadline = time.monotonic() + limit_s
        answered = False
        try:
            self._questions.write(json.dumps({**question, "limit_s": limit_s}).encode() + b"\n")
            answer = self._hear(deadline)
            if "importing" in answer:
                deadline += IMPORT_S
                answer = self._hear(deadline)
            width, height = (0, 0) if "error" in answer else size
            pixels, seen = np.empty((height, width, 3), np.uint8), None
            self._fill(pixels.reshape(-1).data, deadline)
            if answer.get("seen"):
                seen = np.empty((height, width), np.bool_)
                self._fill(seen.view(np.uint8).reshape(-1).data, deadline)
            answered = True
        except TimeoutError as error:
            raise ChildError(
                f"gave no answer within {limit_s:.3g} s (a busy machine or disk, or a damaged file); try again, or "
                "copy it again to a fast disk"
            ) from error
        except (EOFError, BrokenPipeError) as error:
            raise ChildError(f"{self._cause_of_death()}; the file is damaged: copy it again from its source") from error
        except ValueError as error:
            raise ChildError(
                "gave an answer that makes no sense; the file is damaged: copy it again from its source"
            ) from error
        finally:
            if not answered:  # a later answer would be taken for that of the next question
                self.kill()
        return answer, pixels, seen

    def kill(self) -> None:
        """End the child (it has nothing to save) and close the pipes; a second time does nothing."""
        if self._owner != os.getpid():
            return  # forked: the child is the parent's
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(_REAP_S)
        for pipe in (self._process.stdin, self._process.stdout, self._process.stderr):
            if pipe is not None:
                pipe.close()

    def __del__(self) -> None:
        if hasattr(self, "_process"):
            self.kill()

    def _hear(self, deadline: float) -> dict[str, Any]:
        """The JSON of the next answer."""
        length = bytearray(LENGTH.size)
        self._fill(memoryview(length), deadline)
        (count,) = LENGTH.unpack(length)
        if count > _LONGEST_ANSWER:
            raise ValueError(f"an answer of {count} bytes")
        text = bytearray(count)
        self._fill(memoryview(text), deadline)
        answer = json.loads(text)
        if not isinstance(answer, dict):
            raise ValueError("an answer that is no JSON object")
        return answer

    def _fill(self, target: memoryview, deadline: float) -> None:
        """Fill `target` from the child's stdout; what it prints to stderr meanwhile is kept, the last of it."""
        done = 0
        while done < len(target):
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                raise TimeoutError
            ready = [number for number, _ in self._poll.poll(left_s * 1000)]
            if self._errors in ready:
                self._keep_last_words()
            if self._answers in ready:
                count = os.readv(self._answers, [target[done:]])
                if count == 0:
                    raise EOFError
                done += count

    def _keep_last_words(self) -> bool:
        """Read what there is on stderr; whether there can be more."""
        words = os.read(self._errors, 65536)
        self._last_words = (self._last_words + words)[-_LAST_WORDS:]
        if not words:
            self._poll.unregister(self._errors)
        return bool(words)

    def _cause_of_death(self) -> str:
        try:
            code = self._process.wait(_REAP_S)
        except subprocess.TimeoutExpired:
            return "stopped to answer"
        while any(number == self._errors for number, _ in self._poll.poll(0)) and self._keep_last_words():
            pass
        signals = {known.value: known.name for known in signal.Signals}
        how = f"died of {signals.get(-code, f'signal {-code}')}" if code < 0 else f"ended with status {code}"
        lines = self._last_words.decode(errors="replace").split("\n")
        words = next((" ".join(line.split()) for line in reversed(lines) if line.strip()), "")
        return f"{how} ({words[:300]})" if words else how
