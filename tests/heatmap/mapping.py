"""Slides mapped as a cohort, in this process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from medsd.cohort.entry import SlideEntry
from medsd.heatmap.cohort import map_slides
from medsd.heatmap.model import MapRequest
from medsd.heatmap.report import SlideResult


def job_of(path: Path, mpp: float | None = None) -> SlideEntry:
    return SlideEntry(path.stem, path, mpp=mpp)


def map_here(slides: list[Path], weights: Path, output: Path, **asked: Any) -> list[SlideResult]:
    """Map slides without a process for each."""
    return map_slides([job_of(path) for path in slides], weights, output, MapRequest(**asked), isolate=False)
