"""Folders laid out like CAMELYON16.

training/normal/*.tif   training/tumor/*.tif   training/lesion_annotations/*.xml
testing/images/*.tif    testing/lesion_annotations/*.xml   testing/reference.csv
"""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from medsd.errors import DatasetError

HEADERS = ("slide", "image", "name")
LABELS = {"normal": 0, "tumor": 1, "tumour": 1}


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
    """

    name: str
    path: Path
    label: int | None
    part: str
    annotation: Path | None
    mpp: float | None = None


def find_slides(folder: str | Path) -> list[SlideEntry]:
    """All slides of a CAMELYON16-like folder, sorted by part and name.

    Raises:
        DatasetError: no such folder, an empty part, a tumour slide for training without annotation, a test
            slide that `reference.csv` does not name, or two slides of one name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder; set dataset_dir to a CAMELYON16-like folder")
    training = [
        SlideEntry(path.stem, path, label, "training", _annotation(folder / "training", path, label))
        for kind, label in (("normal", 0), ("tumor", 1))
        for path in _images(folder / "training" / kind)
    ]
    images = _images(folder / "testing" / "images")
    reference = _read_reference(folder / "testing" / "reference.csv")
    missing = [path.stem for path in images if path.stem not in reference]
    if missing:
        raise DatasetError(f"{folder / 'testing' / 'reference.csv'}: no row for slide '{missing[0]}'; add it")
    testing = [
        SlideEntry(path.stem, path, reference[path.stem], "testing", _annotation(folder / "testing", path, 0))
        for path in images
    ]
    check_names(training + testing)
    return training + testing


def check_names(slides: Sequence[SlideEntry]) -> None:
    """Raise DatasetError where two slides have one name, or names that some file systems take for one ("a", "A")."""
    paths: dict[str, Path] = {}
    for slide in slides:
        key = slide.name.casefold()
        if key in paths:
            raise DatasetError(f"{slide.path}: a slide of this name is also at {paths[key]}; rename one")
        paths[key] = slide.path


def split_validation(slides: Sequence[SlideEntry], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Names of training and of validation slides, each class split alone so that both sides hold both.

    Raises:
        DatasetError: a class has fewer than two slides.
    """
    training: list[str] = []
    validation: list[str] = []
    generator = np.random.default_rng(seed)
    for label, word in ((0, "normal"), (1, "tumor")):
        names = sorted(slide.name for slide in slides if slide.part == "training" and slide.label == label)
        if len(names) < 2:
            raise DatasetError(f"training/{word}: {len(names)} slide(s); at least 2 are needed, one for validation")
        shuffled = [names[i] for i in generator.permutation(len(names))]
        held_out = min(max(1, round(share * len(names))), len(names) - 1)
        validation += shuffled[:held_out]
        training += shuffled[held_out:]
    return sorted(training), sorted(validation)


def _images(folder: Path) -> list[Path]:
    # Hidden files are what copying tools and killed writers leave behind.
    images = [path for path in sorted(folder.glob("*.tif")) if not path.name.startswith(".")]
    if not images:
        raise DatasetError(f"{folder}: no *.tif slides; dataset_dir must be laid out like CAMELYON16")
    return images


def _annotation(part: Path, slide: Path, label: int) -> Path | None:
    path = part / "lesion_annotations" / f"{slide.stem}.xml"
    if path.is_file():
        return path
    if label == 1:
        raise DatasetError(f"{path}: missing; a tumour slide for training needs its annotation")
    return None


def _read_reference(path: Path) -> dict[str, int]:
    """Slide labels of the test set: rows `slide,label`, a header or not, further columns ignored."""
    if not path.is_file():
        raise DatasetError(f"{path}: missing; it must hold rows like 'test_001,tumor'")
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            rows = [[cell.strip() for cell in row] for row in csv.reader(handle)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path}: not a table in UTF-8 ({error}); save it as CSV") from error
    labels: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        word = row[1].lower() if len(row) > 1 else ""
        if not any(row) or (number == 1 and (row[0].lower() in HEADERS or word == "label")):
            continue
        if word not in LABELS:
            raise DatasetError(f"{path}: row {number}: label '{word}' unknown; use 'normal' or 'tumor'")
        name = row[0].removesuffix(".tif")
        if labels.setdefault(name, LABELS[word]) != LABELS[word]:
            raise DatasetError(f"{path}: row {number}: '{name}' has another label further up; keep one")
    return labels
