"""Folders laid out like CAMELYON16, in either of its two official layouts.

As the challenge gave it (GigaScience DB 100439)    As the open bucket has it (scripts/download_camelyon16)

    training/normal/*.tif                               images/normal_*.tif
    training/tumor/*.tif                                images/tumor_*.tif
    training/lesion_annotations/*.xml                   annotations/*.xml
    testing/images/*.tif                                images/test_*.tif
    testing/lesion_annotations/*.xml
    testing/reference.csv                               evaluation/reference.csv
"""

from __future__ import annotations

import csv
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from medsd.cohort.entry import SlideEntry, check_names
from medsd.errors import DatasetError

logger = logging.getLogger(__name__)

HEADERS = ("slide", "image", "name")
LABELS = {"normal": 0, "tumor": 1, "tumour": 1}
# The column "class" of the bucket's reference.csv: what a slide's largest metastasis is.
_CLASSES = {**LABELS, "negative": 0, "itc": 1, "micro": 1, "macro": 1}

# From the section "Notes about the data" of the README.md that comes with CAMELYON16.
WITHDRAWN = {
    "normal_086": "was misclassified and is tumor_111 now",
    "test_049": "is a duplicate",
}
"""Slides that were taken back, and why; copies of the early releases still hold them."""
_PARTLY = (10, 15, 18, 20, 25, 29, 33, 34, 44, 46, 51, 54, 55, 56, 67, 79, 85, 92, 95, 110)
PARTLY_ANNOTATED = frozenset({*(f"tumor_{number:03d}" for number in _PARTLY), "test_114"})
"""Slides with tumour that nobody outlined, mostly on a second section of the same tissue."""


def find_slides(folder: str | Path) -> list[SlideEntry]:
    """All slides of a CAMELYON16-like folder in either layout: normal, tumour, test, each sorted by name.

    Where the folder is CAMELYON16 itself (its README.md is there, or it is laid out like the bucket), slides that were
    taken back are left out, and those that are only partly annotated are marked, see `SlideEntry.exhaustive`. The
    names alone do not tell: your own slides may be called tumor_010, too.

    Raises:
        DatasetError: no such folder, an empty part, a tumour slide for training without annotation, annotations that
            are still packed, a test slide that `reference.csv` does not name, or two slides of one name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder; set dataset_dir to a CAMELYON16-like folder")
    bucket = (folder / "images").is_dir() and not (folder / "training").is_dir()
    slides = _of_bucket(folder) if bucket else _of_challenge(folder)
    check_names(slides)
    if bucket or _has_readme(folder):
        return _noted(slides)
    known = [slide.name for slide in slides if slide.name.casefold() in {*WITHDRAWN, *PARTLY_ANNOTATED}]
    if known:
        logger.warning(
            "%s: %d slides are named like some of CAMELYON16 that need care (%s); if this is CAMELYON16, put its "
            "README.md there",
            folder,
            len(known),
            known[0],
        )
    return slides


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


def _of_challenge(folder: Path) -> list[SlideEntry]:
    training, testing = folder / "training", folder / "testing"
    outlines = training / "lesion_annotations"
    found = _training(_images(training / "normal"), _images(training / "tumor"), outlines)
    images = _images(testing / "images")
    return found + _testing(images, testing / "lesion_annotations", testing / "reference.csv")


def _of_bucket(folder: Path) -> list[SlideEntry]:
    images = folder / "images"
    kinds: dict[str, list[Path]] = {"normal": [], "tumor": [], "test": []}
    for path in _images(images):
        kind = path.stem.partition("_")[0].casefold()
        if kind not in kinds:
            raise DatasetError(f"{path}: its name says not what it is; slides here are normal_*, tumor_* and test_*")
        kinds[kind].append(path)
    for kind, paths in kinds.items():
        if not paths:
            raise DatasetError(f"{images}: no {kind}_*.tif slides; fetch some (scripts/download_camelyon16)")
    reference = folder / "evaluation" / "reference.csv"
    if not reference.is_file() and (folder / "reference.csv").is_file():
        reference = folder / "reference.csv"
    outlines = folder / "annotations"
    return _training(kinds["normal"], kinds["tumor"], outlines) + _testing(kinds["test"], outlines, reference)


def _training(normal: Sequence[Path], tumour: Sequence[Path], outlines: Path) -> list[SlideEntry]:
    found = _annotations(outlines)
    for path in tumour:
        if path.stem.casefold() not in found:
            missing = outlines / f"{path.stem}.xml"
            raise DatasetError(f"{missing}: missing; a tumour slide for training needs its annotation")
    return [
        SlideEntry(path.stem, path, label, "training", found.get(path.stem.casefold()))
        for paths, label in ((normal, 0), (tumour, 1))
        for path in paths
    ]


def _testing(images: Sequence[Path], outlines: Path, reference: Path) -> list[SlideEntry]:
    found, labels = _annotations(outlines), _read_reference(reference)
    missing = [path.stem for path in images if path.stem.casefold() not in labels]
    if missing:
        raise DatasetError(f"{reference}: no row for slide '{missing[0]}'; add it")
    keys = [path.stem.casefold() for path in images]
    return [
        SlideEntry(path.stem, path, labels[key], "testing", found.get(key))
        for path, key in zip(images, keys, strict=True)
    ]


def _noted(slides: Sequence[SlideEntry]) -> list[SlideEntry]:
    """The slides that are to be used, those that are partly annotated marked."""
    kept = []
    for slide in slides:
        key = slide.name.casefold()
        if key in WITHDRAWN:
            logger.warning("%s: left out; CAMELYON16 took it back: it %s", slide.path, WITHDRAWN[key])
        else:
            kept.append(replace(slide, exhaustive=key not in PARTLY_ANNOTATED))
    return kept


def _has_readme(folder: Path) -> bool:
    path = folder / "README.md"
    return path.is_file() and b"CAMELYON16" in path.read_bytes()


def _images(folder: Path) -> list[Path]:
    # Hidden files are what copying tools and killed writers leave behind.
    images = [path for path in sorted(folder.glob("*.tif")) if not path.name.startswith(".")]
    if not images:
        raise DatasetError(f"{folder}: no *.tif slides; dataset_dir must be laid out like CAMELYON16")
    return images


def _annotations(folder: Path) -> dict[str, Path]:
    """Files of outlines by slide; releases differ in case (tumor_001.tif, Tumor_001.xml)."""
    packed = folder.with_name(f"{folder.name}.zip")
    if packed.is_file() and not folder.is_dir():
        raise DatasetError(f"{packed}: still packed; unpack it: unzip -j '{packed}' -d '{folder}'")
    return {path.stem.casefold(): path for path in sorted(folder.glob("*.xml")) if not path.name.startswith(".")}


def _read_reference(path: Path) -> dict[str, int]:
    """Slide labels of the test set by name in lower case: rows `slide,label`, a header or not, more columns or not.

    Where the header has a column `class`, that is the label (negative, itc, micro, macro).
    """
    if not path.is_file():
        raise DatasetError(f"{path}: missing; it must hold rows like 'test_001,tumor'")
    try:
        with open(path, newline="", encoding="utf-8-sig") as handle:
            rows = [[cell.strip() for cell in row] for row in csv.reader(handle)]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise DatasetError(f"{path}: not a table in UTF-8 ({error}); save it as CSV") from error
    column, words = 1, LABELS
    labels: dict[str, int] = {}
    for number, row in enumerate(rows, start=1):
        heads = [cell.lower() for cell in row]
        if number == 1 and "class" in heads:
            column, words = heads.index("class"), _CLASSES
        word = heads[column] if len(row) > column else ""
        if not any(row) or (number == 1 and (heads[0] in HEADERS or word in ("label", "class"))):
            continue
        if word not in words:
            raise DatasetError(f"{path}: row {number}: label '{word}' unknown; use 'normal' or 'tumor'")
        name = heads[0].removesuffix(".tif").casefold()
        if labels.setdefault(name, words[word]) != words[word]:
            raise DatasetError(f"{path}: row {number}: '{name}' has another label further up; keep one")
    return labels
