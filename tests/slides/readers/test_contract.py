"""What every reader must do: whole level pixels, exact at every border, from any thread, process or copy."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from medsd.errors import SlideError
from medsd.slides.readers.base import LevelReader
from medsd.slides.readers.choose import READERS, open_reader
from medsd.slides.slide import open_slide


@dataclass(frozen=True)
class Known:
    """A file, the reader that is to open it, and the pixels of its levels."""

    path: Path
    reader: str
    levels: list[np.ndarray]

    def open(self) -> LevelReader:
        return open_reader(self.path, self.reader)


def _tifffile(folder: Path, coding: Any, formats: Any) -> Known:
    levels = _pyramid(coding, 437, 301)
    coding.write_levels(folder / "plain.tif", levels, 0.5, 2)
    return Known(folder / "plain.tif", "tifffile", levels)


def _openslide(folder: Path, coding: Any, formats: Any) -> Known:
    levels = _pyramid(coding, 512, 384)  # OpenSlide interpolates levels of odd sizes
    coding.write_levels(folder / "even.tif", levels, 0.5, 2)
    return Known(folder / "even.tif", "openslide", levels)


def _planes(folder: Path, coding: Any, formats: Any) -> Known:
    levels = _pyramid(coding, 437, 301)
    return Known(formats.planes(folder / "planes.ome.tif", levels), "tiatoolbox", levels)


def _jp2(folder: Path, coding: Any, formats: Any) -> Known:
    pixels = coding.coded_pixels(437, 301)
    path = formats.jp2(folder / "wavelets.jp2", pixels, numres=2)
    with Image.open(path) as image:
        image.reduce = 1  # PIL has an OpenJPEG of its own, and decodes the level as a whole
        return Known(path, "tiatoolbox", [pixels, np.asarray(image)])


def _ngff(order: str) -> Callable[[Path, Any, Any], Known]:
    def make(folder: Path, coding: Any, formats: Any) -> Known:
        levels = _pyramid(coding, 437, 301)
        return Known(formats.ngff(folder / f"{order}.zarr", levels, order), "zarr", levels)

    return make


def _png(folder: Path, coding: Any, formats: Any) -> Known:
    pixels = coding.coded_pixels(437, 301)
    Image.fromarray(pixels).save(folder / "picture.png")
    return Known(folder / "picture.png", "pillow", [pixels])


def _jpeg(folder: Path, coding: Any, formats: Any) -> Known:
    path = folder / "picture.jpg"
    Image.fromarray(coding.coded_pixels(437, 301)).save(path, quality=90)
    return Known(path, "pillow", [np.asarray(Image.open(path).convert("RGB"))])


def _strips(folder: Path, coding: Any, formats: Any) -> Known:
    pixels = coding.coded_pixels(437, 301)
    Image.fromarray(pixels).save(folder / "strips.tif", compression="tiff_lzw")
    return Known(folder / "strips.tif", "pillow", [pixels])


KINDS: dict[str, Callable[[Path, Any, Any], Known]] = {
    "tifffile": _tifffile,
    "openslide": _openslide,
    "ome-planes": _planes,
    "jp2": _jp2,
    "ngff-yxc": _ngff("yxc"),
    "ngff-tczyx": _ngff("tczyx"),
    "png": _png,
    "jpeg": _jpeg,
    "striped-tiff": _strips,
}


def _pyramid(coding: Any, width: int, height: int) -> list[np.ndarray]:
    levels = [coding.coded_pixels(width, height)]
    while len(levels) < 3:
        levels.append(coding.halved(levels[-1], 2))
    return levels


@pytest.fixture(scope="module", params=KINDS)
def known(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    coding: SimpleNamespace,
    formats: SimpleNamespace,
) -> Known:
    return KINDS[request.param](tmp_path_factory.mktemp("known"), coding, formats)


def rectangles(size: tuple[int, int], number: int = 40) -> list[tuple[int, int, int, int]]:
    """All of the level, its corners and edges by a pixel and by a few, and places at random."""
    width, height = size
    found = [(0, 0, width, height), (0, 0, 1, 1), (width - 1, height - 1, 1, 1)]
    found += [(width - 1, 0, 1, height), (0, height - 1, width, 1), (0, 0, width, 1), (0, 0, 1, height)]
    found += [(width - 9, height - 7, 9, 7), (width - 9, 0, 9, 7), (0, height - 7, 9, 7)]
    generator = np.random.default_rng(5)
    for _ in range(number):
        left, top = int(generator.integers(width)), int(generator.integers(height))
        found.append((left, top, int(generator.integers(width - left)) + 1, int(generator.integers(height - top)) + 1))
    return found


def part(level: np.ndarray, rectangle: tuple[int, int, int, int]) -> np.ndarray:
    column, row, columns, rows = rectangle
    return level[row : row + rows, column : column + columns]


def test_every_reader_is_held_to_this(known: Known) -> None:
    assert known.reader in READERS
    assert known.open().name == known.reader


def test_sizes_are_those_that_were_written(known: Known) -> None:
    assert known.open().sizes == tuple(level.shape[1::-1] for level in known.levels)


def test_pixels_are_exact_wherever_they_are_read(known: Known) -> None:
    reader = known.open()
    for number, level in enumerate(known.levels):
        for rectangle in rectangles(reader.sizes[number]):
            got = reader.read(number, *rectangle)
            assert got.dtype == np.uint8 and np.array_equal(got, part(level, rectangle)), (number, rectangle)


def test_what_is_read_may_be_written_to(known: Known) -> None:
    reader = known.open()
    for rectangle in [(3, 2, 30, 20), (0, 0, *reader.sizes[0])]:
        reader.read(0, *rectangle)[...] = 7
        assert np.array_equal(reader.read(0, *rectangle), part(known.levels[0], rectangle))


def test_a_whole_area_is_seen(known: Known) -> None:
    pixels, seen = known.open().read_seen(0, 5, 7, 100, 90)
    assert seen is None and np.array_equal(pixels, part(known.levels[0], (5, 7, 100, 90)))


def test_threads_read_at_once(known: Known) -> None:
    reader = known.open()
    asked = [
        (number, rectangle)
        for number, level in enumerate(known.levels)
        for rectangle in rectangles(level.shape[1::-1], 10)
    ]
    with ThreadPoolExecutor(8) as pool:
        for (number, rectangle), got in zip(
            asked, pool.map(lambda place: reader.read(place[0], *place[1]), asked), strict=True
        ):
            assert np.array_equal(got, part(known.levels[number], rectangle)), (number, rectangle)


def test_a_copy_by_pickle_is_small_and_reads_the_same(known: Known) -> None:
    reader = known.open()
    reader.read(0, 0, 0, 50, 40)
    data = pickle.dumps(reader)
    copy = pickle.loads(data)
    assert len(data) < 8000 and copy.sizes == reader.sizes and copy.properties == reader.properties
    assert np.array_equal(copy.read(0, 3, 4, 50, 40), part(known.levels[0], (3, 4, 50, 40)))


def test_close_may_come_at_any_time_and_twice(known: Known) -> None:
    reader = known.open()
    reader.close()
    reader.read(0, 0, 0, 9, 9)
    reader.close()
    reader.close()
    with open_slide(known.path, mpp=0.5, reader=known.reader) as slide:
        assert slide.reader == known.reader
        assert np.array_equal(slide.read(3, 4, 30, 20), part(known.levels[0], (3, 4, 30, 20)))
    with pytest.raises(SlideError, match="was closed; open it again"):
        slide.read(0, 0, 9, 9)


@pytest.fixture
def gone(known: Known, tmp_path: Path) -> LevelReader:
    """A reader whose file is cut behind its back after opening."""
    path = tmp_path / known.path.name
    if known.path.is_dir():
        for source in sorted(known.path.rglob("*")):
            if source.is_file():
                target = path / source.relative_to(known.path)
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(source.read_bytes())
        reader = open_reader(path, known.reader)
        for chunk in (path / "0").rglob("*"):
            if chunk.is_file() and chunk.name != ".zarray":
                chunk.write_bytes(chunk.read_bytes()[:-100])
        return reader
    path.write_bytes(known.path.read_bytes())
    reader = pickle.loads(pickle.dumps(open_reader(path, known.reader)))
    path.write_bytes(known.path.read_bytes()[:2000])
    return reader


def test_damage_is_one_line_that_names_the_file(known: Known, gone: LevelReader) -> None:
    with pytest.raises(SlideError) as caught:
        gone.read(0, 0, 0, *gone.sizes[0])
    assert known.path.name in str(caught.value) and "\n" not in str(caught.value)


def test_damage_is_white_and_not_seen(gone: LevelReader) -> None:
    width, height = gone.sizes[0]
    pixels, seen = gone.read_seen(0, 0, 0, width, height)
    assert seen is not None and seen.shape == (height, width) and not seen.any()
    assert (pixels == 255).all()
