"""Parts of a data set: what is said is kept, and no patient is on two sides."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsd.cohort.entry import SlideEntry
from medsd.cohort.split import patients_on_two_sides, split_validation, with_parts
from medsd.errors import DatasetError

NAMES = ("benign", "in situ", "invasive")
SLIDES = st.lists(st.tuples(st.integers(0, 12), st.integers(0, 2)), min_size=1, max_size=60)


def entries(drawn: list[tuple[int, int]], part: str = "", classes: int = 2) -> list[SlideEntry]:
    """Slides of at least four patients of each class, and of those that were drawn."""
    least = [(100 + number, number % classes) for number in range(4 * classes)]
    return [
        SlideEntry(f"s{number:03}", Path(f"s{number}"), label, part, patient=f"p{patient}")
        for number, (patient, label) in enumerate([*drawn, *least])
    ]


@given(SLIDES, st.floats(0.1, 0.6), st.integers(0, 99))
def test_patients_stay_whole_and_every_part_has_all_classes(
    drawn: list[tuple[int, int]], share: float, seed: int
) -> None:
    given_slides = entries(drawn, classes=3)
    slides = with_parts(given_slides, share, seed, NAMES)
    training, validation = split_validation(slides, share, seed, NAMES)
    testing = [slide.name for slide in slides if slide.part == "testing"]
    assert sorted([*training, *validation, *testing]) == [slide.name for slide in slides]
    by_name = {slide.name: slide for slide in slides}
    parts = [[by_name[name] for name in names] for names in (training, validation, testing)]
    assert not patients_on_two_sides(parts)
    assert all({slide.label for slide in part} == {0, 1, 2} for part in parts)
    assert with_parts(given_slides[::-1], share, seed, NAMES)[::-1] == slides


@pytest.mark.parametrize(("share", "dealt"), [(0.1, 1), (0.27, 1), (0.4, 2), (0.9, 3)])
def test_the_share_is_that_of_each_classs_patients(share: float, dealt: int) -> None:
    """Of four: at least one, the nearest number, and one is left."""
    found = with_parts(entries([]), share, 0)
    assert [slide.label for slide in found if slide.part == "testing"].count(1) == dealt


@pytest.mark.parametrize("seed", range(20))
def test_patients_of_several_classes_leave_no_side_without_one(seed: int) -> None:
    """Two with slides of both, four with tumour alone, one with none."""
    held = {"A": (0, 1), "B": (0, 1), "C": (1,), "D": (1,), "E": (1,), "F": (1,), "G": (0,)}
    slides = [
        SlideEntry(f"{patient}{label}", Path(f"{patient}{label}"), label, patient=patient)
        for patient, labels in held.items()
        for label in labels
    ]
    found = with_parts(slides, 0.25, seed)
    split_validation(found, 0.25, seed)  # refuses a side that lacks a class
    assert {slide.label for slide in found if slide.part == "testing"} == {0, 1}


def test_a_class_that_is_not_tested_on_is_told(caplog: pytest.LogCaptureFixture) -> None:
    testing = [
        replace(slide, name=f"t{slide.name}", patient="", part="testing") for slide in entries([]) if slide.label
    ]
    with_parts([*entries([], "training"), *testing], 0.5, 0)
    assert caplog.messages == ["testing: no slide of normal, of which scores say nothing; give slides other parts"]


def test_parts_that_somebody_said_are_kept_and_leaks_told() -> None:
    slides = entries([(1, 0), (1, 1), (2, 1)])
    slides[0] = replace(slides[0], part="testing")
    slides[2] = replace(slides[2], part="validation")
    found = with_parts(slides, 0.5, 0)
    assert [slide.part for slide in found[:3]] == ["testing", "testing", "validation"]  # the second by its patient
    assert {slide.part for slide in found[3:]} == {"training"}  # somebody chose the tests
    found[3] = replace(found[3], part="validation")
    assert split_validation(found, 0.5, 0)[1] == ["s002", "s003"]
    leaking = [[found[0]], [replace(found[1], part="training")]]
    assert patients_on_two_sides(leaking) == ["p1"]
    with pytest.raises(DatasetError, match="validation: no normal slide; give slides other parts"):
        split_validation([*found[:3], *found[4:]], 0.5, 0)


@pytest.mark.parametrize(("given_part", "missing"), [("training", "testing"), ("testing", "training")])
def test_a_part_that_no_slide_is_left_for_is_told(given_part: str, missing: str) -> None:
    with pytest.raises(DatasetError, match=f"all 8 slides are given to other parts than {missing}; give some to it"):
        with_parts(entries([], given_part), 0.5, 0)


def test_a_patient_written_in_two_ways_is_told() -> None:
    slides = entries([(1, 0), (2, 1)])
    with pytest.raises(DatasetError, match=r"s1: patient 'P1' differs from 'p1' \(s0\) in case"):
        with_parts([slides[0], replace(slides[1], patient="P1"), *slides[2:]], 0.5, 0)


def test_slides_without_label_or_too_few() -> None:
    with pytest.raises(DatasetError, match="s1: has no label; give every slide one in the manifest's column"):
        with_parts([replace(slide, label=None) if slide.name == "s001" else slide for slide in entries([])], 0.5, 0)
    with pytest.raises(DatasetError, match=r"training/normal: 1 slide\(s\); at least 2 are needed, one for testing"):
        with_parts(entries([])[-2:], 0.5, 0)
