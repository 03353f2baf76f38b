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

import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from medsd.cohort.entry import SlideEntry, check_names, output_name
from medsd.errors import DatasetError
from medsd.tables import read_table

logger = logging.getLogger(__name__)

_HEADERS = ("slide", "image", "name")
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
        raise DatasetError(f"{folder}: no such folder; set dataset_dir to a manifest or a CAMELYON16-like folder")
    bucket = (folder / "images").is_dir() and not (folder / "training").is_dir()
    slides = _of_bucket(folder) if bucket else _of_challenge(folder)
    check_names(slides)
    readme = folder / "README.md"
    if bucket or (readme.is_file() and b"CAMELYON16" in readme.read_bytes()):
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


def _of_challenge(folder: Path) -> list[SlideEntry]:
    training, testing = folder / "training", folder / "testing"
    images = {"normal": training / "normal", "tumor": training / "tumor", "test": testing / "images"}
    kinds = {kind: _images(place) for kind, place in images.items()}
    outlines = training / "lesion_annotations", testing / "lesion_annotations"
    return _entries(kinds, *outlines, testing / "reference.csv")


def _of_bucket(folder: Path) -> list[SlideEntry]:
    kinds: dict[str, list[Path]] = {"normal": [], "tumor": [], "test": []}
    for path in _images(folder / "images"):
        kind = path.stem.partition("_")[0].casefold()
        if kind not in kinds:
            raise DatasetError(f"{path}: its name says not what it is; slides here are normal_*, tumor_* and test_*")
        kinds[kind].append(path)
    for kind, paths in kinds.items():
        if not paths:
            raise DatasetError(f"{folder / 'images'}: no {kind}_*.tif slides; fetch some (scripts/download_camelyon16)")
    reference = folder / "evaluation" / "reference.csv"
    if not reference.is_file() and (folder / "reference.csv").is_file():
        reference = folder / "reference.csv"
    return _entries(kinds, folder / "annotations", folder / "annotations", reference)


def _entries(kinds: dict[str, list[Path]], training: Path, testing: Path, reference: Path) -> list[SlideEntry]:
    """Entries of normal, tumour and test slides; `training` and `testing` are the folders of their outlines."""
    outlines = {"training": _annotations(training), "testing": _annotations(testing)}
    labels = _read_reference(reference)
    entries = []
    for kind, path in ((kind, path) for kind, paths in kinds.items() for path in paths):
        key, part = path.stem.casefold(), "testing" if kind == "test" else "training"
        annotation = outlines[part].get(key)
        if kind == "tumor" and annotation is None:
            missing = training / f"{path.stem}.xml"
            raise DatasetError(f"{missing}: missing; a tumour slide for training needs its annotation")
        if kind == "test" and key not in labels:
            raise DatasetError(f"{reference}: no row for slide '{path.stem}'; add it")
        label = labels[key] if kind == "test" else LABELS[kind]
        entries.append(SlideEntry(output_name(path.stem), path, label, part, annotation))
    return entries


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
    column, words = 1, LABELS
    labels: dict[str, int] = {}
    for number, row in read_table(path, header=False).iterrows():
        cells = [str(cell).lower() for cell in row]
        if number == 1 and "class" in cells:
            column, words = cells.index("class"), _CLASSES
        word = cells[column] if len(cells) > column else ""
        if number == 1 and (cells[0] in _HEADERS or word in ("label", "class")):
            continue
        if word not in words:
            raise DatasetError(f"{path}: row {number}: label '{word}' unknown; use 'normal' or 'tumor'")
        name = cells[0].removesuffix(".tif").casefold()
        if labels.setdefault(name, words[word]) != words[word]:
            raise DatasetError(f"{path}: row {number}: '{name}' has another label further up; keep one")
    return labels
