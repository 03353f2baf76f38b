"""Files of an open S3 bucket, by plain HTTPS: listed, and fetched with resume and checksums."""

from __future__ import annotations

import hashlib
import http.client
import logging
import re
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO
from xml.etree.ElementTree import ParseError

from defusedxml import DefusedXmlException
from defusedxml.ElementTree import fromstring

from medsd.errors import DatasetError, OutputError
from medsd.files import make_folder

logger = logging.getLogger(__name__)

CHECKSUMS = "checksums.md5"
"""The bucket's file of lines `MD5 name`, as md5sum writes them."""

_NAME = re.compile(r"\w[\w.-]*(/\w[\w.-]*)*", re.ASCII)
_CHECKSUM = re.compile(r"(?P<md5>[0-9a-fA-F]{32}) [ *](?P<name>.+)")
_RANGE = re.compile(r"bytes (?P<start>\d+)-\d+/(?P<size>\d+)")
_LOCAL = ("localhost", "127.0.0.1", "::1")
_PASSING = (408, 429, 500, 502, 503, 504)
_CHUNK = 2**20
_LONGEST_WAIT_S = 60.0

Advance = Callable[[int], None]
"""Told the number of bytes that came, or were there already; a negative one when some are thrown away."""


class _PassingError(Exception):
    """A fault of server or network that may be over at the next attempt."""


@dataclass(frozen=True)
class RemoteFile:
    """A file of the bucket.

    Attributes:
        name: its path below the base address, such as `images/normal_001.tif`; safe to be one below a folder.
        size: bytes.
        md5: hexadecimal digits, None where none is published.
    """

    name: str
    size: int
    md5: str | None


class Server:
    """A bucket that speaks S3's listing (ListObjectsV2) and HTTP ranges, read without credentials.

    Args:
        base_url: where the data set's files lie; https, or http on this machine.
        attempts: how often in a row a request may fail without a byte gained.
        wait_s: seconds before the second attempt, doubled for each further one, at most a minute.
        timeout_s: seconds without an answer after which a request has failed.

    Raises:
        DatasetError: the address is not https.
    """

    def __init__(self, base_url: str, attempts: int = 6, wait_s: float = 1.0, timeout_s: float = 60.0) -> None:
        self.base_url = base_url.rstrip("/") + "/"
        _check_address(self.base_url)
        self._attempts, self._wait_s, self._timeout_s = attempts, wait_s, timeout_s
        self._opener = urllib.request.build_opener(_SafeRedirects())

    def list_files(self) -> list[RemoteFile]:
        """All files below the base address, by name, with the checksums that are published there.

        Names that could lead out of a folder, or are hidden, are left out.

        Raises:
            DatasetError: the server does not answer, what it lists is no listing, or there are no checksums.
        """
        sizes = dict(self._listed())
        if CHECKSUMS not in sizes:
            raise DatasetError(f"{self.base_url}: no {CHECKSUMS} there; check the base address")
        md5 = _parse_checksums(self._read(self.base_url + CHECKSUMS).decode("utf-8", "replace"))
        return [RemoteFile(name, size, md5.get(name)) for name, size in sorted(sizes.items())]

    def fetch(self, file: RemoteFile, folder: Path, advance: Advance) -> Path:
        """Get a file, or the rest of it; it is at its place only when size and checksum are right.

        A broken connection is taken up where it broke, also by a later run. A server that does not give parts starts
        the file again.

        Raises:
            DatasetError: the server does not give the file, or another than was announced.
            OutputError: it cannot be written.
        """
        path, part = folder / file.name, part_of(file, folder)
        make_folder(path.parent)
        resumed = size_of(part) > 0
        advance(size_of(part))
        self._patiently(file.name, lambda: self._append(file, part, advance), lambda: size_of(part))
        if file.md5 is not None and md5_of(part) != file.md5:
            part.unlink()
            advance(-file.size)
            if not resumed:
                raise DatasetError(f"{file.name}: its checksum is wrong; try again, the server may have been at fault")
            return self.fetch(file, folder, advance)
        part.replace(path)
        return path

    def _listed(self) -> Iterator[tuple[str, int]]:
        """Name and size of every file below the base address."""
        address = urllib.parse.urlsplit(self.base_url)
        prefix = urllib.parse.unquote(address.path.lstrip("/"))
        query = {"list-type": "2", "prefix": prefix}
        seen: set[str] = set()
        while True:
            page = address._replace(path="/", query=urllib.parse.urlencode(query)).geturl()
            try:
                root = fromstring(self._read(page))
                found = [(item.findtext("{*}Key"), item.findtext("{*}Size")) for item in root.findall("{*}Contents")]
                entries = [((key or "").removeprefix(prefix), int(size or "")) for key, size in found]
            except (ParseError, DefusedXmlException, ValueError) as error:
                raise DatasetError(f"{page}: not a bucket's listing ({error}); check the base address") from error
            for name, size in entries:
                if _NAME.fullmatch(name):
                    yield name, size
                elif name and not name.endswith("/"):  # what consoles make of a folder
                    logger.warning("%r in the listing is no plain file name; left out", name)
            token = root.findtext("{*}NextContinuationToken")
            if root.findtext("{*}IsTruncated") != "true":
                return
            if not token or token in seen:
                raise DatasetError(f"{page}: the listing breaks off; try again")
            seen.add(token)
            query["continuation-token"] = token

    def _read(self, url: str) -> bytes:
        """The small file at `url`."""
        answer = bytearray()

        def get() -> None:
            answer.clear()
            with self._opener.open(url, timeout=self._timeout_s) as response:
                answer.extend(response.read())

        self._patiently(url, get, lambda: 0)
        return bytes(answer)

    def _append(self, file: RemoteFile, part: Path, advance: Advance) -> None:
        """One request for what `part` lacks."""
        have = size_of(part)
        if have == file.size:
            part.touch()  # an empty file has nothing to ask for
            return
        if have > file.size:
            part.unlink()
            advance(-have)
            have = 0
        url = self.base_url + urllib.parse.quote(file.name)
        request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
        with self._opener.open(request, timeout=self._timeout_s) as response:
            match = _RANGE.fullmatch(response.headers.get("Content-Range", ""))
            announced = int(match["size"]) if match else int(response.headers.get("Content-Length", file.size))
            if announced != file.size:
                raise DatasetError(f"{file.name}: {announced} bytes there, {file.size} in the listing; start again")
            going_on = response.status == 206 and match is not None and int(match["start"]) == have
            if response.status == 206 and not going_on:
                raise _PassingError("the server gave another part than was asked for")
            if not going_on:
                part.unlink(missing_ok=True)
                advance(-have)
                have = 0
            _copy(response, part, file.size - have, advance)
        if size_of(part) != file.size:
            raise _PassingError(f"the connection broke at {size_of(part)} of {file.size} bytes")

    def _patiently(self, what: str, attempt: Callable[[], None], gained: Callable[[], int]) -> None:
        """Call `attempt` until it comes through, or has failed too often without anything gained."""
        failed = 0
        while True:
            before = gained()
            try:
                return attempt()
            except urllib.error.HTTPError as error:
                if error.code not in _PASSING:
                    raise DatasetError(f"{what}: the server answers {error.code} ({error.reason})") from error
                reason = f"the server answers {error.code}"
            except urllib.error.URLError as error:
                reason = str(error.reason)
            except (OSError, http.client.HTTPException, _PassingError) as error:
                reason = str(error) or type(error).__name__
            failed = 1 if gained() > before else failed + 1
            if failed >= self._attempts:
                raise DatasetError(f"{what}: not to be had ({reason}); run again to go on")
            logger.info("%s: %s; trying again", what, reason)
            time.sleep(min(self._wait_s * 2 ** (failed - 1), _LONGEST_WAIT_S))


class _SafeRedirects(urllib.request.HTTPRedirectHandler):
    """Follows a redirection only to an address that could have been given."""

    def redirect_request(
        self,
        req: urllib.request.Request,
        fp: IO[bytes],
        code: int,
        msg: str,
        headers: http.client.HTTPMessage,
        newurl: str,
    ) -> urllib.request.Request | None:
        _check_address(newurl)
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_address(url: str) -> None:
    address = urllib.parse.urlsplit(url)
    if address.scheme != "https" and not (address.scheme == "http" and address.hostname in _LOCAL):
        raise DatasetError(f"{url}: not https; give an address that begins with https://")


def _parse_checksums(text: str) -> dict[str, str]:
    matches = [match for line in text.splitlines() if (match := _CHECKSUM.fullmatch(line.strip()))]
    if not matches:
        raise DatasetError(f"{CHECKSUMS}: holds no line 'MD5 name'; check the base address")
    return {match["name"].removeprefix("./"): match["md5"].lower() for match in matches}


def _copy(source: http.client.HTTPResponse, target: Path, length: int, advance: Advance) -> None:
    """Append `length` bytes to `target`, or what comes of them."""
    try:
        handle = open(target, "ab")  # noqa: SIM115 - its errors are told apart from the network's
    except OSError as error:
        raise OutputError(f"{target}: cannot be written ({error.strerror})") from error
    with handle:
        while length > 0:
            chunk = source.read(min(_CHUNK, length))
            if not chunk:
                return
            try:
                handle.write(chunk)
                handle.flush()
            except OSError as error:
                raise OutputError(f"{target}: cannot be written ({error.strerror}); run again to go on") from error
            length -= len(chunk)
            advance(len(chunk))


def size_of(path: Path) -> int:
    """Bytes of a file; 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def md5_of(path: Path) -> str:
    """The MD5 of a file as hexadecimal digits."""
    with open(path, "rb") as handle:
        # MD5 is what is published; it guards against faults, not against forgers.
        return hashlib.file_digest(handle, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def part_of(file: RemoteFile, folder: Path) -> Path:
    """Where a file is kept until it is whole; the checksum in the name ties it to the content that it is a part of."""
    path = folder / file.name
    return path.with_name(f".{path.name}.{file.md5 or file.size}.part")
