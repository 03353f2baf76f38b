"""What an installation has, what it lacks, and the fix."""

from __future__ import annotations

import importlib
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path

from packaging.requirements import Requirement

import medsd

_LEAST_FREE_GB = 5


@dataclass(frozen=True)
class Finding:
    """One thing looked at: its name, whether it is well, and what was found or how to mend it."""

    subject: str
    ok: bool
    text: str


def examine() -> list[Finding]:
    """Everything that a run needs: Python, packages, the slide library, codecs, devices, disk."""
    return [
        Finding("medsd", True, f"{medsd.__version__} at {Path(medsd.__file__).parent}"),
        _python(),
        *_packages(),
        _openslide(),
        _codecs(),
        *_devices(),
        _opencv(),
        _disk(),
    ]


def _python() -> Finding:
    found = ".".join(map(str, sys.version_info[:3]))
    well = (3, 11) <= sys.version_info[:2] < (3, 13)
    return Finding(
        "python", well, found if well else f"{found}; medsd needs 3.11 or 3.12, make .venv with one of these"
    )


def _packages() -> Iterator[Finding]:
    try:
        lines = requires("medsd") or []
    except PackageNotFoundError:
        yield Finding("medsd package", False, "not installed; run ./scripts/setup")
        return
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            found = version(requirement.name)
        except PackageNotFoundError:
            yield Finding(requirement.name, False, "not installed; run ./scripts/setup")
            continue
        well = requirement.specifier.contains(found, prereleases=True)
        yield Finding(
            requirement.name, well, found if well else f"{found}, needs {requirement.specifier}; ./scripts/setup"
        )


def _openslide() -> Finding:
    try:
        openslide = importlib.import_module("openslide")
    except (ImportError, OSError) as error:
        return Finding(
            "openslide library", False, f"{error}; pip install openslide-bin, or your system's libopenslide0"
        )
    return Finding("openslide library", True, openslide.__library_version__)


def _codecs() -> Finding:
    try:
        imagecodecs = importlib.import_module("imagecodecs")
    except ImportError as error:
        return Finding("image codecs", False, f"{error}; run ./scripts/setup")
    missing = [
        name for name in ("JPEG8", "JPEG2K", "DEFLATE", "LZW", "ZSTD") if not getattr(imagecodecs, name).available
    ]
    text = f"without {', '.join(missing)}; reinstall imagecodecs" if missing else "JPEG, JPEG 2000, deflate, LZW, zstd"
    return Finding("image codecs", not missing, text)


def _devices() -> Iterator[Finding]:
    try:
        torch = importlib.import_module("torch")
    except (ImportError, OSError) as error:
        yield Finding("cpu", False, f"{error}; run ./scripts/setup")
        return
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
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    versions = {entry.split()[1] for entry in found}
    if len(versions) > 1:
        return Finding("opencv", False, f"{' and '.join(found)} share a folder; pip uninstall one, reinstall the other")
    return Finding("opencv", True, ", ".join(found) or "not installed (only tiatoolbox needs it)")


def _disk() -> Finding:
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    well = free_gb >= _LEAST_FREE_GB
    return Finding(
        "disk here", well, f"{free_gb:.0f} GB free" if well else f"{free_gb:.1f} GB free; make room for outputs"
    )
