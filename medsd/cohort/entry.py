"""One slide of a cohort, and the names that outputs are kept by."""

from __future__ import annotations

import hashlib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from medsd.errors import DatasetError
from medsd.slides.mpp import check_mpp

# File systems take 255 bytes; temporary names and suffixes come to it.
_LONGEST_BYTES = 120
# What shells, Windows and its shares, and spreadsheets take for something else.
_UNFIT = frozenset('/\\:*?"<>|')
_UNFIT_FIRST = ".=+-@ "
RESERVED = frozenset(["index.html", "slides.csv", "tiles.npz", "stains", "slides", "thumbnails", "record.json"])
"""Names, in any case, that output folders use themselves."""
# What Windows takes for a device, with any suffix.
_DEVICES = frozenset(
    ["con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(10))]
)


@dataclass(frozen=True)
class SlideEntry:
    """One slide of a data set.

    Attributes:
        name: what its outputs are kept by, see `output_name`.
        path: its file.
        label: number of its class, 0 normal, 1 tumour where there are two; None where nobody says.
        part: "training", "validation" or "testing"; empty where nobody says.
        annotation: the file of its outlines, if any.
        mpp: micrometres per level-0 pixel, where the file's own is missing or wrong.
        exhaustive: whether all of every class but the first is outlined; where not, tissue outside has no label.
        patient: whose slide it is; empty where nobody says.

    Raises:
        ConfigError: a scale that no microscope has.
        DatasetError: a name that outputs cannot be kept by.
    """

    name: str
    path: Path
    label: int | None = None
    part: str = ""
    annotation: Path | None = None
    mpp: float | None = None
    exhaustive: bool = True
    patient: str = ""

    def __post_init__(self) -> None:
        if self.name != output_name(self.name):
            raise DatasetError(
                f"{self.path}: outputs cannot be kept by the name {self.name!r}; use {output_name(self.name)!r}"
            )
        if self.mpp is not None:
            check_mpp(f"{self.path}: mpp", self.mpp)


def output_name(text: str) -> str:
    """The name of a slide's outputs from the stem of its file: a part of a path on any system, and nothing else.

    It is not empty, at most 120 bytes long, has no separators, control characters or bytes that are no text, does not
    begin with a dot, a blank or what spreadsheets take for a formula, and does not end with a dot or blank. Names in
    `RESERVED` and of devices (`con.1`) get a line below.

    Example:
        >>> output_name("tumor_001"), output_name(".."), output_name("=a/b")
        ('tumor_001', 'slide', 'a_b')
    """
    name = "".join("_" if letter in _UNFIT or not letter.isprintable() else letter for letter in text)
    name = name.lstrip(_UNFIT_FIRST).encode()[:_LONGEST_BYTES].decode(errors="ignore")
    name = name.rstrip(". ") or "slide"
    if _folded(name) in RESERVED:
        return f"{name}_"
    first, *others = name.split(".")
    if _folded(first.strip()) in _DEVICES:
        return output_name(".".join([f"{first.strip()}_", *others]))
    return name


def own_name(path: Path) -> str:
    """The name of a slide whose usual one another slide has: with eight digits that follow from its path."""
    digits = hashlib.sha256(os.fsencode(os.path.abspath(path))).hexdigest()[:8]
    return f"{output_name(path.stem).encode()[: _LONGEST_BYTES - 9].decode(errors='ignore')}-{digits}"


def file_words(path: Path) -> str:
    """A slide's file for a reader: with its folder, for many are called HE.tif."""
    return str(Path(*path.parts[-2:]))


def named_slides(paths: Iterable[Path]) -> list[SlideEntry]:
    """Entries of slides, of which nothing else is known, each with a name of its own."""
    return with_own_names([SlideEntry(output_name(path.stem), path) for path in paths])


def with_own_names(entries: Sequence[SlideEntry]) -> list[SlideEntry]:
    """The entries, those that share a name (in any case) each with one that follows from its path."""
    counts = Counter(_folded(entry.name) for entry in entries)
    return [
        replace(entry, name=own_name(entry.path)) if counts[_folded(entry.name)] > 1 else entry for entry in entries
    ]


def check_names(slides: Iterable[SlideEntry]) -> None:
    """Raise DatasetError where two slides have one name, or names that some file systems take for one ("a", "A")."""
    paths: dict[str, Path] = {}
    for slide in slides:
        key = _folded(slide.name)
        if key in paths:
            raise DatasetError(f"{slide.path}: a slide of this name is also at {paths[key]}; rename one")
        paths[key] = slide.path


PATIENT = "patient"  # the column of tables


def check_patients(patients: Iterable[tuple[str, str]]) -> None:
    """Raise DatasetError where patients, each with the place of its name, differ in case alone: they would be two."""
    known: dict[str, tuple[str, str]] = {}
    for where, patient in patients:
        other, spelt = known.setdefault(_folded(patient), (where, patient))
        if spelt != patient:
            raise DatasetError(
                f"{where}: patient '{patient}' differs from '{spelt}' ({other}) in case alone; write both alike"
            )


def _folded(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
