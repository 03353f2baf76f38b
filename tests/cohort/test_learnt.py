"""What a network learnt from is known again, under any name, and nothing else is taken for it."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from medsd.cohort.entry import SlideEntry
from medsd.cohort.learnt import (
    group_sources,
    learnt_and_tested,
    learnt_from,
    learnt_words,
    slide_sources,
    tell_of_learnt,
    why_too_good,
)
from medsd.errors import SlideError
from medsd.phantom import PhantomSpec, write_phantom


def data(**parts):
    return SimpleNamespace(sources=lambda part: parts.get(part, {}))


@pytest.fixture(scope="module")
def slides(tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("slides")
    paths = [folder / f"{name}.tif" for name in "ab"]
    for seed, path in enumerate(paths):
        write_phantom(PhantomSpec(seed=seed, tumour=False, size_px=512), path)
    return paths


def test_a_slide_is_known_by_its_bytes_and_a_patient_by_name(slides: list[Path], tmp_path: Path) -> None:
    a, b = slides
    learnt = learnt_from(data(training=slide_sources([SlideEntry("a", a, patient="p1")])))
    assert (
        len(learnt) == 2
        and learnt == tuple(sorted(learnt))
        and not any("p1" in one or "a.tif" in one for one in learnt)
    )
    copy = shutil.copy(a, tmp_path / "renamed.tif")
    assert "learnt from this slide" in learnt_words(SlideEntry("other", Path(copy)), learnt)
    assert "from other slides of this patient (p1)" in learnt_words(SlideEntry("b", b, patient="p1"), learnt)
    assert learnt_words(SlideEntry("b", b, patient="P1"), learnt)
    assert learnt_words(SlideEntry("a", b, patient="p2"), learnt) == ""
    # A file of the same name and size is another slide where its bytes are.
    changed = bytearray(a.read_bytes())
    changed[500] ^= 1
    (tmp_path / "a.tif").write_bytes(changed)
    assert learnt_words(SlideEntry("a", tmp_path / "a.tif"), learnt) == ""
    # Glass at first, of one size: pictures without compression.
    start = bytes(3 * 2**20)
    for name, middle in (("c", b"1"), ("d", b"2")):
        (tmp_path / f"{name}.tif").write_bytes(start + middle + start)
    learnt = learnt_from(data(training=slide_sources([SlideEntry("c", tmp_path / "c.tif")])))
    assert learnt_words(SlideEntry("c", tmp_path / "c.tif"), learnt)
    assert learnt_words(SlideEntry("d", tmp_path / "d.tif"), learnt) == ""
    with pytest.raises(SlideError, match=r"nowhere\.tif: No such file.*; put the slide back"):
        slide_sources([SlideEntry("nowhere", tmp_path / "nowhere.tif")])


def test_who_is_tested_on_though_learnt_from_is_named(caplog: pytest.LogCaptureFixture) -> None:
    groups = {"training": ["p1", "p2"], "validation": ["p3"], "testing": ["p4"]}
    first = data(**{part: group_sources("patient", names, "a") for part, names in groups.items()})
    learnt = learnt_from(first)
    assert len(learnt) == 3 and learnt_and_tested(first, learnt) == []
    other = data(
        training=group_sources("Patient", ["p4"], "b"), testing=group_sources("Patient", ["p1", "p3", "p5"], "b")
    )
    assert learnt_and_tested(other, learnt) == ["p1", "p3"]
    assert learnt_and_tested(data(testing=group_sources("stain_cluster", ["p1"], "a")), learnt) == []
    clusters = learnt_from(data(training=group_sources("stain_cluster", ["1"], "pcam")))
    assert learnt_and_tested(data(testing=group_sources("stain_cluster", ["1"], "pcam")), clusters) == ["1"]
    assert learnt_and_tested(data(testing=group_sources("stain_cluster", ["1"], "mine")), clusters) == []
    # What a start learnt from goes on with who starts from it.
    assert set(learnt_from(other, learnt)) > set(learnt)
    tell_of_learnt(first, learnt)
    assert not caplog.text
    tell_of_learnt(other, learnt_from(other, learnt))
    assert "scores are too good: 2 of what is tested on was learnt from before, going by names" in caplog.text
    assert "bytes of slides (p1, p3); give all trainings one split" in caplog.text
    assert why_too_good([f"p{number}" for number in range(9)]).endswith("(p0, p1, p2, p3, p4, ...)")
