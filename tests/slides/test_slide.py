"""Reading against slides whose pixels say where they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from medsd.errors import MedsdError, SlideError
from medsd.slides import slide as slide_module
from medsd.slides.resample import Axis
from medsd.slides.slide import FileSlide, level_for, level_of, open_slide, thumbnail

NAMES = ["even-2x", "even-4x", "odd-2x", "odd-4x"]
Coded = dict[str, Any]

quick = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def plain_read(level: np.ndarray, column: int, row: int, columns: int, rows: int) -> np.ndarray:
    """Whole pixels of an array, white outside: the reference."""
    canvas = np.full((rows, columns, 3), 255, np.uint8)
    for y in range(max(0, -row), min(rows, level.shape[0] - row)):
        left, right = max(0, -column), min(columns, level.shape[1] - column)
        if left < right:
            canvas[y, left:right] = level[row + y, column + left : column + right]
    return canvas


@pytest.mark.parametrize("name", NAMES)
def test_pixels_at_the_scale_of_a_level_are_the_levels_own(coded_slides: Coded, name: str) -> None:
    coded = coded_slides[name]
    with open_slide(coded.path) as slide:
        assert (slide.mpp, slide.mpp_source, slide.reader) == (coded.mpp, "TIFF resolution tags", "tifffile")
        assert slide.dimensions == coded.levels[0].shape[1::-1]
        for number, level in enumerate(coded.levels):
            ratio = coded.factor**number
            height, width = level.shape[:2]
            places = [
                (0, 0),
                (-7, -5),
                (width - 20, height - 15),  # the far corner, where a wrong factor has drifted most
                (width - 20, -5),
                (-7, height - 15),
                (width // 2, height // 3),
            ]
            for column, row in places:
                got = slide.read(column * ratio, row * ratio, 40, 30, mpp=slide.mpp * ratio)
                assert np.array_equal(got, plain_read(level, column, row, 40, 30)), (number, column, row)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("ratio", [0.4, 1.0, 1.3, 2.06, 3.0, 3.7, 5.3])
def test_places_are_kept_at_any_scale(coded_slides: Coded, name: str, ratio: float) -> None:
    coded = coded_slides[name]
    with open_slide(coded.path) as slide:
        w, h = (size - size % coded.factor**2 for size in slide.dimensions)
        width, height = int(0.45 * w / ratio), int(0.45 * h / ratio)
        # Near the origin, in the middle at a fraction of a pixel, and touching the far corner.
        for x, y in [(9, 9), (0.3 * w + 0.37, 0.3 * h + 0.71), (w - 9 - width * ratio, h - 9 - height * ratio)]:
            pixels = slide.read(x, y, width, height, mpp=slide.mpp * ratio)
            assert max(map(abs, coded.phase_error(pixels, x, y, ratio))) < 0.1, (x, y)


@pytest.mark.parametrize("fraction", [0.1, 0.25, 0.5, 0.9])
def test_a_fraction_of_a_pixel_is_linear_interpolation(coded_slides: Coded, fraction: float) -> None:
    coded = coded_slides["even-2x"]
    got = open_slide(coded.path).read(100 + fraction, 50, 30, 20)
    left, right = (coded.levels[0][50:70, 100 + step : 130 + step].astype(float) for step in (0, 1))
    assert np.abs(got - (left + fraction * (right - left))).max() <= 0.5 + 255 / 1024


def test_half_the_scale_of_the_finest_level_is_the_mean_of_two_by_two(tmp_path: Path, coded_slides: Coded) -> None:
    coded = coded_slides["even-4x"]
    got = open_slide(coded.path).read(10, 20, 30, 20, mpp=2 * coded.mpp)
    blocks = coded.levels[0][20:60, 10:70].reshape(20, 2, 30, 2, 3).mean((1, 3))
    assert np.array_equal(got, np.rint(blocks))


def embed(pixels: np.ndarray, margin: int) -> np.ndarray:
    canvas = np.full((pixels.shape[0] + 2 * margin, pixels.shape[1] + 2 * margin, 3), 255, np.uint8)
    canvas[margin:-margin, margin:-margin] = pixels
    return canvas


@pytest.fixture(scope="session")
def embedded(tmp_path_factory: pytest.TempPathFactory, coded_slides: Coded, coding: Any) -> tuple[FileSlide, FileSlide]:
    """A slide, and the same with a real white margin of 512 px on every side."""
    coded = coded_slides["even-2x"]
    path = tmp_path_factory.mktemp("embedded") / "wide.tif"
    coding.write_levels(path, [embed(level, 512 >> i) for i, level in enumerate(coded.levels)], coded.mpp, 2)
    return open_slide(coded.path), open_slide(path)


@quick
@given(
    x=st.floats(-300, 700),
    y=st.floats(-300, 600),
    width=st.integers(1, 40),
    height=st.integers(1, 40),
    ratio=st.floats(0.2, 6),
)
def test_outside_is_white_at_every_border(
    embedded: tuple[FileSlide, FileSlide], x: float, y: float, width: int, height: int, ratio: float
) -> None:
    narrow, wide = embedded
    # A power of two is added to x and y, so that both reads have the same phase to the last bit or nearly so.
    one = narrow.read(x, y, width, height, mpp=0.5 * ratio).astype(int)
    other = wide.read(x + 512, y + 512, width, height, mpp=0.5 * ratio)
    assert one.shape == (height, width, 3)
    assert np.array_equal(one, other)


@pytest.mark.parametrize("place", [(-5000, 0), (0, -5000), (10**7, 10), (10, 10**7), (-(10**7), -(10**7))])
@pytest.mark.parametrize("ratio", [0.7, 1.0, 2.0, 3.3])
def test_far_outside_is_all_white(coded_slides: Coded, place: tuple[int, int], ratio: float) -> None:
    pixels = open_slide(coded_slides["odd-2x"].path).read(*place, 9, 7, mpp=0.5 * ratio)
    assert pixels.shape == (7, 9, 3) and pixels.dtype == np.uint8 and (pixels == 255).all()


@pytest.mark.parametrize("name", NAMES)
@quick
@given(
    x=st.floats(-50, 300),
    y=st.floats(-50, 300),
    ratio=st.one_of(st.floats(0.3, 7), st.sampled_from([1.0, 1.5, 2.0, 2.5, 3.0, 4.0, 6.0])),
    cut=st.tuples(st.integers(1, 47), st.integers(1, 35)),
)
def test_neighbouring_reads_join_exactly(
    coded_slides: Coded, name: str, x: float, y: float, ratio: float, cut: tuple[int, int]
) -> None:
    slide = open_slide(coded_slides[name].path)
    mpp, (left, top) = slide.mpp * ratio, cut
    whole = slide.read(x, y, 48, 36, mpp)
    rows = []
    for y_start, height in ((0, top), (top, 36 - top)):
        parts = [
            slide.read(x + x_start * ratio, y + y_start * ratio, width, height, mpp)
            for x_start, width in ((0, left), (left, 48 - left))
        ]
        rows.append(np.concatenate(parts, axis=1))
    assert np.array_equal(np.concatenate(rows), whole)


def test_a_large_resampled_read_is_made_of_small_ones(coded_slides: Coded, monkeypatch: pytest.MonkeyPatch) -> None:
    slide = open_slide(coded_slides["odd-2x"].path)
    whole = slide.read(-20.5, 3.25, 301, 203, mpp=1.37)
    largest = 0
    inner = slide._read_level

    def watch(index: int, columns: Axis, rows: Axis, decode: Any) -> tuple[np.ndarray, np.ndarray | None]:
        nonlocal largest
        largest = max(largest, columns.length * rows.length)
        return inner(index, columns, rows, decode)

    monkeypatch.setattr(slide, "_read_level", watch)
    monkeypatch.setattr(slide_module, "_MOST_LEVEL_PX", 5000)
    assert np.array_equal(slide.read(-20.5, 3.25, 301, 203, mpp=1.37), whole)
    assert 0 < largest <= 5000


def test_the_nearest_finer_level_is_read(coded_slides: Coded) -> None:
    slide = open_slide(coded_slides["odd-2x"].path)
    found = [level_for(slide.levels, ratio) for ratio in (0.1, 1.0, 1.99, 2.0, 3.9, 4.0, 100.0)]
    assert found == [0, 0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("base", "size", "factor"),
    [
        ((1483, 997), (741, 498), (2, 2)),
        ((1483, 997), (742, 499), (2, 2)),
        ((2220, 2967), (277, 370), (8, 8)),
        ((46000, 32914), (2875, 2057), (16, 16)),
        ((100, 3000), (3, 93), (32, 32)),  # 100 / 3 alone would say 33
        ((1501, 1103), (23, 17), (64, 64)),  # 65 fits, too
        ((30000, 22000), (118, 86), (256, 256)),
        ((5000, 3700), (50, 37), (100, 100)),
        ((1000, 1000), (300, 300), (1000 / 300, 1000 / 300)),
        ((1000, 800), (500, 200), (2, 4)),
    ],
)
def test_the_factor_of_a_level(base: tuple[int, int], size: tuple[int, int], factor: tuple[float, float]) -> None:
    level = level_of(base, size)
    assert (level.downsample_x, level.downsample_y) == factor


def test_the_whole_slide_as_one_picture(coded_slides: Coded) -> None:
    coded = coded_slides["odd-2x"]
    with open_slide(coded.path) as slide:
        picture, ratio = thumbnail(slide, 100)
        assert picture.shape == (67, 100, 3) and ratio == pytest.approx(14.83)
        assert max(map(abs, coded.phase_error(picture[:-2, :-2], 0, 0, ratio))) < 0.1
        assert thumbnail(slide, 5000)[0].shape == (997, 1483, 3)


def test_a_place_that_costs_its_reader_leaves_the_rest_of_the_picture(array_slide: Any) -> None:
    """As of a slide read in a child: a read that touches the place is not seen as a whole."""

    class Deadly(array_slide):  # type: ignore[misc]
        def read_seen(self, x: float, y: float, width: int, height: int, mpp: float) -> tuple[np.ndarray, Any]:
            hit = x <= 700 < x + width * mpp / self.mpp and y <= 300 < y + height * mpp / self.mpp
            return self.read(x, y, width, height, mpp), np.full((height, width), not hit)

    pixels = np.random.default_rng(0).integers(0, 256, (1200, 1600, 3), np.uint8)
    picture, ratio = thumbnail(Deadly(pixels), 800)
    kept = (picture == pixels[::2, ::2]).all(axis=2)
    assert ratio == 2.0 and not kept[:256, 256:512].any()
    kept[:256, 256:512] = True
    assert kept.all()


@pytest.mark.parametrize(("size", "mpp"), [((0, 5), None), ((5, -1), None), ((5, 5), 0.0), ((5, 5), math.nan)])
def test_sizes_and_scales_that_mean_nothing(coded_slides: Coded, size: tuple[int, int], mpp: float | None) -> None:
    for kind in (MedsdError, ValueError):  # a ValueError, which it was alone
        with open_slide(coded_slides["even-2x"].path) as slide, pytest.raises(kind, match="must be"):
            slide.read(0, 0, *size, mpp=mpp)


def test_transparency_is_white(transparent: tuple[Path, np.ndarray]) -> None:
    path, colours = transparent
    with open_slide(path) as slide:
        assert slide.reader == "openslide"
        pixels = slide.read(-10, -10, 276, 212)
    assert (pixels[10:-10, 10:138] == 255).all()
    assert np.array_equal(pixels[10:-10, 138:-10], colours[:, 128:])
    assert (pixels[:10] == 255).all() and (pixels[:, -10:] == 255).all()


def _no_file(folder: Path) -> Path:
    return folder / "absent.tif"


def _text(folder: Path) -> Path:
    (folder / "text.svs").write_text("not a slide")
    return folder / "text.svs"


def _empty(folder: Path) -> Path:
    (folder / "empty.tif").touch()
    return folder / "empty.tif"


@pytest.mark.parametrize(
    ("make", "words"),
    [(_no_file, "no such file"), (lambda f: f, "is a folder"), (_text, "not a slide"), (_empty, "not a slide")],
)
def test_what_is_no_slide(tmp_path: Path, make: Callable[[Path], Path], words: str) -> None:
    path = make(tmp_path)
    with pytest.raises(SlideError, match=words) as caught:
        open_slide(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
