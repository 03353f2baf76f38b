"""Ways to damage a file: as disks and copies lose bytes, and as a hostile hand writes directories and texts."""

from __future__ import annotations

import io
import re
import struct
from collections.abc import Callable

import numpy as np
import tifffile

Random = np.random.Generator
Mutation = Callable[[bytes, Random], bytes]

_BLOCK_BYTES = 2**16
_HEADER_BYTES = 1024
_WORDS = (0, 1, 2, 3, 7, 255, 2**15, 2**16 - 1, 2**20, 2**31 - 1, 2**31, 2**32 - 1)
_NUMBER = re.compile(rb"-?\d+(?:\.\d+)?(?:[eE][+-]?\d+)?")
_TOKEN = re.compile(rb"[A-Za-z_][\w.:-]*")
_VALUES = (
    *(b"NaN", b"Infinity", b"-1", b"0", b"1e308", b"1e400", b"-0.0", b"9" * 40, b"2147483648", b"", b"abc", b"null"),
    *(b"true", b"[]", b"{}", b'"', b"=1+1", b"../../x", b"$import os", b"\x00", b"\xff\xfe", b"\r", b"\n", b"," * 9),
)
_STARTS = (
    b"\xef\xbb\xbf",
    b"\xff\xfe",
    b"\x1f\x8b\x08\x00",
    b"II*\x00",
    b" \n" * 999,
    b"[" * 5000,
    b"<a>" * 5000,
    b"\x00",
)


def flip(data: bytes, random: Random) -> bytes:
    """One to eight bits: anywhere, or in the first or the last kilobyte."""
    hurt = bytearray(data)
    first, last = ((0, len(hurt)), (0, _HEADER_BYTES), (len(hurt) - _HEADER_BYTES, len(hurt)))[random.integers(3)]
    for spot in random.integers(max(first, 0), min(last, len(hurt)), random.integers(1, 9)):
        hurt[spot] ^= 1 << int(random.integers(8))
    return bytes(hurt)


def overwrite(data: bytes, random: Random) -> bytes:
    """A block of zeros, ones or noise, as long as a lost sector or a tile."""
    start, end = _block(data, random)
    new = (bytes(end - start), b"\xff" * (end - start), random.bytes(end - start))[random.integers(3)]
    return data[:start] + new + data[end:]


def cut(data: bytes, random: Random) -> bytes:
    """The end is missing."""
    return data[: random.integers(len(data))]


def lose(data: bytes, random: Random) -> bytes:
    """A block is missing, so that all behind it lies elsewhere."""
    start, end = _block(data, random)
    return data[:start] + data[end:]


def move(data: bytes, random: Random) -> bytes:
    """A block lies over another one."""
    start, end = _block(data, random)
    other = int(random.integers(len(data) - (end - start) + 1))
    return data[:other] + data[start:end] + data[other + end - start :]


def word(data: bytes, random: Random) -> bytes:
    """Two, four or eight bytes in the first kilobytes, or near the end, become a number at the border of something."""
    size = int(random.choice([2, 4, 8]))
    number = int(random.choice(_WORDS)) % 256**size
    near = int(random.integers(min(4 * _HEADER_BYTES, len(data))))
    start = (near if random.integers(2) else len(data) - near) // 2 * 2
    return data[:start] + number.to_bytes(size, str(random.choice(["little", "big"]))) + data[start + size :]  # type: ignore[arg-type]


def tiff_entry(data: bytes, random: Random) -> bytes:
    """Type, count, or value of an entry of a TIFF directory; or an element of the table that it points to."""
    hurt = bytearray(data)
    with tifffile.TiffFile(io.BytesIO(data)) as file:
        order, big = file.byteorder, file.is_bigtiff
        pages = [*file.pages, *(page for series in file.series for level in series.levels for page in level.pages)]
        page = pages[random.integers(len(pages))]
        tags = list(page.aspage().tags)  # type: ignore[union-attr]
        tag = tags[random.integers(len(tags))]
    number = int(random.choice([*_WORDS, len(data), len(data) - 1]))
    part = random.integers(4)
    if part == 3:  # in its values
        unit = {1: 1, 2: 1, 3: 2, 4: 4, 5: 4, 16: 8}.get(int(tag.dtype), 4)
        spot = int(tag.valueoffset) + unit * int(random.integers(max(tag.count, 1)))
        hurt[spot : spot + unit] = (number % 256**unit).to_bytes(unit, "little" if order == "<" else "big")
        return bytes(hurt[: len(data)])
    start, size, code = ((2, 2, "H"), (4, 8 if big else 4, "Q" if big else "I"), (12 if big else 8, 4, "I"))[part]
    value = int(random.integers(20)) if part == 0 else number
    hurt[tag.offset + start : tag.offset + start + size] = struct.pack(order + code, value % 256**size)
    return bytes(hurt)


def text(data: bytes, random: Random) -> bytes:
    """A number, a name or a line of a text becomes another, is lost, or comes twice."""
    kind = random.integers(5)
    if kind == 0:
        return _STARTS[random.integers(len(_STARTS))] + data
    if kind == 1:
        lines = data.splitlines(keepends=True)
        place = random.integers(len(lines))
        lines[place : place + 1] = [b"", lines[place] * 2, lines[place] * 3000, b"\n"][random.integers(4)].splitlines(
            True
        )
        return b"".join(lines)
    found = list((_NUMBER if kind == 2 else _TOKEN).finditer(data))
    if not found:
        return flip(data, random)
    chosen, other = (found[place] for place in random.integers(len(found), size=2))
    new = other.group() if kind == 4 else _VALUES[random.integers(len(_VALUES))]
    return data[: chosen.start()] + new + data[chosen.end() :]


def safetensors_header(data: bytes, random: Random) -> bytes:
    """Its JSON header as text, with the length that it then has."""
    end = 8 + int.from_bytes(data[:8], "little")
    header = text(data[8:end], random)
    return len(header).to_bytes(8, "little") + header + data[end:]


BYTES: tuple[Mutation, ...] = (flip, overwrite, cut, lose, move, word)


def _block(data: bytes, random: Random) -> tuple[int, int]:
    """Start and end of a block: each order of size is as likely."""
    length = min(len(data), int(np.exp(random.uniform(0, np.log(_BLOCK_BYTES)))))
    start = int(random.integers(len(data) - length + 1))
    return start, start + length
