"""Which slides a cohort has: a folder that is searched, or a table that lists them.

slide,label,annotation,mpp,part,patient
case_01.svs,tumor,outlines/case_01.xml,,training,p1
case_02.tif,normal,,0.25,,p2
"""

from __future__ import annotations

import logging
import os
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from medsd.classes import CLASSES, class_number
from medsd.cohort.entry import SlideEntry, check_names, check_patients, named_slides, output_name, with_own_names
from medsd.cohort.kept import TABLE
from medsd.errors import DatasetError
from medsd.slides.mpp import WANTED_MPP, is_plausible
from medsd.slides.parts import dicom_series
from medsd.slides.readers.zarr_levels import is_zarr
from medsd.tables import read_table

logger = logging.getLogger(__name__)

COLUMNS = ("slide", "label", "annotation", "mpp", "part", "patient")
"""Columns of a manifest; the first must be there."""

_FILES = ".svs .tif .tiff .btf .ndpi .mrxs .scn .bif .dcm .vms .vmu .svslide .jp2"
SLIDE_SUFFIXES = (*_FILES.split(), ".zarr")
"""How names of slides end; `.zarr` is a folder."""

# Pictures are slides where they are named singly: in folders of slides they are labels, sketches, masks, overlays.
_PICTURES = (".png", ".jpg", ".jpeg")

ANNOTATION_SUFFIXES = (".xml", ".geojson", ".json", ".tif", ".tiff", ".xml.gz", ".geojson.gz", ".json.gz")
"""How names of annotations end, after the slide's name."""

PART_OF_WORD = {"training": "training", "train": "training", "validation": "validation", "val": "validation"}
PART_OF_WORD |= {"testing": "testing", "test": "testing"}
"""Parts of a data set by the words for them."""

_MASK = "_mask"
# float() also takes "1_0", "nan" and digits of other scripts.
_NUMBER = re.compile(r"[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?", re.ASCII)


def find_cohort(
    source: str | Path,
    manifest: str | Path | None = None,
    annotations: str | Path | None = None,
    leave_out: str | Path | None = None,
    classes: Sequence[str] = CLASSES,
) -> list[SlideEntry]:
    """The slides of a folder, of a manifest, those of a folder that a manifest lists, or a slide itself.

    Args:
        source: a folder, see `search_folder`, a slide, or a manifest (`.csv`).
        manifest: a table of the slides in `source`; other slides there are left out.
        annotations: folder of files `<slide's name>.xml` and the like, for slides whose manifest names none.
        leave_out: a folder in `source` that is not searched (that of the outputs).
        classes: see `read_manifest`.

    Returns:
        entries with absolute paths.

    Raises:
        DatasetError: no slides, a mistake in the manifest, or no such folder.

    Example:
        >>> [entry.name for entry in find_cohort("slide.tif")]
        ['slide']
    """
    source = Path(source)
    if source.suffix.lower() == ".csv" and not source.is_dir():
        if manifest is not None:
            raise DatasetError(f"{source}: a manifest, as is {manifest}; give one, or a folder and one")
        entries = read_manifest(source, classes=classes)
    elif manifest is not None:
        entries = read_manifest(manifest, source, classes)
        unlisted = len(set(_slide_files(source, leave_out)[0]) - {entry.path for entry in entries})
        if unlisted:
            logger.warning("%s: %d slides that %s does not list are left out", source, unlisted, manifest)
    else:
        entries = _slides_at(source, leave_out)
    return entries if annotations is None else _with_annotations(entries, Path(annotations))


def find_slides_at(places: Sequence[str | Path], leave_out: str | Path | None = None) -> list[SlideEntry]:
    """The slides of several folders, manifests (their labels left out) and slides, as `find_cohort` finds those of one.

    Raises:
        DatasetError: see there.
    """
    return with_own_names([entry for place in places for entry in find_cohort(place, leave_out=leave_out, classes=())])


def _slides_at(place: Path, leave_out: str | Path | None) -> list[SlideEntry]:
    """A slide, which may be a folder or not be there (that costs its row alone), or those in a folder."""
    known = place.name.lower().endswith(SLIDE_SUFFIXES)
    if place.is_file() or _is_store(place) or (known and not place.is_dir()):
        return named_slides([Path(os.path.abspath(place))])
    return search_folder(place, leave_out)


def search_folder(folder: str | Path, leave_out: str | Path | None = None) -> list[SlideEntry]:
    """The slides in a folder and the folders in it, by name; nothing is known of their labels.

    Left out are hidden files and folders, masks (`*_mask.tif`, CAMELYON's word), pictures (PNG, JPEG), which the log
    counts, and of a DICOM series all files but the largest. Links are followed.

    Args:
        folder: where to look.
        leave_out: a folder that is not searched.

    Raises:
        DatasetError: no such folder, or no slide in it.
    """
    files, pictures = _slide_files(folder, leave_out)
    passed = f"{pictures} picture(s) ({', '.join(_PICTURES)}) are left out; name those that are slides singly"
    if not files:
        raise DatasetError(
            f"{folder}: no slides; their names end in {' '.join(SLIDE_SUFFIXES)}" + (f"; {passed}" if pictures else "")
        )
    if pictures:
        logger.info("%s: %s", folder, passed)
    entries = named_slides(files)
    check_names(entries)
    return sorted(entries, key=lambda entry: entry.name)


def _is_store(path: Path) -> bool:
    """Whether a folder is a slide (OME-NGFF), by its name or by what is in it."""
    return is_zarr(path) or (path.suffix.lower() == ".zarr" and path.is_dir())


def _slide_files(folder: str | Path, leave_out: str | Path | None) -> tuple[list[Path], int]:
    """The slides in a folder, and how many pictures."""
    everything = list(_walk(Path(folder), None if leave_out is None else os.path.realpath(leave_out)))
    found = [path for path in everything if path.suffix.lower() not in _PICTURES]
    slides = [path for path in found if not path.stem.lower().endswith(_MASK)]
    if len(found) > len(slides):
        logger.info("%s: %d files named *%s.* are left out", folder, len(found) - len(slides), _MASK)
    dicom = [path for path in slides if path.suffix.lower() == ".dcm"]
    kept = set(_one_of_a_series(dicom))
    kept_slides = [path for path in slides if path in kept or path.suffix.lower() != ".dcm"]
    return kept_slides, len(everything) - len(found)


def _walk(folder: Path, leave_out: str | None) -> Iterator[Path]:
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder; name one with slides, or a manifest (.csv)")
    seen = {leave_out}
    for base, folders, files in os.walk(os.path.abspath(folder), followlinks=True):
        real = os.path.realpath(base)
        if real in seen:  # a link that leads back
            folders.clear()
            continue
        seen.add(real)
        stores = sorted(name for name in folders if name.lower().endswith(".zarr"))
        folders[:] = sorted(name for name in folders if not name.startswith(".") and name not in stores)
        for name in [*stores, *sorted(files)]:
            if name.lower().endswith((*SLIDE_SUFFIXES, *_PICTURES)) and not name.startswith("."):
                yield Path(base, name)


def _one_of_a_series(files: Sequence[Path]) -> list[Path]:
    """The largest file of each DICOM series in a folder; OpenSlide finds the others by it."""
    largest: dict[tuple[Path, str], tuple[int, Path]] = {}
    for path in files:
        key = path.parent, dicom_series(path) or path.name  # opening a file of no series will call it damaged
        size = path.stat().st_size if path.exists() else 0
        largest[key] = max(largest.get(key, (-1, path)), (size, path))
    return sorted(path for _, path in largest.values())


def _with_annotations(entries: Sequence[SlideEntry], folder: Path) -> list[SlideEntry]:
    if not folder.is_dir():
        raise DatasetError(f"{folder}: no such folder; name the one that holds the annotations")
    annotated = []
    used: set[Path] = set()
    counts = Counter(entry.path.stem for entry in entries)
    for entry in entries:
        stems = (entry.path.stem, entry.path.stem + _MASK)
        found = [folder / f"{stem}{suffix}" for stem in stems for suffix in ANNOTATION_SUFFIXES]
        absolute = [Path(os.path.abspath(path)) for path in found if path.is_file()]
        files = [path for path in absolute if path != entry.path]
        if len(files) > 1 and entry.annotation is None:
            names = ", ".join(path.name for path in files)
            raise DatasetError(f"{folder}: slide '{entry.path.stem}' has several annotations ({names}); keep one")
        if files and counts[entry.path.stem] > 1:
            raise DatasetError(f"{files[0]}: belongs to either of several slides of its name; name it in a manifest")
        used |= {*files, entry.path}
        annotated.append(replace(entry, annotation=entry.annotation or (files[0] if files else None)))
    if not any(entry.annotation for entry in annotated):
        raise DatasetError(
            f"{folder}: no annotation of any slide; they are named as the slides, '{entries[0].path.stem}.xml'"
        )
    there = (Path(os.path.abspath(path)) for path in sorted(folder.iterdir()) if not path.name.startswith("."))
    others = [path for path in there if path.name.lower().endswith(ANNOTATION_SUFFIXES) and path not in used]
    if others:
        logger.warning("%s: %d annotations belong to no slide, the first: %s", folder, len(others), others[0].name)
    without = [entry for entry in annotated if entry.annotation is None]
    if without:
        logger.warning("%s: %d slides have no annotation, the first: %s", folder, len(without), without[0].path.name)
    return annotated


def manifest_at(place: Path) -> Path | None:
    """The manifest that a place is, or that a folder holds (`slides.csv`); None where there is none."""
    table = place / TABLE if place.is_dir() else place
    return table if table.suffix.lower() == ".csv" and table.is_file() else None


def read_manifest(
    path: str | Path, root: str | Path | None = None, classes: Sequence[str] = CLASSES
) -> list[SlideEntry]:
    """The slides that a table lists: column `slide` and, as far as they are needed, the others of `COLUMNS`.

    UTF-8, comma separated, first row the column names; empty rows count but say nothing. An empty cell means: no
    label, no annotation, the file's own mpp, any part, a patient of its own. Files named relatively lie in `root`
    (links in it are followed), others are named with their whole path.

    Args:
        path: the table.
        root: folder that relative names start from; None for the table's own.
        classes: names that labels may have, in any case, that of normal slides first; "tumor" is "tumour". None:
            labels are not looked at.

    Returns:
        entries in the order of the table, with absolute paths.

    Raises:
        DatasetError: the first mistake, with its row and column and what to do.
    """
    path = Path(path)
    root = Path(os.path.abspath(path.parent if root is None else root))
    entries: list[SlideEntry] = []
    places: dict[Path, int] = {}
    for number, cells in read_table(path, ["slide"], known=COLUMNS).iterrows():
        where = f"{path}: row {number}"
        entry = _entry(cells, root, classes, where)
        other = places.setdefault(entry.path, number)
        if other != number:
            raise DatasetError(f"{where}, column 'slide': row {other} has this slide, too; drop one")
        entries.append(entry)
    if not entries:
        raise DatasetError(f"{path}: lists no slide; give one a row below the column names")
    check_patients((f"{path}: row {places[entry.path]}", entry.patient) for entry in entries)
    return with_own_names(entries)


def _entry(cells: Mapping[str, str], root: Path, classes: Sequence[str], where: str) -> SlideEntry:
    slide = _file(cells["slide"], root, f"{where}, column 'slide'")
    annotation = cells.get("annotation", "")
    return SlideEntry(
        output_name(slide.stem),
        slide,
        _label(cells.get("label", ""), classes, f"{where}, column 'label'"),
        _part(cells.get("part", ""), f"{where}, column 'part'"),
        _file(annotation, root, f"{where}, column 'annotation'") if annotation else None,
        _mpp(cells.get("mpp", ""), f"{where}, column 'mpp'"),
        patient=cells.get("patient", ""),
    )


def _label(word: str, classes: Sequence[str], where: str) -> int | None:
    if not classes:
        return None
    number = class_number(classes, word)
    if word and number is None:
        raise DatasetError(f"{where}: '{word}' is unknown; use {', '.join(classes)} or nothing, or name your classes")
    return number


def _part(word: str, where: str) -> str:
    if word and word.casefold() not in PART_OF_WORD:
        raise DatasetError(f"{where}: '{word}' is unknown; use {', '.join(PART_OF_WORD)} or nothing")
    return PART_OF_WORD[word.casefold()] if word else ""


def _file(text: str, root: Path, where: str) -> Path:
    """An existing file, or a Zarr folder."""
    if not text:
        raise DatasetError(f"{where}: empty; name a file")
    path = Path(os.path.normpath(root / text))
    if not Path(text).is_absolute() and not path.is_relative_to(root):
        raise DatasetError(f"{where}: '{text}' leads out of {root}; give the whole path of a file elsewhere")
    try:
        there = path.is_file() or _is_store(path)
    except OSError as error:
        raise DatasetError(f"{where}: '{text}' is no name of a file ({error.strerror}); correct it") from error
    if not there:
        raise DatasetError(f"{where}: no file {path}; correct the name, which starts from {root}")
    return path


def _mpp(text: str, where: str) -> float | None:
    if not text:
        return None
    if not _NUMBER.fullmatch(text):
        raise DatasetError(f"{where}: '{text}' is no number; give micrometres per level-0 pixel, as 0.25, or nothing")
    value = float(text)
    if not is_plausible(value):
        raise DatasetError(f"{where}: no microscope has {text} um per pixel; {WANTED_MPP}")
    return value
