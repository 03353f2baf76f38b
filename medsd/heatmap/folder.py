"""The folder that one slide leaves, whatever a network makes of it: maps or classes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from medsd.cohort.entry import SlideEntry
from medsd.errors import SlideError
from medsd.files import atomic_path
from medsd.heatmap.numbers import percent
from medsd.heatmap.store import own_store
from medsd.progress import Progress
from medsd.record import read_record
from medsd.slides.parts import slide_identity, slide_sha256
from medsd.slides.readers.base import RGB
from medsd.slides.slide import Slide, thumbnail

RECORD, OVERLAY, REPORT, THUMBNAIL = "record.json", "overlay.png", "report.html", "thumbnail.png"
_STORE = "blocks"
THUMBNAIL_PX = 1600


def holds_classes(output: Path) -> bool | None:
    """Whether slides in an output folder were segmented, or mapped; None of a folder without any that is finished."""
    for path in output.glob(f"*/{RECORD}"):
        if (record := read_record(path)) is not None:
            return "areas_mm2" in record["result"]  # all in a folder are of one kind, for the other is refused
    return None


@dataclass(frozen=True)
class SlideFolder:
    """Where the outputs of a slide go, and what all of them say of it.

    Attributes:
        path: the folder.
        slide, entry: whose outputs they are.
    """

    path: Path
    slide: Slide
    entry: SlideEntry

    @cached_property
    def picture(self) -> tuple[RGB, float]:
        """A thumbnail of the slide of at most 1,600 px, and how many level-0 px each of its pixels is wide."""
        return thumbnail(self.slide, THUMBNAIL_PX)

    @cached_property
    def sha256(self) -> str:
        """Of all files of the slide."""
        return slide_sha256(self.entry.path)

    def store(self, recipe: Mapping[str, Any]) -> Path:
        """Where the slide's blocks are kept until it is done: those of another file or recipe go."""
        made_from = json.dumps([slide_identity(self.entry.path), self.entry.mpp, recipe], sort_keys=True)
        return own_store(self.path / _STORE, made_from)

    def clear_store(self) -> None:
        """Forget the blocks: the slide is done."""
        shutil.rmtree(self.path / _STORE, ignore_errors=True)

    def progress(self, shown: Progress) -> Progress:
        """The same, with the slide's name before what is counted."""

        def of_slide(items: Iterable[Any], total: int, unit: str) -> Iterator[Any]:
            return shown(items, total, f"{self.entry.name}, {unit}")

        return of_slide

    def check_seen(self, unseen: float, allowed: float) -> None:
        """Refuse a slide too much of which is damaged.

        Raises:
            SlideError: a larger share of the slide (0 to 1) cannot be decoded than is allowed.
        """
        if unseen > allowed:
            raise SlideError(
                f"{self.entry.path}: {percent(unseen, 1)} of it cannot be decoded, more than {percent(allowed)}; "
                "copy it again from its source"
            )

    def write_thumbnail(self) -> None:
        """What is left of a slide without tissue."""
        with atomic_path(self.path / THUMBNAIL) as temporary:
            Image.fromarray(self.picture[0]).save(temporary)

    def about(self) -> dict[str, Any]:
        """What its record says of every slide."""
        slide = self.slide
        return {
            "slide": {"name": self.entry.path.name, "sha256": self.sha256},
            "scale": {
                "mpp": slide.mpp,
                "mpp_source": slide.mpp_source,
                "dimensions": slide.dimensions,
                "bounds": slide.bounds,
                "reader": slide.reader,
            },
            "intended_use": "research use only",
        }
