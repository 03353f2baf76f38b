"""What an installation has, what it lacks, and the fix."""

from __future__ import annotations

import importlib
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

import medsd

_LEAST_FREE_GB = 5
# Docker gives 64 MB; a worker hands over a batch at a time.
_LEAST_SHARED_GB = 1
_SHARED = Path("/dev/shm")
_SETUP = "run ./scripts/setup"


@dataclass(frozen=True)
class Finding:
    """One thing looked at: its name, whether it is well, and what was found or how to mend it."""

    subject: str
    ok: bool
    text: str


def examine(out: Path | None = None) -> list[Finding]:
    """Everything that a run needs: Python, packages, system libraries, codecs, devices, memory, disk.

    Args:
        out: where outputs shall go; None for the working directory.
    """
    here = Finding("medsd", True, f"{medsd.__version__} at {Path(medsd.__file__).parent}")
    return [here, _python(), *_packages(), *_libraries(), _opencv(), *_shared_memory(), *_disk(out or Path.cwd())]


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    well = (3, 11) <= sys.version_info[:2] < (3, 13)
    return Finding("python", well, found + ("" if well else "; medsd needs 3.11 or 3.12, make .venv with one of these"))


def _packages() -> Iterator[Finding]:
    try:
        lines = requires("medsd") or []
    except PackageNotFoundError:
        yield Finding("medsd package", False, f"not installed; {_SETUP}")
        return
    for requirement in map(Requirement, lines):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Finding(requirement.name, False, f"not installed; {_SETUP}")
            continue
        well = requirement.specifier.contains(found, prereleases=True)
        yield Finding(requirement.name, well, found if well else f"{found}, needs {requirement.specifier}; {_SETUP}")


def _libraries() -> Iterator[Finding]:
    """What may fail to load although its package is installed."""
    for name, subject, examined, fix in (
        ("openslide", "openslide library", _openslide, "pip install openslide-bin, or your system's libopenslide0"),
        ("imagecodecs", "image codecs", _codecs, _SETUP),
        ("torch", "cpu", _devices, _SETUP),
        ("cv2", "libGL", _nothing_more, "apt-get install libgl1 (or your system's libGL), or opencv-python-headless"),
        ("glymur", "OpenJPEG", _openjpeg, _SETUP),
    ):
        try:
            library = importlib.import_module(name)
        except (ImportError, OSError) as error:
            yield Finding(subject, False, f"{error}; {fix}")
        else:
            yield from examined(library)


def _openslide(openslide: Any) -> Iterator[Finding]:
    yield Finding("openslide library", True, openslide.__library_version__)


def _codecs(imagecodecs: Any) -> Iterator[Finding]:
    missing = [
        name for name in ("JPEG8", "JPEG2K", "DEFLATE", "LZW", "ZSTD") if not getattr(imagecodecs, name).available
    ]
    text = f"without {', '.join(missing)}; reinstall imagecodecs" if missing else "JPEG, JPEG 2000, deflate, LZW, zstd"
    yield Finding("image codecs", not missing, text)


def _nothing_more(_library: Any) -> Iterator[Finding]:
    """That it can be imported was the question."""
    yield Finding("libGL", True, "found, or not needed")


def _openjpeg(glymur: Any) -> Iterator[Finding]:
    found = glymur.version.openjpeg_version
    if found == "0.0.0":
        found = "not found, so files that are plain JPEG 2000 (.jp2) cannot be read; apt-get install libopenjp2-7"
    yield Finding("OpenJPEG", True, found)


def _devices(torch: Any) -> Iterator[Finding]:
    yield Finding("cpu", True, f"{torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        if not any(Path("/dev").glob("nvidia[0-9]*")):
            yield Finding("gpu", True, "none found; everything runs on the CPU")
        elif torch.version.cuda is None:
            yield Finding("gpu", False, f"there is one, but torch {torch.__version__} is for CPUs; {_SETUP}")
        else:
            yield Finding(
                "gpu", False, f"there is one, but its driver is too old for CUDA {torch.version.cuda}; renew it"
            )
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        yield Finding(f"gpu {number}", True, f"{device.name}, {device.total_memory / 2**30:.0f} GiB")


def _opencv() -> Finding:
    """Two OpenCV wheels share one folder: the one installed last overwrites the other's files."""
    found = []
    for name in ("opencv-python", "opencv-python-headless", "opencv-contrib-python", "opencv-contrib-python-headless"):
        with suppress(PackageNotFoundError):
            found.append(f"{name} {version(name)}")
    if len({entry.split()[1] for entry in found}) > 1:
        return Finding("opencv", False, f"{' and '.join(found)} share a folder; pip uninstall one, reinstall the other")
    return Finding("opencv", bool(found), ", ".join(found) or f"not installed; {_SETUP}")


def _shared_memory() -> Iterator[Finding]:
    if not _SHARED.is_dir():  # no Linux
        return
    size_gb = shutil.disk_usage(_SHARED).total / 1e9
    well = size_gb >= _LEAST_SHARED_GB
    fix = "" if well else "; workers would be killed: docker run --shm-size 2g, or --workers 0"
    yield Finding("shared memory", well, f"{size_gb:.2g} GB{fix}")


def _disk(out: Path) -> Iterator[Finding]:
    if out.is_symlink() and not out.exists():
        yield Finding("outputs", False, f"{out} is a link to nothing; name a folder")
        return
    place = next(folder for folder in (out.absolute(), *out.absolute().parents) if folder.exists())
    if not place.is_dir():
        yield Finding("outputs", False, f"{place} is a file; name a folder")
        return
    try:
        with tempfile.TemporaryFile(dir=place):
            pass
    except OSError as error:
        yield Finding("outputs", False, f"{place}: cannot be written to ({error.strerror}); choose another folder")
        return
    free_gb = shutil.disk_usage(place).free / 1e9
    well = free_gb >= _LEAST_FREE_GB
    yield Finding("outputs", well, f"{place}: {free_gb:.1f} GB free" + ("" if well else "; make room for outputs"))
