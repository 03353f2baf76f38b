"""Provenance of a slide's outputs, and whether they are still what a run would make."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import medsd
from medsd.files import sha256_of, write_json

RECORD = "record.json"
_PACKAGES = ("torch", "monai", "timm", "numpy", "openslide-python", "tifffile", "scikit-image")


@dataclass(frozen=True)
class Recipe:
    """What a slide's maps follow from: the same recipe on the same file gives the same outputs.

    Attributes:
        weights_sha256: of the classifier's tensors and card.
        calibration: threshold, scale, layer, attribution, smoothing as in the weights.
        mpp_override: the caller's micrometres per level-0 pixel, or None.
        medsd: version that made them.
    """

    weights_sha256: str
    calibration: dict[str, Any]
    mpp_override: float | None
    medsd: str = medsd.__version__


def is_complete(folder: Path, slide: Path, recipe: Recipe) -> bool:
    """Whether `folder` holds finished outputs of this very file made by this recipe, with every file there.

    The slide is compared by size and time of change, not by its hash: gigabytes are not read to find nothing to do.
    """
    path = folder / RECORD
    if not path.is_file():
        return False
    try:
        record = json.loads(path.read_text("utf-8"))
        status = slide.stat()
        return bool(
            record["recipe"] == json.loads(json.dumps(vars(recipe)))
            and record["slide"]["size_bytes"] == status.st_size
            and record["slide"]["modified_ns"] == status.st_mtime_ns
            and all((folder / name).is_file() for name in record["files"])
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False  # no such slide any more, or a record of another version: trying tells


def write_record(
    folder: Path, slide: Path, recipe: Recipe, status: str, files: list[str], content: dict[str, Any]
) -> None:
    """Write `record.json`, the last file of a slide: its presence says that the others are whole."""
    file = slide.stat()
    record = {
        "status": status,
        "slide": {
            "name": slide.name,
            "size_bytes": file.st_size,
            "modified_ns": file.st_mtime_ns,
            "sha256": sha256_of(slide),
        },
        "recipe": vars(recipe),
        **content,
        "files": files,
        "versions": {package: version(package) for package in _PACKAGES},
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
        "intended_use": "research use only",
    }
    write_json(folder / RECORD, record)


def read_record(folder: Path) -> dict[str, Any]:
    """The record of a finished slide."""
    record: dict[str, Any] = json.loads((folder / RECORD).read_text("utf-8"))
    return record
