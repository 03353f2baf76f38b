"""Fixtures shared by all tests."""

from __future__ import annotations

import math
import multiprocessing
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tifffile
import torch

from medsd.phantom import write_phantom_dataset
from tests.pretended_gpu import GPU, pretended_gpu


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of small real files (MEDSD_DATA, or `shared/data` beside the checkout); skips where it is not."""
    folder = Path(os.environ.get("MEDSD_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "SOURCES.md").is_file():
        pytest.skip(f"real data not present: {folder} (set MEDSD_DATA to the folder that holds them)")
    return folder


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--pretended-gpu", action="store_true", help="Every test sees a GPU: tests/pretended_gpu.py.")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    if not item.config.getoption("--pretended-gpu"):
        return (yield)
    with pretended_gpu():
        return (yield)


@pytest.fixture
def gpu() -> Iterator[torch.device]:
    """A GPU, pretended."""
    with pretended_gpu():
        yield GPU


class ArraySlide:
    """A slide held in memory, read at multiples of its mpp only: whole pixels, white outside."""

    reader, mpp_source, mpp_doubt, path = "array", "test", "", Path("array")

    def __init__(self, pixels: np.ndarray, mpp: float = 1.0) -> None:
        self.pixels, self.mpp = pixels, mpp
        self.dimensions = (pixels.shape[1], pixels.shape[0])
        self.bounds = (0, 0, *self.dimensions)

    def read(self, x: float, y: float, width: int, height: int, mpp: float | None = None) -> np.ndarray:
        step = round((mpp or self.mpp) / self.mpp)
        left, top = math.floor(x), math.floor(y)
        rows = np.arange(top, top + height * step, step)
        columns = np.arange(left, left + width * step, step)
        region = np.full((height, width, 3), 255, np.uint8)
        inside_rows = (rows >= 0) & (rows < self.pixels.shape[0])
        inside_columns = (columns >= 0) & (columns < self.pixels.shape[1])
        region[np.ix_(inside_rows, inside_columns)] = self.pixels[np.ix_(rows[inside_rows], columns[inside_columns])]
        return region

    def read_seen(
        self, x: float, y: float, width: int, height: int, mpp: float | None = None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        return self.read(x, y, width, height, mpp), None

    def close(self) -> None:
        pass


@pytest.fixture(scope="session")
def array_slide() -> type[ArraySlide]:
    """Makes a slide of an RGB array."""
    return ArraySlide


BASE_MPP = 0.5


def halved(pixels: np.ndarray, factor: int) -> np.ndarray:
    """Block means, sizes rounded down, as most writers make levels."""
    height, width = pixels.shape[0] // factor, pixels.shape[1] // factor
    blocks = pixels[: height * factor, : width * factor].reshape(height, factor, width, factor, -1)
    return np.rint(blocks.mean((1, 3))).astype(np.uint8)


def write_levels(path: Path, levels: list[np.ndarray], mpp: float, factor: int, **coding: Any) -> None:
    """A generic tiled pyramidal TIFF."""
    coding = {"compression": "deflate", "photometric": "rgb", **coding}
    with tifffile.TiffWriter(path) as writer:
        for number, level in enumerate(levels):
            per_cm = 1e4 / (mpp * factor**number)
            writer.write(
                level,
                tile=(64, 64),
                resolution=(per_cm, per_cm),
                resolutionunit="CENTIMETER",
                subfiletype=1 if number else 0,
                metadata=None,
                **coding,
            )


@dataclass(frozen=True)
class CodedSlide:
    """Red says x and green y: level = start + slope * centre in level-0 pixels, dithered; blue is noise."""

    path: Path
    levels: list[np.ndarray]
    factor: int
    mpp: float
    start: float
    slope: tuple[float, float]

    def phase_error(self, pixels: np.ndarray, x: float, y: float, ratio: float) -> tuple[float, float]:
        """How far the pixels of a read at level-0 (x, y) lie from where they should, in output pixels along x, y."""
        errors = []
        for channel, begin in ((0, x), (1, y)):
            along = pixels[..., channel].mean(axis=channel).astype(float)
            centre = begin + (np.arange(len(along)) + 0.5) * ratio
            found = (along - self.start) / self.slope[channel]
            errors.append(float(np.mean(found - centre)) / ratio)
        return errors[0], errors[1]


def coded_pixels(width: int, height: int, seed: int = 0) -> np.ndarray:
    """Level 0 of a `CodedSlide`."""
    generator = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] + 0.5
    pixels = np.stack([20 + x * (200 / width), 20 + y * (200 / height), generator.uniform(0, 255, x.shape)], -1)
    # Rounding at random, over three greys, keeps the mean where it is also when pixels are mixed and rounded again, so
    # that a place can be read to a few hundredths of a pixel.
    return np.clip(np.floor(pixels + generator.uniform(-1, 2, pixels.shape)), 0, 255).astype(np.uint8)


def write_coded(path: Path, width: int, height: int, factor: int, levels: int = 3, mpp: float = BASE_MPP) -> CodedSlide:
    """Write a coordinate-coded pyramid."""
    pyramid = [coded_pixels(width, height)]
    while len(pyramid) < levels:
        pyramid.append(halved(pyramid[-1], factor))
    write_levels(path, pyramid, mpp, factor)
    return CodedSlide(path, pyramid, factor, mpp, 20.0, (200 / width, 200 / height))


@pytest.fixture(scope="session")
def coding() -> SimpleNamespace:
    """The functions of this file that draw and write slides."""
    return SimpleNamespace(write_levels=write_levels, coded_pixels=coded_pixels, write_coded=write_coded, halved=halved)


CODED = {"even-2x": (512, 384, 2), "even-4x": (768, 512, 4), "odd-2x": (1483, 997, 2), "odd-4x": (1483, 997, 4)}


@pytest.fixture(scope="session")
def coded_slides(tmp_path_factory: pytest.TempPathFactory) -> dict[str, CodedSlide]:
    """Coded slides by name: 2x and 4x, even sizes and odd ones whose levels are rounded down."""
    folder = tmp_path_factory.mktemp("coded")
    return {name: write_coded(folder / f"{name}.tif", *size) for name, size in CODED.items()}


_CALL = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("of_a_test", file)
module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
getattr(module, name)(*arguments)
"""


@pytest.fixture(scope="session")
def run_apart() -> Callable[..., list[int | None]]:
    """`run_apart(function, *arguments)`: calls a test module's function in as many processes at once as there are
    argument tuples; their exit codes.

    Forked from a server that has imported torch and MONAI, which takes 15 s, and run nothing: OpenMP's threads do not
    survive a fork, and a child of this process would wait for them for ever.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch.nn.parallel.distributed", "monai.engines", "monai.handlers", "timm"])

    def run(function: Callable[..., None], *each: tuple[Any, ...], limit_s: float = 600) -> list[int | None]:
        file, name = function.__code__.co_filename, function.__name__
        processes = [
            context.Process(target=exec, args=(_CALL, {"file": file, "name": name, "arguments": arguments}))
            for arguments in each
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(limit_s)
            process.kill()
            process.join()
        return [process.exitcode for process in processes]

    return run


@pytest.fixture
def quick_tiling(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small pictures of slides that are tiled in the test, and no child processes."""
    from medsd.cohort import making, tile_picture
    from medsd.slides.slide import open_slide

    monkeypatch.setattr(tile_picture, "_LONGEST_PX", 64)
    monkeypatch.setattr(making, "IsolatedSlide", open_slide)


@pytest.fixture(scope="session")
def phantoms(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of six small phantom slides: two of each class for training, one of each for testing. Do not write."""
    return write_phantom_dataset(tmp_path_factory.mktemp("phantoms") / "data", slides=6, size_px=1024)
