"""`medsd view`: reports with all of their slides, as deep-zoom pages on this machine alone."""

from __future__ import annotations

import json
import logging
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes, urlsplit

from medsd.checks import check_number
from medsd.errors import DatasetError, MedsdError, OutputError, SlideError
from medsd.heatmap.folder import THUMBNAIL
from medsd.heatmap.report import packed_map, quoted
from medsd.heatmap.tiff import read_ome_tiff
from medsd.heatmap.zoom import TILE_PX, as_jpeg, read_tile, zoom_steps
from medsd.record import read_record
from medsd.slides.isolate.slide import IsolatedSlide
from medsd.slides.parts import slide_identity
from medsd.slides.readers.damage import UNFORESEEN
from medsd.slides.slide import Slide

logger = logging.getLogger(__name__)

HOST = "127.0.0.1"
_INDEX = "index.html"
_MOST_OPEN = 8  # slides
_FILES = {"report.html": "text/html; charset=utf-8", "overlay.png": "image/png"}
_REST = "only what the report holds can be shown"
_TILE = re.compile(r"tiles/(\d{1,2})/(\d{1,7})_(\d{1,7})\.jpg")
_MAP = re.compile(r"maps/([\w.]+)\.json")
_POLICY = (
    "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


class ViewServer(ThreadingHTTPServer):
    """Serves, to read alone, what `map_slides` or `segment_slides` left in a folder, and tiles of its slides.

    Addresses choose among the slides found at the start and among files named here: none is taken for a path. Only
    this machine is answered, and only pages of its own.

    Args:
        folder: output of `map_slides`, or the folder of one slide in it.
        port: to listen at; 0 for any that is free.

    Raises:
        DatasetError: no finished slide in the folder.
        OutputError: the port cannot be had.
    """

    daemon_threads = True

    def __init__(self, folder: str | Path, port: int = 0) -> None:
        check_number("port", port, "[0, 65535]", whole=True)
        root = Path(folder)
        folders = (
            [root] if (root / "record.json").is_file() else sorted(path.parent for path in root.glob("*/record.json"))
        )
        self.folders = {one.resolve().name: one for one in folders}
        self.slides = {name: one for name, one in self.folders.items() if (one / "report.html").is_file()}
        if not self.slides:
            raise DatasetError(f"{root}: no slide with a report; name one that medsd heatmap or segment wrote")
        self.index = root / _INDEX
        self._opened: OrderedDict[str, IsolatedSlide] = OrderedDict()
        self._opening = threading.Lock()
        self._told: set[str] = set()
        try:
            super().__init__((HOST, port), _Handler)
        except OSError as error:
            raise OutputError(f"port {port}: cannot be listened at ({error.strerror}); choose another") from error

    def tell(self, words: str) -> None:
        """Warn once: a page asks for hundreds of tiles of a slide that is not there."""
        if words not in self._told:
            self._told.add(words)
            logger.warning("%s", words)

    @property
    def address(self) -> str:
        """Where a browser finds it."""
        return f"http://{HOST}:{self.server_port}/"

    def record(self, name: str) -> dict[str, Any]:
        """The record of a slide.

        Raises:
            DatasetError: its outputs are not whole.
        """
        record = read_record(self.slides[name] / "record.json")
        if record is None:
            raise DatasetError(f"{self.slides[name]}: outputs are not whole; map the slide again")
        return record

    def slide(self, name: str) -> Slide:
        """The slide of that name, in a process of its own: a decoder that dies or hangs costs some tiles.

        Raises:
            SlideError: its file is not there, not the one that was mapped, or cannot be opened.
        """
        with self._opening:
            if name not in self._opened:
                self._opened[name] = self._open(name)
            self._opened.move_to_end(name)
            while len(self._opened) > _MOST_OPEN:
                self._opened.popitem(last=False)[1].close()
            return self._opened[name]

    def server_close(self) -> None:
        """Stop listening, and end the slides' processes."""
        super().server_close()
        with self._opening:
            while self._opened:
                self._opened.popitem()[1].close()

    def _open(self, name: str) -> IsolatedSlide:
        record = self.record(name)
        path = Path(record["result"]["path"])
        if not path.exists():
            why = "moved, or on another disk" if path.is_absolute() else "recorded from another folder; start there"
            raise SlideError(f"{path}: the slide is not there ({why}); {_REST}")
        if json.loads(json.dumps(slide_identity(path))) != record["recipe"]["slide"]:
            raise SlideError(f"{path}: is not the file that was mapped, but another or a changed one; {_REST}")
        return IsolatedSlide(path, record["recipe"]["mpp"])


class _Handler(BaseHTTPRequestHandler):
    server: ViewServer
    server_version = "medsd"
    sys_version = ""
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        try:
            self._answer()
        except ConnectionError:  # the browser no longer wants it
            self.close_connection = True
        except (MedsdError, *UNFORESEEN) as error:
            self.server.tell(f"{error}")
            self._refuse(HTTPStatus.NOT_FOUND)

    do_HEAD = do_GET

    def log_message(self, format: str, *args: Any) -> None:
        logger.debug(format, *args)

    def _answer(self) -> None:
        # A foreign page whose name was made to point here would send its own name.
        if self.headers.get("Host") not in {f"{name}:{self.server.server_port}" for name in (HOST, "localhost")}:
            return self._refuse(HTTPStatus.FORBIDDEN)
        address = urlsplit(self.path)
        name, _, rest = address.path.lstrip("/").partition("/")
        slide = os.fsdecode(unquote_to_bytes(name))
        if not rest and name in ("", _INDEX):
            return self._start()
        if not rest and name == "favicon.ico":  # every browser asks
            return self._refuse(HTTPStatus.NO_CONTENT)
        if rest == THUMBNAIL and slide in self.server.folders:  # the index links to it of slides without a report
            return self._send((self.server.folders[slide] / rest).read_bytes(), "image/png")
        if slide not in self.server.slides:
            return self._refuse(HTTPStatus.NOT_FOUND)
        if rest == "report.html" and address.query != "tiles":
            return self._redirect(f"/{name}/report.html?tiles")
        if rest in _FILES:
            return self._send((self.server.slides[slide] / rest).read_bytes(), _FILES[rest])
        if (tile := _TILE.fullmatch(rest)) is not None:
            return self._send_tile(slide, *map(int, tile.groups()))
        if (shown := _MAP.fullmatch(rest)) is not None:
            return self._send_map(slide, shown[1])
        return self._refuse(HTTPStatus.NOT_FOUND)

    def _start(self) -> None:
        if len(self.server.slides) > 1 and self.server.index.is_file():
            return self._send(self.server.index.read_bytes(), _FILES["report.html"])
        names = [f"/{quoted(name)}/report.html?tiles" for name in self.server.slides]
        return self._redirect(names[0])

    def _send_tile(self, name: str, level: int, column: int, row: int) -> None:
        slide = self.server.slide(name)
        steps = zoom_steps(slide.dimensions)
        if level >= len(steps) or any(
            index * TILE_PX * steps[level] >= side for index, side in zip((column, row), slide.dimensions, strict=True)
        ):
            return self._refuse(HTTPStatus.NOT_FOUND)
        return self._send(as_jpeg(read_tile(slide, steps[level], column, row)), "image/jpeg", "private, max-age=3600")

    def _send_map(self, name: str, key: str) -> None:
        record = self.server.record(name)
        first, *others = record["recipe"].get("methods", [""])  # none of slides that were segmented
        files = {first: "saliency.ome.tif", "probability": "probability.ome.tif"}
        files |= {method: f"{method}.ome.tif" for method in others}
        if files.get(key) not in record["outputs"]:
            return self._refuse(HTTPStatus.NOT_FOUND)
        content: Mapping[str, Any] = packed_map(read_ome_tiff(self.server.slides[name] / files[key]))
        return self._send(json.dumps(content).encode(), "application/json")

    def _send(self, content: bytes, kind: str, cache: str = "no-store") -> None:
        self.send_response(HTTPStatus.OK)
        self._end_head({"Content-Type": kind, "Cache-Control": cache}, content)

    def _redirect(self, address: str) -> None:
        self.send_response(HTTPStatus.FOUND)
        self._end_head({"Location": address}, b"")

    def _refuse(self, status: HTTPStatus) -> None:
        self.send_response(status)
        content = b"" if status == HTTPStatus.NO_CONTENT else status.phrase.encode()
        self._end_head({"Content-Type": "text/plain"}, content)

    def _end_head(self, headers: Mapping[str, str], content: bytes) -> None:
        fixed = {
            "Content-Security-Policy": _POLICY,
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
            "Content-Length": str(len(content)),
        }
        for name, value in {**headers, **fixed}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
