"""Where the log goes: lines on standard error, and, if wanted, a file of lines or of JSON objects."""

from __future__ import annotations

import json
import logging
import sys
from contextlib import suppress
from datetime import datetime
from pathlib import Path

from medsd.errors import OutputError

logger = logging.getLogger(__name__)


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


class _File(logging.FileHandler):
    """Ends, and says so in a line, when nothing more can be written."""

    def handleError(self, record: logging.LogRecord) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            return super().handleError(record)
        self.setLevel(logging.CRITICAL + 1)  # not removed: the line still goes round the others
        logger.error("%s: cannot be written (%s); the log goes on without it", self.baseFilename, error.strerror)

    def close(self) -> None:
        with suppress(OSError):  # what it still holds cannot be written either
            super().close()


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
        OutputError: the file cannot be written, or holds something else.
    """
    path = Path(path)
    if path.is_file() and not _is_text(path):
        raise OutputError(f"{path}: is no text, and is left as it is; choose another file for --log")
    try:
        handler = _File(path, encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written ({error.strerror}); choose another file for --log") from error
    handler.setFormatter(_Json() if as_json else _Dated("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    logging.getLogger().addHandler(handler)


def _is_text(path: Path) -> bool:
    """Whether the first bytes of a file could be a log's; those of a file that cannot be read are not looked at."""
    with suppress(OSError), open(path, "rb") as file:
        return b"\0" not in file.read(4096)
    return True
