"""A slide's finished outputs while they are made anew: not gone before there are others."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from medsd.files import read_json
from medsd.record import read_record


@dataclass(frozen=True)
class Before:
    """Outputs that stand aside, in a hidden folder beside their record, so that moving them is renaming.

    Of one process at a time, which has claimed the slide. The record comes back last: where it stands, all do.

    Attributes:
        record: the slide's.
        outputs: the places of all that it may have left.
    """

    record: Path
    outputs: Sequence[Path]

    @property
    def folder(self) -> Path:
        """Where they stand; a name that is no record's, nor one of a file in the making."""
        return self.record.with_name(f".before.{self.record.name}.kept")

    def set_aside(self) -> None:
        """Clear the outputs' places: what is whole is kept, as what a killed run had kept is, the rest goes.

        Raises:
            OSError: a file cannot be moved or removed.
        """
        self.bring_back()
        whole = read_record(self.record) is not None
        for path in (self.record, *self.outputs):
            if whole and path.exists():
                self.folder.mkdir(exist_ok=True)
                path.replace(self.folder / path.name)
            path.unlink(missing_ok=True)

    def bring_back(self) -> None:
        """Put the outputs back, over whatever stands in their places, unless there are whole ones by now.

        Raises:
            OSError: a file cannot be moved.
        """
        if self.folder.is_dir() and read_record(self.record) is None:
            places = {path.name: path for path in (*self.outputs, self.record)}
            own = self._own()
            for path in self.outputs:
                if path.name not in own:  # of a run that was stopped while it moved them, they stand there already
                    path.unlink(missing_ok=True)
            for kept in sorted(self.folder.iterdir(), key=lambda path: path.name == self.record.name):
                kept.replace(places.get(kept.name, self.record.with_name(kept.name)))
        self.forget()

    def _own(self) -> set[str]:
        """Names of what the record that stands aside lists."""
        try:
            return {Path(name).name for name in read_json(self.folder / self.record.name)["outputs"]}
        except (OSError, ValueError, KeyError, TypeError):
            return set()

    def forget(self) -> None:
        """Let go of what stands aside."""
        shutil.rmtree(self.folder, ignore_errors=True)
