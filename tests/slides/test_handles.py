"""A slide in threads, forks and pickles, and one that is closed."""

from __future__ import annotations

import hashlib
import multiprocessing
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsd.errors import SlideError
from medsd.slides.slide import FileSlide, open_slide

Coded = dict[str, Any]


def places(slide: FileSlide, number: int) -> list[tuple[float, float, float]]:
    ends = (*slide.dimensions, 4)
    return [tuple(row) for row in np.random.default_rng(3).uniform((-20, -20, 0.3), ends, (number, 3)).tolist()]


def digest(slide: FileSlide, place: tuple[float, float, float]) -> str:
    x, y, ratio = place
    return hashlib.sha256(slide.read(x, y, 40, 30, mpp=slide.mpp * ratio).tobytes()).hexdigest()


@pytest.mark.parametrize("kind", ["tifffile", "openslide"])
def test_eight_threads_read_the_same_pixels(
    coded_slides: Coded, transparent: tuple[Path, np.ndarray], kind: str
) -> None:
    slide = open_slide(transparent[0] if kind == "openslide" else coded_slides["odd-2x"].path)
    assert slide.reader == kind
    asked = places(slide, 60)
    alone = [digest(slide, place) for place in asked]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda place: digest(slide, place), asked * 8))
    assert together == alone * 8
    assert len(set(alone)) > 10


def _digest_in_child(slide: FileSlide, asked: list[Any], pipe: Any) -> None:
    pipe.send([digest(slide, place) for place in asked])
    slide.close()


def test_a_fork_after_reading_gets_handles_of_its_own(coded_slides: Coded) -> None:
    slide = open_slide(coded_slides["odd-2x"].path)
    asked = places(slide, 20)
    alone = [digest(slide, place) for place in asked]
    context = multiprocessing.get_context("fork")
    for _ in range(2):
        ours, theirs = context.Pipe()
        child = context.Process(target=_digest_in_child, args=(slide, asked, theirs))
        child.start()
        # Both read at once: a shared file position would mix them up.
        assert [digest(slide, place) for place in asked] == alone
        assert ours.poll(20) and ours.recv() == alone
        child.join(20)
        assert child.exitcode == 0
    assert [digest(slide, place) for place in asked] == alone  # the children's close() was theirs alone


def test_a_pickled_slide_is_small_and_reads_the_same(coded_slides: Coded) -> None:
    slide = open_slide(coded_slides["even-2x"].path, mpp=0.3)
    pixels = slide.read(3, 4, 50, 40, mpp=0.7)
    data = pickle.dumps(slide)
    copy = pickle.loads(data)
    assert len(data) < 6000 and (copy.mpp, copy.mpp_source) == (0.3, "given by the caller; the file says 0.5")
    assert np.array_equal(copy.read(3, 4, 50, 40, mpp=0.7), pixels)


def test_a_closed_slide_says_so(coded_slides: Coded) -> None:
    with open_slide(coded_slides["even-2x"].path) as slide:
        slide.read(0, 0, 5, 5)
    slide.close()
    with pytest.raises(SlideError, match=r"even-2x\.tif: the slide was closed; open it again"):
        slide.read(0, 0, 5, 5)


def test_closing_while_others_read_is_pixels_or_the_error(coded_slides: Coded) -> None:
    slide = open_slide(coded_slides["odd-2x"].path)
    expected = slide.read(0, 0, 200, 200)

    def reads() -> int:
        done = 0
        for _ in range(300):
            try:
                assert np.array_equal(slide.read(0, 0, 200, 200), expected)
            except SlideError:
                return done
            done += 1
        return done

    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(reads) for _ in range(4)]
        slide.close()
        assert all(future.result(30) < 300 for future in futures)
