"""Which part each slide of a data set plays: what somebody said is kept, the rest is dealt, by patient."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np

from medsd.classes import CLASSES
from medsd.cohort.entry import SlideEntry, check_patients
from medsd.errors import DatasetError

logger = logging.getLogger(__name__)

PARTS = ("training", "validation", "testing")
"""What slides, patches and images with masks are for."""

_DEALS = 100  # that are tried at most (our choice)


def with_parts(
    slides: Sequence[SlideEntry], test_share: float, seed: int, classes: Sequence[str] = CLASSES
) -> list[SlideEntry]:
    """The slides, each with a part: where nobody said one, that of the patient's others, or a share is for testing.

    Where some slides are said to be for testing, no others are. A share is one of each of `classes`, whose numbers
    labels are; a patient with slides of several counts to the last of them. A class that no slide for testing has is
    told by a warning.

    Raises:
        DatasetError: a slide has no label, a class too few slides, patients differ in case alone, or all slides are
            given to other parts than training or testing.
    """
    check_patients((str(slide.path), slide.patient) for slide in slides)
    unlabelled = next((slide for slide in slides if slide.label is None), None)
    if unlabelled is not None:
        raise DatasetError(f"{unlabelled.path}: has no label; give every slide one in the manifest's column 'label'")
    of_patient = {slide.patient: slide.part for slide in slides if slide.patient and slide.part}
    known = [replace(slide, part=slide.part or of_patient.get(slide.patient, "")) for slide in slides]
    free = [slide for slide in known if not slide.part]
    dealt: set[str] = set()
    if free and not any(slide.part == "testing" for slide in known):
        training = [slide for slide in known if slide.part == "training"]
        # Validation is dealt from the rest, unless somebody said it.
        least = 1 if any(slide.part == "validation" for slide in known) else 2
        dealt = _dealt(free, test_share, seed, "testing", classes, training, least)
    parts = {True: "testing", False: "training"}
    whole = [replace(slide, part=slide.part or parts[slide.name in dealt]) for slide in known]
    for part in parts.values():
        if not any(slide.part == part for slide in whole):
            raise DatasetError(
                f"part: all {len(whole)} slides are given to other parts than {part}; give some to it, or leave their "
                "cells empty in the manifest's column 'part'"
            )
    tested = {slide.label for slide in whole if slide.part == "testing"}
    if without := [word for label, word in enumerate(classes) if label not in tested]:
        logger.warning(
            "testing: no slide of %s, of which scores say nothing; give slides other parts", ", ".join(without)
        )
    return whole


def split_validation(
    slides: Sequence[SlideEntry], share: float, seed: int, classes: Sequence[str] = CLASSES
) -> tuple[list[str], list[str]]:
    """Names of training and of validation slides: those said to be, or a share of each class's patients.

    Raises:
        DatasetError: a side would lack a class.
    """
    training = [slide for slide in slides if slide.part == "training"]
    held_out = {slide.name for slide in slides if slide.part == "validation"}
    if not held_out:
        held_out = _dealt(training, share, seed, "validation", classes)
    names = [slide.name for slide in training]
    sides = sorted(set(names) - held_out), sorted(held_out)
    label = {slide.name: slide.label for slide in slides}
    for side, part in zip(sides, ("training", "validation"), strict=True):
        for number, word in enumerate(classes):
            if not any(label[name] == number for name in side):
                raise DatasetError(f"{part}: no {word} slide; give slides other parts, or change the seed")
    return sides


def patients_on_two_sides(parts: Sequence[Sequence[SlideEntry]]) -> list[str]:
    """The patients with slides in more than one part, in order."""
    sides = [{slide.patient for slide in part if slide.patient} for part in parts]
    return sorted({patient for n, side in enumerate(sides) for other in sides[:n] for patient in side & other})


def _dealt(
    slides: Sequence[SlideEntry],
    share: float,
    seed: int,
    part: str,
    classes: Sequence[str],
    kept: Sequence[SlideEntry] = (),
    least: int = 1,
) -> set[str]:
    """Names of a share of the slides: of the patients of each class, so that no patient is cut.

    Patients of several classes may leave a side without one. Then one of it is added, or all is dealt anew, until each
    class is on this side and the rest, with the slides `kept` for it, has `least` patients of each; or as far as that
    goes without taking a class from either.
    """
    groups = _of_patients(slides)
    held = {name: {slide.label or 0 for slide in group} for name, group in groups.items()}
    others = [{slide.label or 0 for slide in group} for group in _of_patients(kept).values()]
    numbers = range(len(classes))
    for label, word in enumerate(classes):
        count = sum(label in labels for labels in held.values())
        if count < 2:
            raise DatasetError(f"training/{word}: {count} slide(s); at least 2 are needed, one for {part}")

    def lacking(chosen: set[str]) -> tuple[int, int]:
        side = Counter(label for name in chosen for label in held[name])
        rest = Counter(label for labels in others for label in labels)
        rest.update(label for name in held.keys() - chosen for label in held[name])
        return sum(max(0, least - rest[label]) for label in numbers), sum(not side[label] for label in numbers)

    generator = np.random.default_rng(seed)

    def deal() -> set[str]:
        chosen: set[str] = set()
        for label in numbers:
            names = _shuffled((name for name, labels in held.items() if max(labels) == label), generator)
            count = min(max(1, round(share * len(names))), len(names) - 1)
            chosen.update(names[: max(count, 0)])
        for label in numbers:
            if not any(label in held[name] for name in chosen):
                names = _shuffled((name for name, labels in held.items() if label in labels), generator)
                chosen = min(chosen, *(chosen | {name} for name in names), key=lacking)
        return chosen

    best = deal()
    for _ in range(_DEALS):
        if not any(lacking(best)):
            break
        before, now = lacking(best), lacking(other := deal())
        if now != before and now[0] <= before[0] and now[1] <= before[1]:
            best = other
    return {slide.name for name in best for slide in groups[name]}


def _of_patients(slides: Sequence[SlideEntry]) -> dict[str, list[SlideEntry]]:
    """Slides by patient; a slide without one is a patient of its own."""
    groups: dict[str, list[SlideEntry]] = {}
    for slide in slides:
        groups.setdefault(f"patient {slide.patient}" if slide.patient else slide.name, []).append(slide)
    return groups


def _shuffled(names: Iterable[str], generator: np.random.Generator) -> list[str]:
    ordered = sorted(names)
    return [ordered[i] for i in generator.permutation(len(ordered))]
