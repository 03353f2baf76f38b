"""Whose outputs have a name in a folder, and which slides of a cohort a process is given."""

from __future__ import annotations

import filecmp
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from medsd.cohort.entry import SlideEntry, output_name, own_name
from medsd.cohort.kept import FEATURES, FOLDERS, TILES, Kept, holds
from medsd.errors import DatasetError
from medsd.record import read_record
from medsd.slides.parts import slide_identity


def shard_of(entries: Sequence[SlideEntry], text: str) -> list[SlideEntry]:
    """A share of the slides, such as "3/40": every fortieth by name, from the third on; whatever their order.

    Raises:
        DatasetError: no such share.
    """
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and 1 <= int(number) <= int(count)):
        raise DatasetError(f"shard='{text}': give one as 3/40, from 1/40 to 40/40")
    return sorted(entries, key=lambda entry: entry.name)[int(number) - 1 :: int(count)]


def check_kind(kept: Kept[Any]) -> None:
    """Raise DatasetError where the folder holds outputs of another kind, whose table would be replaced."""
    if any(holds(kept.folder, place) for place in (TILES, FEATURES, FOLDERS) if place != kept.record):
        raise DatasetError(
            f"{kept.folder}: holds outputs of another verb, whose table would be replaced; choose another folder"
        )


def check_owner(kept: Kept[Any], entry: SlideEntry) -> None:
    """Raise DatasetError where the folder holds outputs of another slide of this name, which are not ours."""
    other = _owner(kept, entry.name, entry.path)
    if other not in (None, True):
        raise DatasetError(
            f"{entry.path}: {kept.folder} holds outputs of another slide of this name, {other}; "
            "rename one, or use another folder"
        )


def _owner(kept: Kept[Any], name: str, path: Path) -> str | bool | None:
    """Whose outputs have a name: True for those of the slide at `path`, else the other's; None where there are none."""
    record = read_record(kept.record_of(name))
    if record is None or record["status"] == "failed":
        return None
    other = str(record["result"]["path"])
    return _is_same_slide(path, other, record["recipe"]["slide"]) or other


def with_free_name(kept: Kept[Any], entry: SlideEntry) -> SlideEntry:
    """The slide by the name that its outputs have, or else by one that no other slide's have."""
    names = entry.name, output_name(entry.path.stem), own_name(entry.path)
    owners = {name: _owner(kept, name, entry.path) for name in names}
    known = next((name for name, owner in owners.items() if owner is True), None)
    return replace(entry, name=known or next((name for name in owners if owners[name] is None), entry.name))


def known_identity(path: Path) -> Any:
    """As records hold it; None where the file cannot be reached."""
    try:
        return json.loads(json.dumps(slide_identity(path)))
    except OSError:
        return None


def _is_same_slide(path: Path, recorded: str, recorded_identity: Any) -> bool:
    """Whether `path` is what was `recorded`, changed or copied, and no other file of the same name."""
    now = known_identity(path)
    if os.path.abspath(path) == os.path.abspath(recorded) or now in (None, recorded_identity):
        return True
    if [part[:2] for part in now] != [part[:2] for part in recorded_identity]:
        return False  # another name or size
    both = path.is_file() and os.path.isfile(recorded)
    return not os.path.exists(recorded) or (both and filecmp.cmp(path, recorded, shallow=False))
