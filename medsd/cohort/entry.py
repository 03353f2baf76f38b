"""One slide of a cohort, and the names that outputs are kept by."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from medsd.errors import DatasetError


@dataclass(frozen=True)
class SlideEntry:
    """One slide of a data set.

    Attributes:
        name: what its outputs are kept by.
        path: its file.
        label: 1 tumour, 0 normal, None where nobody says.
        part: "training" or "testing"; empty where the data set has no parts.
        annotation: the file of its outlines, if any.
        mpp: micrometres per level-0 pixel, where the file's own is missing or wrong.
        exhaustive: whether the annotation outlines all tumour; where it does not, tissue outside it has no label.
    """

    name: str
    path: Path
    label: int | None = None
    part: str = ""
    annotation: Path | None = None
    mpp: float | None = None
    exhaustive: bool = True


def check_names(slides: Iterable[SlideEntry]) -> None:
    """Raise DatasetError where two slides have one name, or names that some file systems take for one ("a", "A")."""
    paths: dict[str, Path] = {}
    for slide in slides:
        key = slide.name.casefold()
        if key in paths:
            raise DatasetError(f"{slide.path}: a slide of this name is also at {paths[key]}; rename one")
        paths[key] = slide.path
