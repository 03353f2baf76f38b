"""What a cohort's slides are made into: the interface of such work, which `medsd.cohort.runner` goes through."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic

from medsd.cohort.entry import SlideEntry
from medsd.cohort.kept import Kept, Row
from medsd.progress import Progress
from medsd.slides.slide import Slide


@dataclass(frozen=True)
class Made(Generic[Row]):
    """What a slide was made into: its row, and what its record keeps beside that."""

    row: Row
    outputs: Sequence[str] = ()
    content: Mapping[str, Any] = field(default_factory=dict)


class Work(Kept[Row]):
    """What is done with each slide of a cohort, beside how it is kept.

    Attributes:
        outputs: all files that a slide may leave, named as `record`, from the record's folder; those of an earlier
            recipe stand aside while new ones are made.
        summaries: files of the whole cohort that are wrong while slides are made anew, and go before.
    """

    outputs: Sequence[str]
    summaries: Sequence[str] = ()

    @abstractmethod
    def recipe(self, entry: SlideEntry) -> Mapping[str, Any]:
        """What a slide's outputs follow from beside its file and scale, as JSON values."""

    def row(self, entry: SlideEntry, status: str, reason: str = "") -> Row:
        """The row of a slide of which nothing else is known."""
        return self.row_now(self.row_type(entry.name, status, reason), entry)

    @abstractmethod
    def make(self, slide: Slide, entry: SlideEntry, progress: Progress) -> Made[Row]:
        """Make a slide's outputs; any error that a damaged file can cause makes it a failed one."""
