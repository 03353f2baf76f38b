#!/usr/bin/env python3
"""Tiles per second of medsd's reader against its peers, on the same files in one run.

    python scripts/bench_read.py DATA [--rounds 7] [--phantom-px 16384]

DATA holds CMU-1-Small-Region.svs and derived/cmu1-region-pyramid-jpeg.tif. Every round runs every reader over the
tissue grid of every slide, each with a newly opened slide (nothing cached but the operating system's pages; opening is
not counted), in turn, so that a busy machine hits all alike. Printed are medians of the rounds' ratios with their
range.
"""

from __future__ import annotations

import argparse
import logging
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import numpy.typing as npt
import openslide

from medsd.phantom import PhantomSpec, write_phantom
from medsd.slides.readers.choose import open_reader
from medsd.slides.readers.tiff import TiledTiff
from medsd.slides.reading import read_tiles
from medsd.slides.slide import open_slide
from medsd.slides.tissue import find_tissue

Ints = npt.NDArray[np.int64]
Work = Callable[[], None]
Reader = Callable[[Path, Ints, Ints, int], Work]
"""Opens a slide, and gives what reads all tiles of `side` px whose top left corners (level-0 px) are given."""

MEMORY_TILES = 10_000


def medsd(threads: int) -> Reader:
    def opened(path: Path, x: Ints, y: Ints, side: int) -> Work:
        slide = open_slide(path)
        return lambda: exhaust(read_tiles(slide, x, y, side, threads=threads))

    return opened


def medsd_one_by_one(path: Path, x: Ints, y: Ints, side: int) -> Work:
    slide = open_slide(path)
    return lambda: exhaust(slide.read(*place, side, side) for place in places(x, y))


def plain_openslide(path: Path, x: Ints, y: Ints, side: int) -> Work:
    slide = openslide.OpenSlide(path)
    return lambda: exhaust(
        np.asarray(slide.read_region(place, 0, (side, side)).convert("RGB")) for place in places(x, y)
    )


def tiatoolbox(path: Path, x: Ints, y: Ints, side: int) -> Work:
    from tiatoolbox.wsicore.wsireader import WSIReader

    slide = WSIReader.open(path)
    return lambda: exhaust(slide.read_rect(place, (side, side), resolution=0, units="level") for place in places(x, y))


def monai(path: Path, x: Ints, y: Ints, side: int) -> Work:
    from monai.data import WSIReader

    reader = WSIReader("openslide")
    slide = reader.read(path)
    return lambda: exhaust(reader.get_data(slide, (top, left), (side, side), level=0) for left, top in places(x, y))


def medsd_between(path: Path, x: Ints, y: Ints, side: int, factor: float) -> Iterator[npt.NDArray[np.uint8]]:
    slide = open_slide(path)
    yield from (slide.read(*place, side, side, slide.mpp * factor) for place in places(x, y))


def tiatoolbox_between(path: Path, x: Ints, y: Ints, side: int, factor: float) -> Iterator[npt.NDArray[np.uint8]]:
    from tiatoolbox.wsicore.wsireader import WSIReader

    mpp = open_slide(path).mpp
    slide = WSIReader.open(path, mpp=(mpp, mpp))
    yield from (
        slide.read_rect(place, (side, side), resolution=mpp * factor, units="mpp", coord_space="baseline")
        for place in places(x, y)
    )


def places(x: Ints, y: Ints) -> list[tuple[int, int]]:
    return list(zip(x.tolist(), y.tolist(), strict=True))


def exhaust(results: Iterable[object]) -> None:
    """Let every result go at once, as a consumer of tiles does."""
    for _ in results:
        pass


def grid(path: Path, side: int, stride: int, offset: tuple[int, int]) -> tuple[Ints, Ints]:
    """Places of the tiles, at least half tissue, that start at `offset` and lie inside the slide; row by row."""
    with open_slide(path) as slide:
        width, height = slide.dimensions
        x, y = np.meshgrid(
            np.arange(offset[0], width - side + 1, stride), np.arange(offset[1], height - side + 1, stride)
        )
        x, y = x.ravel(), y.ravel()
        kept = find_tissue(slide).share(x, y, side) >= 0.5
    return x[kept], y[kept]


def seconds(works: Iterable[Work]) -> float:
    """Time of the works together; what making each takes (opening a slide) does not count."""
    taken = 0.0
    for work in works:
        started = time.perf_counter()
        work()
        taken += time.perf_counter() - started
    return taken


def row(name: str, values: list[float], target: float | None, unit: str = "x") -> None:
    middle = statistics.median(values)
    wanted = "" if target is None else f"   target {target:g}{unit}: {'met' if middle >= target else 'MISSED'}"
    print(f"    {name:<34} {middle:8.2f}{unit}   ({min(values):.2f} to {max(values):.2f}){wanted}")


def compare(path: Path, side: int, offset: tuple[int, int], rounds: int, targets: dict[str, float | None]) -> None:
    x, y = grid(path, side, side, offset)
    readers: dict[str, Reader] = {
        "medsd, 1 thread": medsd_one_by_one,
        "medsd, read_tiles, 1 thread": medsd(1),
        "medsd, read_tiles, 2 threads": medsd(2),
        "openslide": plain_openslide,
        "tiatoolbox": tiatoolbox,
        "monai": monai,
    }
    repeats = max(1, 150 // len(x))  # a measurement takes a few hundredths of a second at least
    for reader in readers.values():
        reader(path, x, y, side)()
    times: dict[str, list[float]] = {name: [] for name in readers}
    for _ in range(rounds):
        for name, reader in readers.items():
            times[name].append(seconds(reader(path, x, y, side) for _ in range(repeats)) / repeats)
    print(f"\n{path.name}: {len(x)} tiles of {side} px from {offset}")
    for name, taken in times.items():
        row(f"{name}, tiles/s", [len(x) / one for one in taken], None, "")
    ours = times["medsd, 1 thread"]
    for name in ("openslide", "tiatoolbox", "monai"):
        row(f"against {name}", [a / b for a, b in zip(times[name], ours, strict=True)], targets.get(name))
    row(
        "2 threads against 1",
        [a / b for a, b in zip(ours, times["medsd, read_tiles, 2 threads"], strict=True)],
        targets.get("threads"),
    )


def decoding_alone(path: Path, rounds: int) -> None:
    """How much two threads gain where nothing is done but decoding JPEG: what the machine allows."""
    reader = open_reader(path)
    assert isinstance(reader, TiledTiff)
    level = reader.levels[0]
    with open(path, "rb") as handle:
        stored = []
        for number in np.flatnonzero(level.counts)[:800]:
            handle.seek(level.offsets[number])
            stored.append(handle.read(level.counts[number]))

    def decode(part: list[bytes]) -> None:
        pixels = np.empty((level.codec.height, level.codec.width, 3), np.uint8)
        for data in part:
            level.codec.decode(data, pixels)

    def both() -> None:
        threads = [threading.Thread(target=decode, args=(stored[start::2],)) for start in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    print(f"\n{path.name}: the decoder alone, {len(stored)} of the file's tiles")
    row("2 threads against 1", [seconds([lambda: decode(stored)]) / seconds([both]) for _ in range(rounds)], None)


def compare_between(path: Path, factor: float, rounds: int, target: float) -> None:
    side = 224
    reach = int(side * factor) + 1
    x, y = grid(path, reach, reach, (17, 29))
    readers = [medsd_between, tiatoolbox_between]
    times: list[list[float]] = [[], []]
    for _ in range(rounds + 1):
        for taken, reader in zip(times, readers, strict=True):
            tiles = reader(path, x, y, side, factor)
            next(tiles)  # opens the slide
            taken.append(seconds([lambda tiles=tiles: exhaust(tiles)]))  # type: ignore[misc]
    ratios = [theirs / ours for ours, theirs in zip(*times, strict=True)][1:]
    pairs = zip(medsd_between(path, x, y, side, factor), tiatoolbox_between(path, x, y, side, factor), strict=True)
    difference = float(np.mean([np.abs(a.astype(int) - b).mean() for a, b in pairs]))
    print(f"\n{path.name}: {len(x)} tiles of {side} px at {factor:g} times the mpp of level 0")
    row("against tiatoolbox", ratios, target)
    print(f"    mean absolute difference of pixels {difference:8.2f} grey levels")


def memory(path: Path) -> None:
    """Resident memory as tiles go by; it grows until the cache of decoded tiles is full (128 MiB)."""
    x, y = grid(path, 256, 100, (7, 3))
    chosen = np.resize(np.arange(len(x)), MEMORY_TILES)
    print(f"\n{path.name}: resident memory over {MEMORY_TILES:,} tiles")
    with open_slide(path) as slide:
        for number, place in enumerate(chosen, start=1):
            slide.read(int(x[place]), int(y[place]), 256, 256)
            if number in (1_000, MEMORY_TILES // 2, MEMORY_TILES):
                print(f"    after {number:>6,} tiles {resident_mib():8.1f} MiB, {threading.active_count()} thread(s)")


def resident_mib() -> float:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, help="folder with CMU-1-Small-Region.svs and derived/")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--phantom-px", type=int, default=16384, help="side of the phantom; 0 leaves it out")
    parser.add_argument("--phantom", type=Path, help="where the phantom is kept; drawn if it is not there")
    asked = parser.parse_args()
    svs, pyramid = asked.data / "CMU-1-Small-Region.svs", asked.data / "derived" / "cmu1-region-pyramid-jpeg.tif"
    everywhere: dict[str, float | None] = {"tiatoolbox": 3.5, "monai": 5.0, "threads": 1.7}
    logging.getLogger("tiatoolbox").setLevel(logging.ERROR)  # it warns of every missing mpp
    with tempfile.TemporaryDirectory() as folder:
        files = [(pyramid, 4.0, 3.0), (svs, 3.0, 2.5)]
        if asked.phantom_px:
            phantom = asked.phantom or Path(folder) / f"phantom-{asked.phantom_px}.tif"
            if not phantom.exists():
                write_phantom(PhantomSpec(seed=0, tumour=True, size_px=asked.phantom_px), phantom)
            files.append((phantom, 4.0, 3.0))
        for path, aligned, unaligned in files:
            compare(path, 256, (0, 0), asked.rounds, {**everywhere, "openslide": aligned})
            compare(path, 224, (17, 29), asked.rounds, {**everywhere, "openslide": unaligned})
        for path, _, _ in files:
            compare_between(path, 1.5, asked.rounds, 3.0)
        decoding_alone(files[-1][0], asked.rounds)
        memory(files[-1][0])


if __name__ == "__main__":
    main()
