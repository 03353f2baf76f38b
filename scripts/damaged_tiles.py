#!/usr/bin/env python
"""One damaged tile of a slide, as several readers show it: is what is lost said to be lost?

pip install "medsd[readers]"
python scripts/damaged_tiles.py

A tiled pyramidal TIFF of a phantom slide, JPEG inside; one tile of level 0 is damaged in one way, and level 0 is read
by each reader as a whole, in a child process with limits. Readers that are not installed are left out.
"""

from __future__ import annotations

import io
import tempfile
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import tifffile
from hostile.child import in_child

from medsd.errors import MedsdError
from medsd.phantom.files import write_pyramid
from medsd.phantom.slides import PhantomSpec, draw_phantom
from medsd.slides.slide import open_slide

_SIDE_PX, _TILE_PX, _MPP = 1024, 256, 0.5
_CPU_S = 30
# Damage changes colours by more, and on more than a block.
_APART, _SHARE = 12, 0.001

Read = Callable[[Path], tuple[np.ndarray, np.ndarray | None]]


def damages(good: bytes) -> dict[str, bytes]:
    """The file with its sixth tile, and once its header, damaged in each way."""
    with tifffile.TiffFile(io.BytesIO(good)) as file:
        page = file.pages[0].aspage()
        start, count = page.dataoffsets[5], page.databytecounts[5]
        tables = [page.tags[name].valueoffset + 5 * 4 for name in ("TileOffsets", "TileByteCounts")]
        assert all(int(page.tags[name].dtype) == 4 for name in ("TileOffsets", "TileByteCounts"))
    end = start + count
    noise = np.random.default_rng(0).bytes(count)
    return {
        "its second half is zeros": good[: start + count // 2] + bytes(count - count // 2) + good[end:],
        "all of it is zeros": good[:start] + bytes(count) + good[end:],
        "all of it is noise": good[:start] + noise + good[end:],
        "its length is halved": _with(good, tables[1], count // 2),
        "its length is 0": _with(good, tables[1], 0),
        "its place is beyond the file": _with(good, tables[0], 2**31),
        "the file ends in it": good[: start + count // 2],
        "no tile, but the header is noise": noise[:4096] + good[4096:],
    }


def _with(good: bytes, where: int, value: int) -> bytes:
    return good[:where] + value.to_bytes(4, "little") + good[where + 4 :]


def medsd_reads(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """By medsd."""
    with open_slide(path, mpp=_MPP) as slide:
        return slide.read_seen(0, 0, _SIDE_PX, _SIDE_PX)


def openslide_reads(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """By OpenSlide."""
    from openslide import OpenSlide

    with OpenSlide(path) as slide:
        return _by_alpha(np.asarray(slide.read_region((0, 0), 0, (_SIDE_PX, _SIDE_PX))))


def _by_alpha(pixels: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Transparency is a word, though glass that was left out is transparent, too."""
    return pixels[..., :3], pixels[..., 3] > 0 if pixels.shape[2] == 4 and pixels[..., 3].min() == 0 else None


def tiffslide_reads(path: Path) -> tuple[np.ndarray, np.ndarray | None]:
    """By tiffslide."""
    from tiffslide import TiffSlide

    with TiffSlide(path) as slide:
        return _by_alpha(np.asarray(slide.read_region((0, 0), 0, (_SIDE_PX, _SIDE_PX))))


def fastslide_reads(path: Path) -> tuple[np.ndarray, None]:
    """By fastslide."""
    from fastslide import FastSlide

    with FastSlide.from_file_path(str(path)) as slide:
        return np.asarray(slide.read_region((0, 0), 0, (_SIDE_PX, _SIDE_PX)).numpy())[..., :3], None


def cucim_reads(path: Path) -> tuple[np.ndarray, None]:
    """By cuCIM, on the CPU."""
    from cucim import CuImage

    return np.asarray(CuImage(str(path)).read_region((0, 0), (_SIDE_PX, _SIDE_PX), 0))[..., :3], None


READERS: dict[str, tuple[str, Read]] = {
    "medsd": ("medsd", medsd_reads),
    "OpenSlide": ("openslide", openslide_reads),
    "tiffslide": ("tiffslide", tiffslide_reads),
    "fastslide": ("fastslide", fastslide_reads),
    "cuCIM": ("cucim", cucim_reads),
}


def outcome(read: Read, good: Path, path: Path) -> tuple[str, str]:
    """What a reader makes of a file, in a word or two, beside what it makes of the undamaged one."""
    truth = read(good)[0]
    try:
        pixels, seen = read(path)
    except MedsdError as error:
        return "refused, with the file's name", str(error)
    except Exception as error:  # noqa: BLE001 - whatever it is, it says that the file was not read
        return "error", f"{type(error).__name__}: {error}"
    if pixels.shape != truth.shape:
        return "**another picture**", f"{pixels.shape}"
    apart = np.abs(pixels.astype(np.int16) - truth).max(axis=2) > _APART
    if seen is not None:
        lost = f"{(~seen).sum() / _TILE_PX**2:.0f} tile" + "s" * (round((~seen).sum() / _TILE_PX**2) != 1)
        word = "marked as lost" if read is medsd_reads else "transparent"
        return (f"{lost} {word}" if (apart & seen).mean() <= _SHARE else "**wrong**"), ""
    if apart.mean() <= _SHARE:
        return "right", ""
    share, colour = apart.mean() * (_SIDE_PX / _TILE_PX) ** 2, pixels[apart].mean()
    return f"**wrong, without a word** ({share:.2g} tiles, mean grey {colour:.0f})", ""


def main() -> None:
    """Print the table."""
    readers = {name: read for name, (module, read) in READERS.items() if find_spec(module) is not None}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "slide.tif"
        good = path.with_name("good.tif")
        write_pyramid(good, draw_phantom(PhantomSpec(seed=1, tumour=True, size_px=_SIDE_PX)).image, _MPP, 2)
        print(f"| the tile | {' | '.join(readers)} |\n|---|" + "---|" * len(readers))
        for name, data in damages(good.read_bytes()).items():
            path.write_bytes(data)
            found = [in_child(lambda _, read=read: outcome(read, good, path), _CPU_S) for read in readers.values()]
            print(f"| {name} | {' | '.join(one.outcome for one in found)} |", flush=True)


if __name__ == "__main__":
    main()
