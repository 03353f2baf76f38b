"""What an installation has, what it lacks, and the fix."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement

import medsd

_LEAST_FREE_GB = 5
_SETUP = "run ./scripts/setup"


@dataclass(frozen=True)
class Finding:
    """One thing looked at: its name, whether it is well, and what was found or how to mend it."""

    subject: str
    ok: bool
    text: str


def examine() -> list[Finding]:
    """Everything that a run needs: Python, packages, the slide library, codecs, devices, disk."""
    here = Finding("medsd", True, f"{medsd.__version__} at {Path(medsd.__file__).parent}")
    return [here, _python(), *_packages(), *_libraries(), _opencv(), _disk()]


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


def _devices(torch: Any) -> Iterator[Finding]:
    yield Finding("cpu", True, f"{torch.get_num_threads()} threads")
    if not torch.cuda.is_available():
        yield Finding("gpu", True, "none found; everything runs on the CPU")
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


def _disk() -> Finding:
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    well = free_gb >= _LEAST_FREE_GB
    return Finding("disk here", well, f"{free_gb:.1f} GB free" + ("" if well else "; make room for outputs"))
