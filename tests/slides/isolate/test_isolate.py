"""Slides read in a child process: the same pixels as without, and one named error whatever becomes of the child."""

from __future__ import annotations

import gc
import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from medsd.errors import MedsdError, SlideError
from medsd.phantom import PhantomSpec, write_phantom
from medsd.slides.isolate import process as isolate_process
from medsd.slides.isolate import slide as isolate
from medsd.slides.isolate.slide import IsolatedSlide, Limits
from medsd.slides.slide import open_slide

# A slide of 4,096 px a side whose pixels say where they are. It does what its file is named after where a read touches
# the level-0 pixel (700, 300), and writes down every process that opened it.
FAKE = """
import os, signal, sys, time
from pathlib import Path
from types import SimpleNamespace
import numpy as np
sys.modules["scipy.sparse"] = SimpleNamespace(csr_array=None)  # fakes are not resampled; half of the time to start
from medsd.errors import NoTissueError
from medsd.slides.isolate.child import main
from medsd.slides.slide import Level

def do(what):
    if what == "segv": os.kill(os.getpid(), signal.SIGSEGV)
    if what == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if what == "exit": print("libfake: bad marker"); sys.stdout.flush(); os._exit(3)
    if what == "hang": time.sleep(60)
    if what == "slow": time.sleep(0.5)
    if what == "raise": raise ValueError("odd\\nbytes")
    if what == "bug": raise ReferenceError("nobody foresaw this")
    if what == "named": raise NoTissueError("x: none; look elsewhere")
    if what == "memory": np.ones(10 * 2**30, np.uint8)
    if what == "noise":
        print("noise" * 100, flush=True)
        os.write(1, b"\\0\\0\\0\\2{}" * 1000)
        os.write(2, b"warning\\n" * 50_000)
        assert sys.stdin.read() == ""

def open_fake(path, mpp, reader):
    with open(path, "a") as handle: handle.write(f"{os.getpid()}\\n")
    what = path.stem
    if what.startswith("open-"): do(what.removeprefix("open-"))
    if what == "import":
        sys.path.insert(0, str(path.parent))
        import tiatoolbox
    size = 4096 if path.stat().st_size < 1000 else 2048

    def read(x, y, width, height, mpp):
        ratio = (mpp or 0.5) / 0.5
        if x <= 700 < x + width * ratio and y <= 300 < y + height * ratio: do(what)
        columns, rows = x + np.arange(width) * ratio, y + np.arange(height) * ratio
        x, y = np.meshgrid(columns, rows)
        return np.stack([x % 256, y % 256, x // 256 + y // 256], -1).astype(np.uint8)

    def read_seen(*area):
        return read(*area), None

    levels = (Level(size, size, 1.0, 1.0),)
    return SimpleNamespace(
        dimensions=(size, size), mpp=0.5, mpp_source="fake", mpp_doubt="", reader="fake", levels=levels,
        bounds=(0, 0, size, size),
        read=read, read_seen=read_seen,
    )

main(open_fake)
"""
BAD = (690, 290, 64, 64)
GOOD = (1000, 1000, 64, 48)


class FakeFiles:
    """Files of fake slides, and which processes opened them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __call__(self, what: str) -> Path:
        path = self.folder / f"{what}.fake"
        path.write_text("")
        return path

    def opened_by(self, what: str) -> list[int]:
        return [int(line) for line in (self.folder / f"{what}.fake").read_text().split()]


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeFiles:
    """Children open fakes."""
    script = tmp_path / "fake.py"
    script.write_text(FAKE)
    monkeypatch.setattr(isolate_process, "_ARGUMENTS", [str(script)])
    return FakeFiles(tmp_path)


def expected(x: int, y: int, width: int, height: int, ratio: int = 1) -> np.ndarray:
    """Pixels of a fake, one by one."""
    places = [[(x + column * ratio, y + row * ratio) for column in range(width)] for row in range(height)]
    return np.array([[(a % 256, b % 256, a // 256 + b // 256) for a, b in row] for row in places], np.uint8)


def is_gone(pid: int) -> bool:
    """Whether no such process is left, not even a zombie of ours (one of others may wait for init)."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    except (FileNotFoundError, ProcessLookupError):
        return True
    return state[0] == "Z" and int(state[1]) != os.getpid()


def wait_until_gone(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not is_gone(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    return is_gone(pid)


def test_pixels_are_those_of_the_slide_itself(shared_data: Path, tmp_path: Path) -> None:
    phantom = tmp_path / "phantom.tif"
    write_phantom(PhantomSpec(seed=1, tumour=True, size_px=512), phantom)
    for path in (shared_data / "wsi" / "CMU-1-Small-Region.svs", phantom):
        with open_slide(path) as plain, IsolatedSlide(path) as isolated:
            for name in ("path", "dimensions", "mpp", "mpp_source", "mpp_doubt", "reader", "levels", "bounds"):
                assert getattr(isolated, name) == getattr(plain, name), name
            width, height = plain.dimensions
            for area in [
                (0, 0, width, height),
                (-30, height - 100, 200, 300),
                (10.25, 20.5, 300, 200, plain.mpp * 2.7),
                (np.int64(400), np.float32(300), np.int32(256), np.int64(256), np.float64(plain.mpp)),
            ]:
                assert np.array_equal(isolated.read(*area), plain.read(*area)), area
                pixels, seen = isolated.read_seen(*area)
                assert seen is None and np.array_equal(pixels, plain.read(*area)), area


def test_the_mask_of_damaged_tiles_comes_along(tmp_path: Path, coding) -> None:
    path = tmp_path / "cut.tif"
    coding.write_levels(path, [coding.coded_pixels(512, 512)], 0.5, 2)
    whole = path.read_bytes()
    path.write_bytes(whole[:150_000] + bytes(150_000) + whole[300_000:])
    with open_slide(path, reader="tifffile") as plain, IsolatedSlide(path, reader="tifffile") as isolated:
        wanted, wanted_seen = plain.read_seen(30, 0, 450, 512)
        pixels, seen = isolated.read_seen(30, 0, 450, 512)
        assert seen is not None and 0.1 < seen.mean() < 0.9
        assert np.array_equal(pixels, wanted) and np.array_equal(seen, wanted_seen)
        with pytest.raises(SlideError) as plain_error:
            plain.read(0, 0, 512, 512)
        with pytest.raises(SlideError) as error:
            isolated.read(0, 0, 512, 512)
        assert str(error.value) == str(plain_error.value)


def test_errors_of_opening_are_those_of_the_slide_itself(tmp_path: Path, coding) -> None:
    text, unscaled = tmp_path / "text.svs", tmp_path / "unscaled.tif"
    text.write_text("no slide")
    coding.write_levels(unscaled, [coding.coded_pixels(128, 128)], 5000.0, 2)
    for arguments in [(text,), (unscaled,), (unscaled, 0.5, "tiffile")]:
        with pytest.raises(MedsdError) as plain:
            open_slide(*arguments)
        with pytest.raises(MedsdError) as isolated:
            IsolatedSlide(*arguments)
        assert (type(isolated.value), str(isolated.value)) == (type(plain.value), str(plain.value))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("segv", "died of SIGSEGV; the file is damaged"),
        ("bug", "ended with status 1 (ReferenceError: nobody foresaw this); the file is damaged"),
        ("hang", "no answer within 1 s"),
        ("memory", "more than 1 GiB of memory needed for reading 64 x 64 px; convert"),
        ("raise", "reading 64 x 64 px failed (ValueError: odd bytes); copy"),
    ],
)
def test_a_failed_read_is_one_line_and_the_next_read_works(fake: FakeFiles, what: str, words: str) -> None:
    path = fake(what)
    with IsolatedSlide(path, limits=Limits(read_s=1, memory_gib=1)) as slide:
        started = time.monotonic()
        with pytest.raises(SlideError) as error:
            slide.read(*BAD)
        assert time.monotonic() - started < 5
        message = str(error.value)
        assert message.startswith(f"{path}: ") and words in message and "\n" not in message
        assert np.array_equal(slide.read(*GOOD), expected(*GOOD))
    survives = what in ("memory", "raise")
    assert len(fake.opened_by(what)) == (1 if survives else 2)
    assert all(is_gone(pid) for pid in fake.opened_by(what))


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("open-exit", "ended with status 3 (libfake: bad marker)"),
        ("open-hang", "no answer within 3 s"),
        ("open-memory", "more than 2 GiB of memory needed for opening"),
        ("open-named", "x: none; look elsewhere"),
    ],
)
def test_a_failed_opening_is_one_line(fake: FakeFiles, what: str, words: str) -> None:
    path = fake(what)
    with pytest.raises(MedsdError) as error:
        IsolatedSlide(path, limits=Limits(open_s=3 if what == "open-hang" else 10))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert (type(error.value).__name__ == "NoTissueError") == (what == "open-named")
    assert all(is_gone(pid) for pid in fake.opened_by(what))


def test_libraries_may_print_and_read_what_they_like(fake: FakeFiles, capfd: pytest.CaptureFixture[str]) -> None:
    with IsolatedSlide(fake("noise")) as slide:
        for area in (BAD, GOOD, BAD):
            assert np.array_equal(slide.read(*area), expected(*area))
    assert len(fake.opened_by("noise")) == 1
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("what", ["segv", "memory"])
def test_what_kills_is_not_seen_and_what_comes_next_is(
    fake: FakeFiles, caplog: pytest.LogCaptureFixture, what: str
) -> None:
    with IsolatedSlide(fake(what)) as slide, caplog.at_level(logging.WARNING):
        pixels, seen = slide.read_seen(100, 100, 600, 500, 1.0)
        again = slide.read_seen(*GOOD)
    assert pixels.shape == (500, 600, 3) and (pixels == 255).all()
    assert seen.shape == (500, 600) and not seen.any()
    assert again[1] is None and np.array_equal(again[0], expected(*GOOD))
    assert len(fake.opened_by(what)) == (2 if what == "segv" else 1)
    assert ("SIGSEGV" if what == "segv" else "2 GiB of memory") in caplog.text


def test_a_slide_that_kills_again_and_again_is_refused(fake: FakeFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(isolate, "_MOST_DEATHS_IN_A_ROW", 3)
    with IsolatedSlide(fake("kill")) as slide:
        with pytest.raises(SlideError, match="SIGKILL"):
            slide.read(*BAD)
        slide.read(*GOOD)  # it is deaths in a row that count
        for _ in range(2):
            with pytest.raises(SlideError, match="SIGKILL"):
                slide.read(*BAD)
        _, seen = slide.read_seen(*BAD)
        assert not seen.any()
        before = len(fake.opened_by("kill"))
        for read in (slide.read, slide.read_seen):
            with pytest.raises(SlideError, match="3 times in a row"):
                read(*GOOD)
        assert len(fake.opened_by("kill")) == before


def test_a_large_read_has_more_time(fake: FakeFiles) -> None:
    limits = Limits(read_s=0.2, px_per_s=1e6)
    with IsolatedSlide(fake("slow"), limits=limits) as slide:
        assert slide.read(0, 0, 2048, 1024).shape == (1024, 2048, 3)
        assert slide.read(0, 0, 128, 64, 8.0).shape == (64, 128, 3)  # from as many pixels of its level
        with pytest.raises(SlideError, match=r"within 0\.2 s"):
            slide.read(*BAD)


def test_importing_a_slow_library_is_not_the_slides_fault(fake: FakeFiles, monkeypatch: pytest.MonkeyPatch) -> None:
    (fake.folder / "tiatoolbox.py").write_text("")
    with IsolatedSlide(fake("import")) as slide:
        assert np.array_equal(slide.read(*GOOD), expected(*GOOD))
    monkeypatch.setattr(isolate_process, "IMPORT_S", -100.0)  # more time is less time
    with pytest.raises(SlideError, match="no answer within"):
        IsolatedSlide(fake("import"))
    IsolatedSlide(fake("fine")).close()


@pytest.mark.parametrize("busy", [False, True])
def test_the_child_does_not_outlive_a_killed_parent(fake: FakeFiles, busy: bool) -> None:
    path = fake("hang")
    parent = f"""
from medsd.slides.isolate import process as isolate_process
from medsd.slides.isolate.slide import IsolatedSlide, Limits
isolate_process._ARGUMENTS = {isolate_process._ARGUMENTS!r}
slide = IsolatedSlide({str(path)!r}, limits=Limits(read_s=2))
print("open", flush=True)
slide.read(*{BAD if busy else GOOD})
input()
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"open\n"
        time.sleep(0.3)
        (child,) = fake.opened_by("hang")
        assert not is_gone(child)
        process.send_signal(signal.SIGKILL)
    assert wait_until_gone(child, 5)


def test_a_slide_nobody_closed_ends_with_its_parent(fake: FakeFiles) -> None:
    path = fake("fine")
    parent = f"""
from medsd.slides.isolate import process as isolate_process
from medsd.slides.isolate.slide import IsolatedSlide
isolate_process._ARGUMENTS = {isolate_process._ARGUMENTS!r}
slide = IsolatedSlide({str(path)!r})
"""
    done = subprocess.run([sys.executable, "-W", "error", "-c", parent], capture_output=True, timeout=20)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert wait_until_gone(fake.opened_by("fine")[0], 5)


def test_slides_leave_nothing_behind(fake: FakeFiles) -> None:
    path = fake("kill")
    before = len(os.listdir("/proc/self/fd")), threading.active_count()
    for number in range(3):
        slide = IsolatedSlide(path)
        if number == 1:
            with pytest.raises(SlideError):
                slide.read(*BAD)
        if number != 2:
            slide.close()
            slide.close()
        del slide
        gc.collect()
    assert (len(os.listdir("/proc/self/fd")), threading.active_count()) == before
    assert len(fake.opened_by("kill")) == 3 and all(is_gone(pid) for pid in fake.opened_by("kill"))


def test_threads_share_a_slide(fake: FakeFiles) -> None:
    areas = [(x, y, 60 + x // 32, 50) for x in range(0, 2048, 256) for y in range(1000, 1400, 100)]
    with IsolatedSlide(fake("fine")) as slide, ThreadPoolExecutor(8) as pool:
        for area, pixels in zip(areas, pool.map(lambda area: slide.read(*area), areas), strict=True):
            assert np.array_equal(pixels, expected(*area)), area
    assert len(fake.opened_by("fine")) == 1


def test_an_interrupted_read_leaves_no_stale_answer(fake: FakeFiles) -> None:
    def interrupt(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    with IsolatedSlide(fake("slow")) as slide:
        former = signal.signal(signal.SIGALRM, interrupt)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.2)
            with pytest.raises(KeyboardInterrupt):
                slide.read(*BAD)
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, former)
        assert np.array_equal(slide.read(*GOOD), expected(*GOOD))


def test_a_pickled_slide_opens_itself_again(fake: FakeFiles) -> None:
    with IsolatedSlide(fake("fine")) as slide, pickle.loads(pickle.dumps(slide)) as copy:
        assert (copy.dimensions, copy.mpp, copy.path) == (slide.dimensions, slide.mpp, slide.path)
        assert np.array_equal(copy.read(*GOOD), slide.read(*GOOD))
    assert len(fake.opened_by("fine")) == 2
    with pytest.raises(SlideError, match="was closed"):
        copy.read(*GOOD)


def test_another_file_of_the_same_name_is_an_error(fake: FakeFiles) -> None:
    path = fake("segv")
    with IsolatedSlide(path) as slide:
        with pytest.raises(SlideError, match="SIGSEGV"):
            slide.read(*BAD)
        path.write_text("0\n" * 1000)
        for _ in range(2):
            with pytest.raises(SlideError, match="no longer the slide"):
                slide.read(*GOOD)


def test_areas_that_are_none_are_the_callers_mistake(fake: FakeFiles) -> None:
    with IsolatedSlide(fake("fine")) as slide:
        for area in [(0, 0, 0, 5), (0, 0, 5, 5, 0.0), (0, 0, 5, 5, float("nan")), (float("nan"), 0, 5, 5)]:
            with pytest.raises(ValueError, match="must be"):
                slide.read(*area)
    assert len(fake.opened_by("fine")) == 1
