"""CAMELYON16's bucket, played by a server on this machine that misbehaves as asked."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import runpy
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsd.cohort import bucket, download
from medsd.cohort.bucket import RemoteFile, Server
from medsd.cohort.download import BASE_URL, STATE, Folder, check_space, choose, missing_files
from medsd.errors import DatasetError, OutputError

SCRIPT = Path(__file__).parents[2] / "scripts" / "download_camelyon16"
SLIDE = "images/normal_001.tif"


def content(name: str, size: int) -> bytes:
    return np.random.default_rng(list(name.encode())).bytes(size)


FILES = {
    "README.md": b"# CAMELYON16 Data Set\n",
    "license.txt": b"CC0\n",
    "evaluation/reference.csv": b"image,type,class,center\ntest_001.tif,test,micro,0\n",
    "evaluation/evaluate.py": b"never fetched",
    **{f"images/{name}_001.tif": content(name, 300_000) for name in ("normal", "tumor", "test")},
    "images/normal_002.tif": content("other", 70_001),
    **{f"annotations/{name}_001.xml": content(name, 2000) for name in ("tumor", "test")},
    "masks/tumor_001_mask.tif": b"never fetched",
}


class Bucket(ThreadingHTTPServer):
    """Files below /CAMELYON16/, listed two at a time."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.daemon_threads = True
        self.files = dict(FILES)
        self.ranges = True
        self.faults: dict[str, list[str]] = {}  # what goes wrong with a file, request by request
        self.asked: list[tuple[str, str | None]] = []
        self.listed: list[str] = []  # keys beside those of the files
        self.checksums: dict[str, str] = {}
        self.url = f"http://127.0.0.1:{self.server_port}/CAMELYON16"

    def handle_error(self, *_: object) -> None:
        """Clients that hang up are no news."""

    def published(self) -> dict[str, bytes]:
        md5 = {name: hashlib.md5(data).hexdigest() for name, data in self.files.items()} | self.checksums
        return {**self.files, "checksums.md5": "".join(f"{md5[name]} *{name}\n" for name in md5).encode()}


class Handler(BaseHTTPRequestHandler):
    server: Bucket
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        query = dict(urllib.parse.parse_qsl(address.query))
        if address.path == "/":
            assert query["list-type"] == "2" and query["prefix"] == "CAMELYON16/"
            self.answer(200, self.listing(int(query.get("continuation-token", "0"))))
            return
        name = urllib.parse.unquote(address.path).removeprefix("/CAMELYON16/")
        asked = self.headers.get("Range")
        self.server.asked.append((name, asked))
        faults = self.server.faults.get(name, [])
        self.give(name, asked if self.server.ranges else None, faults.pop(0) if faults else "")

    def listing(self, start: int) -> bytes:
        sizes = {f"CAMELYON16/{name}": len(data) for name, data in self.server.published().items()}
        sizes |= {"CAMELYON16/images/": 0} | dict.fromkeys(self.server.listed, 1)
        page = list(sizes.items())[start : start + 2]
        rows = "".join(f"<Contents><Key>{key}</Key><Size>{size}</Size></Contents>" for key, size in page)
        more = start + 2 < len(sizes)
        token = f"<NextContinuationToken>{start + 2}</NextContinuationToken>" if more else ""
        rows += f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}"
        return (
            f'<?xml version="1.0"?><ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">{rows}'
            "</ListBucketResult>"
        ).encode()

    def give(self, name: str, asked: str | None, fault: str) -> None:
        data = self.server.published().get(name)
        if fault.isdigit() or data is None:
            self.answer(int(fault or 404), b"no")
        elif fault.startswith("to "):
            self.answer(302, b"", {"Location": fault.removeprefix("to ")})
        elif asked is None:
            self.answer(200, data, broken=fault == "break")
        else:
            start = int(asked.removeprefix("bytes=").removesuffix("-")) + (1 if fault == "shift" else 0)
            headers = {"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"}
            self.answer(206, data[start:], headers, broken=fault == "break")

    def answer(self, code: int, data: bytes, headers: dict[str, str] | None = None, broken: bool = False) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if broken else data)
        self.close_connection = broken


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(bucket.time, "sleep", lambda _: None)
    with Bucket() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def remote(served: Bucket, name: str) -> RemoteFile:
    return next(file for file in Server(served.url).list_files() if file.name == name)


def fetch(served: Bucket, folder: Path, name: str = SLIDE, attempts: int = 4) -> int:
    """Fetch a file; returns what a progress bar would stand at."""
    came: list[int] = []
    Server(served.url, attempts=attempts).fetch(remote(served, name), folder, came.append)
    return sum(came)


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.rglob("*.part")]


def ranges(served: Bucket, name: str = SLIDE) -> list[str | None]:
    return [asked for file, asked in served.asked if file == name]


def test_all_pages_are_listed_with_sizes_and_checksums(served: Bucket) -> None:
    files = {file.name: file for file in Server(served.url).list_files()}
    assert set(files) == {*FILES, "checksums.md5"}
    for name, data in FILES.items():
        assert files[name] == RemoteFile(name, len(data), hashlib.md5(data).hexdigest())
    assert files["checksums.md5"].md5 is None


def test_names_that_lead_out_of_the_folder_are_left_out(served: Bucket, caplog: pytest.LogCaptureFixture) -> None:
    inside = {file.name for file in Server(served.url).list_files()}
    bad = [
        "../evil.tif",
        "images/../../evil",
        "/etc/evil",
        "images\\evil",
        ".hidden",
        "images/.x",
        "a//b",
        "C:/x",
        "a b",
    ]
    served.listed = [f"CAMELYON16/{name}" for name in bad] + ["elsewhere/x"]
    assert {file.name for file in Server(served.url).list_files()} - {"elsewhere/x"} == inside
    assert all(repr(name) in caplog.text for name in bad)


@given(name=st.text(st.sampled_from("ab_.-/\\: \x00é"), max_size=12))
def test_a_name_that_is_let_through_stays_below_the_folder(name: str) -> None:
    if bucket._NAME.fullmatch(name):
        assert os.path.normpath(os.path.join("/out", name)) == f"/out/{name}" != "/out/"


def test_a_file_comes_whole(served: Bucket, tmp_path: Path) -> None:
    assert fetch(served, tmp_path) == 300_000
    assert (tmp_path / SLIDE).read_bytes() == FILES[SLIDE] and not leftovers(tmp_path)
    assert ranges(served) == [None]


def test_a_broken_connection_is_taken_up_where_it_broke(served: Bucket, tmp_path: Path) -> None:
    served.faults[SLIDE] = ["break", "break"]
    assert fetch(served, tmp_path) == 300_000
    assert ranges(served) == [None, "bytes=150000-", "bytes=225000-"]
    assert (tmp_path / SLIDE).read_bytes() == FILES[SLIDE] and not leftovers(tmp_path)


def test_a_later_run_goes_on_where_an_earlier_one_ended(served: Bucket, tmp_path: Path) -> None:
    served.faults[SLIDE] = ["break", "503", "503"]
    with pytest.raises(DatasetError, match=rf"^{SLIDE}: not to be had \(the server answers 503\); run again to go on$"):
        fetch(served, tmp_path, attempts=3)
    assert not (tmp_path / SLIDE).exists() and len(leftovers(tmp_path)) == 1
    assert fetch(served, tmp_path) == 300_000
    assert ranges(served)[-1] == "bytes=150000-" and (tmp_path / SLIDE).read_bytes() == FILES[SLIDE]


def test_bytes_gained_give_new_patience(served: Bucket, tmp_path: Path) -> None:
    served.faults[SLIDE] = ["break"] * 8
    fetch(served, tmp_path, attempts=2)
    assert len(ranges(served)) == 9 and (tmp_path / SLIDE).read_bytes() == FILES[SLIDE]


def test_a_server_without_ranges_starts_again(served: Bucket, tmp_path: Path) -> None:
    served.ranges = False
    served.faults[SLIDE] = ["break"]
    assert fetch(served, tmp_path) == 300_000
    assert ranges(served) == [None, "bytes=150000-"] and (tmp_path / SLIDE).read_bytes() == FILES[SLIDE]


def test_a_server_that_gives_another_part_is_not_believed(served: Bucket, tmp_path: Path) -> None:
    served.faults[SLIDE] = ["break", "shift"]
    fetch(served, tmp_path)
    assert ranges(served)[1:] == ["bytes=150000-"] * 2 and (tmp_path / SLIDE).read_bytes() == FILES[SLIDE]


@pytest.mark.parametrize("code", ["503", "500", "429"])
def test_a_passing_fault_is_tried_again(served: Bucket, tmp_path: Path, code: str) -> None:
    served.faults[SLIDE] = [code, code]
    fetch(served, tmp_path)
    assert len(ranges(served)) == 3 and (tmp_path / SLIDE).read_bytes() == FILES[SLIDE]


def test_waits_grow_to_a_minute(served: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(bucket.time, "sleep", waits.append)
    served.faults[SLIDE] = ["503"] * 9
    fetch(served, tmp_path, attempts=10)
    assert waits == [1, 2, 4, 8, 16, 32, 60, 60, 60]


@pytest.mark.parametrize("code", ["404", "403"])
def test_a_lasting_fault_is_not_tried_again(served: Bucket, tmp_path: Path, code: str) -> None:
    served.faults[SLIDE] = [code]
    with pytest.raises(DatasetError, match=rf"^{SLIDE}: the server answers {code}"):
        fetch(served, tmp_path)
    assert len(ranges(served)) == 1


def test_a_wrong_checksum_leaves_nothing(served: Bucket, tmp_path: Path) -> None:
    served.checksums = {SLIDE: "0" * 32}
    with pytest.raises(DatasetError, match=rf"^{SLIDE}: its checksum is wrong"):
        fetch(served, tmp_path)
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_part_of_something_else_is_thrown_away(served: Bucket, tmp_path: Path) -> None:
    for wrong in (b"x" * 1000, b"x" * 300_000, b"x" * 300_001):
        part = tmp_path / "images" / f".normal_001.tif.{hashlib.md5(FILES[SLIDE]).hexdigest()}.part"
        part.parent.mkdir(exist_ok=True)
        part.write_bytes(wrong)
        assert fetch(served, tmp_path) == 300_000
        assert (tmp_path / SLIDE).read_bytes() == FILES[SLIDE] and not leftovers(tmp_path)


def test_another_size_than_listed_is_refused(served: Bucket, tmp_path: Path) -> None:
    file = remote(served, SLIDE)
    with pytest.raises(DatasetError, match=r"300000 bytes there, 299999 in the listing"):
        Server(served.url).fetch(RemoteFile(SLIDE, 299_999, file.md5), tmp_path, lambda _: None)


def test_an_empty_file_is_a_file(served: Bucket, tmp_path: Path) -> None:
    served.files["images/normal_009.tif"] = b""
    assert fetch(served, tmp_path, "images/normal_009.tif") == 0
    assert (tmp_path / "images/normal_009.tif").read_bytes() == b""


def test_only_https_or_this_machine(served: Bucket, tmp_path: Path) -> None:
    for url in (
        "http://example.org/x",
        "ftp://example.org",
        "file:///etc/",
        "example.org",
        "http://localhost.evil.org",
    ):
        with pytest.raises(DatasetError, match="not https; give an address that begins with https://"):
            Server(url)
    Server(BASE_URL)
    served.faults[SLIDE] = ["to http://example.org/"]
    with pytest.raises(DatasetError, match=r"^http://example\.org/: not https"):
        fetch(served, tmp_path)
    served.faults[SLIDE] = [f"to {served.url}/images/normal_001.tif"]
    fetch(served, tmp_path)


def test_what_is_no_bucket_is_told(served: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Handler, "listing", lambda *_: b"<html><br>hello</html>")
    with pytest.raises(DatasetError, match="not a bucket's listing"):
        Server(served.url).list_files()
    bomb = b'<!DOCTYPE x [<!ENTITY a "aaaa"><!ENTITY b "&a;&a;">]><ListBucketResult>&b;</ListBucketResult>'
    monkeypatch.setattr(Handler, "listing", lambda *_: bomb)
    with pytest.raises(DatasetError, match="not a bucket's listing"):
        Server(served.url).list_files()
    monkeypatch.setattr(Handler, "listing", lambda *_: b"<ListBucketResult></ListBucketResult>")
    with pytest.raises(DatasetError, match=r"no checksums\.md5 there; check the base address"):
        Server(served.url).list_files()


def test_checksums_that_are_none_are_told(served: Bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Bucket, "published", lambda _: {"checksums.md5": b"<html>sorry</html>"})
    with pytest.raises(DatasetError, match=r"checksums\.md5: holds no line 'MD5 name'"):
        Server(served.url).list_files()


def test_what_is_chosen(served: Bucket) -> None:
    files = Server(served.url).list_files()

    def names(part: download.Part | None = None, *only: str) -> set[str]:
        return {file.name for file in choose(files, part, only)} - always

    always = {"README.md", "license.txt", "checksums.md5", "evaluation/reference.csv"}
    assert always <= {file.name for file in choose(files, None, ["normal_001"])}
    training = {SLIDE, "images/normal_002.tif", "images/tumor_001.tif", "annotations/tumor_001.xml"}
    testing = {"images/test_001.tif", "annotations/test_001.xml"}
    assert names("training") == training and names("testing") == testing and names() == training | testing
    assert names("annotations") == {"annotations/tumor_001.xml", "annotations/test_001.xml"}
    assert names(None, "tumor_001") == {"images/tumor_001.tif", "annotations/tumor_001.xml"}
    assert names("training", "normal_001", "tumor_001") == training - {"images/normal_002.tif"}
    with pytest.raises(DatasetError, match=r"slide 'normal_01': not there; did you mean 'normal_0\d\d'\?"):
        names(None, "normal_01")
    with pytest.raises(DatasetError, match="slide 'test_001': not there"):
        names("training", "test_001")


def test_what_was_found_right_is_not_hashed_again(
    served: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [file for file in Server(served.url).list_files() if file.name in FILES]
    for file in files:  # as another client left them
        (tmp_path / file.name).parent.mkdir(exist_ok=True)
        (tmp_path / file.name).write_bytes(FILES[file.name])
    hashed: list[str] = []
    inner = bucket.md5_of
    monkeypatch.setattr(download, "md5_of", lambda path: (hashed.append(path.name), inner(path))[1])
    assert missing_files(files, Folder(tmp_path)) == [] and len(hashed) == len(files)
    hashed.clear()
    assert missing_files(files, Folder(tmp_path)) == [] and hashed == []

    slide = tmp_path / SLIDE
    os.utime(slide, ns=(1, 1))
    assert missing_files(files, Folder(tmp_path)) == [] and hashed == ["normal_001.tif"]
    slide.write_bytes(b"x" + FILES[SLIDE][1:])
    assert [file.name for file in missing_files(files, Folder(tmp_path))] == [SLIDE]
    slide.write_bytes(FILES[SLIDE][1:])
    hashed.clear()
    assert [file.name for file in missing_files(files, Folder(tmp_path))] == [SLIDE] and hashed == []
    (tmp_path / STATE).write_text("[1]")
    slide.write_bytes(FILES[SLIDE])
    assert missing_files(files, Folder(tmp_path)) == [] and len(hashed) == len(files)


def test_a_published_checksum_that_changed_counts(served: Bucket, tmp_path: Path) -> None:
    fetch(served, tmp_path)
    folder, file = Folder(tmp_path), remote(served, SLIDE)
    folder.keep(file)
    assert folder.holds(file) and not folder.holds(RemoteFile(SLIDE, file.size, "0" * 32))


def test_a_disk_that_is_too_small_is_told_first(tmp_path: Path) -> None:
    with pytest.raises(OutputError, match=r"1000000\.0 GB are to come, \d+\.\d GB are free; make room"):
        check_space([RemoteFile("images/normal_001.tif", 10**15, None)], Folder(tmp_path))


def test_a_disk_that_fills_up_is_told(served: Bucket, tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(OutputError, match=r"\.part: cannot be written \(File too large\); run again to go on"):
            fetch(served, tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(ranges(served)) == 1
    fetch(served, tmp_path)
    assert ranges(served)[1] == "bytes=100000-" and (tmp_path / SLIDE).read_bytes() == FILES[SLIDE]


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        runpy.run_path(str(SCRIPT), run_name="__main__")
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_the_command_fetches_all_but_what_fails(
    served: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    served.faults = {SLIDE: ["404"], "images/test_001.tif": ["break"]}
    served.checksums = {"annotations/tumor_001.xml": "0" * 32}
    out = tmp_path / "data"
    assert command(monkeypatch, out, "--base-url", served.url, "--list") == 0
    assert not out.exists() and "10 files to fetch" in capsys.readouterr().out

    assert command(monkeypatch, out, "--base-url", served.url) == 1
    printed = capsys.readouterr()
    errors = [line for line in printed.err.splitlines() if line.startswith("download_camelyon16: ")]
    assert len(errors) == 2 and "annotations/tumor_001.xml: its checksum is wrong" in errors[0]
    assert f"{SLIDE}: the server answers 404" in errors[1] and "8 files fetched, 2 failed" in printed.out
    served.checksums = {}
    served.asked.clear()
    assert command(monkeypatch, out, "--base-url", served.url) == 0
    fetched = {name for name, _ in served.asked}
    assert fetched == {"checksums.md5", SLIDE, "annotations/tumor_001.xml"}  # the first is read for its content
    wanted = {name for name in FILES if not name.startswith("masks") and name != "evaluation/evaluate.py"}
    assert all((out / name).read_bytes() == FILES[name] for name in wanted)
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert there == {*wanted, "checksums.md5", STATE} and set(json.loads((out / STATE).read_text())) == there - {STATE}


def test_the_command_says_a_mistake_in_one_line(
    served: Bucket, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for arguments in ([tmp_path, "--only", "normal_999"], [tmp_path / "file"]):
        assert command(monkeypatch, *arguments, "--base-url", served.url) == 1
        error = capsys.readouterr().err.strip()
        assert error.startswith("download_camelyon16: ") and "\n" not in error
