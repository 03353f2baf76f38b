"""Damaged and hostile files: right pixels, or one named line, soon and in little memory; never anything else."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medsd.errors import MissingMppError, SlideError
from medsd.slides.isolate.slide import IsolatedSlide
from medsd.slides.slide import FileSlide, check_size, open_slide

GOOD = [
    "CMU-1-Small-Region.svs",
    "derived/cmu1-region-pyramid-jpeg.tif",
    "derived/cmu1-region-pyramid.ome.tif",
    "test3-DAPI-2-(387).ndpi",
    "boxes.tiff",
    "yb10kx5k.zstd.tiff",
    "sm_image_numbers.dcm",
]


def cut(data: bytes, share: float) -> bytes:
    return data[: int(share * len(data))]


def zeros(data: bytes, share: float) -> bytes:
    start = int(share * len(data))
    end = min(len(data), start + max(64, len(data) // 20))
    return data[:start] + bytes(end - start) + data[end:]


def zeros_to_the_end(data: bytes, share: float) -> bytes:
    start = int(share * len(data))
    return data[:start] + bytes(len(data) - start)


def flips(data: bytes, share: float) -> bytes:
    generator = np.random.default_rng(int(share * 100))
    hurt = np.frombuffer(data, np.uint8).copy()
    # Past the first kilobyte: headers have tests of their own below.
    spots = generator.integers(min(1024, len(hurt) // 2), len(hurt), max(3, len(hurt) // 100_000))
    hurt[spots] ^= np.uint8(1) << generator.integers(0, 8, len(spots)).astype(np.uint8)
    return hurt.tobytes()


def picture(slide: Any) -> tuple[np.ndarray, np.ndarray]:
    """Some of a slide at level 0, and which of it was seen."""
    width, height = slide.dimensions
    pixels, seen = slide.read_seen(0, 0, min(width, 2300), min(height, 3000))
    return pixels, np.ones(pixels.shape[:2], bool) if seen is None else seen


def one_line(error: Exception, path: Path) -> None:
    assert path.name in str(error) and "\n" not in str(error), str(error)


@pytest.mark.parametrize("share", [0.03, 0.4, 0.97])
@pytest.mark.parametrize("damage", [cut, zeros, zeros_to_the_end])
@pytest.mark.parametrize("name", GOOD)
def test_lost_bytes_cost_pixels_that_are_said_to_be_lost(
    tmp_path: Path, shared_data: Path, name: str, damage: Any, share: float
) -> None:
    source = shared_data / "wsi" / name
    path = tmp_path / Path(name).name
    path.write_bytes(damage(source.read_bytes(), share))
    started = time.process_time()
    try:
        with open_slide(path, mpp=0.5) as hurt, open_slide(source, mpp=0.5) as whole:
            if hurt.dimensions != whole.dimensions:
                # Only where the first level itself was lost: the file then says so little that a coarser one is first.
                assert hurt.dimensions in [(level.width, level.height) for level in whole.levels]
                return
            (pixels, seen), (wanted, _) = picture(hurt), picture(whole)
            if name.endswith(".dcm"):
                return  # uncompressed: a lost byte is a black pixel, and nothing in the file tells
            wrong = seen & (pixels != wanted).any(axis=2)
            # A decoder is allowed the tile in which the damage begins: what still decodes cannot be told from truth.
            assert wrong.mean() <= 0.01
    except SlideError as error:
        one_line(error, path)
    assert time.process_time() - started < 10


@pytest.mark.parametrize("share", [0.1, 0.5])
@pytest.mark.parametrize("name", GOOD[:4])
def test_flipped_bits_spoil_no_more_than_their_tiles(
    tmp_path: Path, shared_data: Path, name: str, share: float
) -> None:
    source = shared_data / "wsi" / name
    path = tmp_path / Path(name).name
    path.write_bytes(flips(source.read_bytes(), share))
    try:
        with open_slide(path, mpp=0.5) as hurt, open_slide(source, mpp=0.5) as whole:
            (pixels, seen), (wanted, _) = picture(hurt), picture(whole)
            assert (seen & (pixels != wanted).any(axis=2)).mean() < 0.3
    except SlideError as error:
        one_line(error, path)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    import tifffile

    path = tmp_path_factory.mktemp("small") / "slide.tif"
    pixels = np.random.default_rng(0).integers(0, 256, (160, 192, 3)).astype(np.uint8)
    with tifffile.TiffWriter(path) as writer:
        kind = {"tile": (64, 64), "photometric": "rgb", "compression": "deflate", "metadata": None}
        writer.write(pixels, resolution=(20_000, 20_000), resolutionunit="CENTIMETER", **kind)
        writer.write(pixels[::2, ::2], subfiletype=1, **kind)
    return path, path.read_bytes()


# Pixels are read by our own readers alone: one header in a thousand makes OpenSlide abort the process, which is why
# slides are read in a child (`IsolatedSlide`). The same examples each time, but they follow what else was imported.
@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_mutated_headers(tmp_path: Path, small: tuple[Path, bytes], data: st.DataObject) -> None:
    """Every byte that is not pixels: the TIFF header, the directories and their values."""
    import tifffile

    path, good = small
    with tifffile.TiffFile(path) as file:
        tiles = np.zeros(len(good), bool)
        for page in file.pages:
            for start, count in zip(page.dataoffsets, page.databytecounts, strict=True):
                tiles[start : start + count] = True
    header = np.flatnonzero(~tiles).tolist()
    hurt = bytearray(good)
    for spot in data.draw(st.lists(st.sampled_from(header), min_size=1, max_size=6)):
        hurt[spot] = data.draw(st.sampled_from([0, 1, 2, 7, 0x7F, 0x80, 0xFF, hurt[spot] ^ 4]))
    target = tmp_path / "hurt.tif"
    target.write_bytes(hurt)
    try:
        with open_slide(target) as slide:
            if slide.reader == "openslide":
                return
            width, height = min(slide.dimensions[0], 512), min(slide.dimensions[1], 512)
            pixels, seen = slide.read_seen(0, 0, width, height)
            assert pixels.shape == (height, width, 3) and (seen is None or seen.shape == (height, width))
            assert slide.read_seen(3, 5, 20, 10, slide.mpp * 2.3)[0].shape == (10, 20, 3)
    except (SlideError, MissingMppError) as error:
        one_line(error, target)


@pytest.mark.parametrize("size", [(0, 5), (5, -1), (2**21 + 1, 1), (2**19, 2**19), (2**31, 2**31)])
def test_absurd_sizes_are_refused(size: tuple[int, int]) -> None:
    with pytest.raises(SlideError, match=r"a\.tif: .* is no size of a slide"):
        check_size(Path("a.tif"), size)


def test_a_header_of_an_absurd_slide_takes_no_memory(tmp_path: Path, small: tuple[Path, bytes]) -> None:
    import tifffile

    path, good = small
    hurt = bytearray(good)
    with tifffile.TiffFile(path) as file:
        for name in ("ImageWidth", "ImageLength"):
            tag = file.pages[0].tags[name]
            assert tag.dtype in (3, 4)
            # The tag becomes a LONG whose value lies in the entry itself.
            hurt[tag.offset + 2 : tag.offset + 4] = (4).to_bytes(2, "little")
            hurt[tag.offset + 8 : tag.offset + 12] = (2**31 - 5).to_bytes(4, "little")
    target = tmp_path / "vast.tif"
    target.write_bytes(hurt)
    with pytest.raises(SlideError) as caught:
        IsolatedSlide(target, mpp=0.5)
    one_line(caught.value, target)


def test_every_odd_file_in_a_child_within_its_limits(shared_data: Path) -> None:
    """The child has its own limits of time; that they are kept is tested with `IsolatedSlide`."""
    paths = [path for path in sorted((shared_data / "wsi_odd").iterdir()) if path.suffix != ".md"]
    for path in paths:
        try:
            with IsolatedSlide(path, mpp=0.5) as isolated, FileSlide(path, mpp=0.5) as plain:
                width, height = plain.dimensions
                assert np.array_equal(isolated.read(0, 0, width, height), plain.read(0, 0, width, height)), path.name
        except SlideError as error:
            one_line(error, path)


def test_a_file_that_vanishes_or_is_cut_after_opening(tmp_path: Path, coded_slides: dict[str, Any]) -> None:
    path = tmp_path / "cut.tif"
    data = coded_slides["odd-2x"].path.read_bytes()
    path.write_bytes(data)
    slide = open_slide(path)
    path.write_bytes(data[: len(data) // 3])
    with pytest.raises(SlideError, match=r"cut\.tif"):
        slide.read(0, 0, 1483, 997)
    path.unlink()
    with pytest.raises(SlideError, match=r"cut\.tif"):
        pickle.loads(pickle.dumps(slide)).read(0, 0, 100, 100)


@pytest.mark.parametrize("seed", range(40))
def test_damaged_bytes_give_pixels_or_the_error(tmp_path: Path, coded_slides: dict[str, Any], seed: int) -> None:
    generator = np.random.default_rng(seed)
    data = np.frombuffer(coded_slides["even-2x"].path.read_bytes(), np.uint8).copy()
    # Headers and tag tables lie at the end of pages; hit the ends, the start and the tiles.
    spots = generator.integers(8, len(data), 200)
    data[spots] = generator.integers(0, 256, 200)
    path = tmp_path / "hurt.tif"
    path.write_bytes(data.tobytes()[: len(data) - int(generator.integers(0, 2000)) * (seed % 2)])
    try:
        with open_slide(path, mpp=0.5) as slide:
            width, height = slide.dimensions
            assert slide.read(0, 0, min(width, 512), min(height, 384)).shape[2] == 3
    except SlideError as error:
        assert "hurt.tif" in str(error) and "\n" not in str(error)
