"""The child process of `isolate`: it opens one slide and answers questions on stdin until stdin closes.

A question is a line of JSON. An answer is the length of a JSON text (4 bytes, big-endian), the text, then the pixels
(height x width x 3 bytes) and, where the text says `"seen": true`, the mask (height x width bytes of 0 or 1). A text
`{"importing": name}` may come before, once: the answer then takes `IMPORT_S` longer.
"""

from __future__ import annotations

import json
import os
import signal
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from medsd.errors import MedsdError
from medsd.slides.readers.base import RGB, Bools
from medsd.slides.readers.damage import DAMAGED
from medsd.slides.slide import FileSlide, open_slide

if sys.platform != "win32":
    import resource

LENGTH = struct.Struct(">I")
"""The length that goes before an answer's text."""

DESCRIBED = ("dimensions", "mpp", "mpp_source", "mpp_doubt", "reader", "levels", "bounds")
"""The attributes of a `FileSlide` that its first answer tells."""

IMPORT_S = 60.0
"""Seconds for importing tiatoolbox: it takes long, which is not the slide's fault."""

# What decoders raise becomes an answer. Anything else ends the process, and the parent reports its last words.
_ANSWERED = (MedsdError, *DAMAGED)
# The parent kills a child that is late. Where the parent itself was killed, the system does so this much later.
_GRACE_S = 1.0

Opener = Callable[[Path, float | None, str | None], FileSlide]


def main(opener: Opener = open_slide) -> None:
    """Answer until stdin closes; `opener` opens the slide that the first question names."""
    questions, answers = _take_channels()
    _announce_import(answers)
    slide: FileSlide | None = None
    for line in questions:
        question = json.loads(line)
        _die_after(question["limit_s"] + _GRACE_S)
        arrays: list[RGB | Bools] = []
        try:
            if slide is None:
                _limit(question["memory_bytes"])
                slide = opener(Path(question["path"]), question["mpp"], question["reader"])
                answer: dict[str, Any] = {"slide": {name: getattr(slide, name) for name in DESCRIBED}}
            else:
                area = question["area"]
                pixels, seen = (slide.read(*area), None) if question["strict"] else slide.read_seen(*area)
                arrays = [pixels] if seen is None else [pixels, seen]
                answer = {"seen": seen is not None}
        except _ANSWERED as error:
            answer = {"error": [kind.__name__ for kind in type(error).__mro__], "message": str(error)}
        _send(answers, answer, arrays)
        _die_after(0)


def _send(answers: BinaryIO, answer: dict[str, Any], arrays: Iterable[RGB | Bools] = ()) -> None:
    text = json.dumps(answer).encode()
    answers.write(LENGTH.pack(len(text)) + text)
    for array in arrays:
        answers.write(np.ascontiguousarray(array).data)
    answers.flush()


def _announce_import(answers: BinaryIO) -> None:
    """Tell the parent, once, when tiatoolbox is imported."""
    waiting = {"tiatoolbox"}

    def announce(event: str, details: tuple[Any, ...]) -> None:
        if event == "import" and details[0] in waiting:
            waiting.clear()
            _die_after(signal.getitimer(signal.ITIMER_REAL)[0] + IMPORT_S)
            _send(answers, {"importing": details[0]})

    sys.addaudithook(announce)


def _take_channels() -> tuple[BinaryIO, BinaryIO]:
    """Stdin and stdout for our own use; what libraries print goes to stderr, and they find stdin empty."""
    questions, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    return questions, answers


def _die_after(seconds: float) -> None:
    """Let the system end this process then, whatever a decoder does; 0 takes it back."""
    if sys.platform == "win32":
        return
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _limit(memory_bytes: int) -> None:
    """No core files, and no more memory than that (macOS does not enforce it).

    RLIMIT_DATA counts what can be written to; RLIMIT_AS would count libraries and mapped files as well.
    """
    if sys.platform == "win32":
        return
    for what, most in ((resource.RLIMIT_DATA, memory_bytes), (resource.RLIMIT_CORE, 0)):
        allowed = resource.getrlimit(what)[1]
        most = most if allowed == resource.RLIM_INFINITY else min(most, allowed)
        resource.setrlimit(what, (most, most))


if __name__ == "__main__":
    main()
