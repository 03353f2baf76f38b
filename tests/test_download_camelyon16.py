"""CAMELYON16's bucket, played by a server on this machine that misbehaves as asked."""

from __future__ import annotations

import hashlib
import runpy
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

SCRIPT = Path(__file__).parents[1] / "scripts" / "download_camelyon16"
SLIDE = "images/normal_001.tif"
FOLDER = "bucket/CAMELYON16"


def content(name: str, size: int) -> bytes:
    return np.random.default_rng(list(name.encode())).bytes(size)


ALWAYS = {
    "README.md": b"# CAMELYON16 Data Set\n",
    "license.txt": b"CC0\n",
    "evaluation/reference.csv": b"image,type,class,center\ntest_001.tif,test,micro,0\n",
}
SLIDES = {
    **{f"images/{name}_001.tif": content(name, 300_000) for name in ("normal", "tumor", "test")},
    "images/normal_002.tif": b"",
    **{f"annotations/{name}_001.xml": content(name, 2000) for name in ("tumor", "test")},
}
NEVER = {
    "evaluation/evaluate.py": b"x",
    "masks/tumor_001_mask.tif": b"x",
    "../evil.tif": b"x",
    "images/../../evil.tif": b"x",
    "annotations/.hidden.xml": b"x",
}


class Bucket(ThreadingHTTPServer):
    """An open S3 bucket, listed two at a time."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.daemon_threads = True
        self.files: dict[str, bytes] = {}
        self.faults: dict[str, list[str]] = {}  # what goes wrong with a file, request by request
        self.asked: list[tuple[str, str | None]] = []
        self.checksums: dict[str, str] = {}  # instead of the right ones
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are no news."""

    def published(self) -> dict[str, bytes]:
        md5 = {name: hashlib.md5(data).hexdigest() for name, data in self.files.items()} | self.checksums
        return {**self.files, "checksums.md5": "".join(f"{md5[name]} *{name}\n" for name in md5).encode()}

    def ranges(self, name: str = SLIDE) -> list[str | None]:
        return [asked for file, asked in self.asked if file == name]


class Handler(BaseHTTPRequestHandler):
    server: Bucket
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        assert "Authorization" not in self.headers
        address = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(address.query))
        if "list-type" in query:
            self.answer(200, self.listing(int(query.get("continuation-token", "0"))))
            return
        name = urllib.parse.unquote(address.path).removeprefix(f"/{FOLDER}/")
        self.server.asked.append((name, self.headers.get("Range")))
        faults = self.server.faults.get(name, [])
        fault = faults.pop(0) if faults else ""
        data = self.server.published().get(name)
        if fault.isdigit() or data is None:
            self.answer(int(fault or 404), b"")
        elif "Range" in self.headers:
            start, last = map(int, self.headers["Range"].removeprefix("bytes=").split("-"))
            span = {"Content-Range": f"bytes {start}-{last}/{len(data)}"}
            self.answer(206, data[start : last + 1], span, broken=fault == "break")
        else:
            self.answer(200, data)

    def listing(self, start: int) -> bytes:
        keys = [(f"CAMELYON16/{name}", len(data)) for name, data in self.server.published().items()]
        page = keys[start : start + 2]
        rows = "".join(f"<Contents><Key>{key}</Key><Size>{size}</Size></Contents>" for key, size in page)
        token = f"<NextContinuationToken>{start + 2}</NextContinuationToken>" if start + 2 < len(keys) else ""
        rows += f"<IsTruncated>{str(bool(token)).lower()}</IsTruncated>{token}"
        return f'<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{rows}</ListBucketResult>'.encode()

    def answer(self, code: int, data: bytes, headers: dict[str, str] | None = None, broken: bool = False) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if broken else data)
        self.close_connection = broken


@pytest.fixture(scope="module")
def server() -> Iterator[Bucket]:
    """One for all: a client of its address is kept."""
    with Bucket() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def served(server: Bucket, monkeypatch: pytest.MonkeyPatch) -> Bucket:
    """The server as new."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server.files, server.faults, server.checksums = {**ALWAYS, **SLIDES, **NEVER}, {}, {}
    server.asked.clear()
    return server


@pytest.fixture
def download(served: Bucket, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """Runs the script: its exit code, what it printed, and its errors."""

    def run(*arguments: object, range_bytes: int = 2**25) -> tuple[int, str, list[str]]:
        words = [*arguments, "--endpoint", served.url, "--bucket", FOLDER]
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, words)])
        main = runpy.run_path(str(SCRIPT))["main"]
        main.__globals__["RANGE_BYTES"] = range_bytes
        code = main()
        printed = capsys.readouterr()
        return code, printed.out, [line for line in printed.err.splitlines() if "download_camelyon16: " in line]

    return run


def below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_all_but_masks_and_names_that_lead_out(served: Bucket, download, tmp_path: Path) -> None:
    out = tmp_path / "data"
    code, printed, _ = download(out, "--list")
    assert code == 0 and not out.exists() and "10 files to fetch" in printed
    code, printed, _ = download(out)
    assert code == 0 and "10 files fetched" in printed
    assert below(tmp_path / "data") == {**ALWAYS, **SLIDES, "checksums.md5": served.published()["checksums.md5"]}
    served.asked.clear()
    assert download(out)[0] == 0
    assert {name for name, _ in served.asked} == {"checksums.md5"}  # read for its content


@pytest.mark.parametrize(
    ("words", "slides"),
    [
        (["--part", "training"], {SLIDE, "images/normal_002.tif", "images/tumor_001.tif", "annotations/tumor_001.xml"}),
        (["--part", "testing"], {"images/test_001.tif", "annotations/test_001.xml"}),
        (["--part", "annotations"], {"annotations/tumor_001.xml", "annotations/test_001.xml"}),
        (["--only", "tumor_001"], {"images/tumor_001.tif", "annotations/tumor_001.xml"}),
        (["--part", "training", "--only", "normal_001"], {SLIDE}),
    ],
)  # fmt: skip
def test_what_is_chosen(words: list[str], slides: set[str], download, tmp_path: Path) -> None:
    code, printed, _ = download(tmp_path, *words, "--list")
    listed = {line.split()[0] for line in printed.splitlines() if line.startswith("  ")}
    assert code == 0 and listed == slides | {*ALWAYS, "checksums.md5"}


def test_a_broken_connection_and_a_passing_fault_are_tried_again(served: Bucket, download, tmp_path: Path) -> None:
    served.faults = {SLIDE: ["break", "503"]}
    assert download(tmp_path, "--only", "normal_001")[0] == 0
    assert len(served.ranges()) == 3 and below(tmp_path)[SLIDE] == SLIDES[SLIDE]


def test_a_later_run_goes_on_where_an_earlier_one_ended(served: Bucket, download, tmp_path: Path) -> None:
    served.faults = {SLIDE: ["", "", "404"], "images/normal_002.tif": []}
    code, printed, errors = download(tmp_path, "--part", "training", range_bytes=100_000)
    assert code == 1 and len(errors) == 1 and "7 files fetched, 1 failed" in printed  # the others came
    assert errors[0].startswith(f"download_camelyon16: {SLIDE}: ") and errors[0].endswith("; run again to go on")
    assert SLIDE not in below(tmp_path)
    served.asked.clear()
    assert download(tmp_path, "--part", "training")[0] == 0
    assert served.ranges() == ["bytes=200000-299999"] and below(tmp_path)[SLIDE] == SLIDES[SLIDE]
    assert not [name for name in below(tmp_path) if name.endswith(".part")]


def test_a_wrong_checksum_leaves_nothing(served: Bucket, download, tmp_path: Path) -> None:
    served.checksums = {SLIDE: "0" * 32}
    code, _, errors = download(tmp_path, "--only", "normal_001")
    assert code == 1 and "its checksum is wrong" in errors[0]
    assert set(below(tmp_path)) == {*ALWAYS, "checksums.md5"}


def test_what_another_client_left_is_hashed_when_asked(served: Bucket, download, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / SLIDE).write_bytes(b"x" + SLIDES[SLIDE][1:])
    assert download(tmp_path, "--only", "normal_001")[0] == 0 and served.ranges() == []
    assert download(tmp_path, "--only", "normal_001", "--verify")[0] == 0
    assert below(tmp_path)[SLIDE] == SLIDES[SLIDE]
    (tmp_path / SLIDE).write_bytes(SLIDES[SLIDE][1:])  # another size is wrong without a hash
    assert download(tmp_path, "--only", "normal_001")[0] == 0 and below(tmp_path)[SLIDE] == SLIDES[SLIDE]


def test_mistakes_are_told_in_one_line(served: Bucket, download, tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "file").touch()
    cases = [
        ([tmp_path, "--only", "normal_01"], "slide 'normal_01': not there; did you mean 'normal_0"),
        ([tmp_path, "--part", "training", "--only", "test_001"], "slide 'test_001': not there"),
        ([tmp_path / "file"], "cannot write here"),
    ]
    for words, told in cases:
        code, _, errors = download(*words)
        assert code == 1 and len(errors) == 1 and told in errors[0]
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("usage", (), {"free": 1000})())
    assert "905kB are to come, 1.00kB are free; make room" in download(tmp_path)[2][0]
    monkeypatch.setattr(Bucket, "published", lambda _: {"x": b"x"})
    assert "no checksums.md5 there; check the address" in download(tmp_path)[2][0]


def test_only_https_or_this_machine(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    main = runpy.run_path(str(SCRIPT))["main"]
    for url in (
        "http://example.org/x",
        "ftp://example.org",
        "file:///etc/",
        "example.org",
        "http://localhost.evil.org",
    ):
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), "out", "--endpoint", url])
        assert main() == 1 and "not https; give an address that begins with https://" in capsys.readouterr().err
