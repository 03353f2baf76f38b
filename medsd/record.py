"""What outputs were made of, kept beside them: is it done already, and would a run make the same again?"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from datetime import UTC, datetime
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import medsd
from medsd.files import read_json, write_json

_DIGEST = "record_sha256"
_PACKAGES = ("torch", "monai", "timm", "numpy", "openslide-python", "tifffile", "scikit-image")


def identity(path: str | Path) -> list[list[Any]]:
    """Name, size in bytes and time of change of an input, of a folder with what lies directly in it.

    Raises:
        OSError: it is not there.
    """
    path = Path(path)
    parts = [path, *sorted(path.glob("*"))] if path.is_dir() else [path]
    return [[part.name, part.stat().st_size, part.stat().st_mtime_ns] for part in parts]


def write_record(path: str | Path, recipe: Mapping[str, Any], outputs: Iterable[str], **content: Any) -> None:
    """Write the record of finished outputs; the last file of an act, so that its presence says the others are whole.

    Args:
        path: the record, JSON.
        recipe: all that the outputs follow from, plain JSON values: `identity` of the inputs, settings, a version of
            the act's own where it may change while medsd's does not.
        outputs: their names, from the record's folder; kept with their sizes.
        content: what else is worth keeping; given back by `read_record`.

    Raises:
        OutputError: it cannot be written.
    """
    record = {
        "recipe": {"medsd": medsd.__version__, **recipe},
        "outputs": {name: _size(Path(path).parent / name) for name in outputs},
        **content,
        "versions": {package: version(package) for package in _PACKAGES},
        "made": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    rewrite_record(path, record)


def rewrite_record(path: str | Path, record: Mapping[str, Any]) -> None:
    """Write a record that `read_record` gave, and in which something was changed."""
    write_json(path, {**record, _DIGEST: _digest(record)})


def read_record(path: str | Path, recipe: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
    """The record, if its outputs are whole and, where a recipe is given, follow from the very same.

    None means: make them (again). That is so where there is no record, it is damaged, altered or of another version, an
    output is gone or has another size, or the recipe differs.
    """
    path = Path(path)
    try:
        record = read_json(path)
        if record.pop(_DIGEST) != _digest(record):
            return None
        # Through JSON, as the record went: tuples are lists there.
        wanted = record["recipe"] if recipe is None else json.loads(json.dumps({"medsd": medsd.__version__, **recipe}))
        outputs = record["outputs"].items()
        whole = record["recipe"] == wanted and all(_size(path.parent / name) == size for name, size in outputs)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return dict(record) if whole else None


def is_damaged(path: str | Path) -> bool:
    """Whether a file of which `read_record` makes nothing was a record: cut off, altered, or of lost outputs."""
    try:
        return _DIGEST in read_json(path)
    except FileNotFoundError:
        return False
    except (OSError, ValueError, TypeError):
        return True


def _digest(record: Mapping[str, Any]) -> str:
    return sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()


def _size(path: Path) -> int | None:
    """Bytes of a file; None for a folder, which grows by what is put into it."""
    size = path.stat().st_size
    return None if path.is_dir() else size


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Names of what two recipes have different, sorted, nested ones as "optimizer::lr"; for the message about it."""
    one, other = (dict(_flat(json.loads(json.dumps(recipe)))) for recipe in (before, now))
    return [key for key in sorted({*one, *other}) if (key in one, one.get(key)) != (key in other, other.get(key))]


def _flat(recipe: Mapping[str, Any], within: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in recipe.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{within}{key}::")
        else:
            yield f"{within}{key}", value
