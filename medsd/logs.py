"""Where the log goes: lines on standard error, and, if wanted, a file of lines or of JSON objects."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime
from pathlib import Path

from medsd.errors import OutputError


class _Dated(logging.Formatter):
    """Dates in one form, ISO 8601 with the offset from UTC."""

    def formatTime(self, record: logging.LogRecord, datefmt: str | None = None) -> str:
        return datetime.fromtimestamp(record.created).astimezone().isoformat(timespec="seconds")


class _Json(_Dated):
    def format(self, record: logging.LogRecord) -> str:
        content = {"time": self.formatTime(record), "level": record.levelname, "logger": record.name}
        content["message"] = record.getMessage()
        if record.exc_info:
            content["exception"] = self.formatException(record.exc_info)
        return json.dumps(content)


def log_to_terminal() -> None:
    """Lines on standard error: medsd's from INFO on, others' warnings."""
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s", stream=sys.stderr)
    logging.getLogger().setLevel(logging.WARNING)
    logging.getLogger("medsd").setLevel(logging.INFO)
    # What these say of damaged files, tag by tag, is said in one line by the error that follows.
    logging.getLogger("tifffile").setLevel(logging.CRITICAL)


def log_to_file(path: str | Path, as_json: bool = False) -> None:
    """Append to a file, besides: dated lines, or a JSON object a line (time, level, logger, message, exception).

    Raises:
        OutputError: the file cannot be written.
    """
    try:
        handler = logging.FileHandler(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another file for --log") from error
    handler.setFormatter(_Json() if as_json else _Dated("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)
