"""What a run says where there is no terminal, and in a file."""

from __future__ import annotations

import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from pathlib import Path

import pytest

from medsd import progress
from medsd.errors import OutputError
from medsd.logs import log_to_file
from medsd.progress import progress_bar


@contextmanager
def alone() -> Iterator[None]:
    """Loggers without handlers but new ones: pytest sends on what its own hold, and cannot send any name."""
    root, own = logging.getLogger(), [logging.getLogger(name) for name in ("medsd", "medsd.test")]
    before = [(logger, logger.handlers, logger.level, logger.propagate) for logger in (root, *own)]
    for logger in (root, *own):
        logger.handlers = []
    for logger in own:
        logger.setLevel(logging.INFO)
        logger.propagate = True
    try:
        yield
    finally:
        for handler in root.handlers:
            handler.close()
        for logger, handlers, level, propagate in before:
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)


def test_a_file_of_dated_lines_and_one_of_json_objects(tmp_path: Path) -> None:
    with alone():
        log_to_file(tmp_path / "log.txt")
        log_to_file(tmp_path / "log.json", as_json=True)
        logger = logging.getLogger("medsd.test")
        logger.info("f\udce9vrier: ok\n2")
        try:
            raise ValueError("odd")
        except ValueError:
            logger.exception("a.svs")
    # A thread of an earlier test may write a line, too.
    text = (tmp_path / "log.txt").read_text("utf-8")
    first = re.search(r"^(\S+) INFO medsd\.test: f\\udce9vrier: ok$", text, re.MULTILINE)
    assert first and datetime.fromisoformat(first[1]).tzinfo and "\nValueError: odd\n" in text
    rows = map(json.loads, (tmp_path / "log.json").read_text("utf-8").splitlines())
    one, other = (row for row in rows if row["logger"] == "medsd.test")
    # As ASCII: what fails here is sent by pytest, which cannot send any name.
    assert (one["level"], ascii(one["message"])) == ("INFO", ascii("f\udce9vrier: ok\n2"))
    assert other["message"] == "a.svs" and other["exception"].endswith("ValueError: odd")
    with pytest.raises(OutputError, match=r"none/log: cannot be written \(No such file.*choose another file for --log"):
        log_to_file(tmp_path / "none" / "log")


def test_what_is_no_log_is_not_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "slide.tif"
    path.write_bytes(b"II*\0 and so on")
    with pytest.raises(
        OutputError, match=r"slide\.tif: is no text, and is left as it is; choose another file for --log"
    ):
        log_to_file(path)
    assert path.read_bytes() == b"II*\0 and so on"


@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="no /dev/full here")
def test_a_full_disk_ends_the_log_and_nothing_else(capfd: pytest.CaptureFixture[str]) -> None:
    with alone():
        logging.getLogger().addHandler(logging.StreamHandler(sys.stderr))
        log_to_file("/dev/full")
        logging.getLogger().addHandler(logging.StreamHandler(sys.stderr))
        for number in range(3):
            logging.getLogger("medsd.test").info("line %d", number)
    lines = capfd.readouterr().err.splitlines()
    told = "/dev/full: cannot be written (No space left on device); the log goes on without it"
    assert sorted(lines) == sorted(2 * ["line 0", "line 1", "line 2", told])


def test_without_a_terminal_there_is_a_line_now_and_then(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "medsd")
    seconds = iter(range(0, 10_000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(seconds)))
    assert list(progress_bar("heatmap")(range(8), 8, "slide")) == list(range(8))
    assert [record.getMessage() for record in caplog.records] == [
        "heatmap: slide 3 of 8 (37 %), 10 s a slide, 0:00:50 left",
        "heatmap: slide 6 of 8 (75 %), 10 s a slide, 0:00:20 left",
    ]


def test_of_pixels_the_rate_is_told_and_the_slide_named(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "medsd")
    seconds = iter(range(0, 10_000, 10))
    monkeypatch.setattr(progress.time, "monotonic", lambda: float(next(seconds)))
    blocks = [progress.Pixels(4_000_000)] * 8
    assert list(progress_bar("heatmap")(blocks, 8, "a, b, block")) == blocks
    assert caplog.records[0].getMessage() == "heatmap: a, b, block 3 of 8 (37 %), 0.4 Mpx/s, 0:00:50 left"
    monkeypatch.undo()
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(progress, "tqdm", partial(progress.tqdm, mininterval=0, file=terminal))
    assert list(progress_bar("heatmap")(blocks, 8, "a, b, block")) == blocks
    assert "heatmap a, b:  88%" in terminal.getvalue() and "Mpx/s" in terminal.getvalue()
