"""Pictures and masks from disk: each is read whole, or refused in one line."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

import numpy as np
from PIL import PngImagePlugin, WebPImagePlugin

from medsd.cohort.patches import SUFFIXES
from medsd.errors import DatasetError, SlideError
from medsd.slides.readers.base import RGB, Bools, check_file
from medsd.slides.readers.choose import open_reader
from medsd.slides.readers.vendor import is_unknown, on_white

# The maps of a larger one do not fit a usual memory, and slides have an engine of their own.
_MOST_PX = 4096 * 4096
_GREY = ("1", "L", "P", "I;16", "I;16B")


def find_images(places: Sequence[Path], leave_out: Sequence[Path] = ()) -> list[Path]:
    """The pictures at `places`, each once: files as given, folders searched at any depth in the order of names.

    Hidden files and folders, whose name begins with a dot, are passed over.

    Args:
        places: files and folders; a file that is missing is told when it is read.
        leave_out: folders within them that are not searched, such as the one that results are written to.

    Raises:
        DatasetError: there is no picture, or one lies in a folder that is to be left out.
    """
    left_out = [_real(folder) for folder in leave_out]
    found: dict[Path, Path] = {}
    for place in places:
        folder = place if place.is_dir() else place.parent
        if _real(folder) in left_out:
            raise DatasetError(f"{folder}: holds the images, so no results or masks; choose another folder for those")
        inside = [folder for folder in left_out if folder.is_relative_to(_real(place))]
        for path in sorted(place.rglob("*")) if place.is_dir() else [place]:
            hidden = any(part.startswith(".") for part in path.relative_to(place).parts)
            wanted = path == place or path.suffix.lower() in SUFFIXES
            if wanted and not hidden and not any(_real(path).is_relative_to(folder) for folder in inside):
                found.setdefault(_real(path), path)
    if not found:
        where = ", ".join(map(str, places)) or "nothing given"
        raise DatasetError(f"{where}: no images; give files or folders of {', '.join(SUFFIXES)}")
    return list(found.values())


def _real(path: Path) -> Path:
    """Where a path leads; a link that leads to itself is where it is, and is told of when it is read."""
    return Path(os.path.realpath(path))


def image_names(paths: Sequence[Path]) -> list[str]:
    """A name a file for tables: that of the file, with its folders where two files share it.

    Bytes that are no UTF-8 are written as escapes.
    """
    counts = Counter(path.name for path in paths)
    names = [path.as_posix() if counts[path.name] > 1 else path.name for path in paths]
    return [name.encode("utf-8", "backslashreplace").decode() for name in names]


def read_image(path: Path, smallest_px: int = 1) -> RGB:
    """Pixels (height, width, 3) uint8, upright, transparency on white, read by the readers of slides; and WebP.

    Args:
        path: PNG, JPEG, WebP, TIFF of 8 bits a colour, and whatever else `medsd.slides.readers` opens.
        smallest_px: the least side that the network takes.

    Raises:
        SlideError: no such file, not a picture, damaged, or not 8 bits a colour.
        DatasetError: smaller than `smallest_px`, or too large to be explained in one piece.
    """
    check_file(path)
    with open(path, "rb") as handle:
        start = handle.read(12)
    if start[:4] == b"RIFF" and start[8:] == b"WEBP":
        return _read_webp(path, smallest_px)
    try:
        opened = open_reader(path)
    except SlideError as error:
        if not is_unknown(error):
            raise
        words = "not a picture of a known format (PNG, JPEG, WebP, TIFF); copy it again, or save it as PNG"
        raise SlideError(f"{path}: {words}") from error
    with closing(opened) as reader:
        width, height = reader.sizes[0]
        _check_size(path, width, height, smallest_px)
        return reader.read(0, 0, 0, width, height)


def read_png_mask(path: Path, height: int, width: int) -> Bools:
    """A mask (height, width): True where a grey or palette PNG is not 0.

    Raises:
        DatasetError: no PNG, damaged, in colour, or of another size.
    """
    with _decoded(path, "a PNG mask", "write it again"), PngImagePlugin.PngImageFile(path) as image:
        if image.size != (width, height):
            raise DatasetError(
                f"{path}: {image.width} x {image.height} px, its image {width} x {height}; draw it at that size"
            )
        if image.mode not in _GREY:
            raise DatasetError(f"{path}: a mask in colour ({image.mode}); save it as a grey PNG, 0 is background")
        return np.asarray(np.asarray(image) != 0)


def _read_webp(path: Path, smallest_px: int) -> RGB:
    with _decoded(path, "WebP", "copy it again"), open(path, "rb") as handle:
        image = WebPImagePlugin.WebPImageFile(handle)
        _check_size(path, image.width, image.height, smallest_px)
        if image.is_animated:
            raise DatasetError(f"{path}: has several pictures; save the one that is meant as a file of its own")
        return on_white(image)


@contextmanager
def _decoded(path: Path, kind: str, fix: str) -> Iterator[None]:
    try:
        yield
    # What Pillow's decoders raise for damaged bytes.
    except (OSError, SyntaxError, ValueError, EOFError, RuntimeError) as error:
        raise DatasetError(f"{path}: cannot be read as {kind} ({error}); {fix}") from error


def _check_size(path: Path, width: int, height: int, smallest_px: int) -> None:
    if min(width, height) < smallest_px:
        raise DatasetError(f"{path}: {width} x {height} px; the network takes images from {smallest_px} px a side")
    if width * height > _MOST_PX:
        raise DatasetError(
            f"{path}: {width} x {height} px are too many to explain in one piece; cut it, or map slides with "
            "'medsd heatmap'"
        )
