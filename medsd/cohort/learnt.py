"""What a network learnt from goes with its weights, as digests, so that nobody tests on it unawares.

Slides are known by their bytes, under any name; patients by their names in any case, other groups by theirs. No paper
asks for this (our choice): weights travel further than the tables that say who was trained on.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Protocol

from medsd.classes import folded
from medsd.cohort.entry import PATIENT, SlideEntry
from medsd.errors import SlideError
from medsd.slides.parts import slide_fingerprint

logger = logging.getLogger(__name__)

Sources = Mapping[str, frozenset[str]]
"""What is dealt to parts, by name (slides, patients, clusters), each with the digests it is known by."""

_DIGITS, _NAMED = 16, 5


class Dealt(Protocol):
    """Data that know what each of their parts is of."""

    def sources(self, part: str) -> Sources:
        """Of "training", "validation" or "testing"."""
        ...


def slide_sources(slides: Iterable[SlideEntry]) -> Sources:
    """Slides by name, each with its own digest and its patient's.

    Raises:
        SlideError: a slide is not there.
    """
    return {slide.name: _of_slide(slide) | _of_patient(slide) for slide in slides}


def group_sources(column: str, groups: Iterable[str], folder: str) -> Sources:
    """Groups of a table's column by name: patients in any table, others (clusters, organs) in folders of that name."""
    kind = PATIENT if folded(column) == PATIENT else f"{folded(column)} of {folder}"
    return {name: _digests(kind, name) for name in sorted(set(groups))}


def learnt_from(data: Dealt, starts: Iterable[str] = ()) -> tuple[str, ...]:
    """The digests of what data train and validate on, and those of what the network started from, in order."""
    own = [digests for part in ("training", "validation") for digests in data.sources(part).values()]
    return tuple(sorted(frozenset(starts).union(*own)))


def learnt_and_tested(data: Dealt, learnt: Collection[str]) -> list[str]:
    """Names of what data test on though a network that knows the digests `learnt` has learnt from it."""
    return [name for name, digests in data.sources("testing").items() if not digests.isdisjoint(learnt)]


def tell_of_learnt(data: Dealt, learnt: Collection[str]) -> None:
    """Warn, before hours of training, where its scores will be too good."""
    if both := learnt_and_tested(data, learnt):
        logger.warning("%s; give all trainings one split, or test on others", why_too_good(both))


def why_too_good(names: Sequence[str]) -> str:
    """What follows from testing on `names`, without a full stop."""
    named = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    what = f"{len(names)} of what is tested on was learnt from before"
    return f"scores are too good: {what}, going by names of patients and bytes of slides ({named})"


def learnt_words(slide: SlideEntry, learnt: Sequence[str]) -> str:
    """A sentence for who reads the answer on a slide that was learnt from, or whose patient was; empty otherwise.

    Raises:
        SlideError: the slide is not there.
    """
    if not learnt:
        return ""
    what = "from this slide" if not _of_slide(slide).isdisjoint(learnt) else ""
    if not what and not _of_patient(slide).isdisjoint(learnt):
        what = f"from other slides of this patient ({slide.patient})"
    if not what:
        return ""
    return f"No test: the network learnt {what}. How it does on others cannot be seen here."


def _of_slide(slide: SlideEntry) -> frozenset[str]:
    try:
        return frozenset([slide_fingerprint(slide.path)[:_DIGITS]])
    except OSError as error:
        raise SlideError(f"{slide.path}: {error.strerror}; put the slide back") from error


def _of_patient(slide: SlideEntry) -> frozenset[str]:
    return _digests(PATIENT, slide.patient) if slide.patient else frozenset()


def _digests(kind: str, name: str) -> frozenset[str]:
    """Of the name as it is written; of patients in small letters, too, for tables write one now so, now so."""
    spelt = {name, folded(name)} if kind == PATIENT else {name}
    return frozenset(hashlib.sha256(f"{kind}\0{each}".encode()).hexdigest()[:_DIGITS] for each in spelt)
