"""Levels kept as zarr arrays: OME-NGFF folders."""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from medsd.errors import SlideError
from medsd.slides.mpp import UM_PER_UNIT
from medsd.slides.readers.absent import LOST, is_lost
from medsd.slides.readers.base import RGB, Handles, LevelReader, Size
from medsd.slides.readers.damage import damage_named

if TYPE_CHECKING:
    import zarr

# Codecs that make bytes of bytes. Among the others is one that unpickles: it runs what the file says.
_CODECS = {
    *("blosc", "zstd", "lz4", "zlib", "gzip", "bz2", "lzma", "shuffle", "delta"),
    *("bytes", "transpose", "crc32c", "sharding_indexed"),
}
_LARGEST_CHUNK_BYTES = 2**28
_BLOSC_HEAD = struct.Struct("<12xI")
_RGB_HEX = ["FF0000", "00FF00", "0000FF"]


@dataclass(frozen=True, eq=False)
class ArrayLevel:
    """One level as an array of 8-bit pixels, grey or RGB; axes other than x, y and colour have one entry.

    Attributes:
        array: of any order of axes.
        axes: a letter an axis: y, x, c (or s) for colours, others for planes.
    """

    array: zarr.Array[Any]
    axes: str

    @property
    def size(self) -> Size:
        """(width, height)."""
        return self.array.shape[self.axes.index("x")], self.array.shape[self.axes.index("y")]

    @property
    def stored_px(self) -> Size:
        """(width, height) of what is stored as one: a chunk, or a shard of several."""
        stored = self.array.shards or self.array.chunks
        return stored[self.axes.index("x")], stored[self.axes.index("y")]

    def files(self, path: Path, right: int, down: int) -> list[Path]:
        """The files of a stored part in the folder at `path`: several where colours are stored apart."""
        stored = self.array.shards or self.array.chunks
        lengths = zip(self.axes, self.array.shape, stored, strict=True)
        counts = {axis: range(math.ceil(length / part)) if axis in "cs" else (0,) for axis, length, part in lengths}
        counts |= {"x": (right,), "y": (down,)}
        keys = (self.array.metadata.encode_chunk_key(place) for place in product(*(counts[axis] for axis in self.axes)))
        return [path / self.array.path / key for key in keys]

    def check(self, path: Path, coded_by_store: bool = False) -> None:
        """Raise SlideError where the array is no picture, or its chunks are not safe to decode.

        Args:
            path: the file, for the error message.
            coded_by_store: whether chunks are decoded by what holds them (TIFF) instead of by zarr.
        """
        if sorted(axis for axis in self.axes if axis in "yx") != ["x", "y"] or len(self.axes) != self.array.ndim:
            raise unfit(path, f"axes '{self.axes}' of an array of {self.array.ndim} dimensions")
        lengths = dict(zip(self.axes, self.array.shape, strict=True))
        colours = lengths.get("c", 1) * lengths.get("s", 1)
        planes = [axis for axis, length in lengths.items() if axis not in "yxcs" and length != 1]
        if planes:
            raise unfit(path, f"{lengths[planes[0]]} planes along {planes[0]}")
        if self.array.dtype != np.uint8 or colours not in (1, 3):
            raise unfit(path, f"{colours} channels of {self.array.dtype}")
        unknown = set() if coded_by_store else {*_codec_names(self.array)} - _CODECS
        if unknown:
            raise SlideError(f"{path}: compression '{min(unknown)}' is not decoded here; write it with zstd")
        if np.prod([float(length) for length in self.array.chunks]) > _LARGEST_CHUNK_BYTES:
            raise SlideError(f"{path}: chunks of {self.array.chunks} are decoded as a whole; write smaller ones")

    def read(self, column: int, row: int, columns: int, rows: int) -> RGB:
        """Pixels (rows, columns, 3) of a rectangle inside the level."""
        parts = {"x": slice(column, column + columns), "y": slice(row, row + rows), "c": slice(None), "s": slice(None)}
        pixels = np.asarray(self.array[tuple(parts.get(axis, 0) for axis in self.axes)])
        left = [axis for axis in self.axes if axis in parts]
        order = [left.index(axis) for axis in "yxcs" if axis in left]
        return as_rgb(pixels.transpose(order).reshape(rows, columns, -1))


def as_rgb(pixels: npt.NDArray[np.uint8]) -> RGB:
    """Pixels (rows, columns, 3) of the same with one channel or three."""
    return np.repeat(pixels, 3, axis=2) if pixels.shape[2] == 1 else np.ascontiguousarray(pixels)


def unfit(path: Path, why: str) -> SlideError:
    """The error of an image that is whole, but of another kind than a slide is."""
    return SlideError(f"{path}: not one picture of 8-bit RGB or grey ({why}); export it as such")


def check_colours(path: Path, colours: Sequence[str]) -> None:
    """Raise SlideError where three channels are said to be shown in other colours (RRGGBB) than red, green and blue."""
    if len(colours) == 3 and all(colours) and colours != _RGB_HEX:
        raise unfit(path, f"its channels are to be shown in the colours {', '.join(colours)}")


def is_zarr(path: Path) -> bool:
    """Whether the path is a zarr folder, of version 2 or 3."""
    return path.is_dir() and any((path / name).is_file() for name in (".zgroup", ".zattrs", "zarr.json"))


class NgffSlide(LevelReader):
    """An OME-NGFF folder (0.4 or 0.5), one handle a process.

    Read with zarr itself: tiatoolbox 2.1 shows the first level of such a folder alone and wants display settings
    (omero) that the format leaves optional. A chunk that is not there has the fill value, as the format says, and is
    lost where another level shows something.

    Args:
        path: the folder with the multiscales.

    Raises:
        SlideError: not OME-NGFF, not 8-bit grey or RGB, or damaged.
    """

    name = "zarr"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handles: Handles[tuple[tuple[ArrayLevel, ...], Mapping[str, str]]] = Handles(partial(_open, path))
        levels, self.properties = self._handles.here()
        self.sizes: tuple[Size, ...] = tuple(level.size for level in levels)
        self._whole: dict[tuple[int, int, int], bool] = {}

    def read(self, level: int, column: int, row: int, columns: int, rows: int) -> RGB:
        with damage_named(self.path, (level, column, row)):
            array = self._handles.here()[0][level]
            width, height = array.stored_px
            for right in range(column // width, (column + columns - 1) // width + 1):
                for down in range(row // height, (row + rows - 1) // height + 1):
                    if not self._is_whole(array, level, right, down):
                        raise ValueError(LOST)
            return array.read(column, row, columns, rows)

    def _is_whole(self, array: ArrayLevel, level: int, right: int, down: int) -> bool:
        known = self._whole.get((level, right, down))
        if known is None:
            files = array.files(self.path, right, down)
            if array.array.shards is None and _codec_names(array.array)[-1:] == ["blosc"]:
                _check_blosc(file for file in files if file.exists())
            known = all(file.exists() for file in files) or not self._is_lost(array, level, right, down)
            self._whole[level, right, down] = known
        return known

    def _is_lost(self, array: ArrayLevel, level: int, right: int, down: int) -> bool:
        (width, height), (across, high) = array.stored_px, array.size
        left, top = right * width, down * height
        size = min(width, across - left), min(height, high - top)
        levels = self._handles.here()[0]

        def read(number: int, *area: int) -> RGB:
            return levels[number].read(*area)

        return is_lost(read, self.sizes, level, (left, top, *size), shown=int(array.array.fill_value or 0))


def _open(path: Path) -> tuple[tuple[ArrayLevel, ...], Mapping[str, str]]:
    """The levels, and the scale."""
    import zarr

    with damage_named(path):
        group = zarr.open_group(path, mode="r")
        multiscale = _multiscale(path, dict(group.attrs))
        axes = "".join(axis["name"].lower() for axis in multiscale["axes"])
        levels = []
        for dataset in multiscale["datasets"]:
            array = group[dataset["path"]]
            if not isinstance(array, zarr.Array):
                raise ValueError(f"level {dataset['path']!r} is no array")
            levels.append(ArrayLevel(array, axes))
            levels[-1].check(path)
        if not levels:
            raise SlideError(f"{path}: has no levels; write it again")
        return tuple(levels), _scale(multiscale)


def _multiscale(path: Path, attributes: Any) -> Mapping[str, Any]:
    """The first multiscale image of the folder."""
    attributes = attributes.get("ome", attributes)
    scales = attributes.get("multiscales") or [{}]
    if all(isinstance(axis, dict) for axis in scales[0].get("axes") or [None]):
        omero = attributes.get("omero")
        channels = omero.get("channels") if isinstance(omero, dict) else None
        check_colours(path, [str(channel.get("color", "")).upper() for channel in channels or []])
        return dict(scales[0])
    inner = f"name an image in it, such as {path / '0'}" if is_zarr(path / "0") else "write it as OME-NGFF 0.4"
    raise SlideError(f"{path}: a zarr folder, but no image of OME-NGFF 0.4 or 0.5; {inner}")


def _scale(multiscale: Mapping[str, Any]) -> dict[str, str]:
    """The size of a level-0 pixel in um as `ngff.mpp-x` and `ngff.mpp-y`, where it is stated with its unit."""
    axes = multiscale["axes"]
    found = {}
    for number, axis in enumerate(axes):
        unit = UM_PER_UNIT.get(str(axis.get("unit")))
        if axis["name"].lower() not in ("x", "y") or unit is None:
            continue
        factors = [
            float(transform["scale"][number])
            for holder in (multiscale, multiscale["datasets"][0])
            for transform in holder.get("coordinateTransformations") or []
            if isinstance(transform, dict) and _is_scale(transform, len(axes))
        ]
        if factors:
            found[f"ngff.mpp-{axis['name'].lower()}"] = str(float(np.prod(factors)) * unit)
    return found


def _is_scale(transform: Mapping[str, Any], length: int) -> bool:
    scale: Sequence[Any] | None = transform.get("scale")
    return transform.get("type") == "scale" and isinstance(scale, list) and len(scale) == length


def _codec_names(array: zarr.Array[Any]) -> list[str]:
    """In the order in which they are written: the last one's bytes are those in the file."""
    metadata: Any = array.metadata.to_dict()
    if metadata["zarr_format"] == 2:
        codecs = [*(metadata.get("filters") or ()), metadata.get("compressor")]
        return [str(codec["id"]) for codec in codecs if codec is not None]
    return [str(codec["name"]) for codec in metadata["codecs"]]


def _check_blosc(files: Iterable[Path]) -> None:
    """Raise ValueError where a chunk has not the length that its head states: its decoder reads on beyond the end."""
    for file in files:
        with open(file, "rb") as handle:
            head = handle.read(_BLOSC_HEAD.size)
        if len(head) < _BLOSC_HEAD.size or _BLOSC_HEAD.unpack(head) != (file.stat().st_size,):
            raise ValueError("a chunk is not as long as it says")
