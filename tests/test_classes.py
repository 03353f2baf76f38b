"""Names of classes, and which one is asked about."""

from __future__ import annotations

import pytest

from medsd.classes import CLASSES, checked_classes, class_number, target_number
from medsd.errors import ConfigError


def test_words_mean_classes_in_any_case_and_either_spelling() -> None:
    assert [class_number(CLASSES, word) for word in ("Normal", "TUMOR", " tumour ", "cancer", "")] == [
        *(0, 1, 1),
        *(None, None),
    ]
    assert class_number(("normal", "Tumor budding"), "tumour budding") == 1
    names = ("benign", "in situ", "invasive")
    assert [target_number(names, word) for word in (None, "Invasive", "benign")] == [1, 2, 0]
    assert target_number(("no class",), None) == 0
    with pytest.raises(ConfigError, match=r"target=.invasiv.: the classes are .*did you mean .invasive."):
        target_number(names, "invasiv")
    assert target_number(("0", "1", "2"), 2) == 2  # type: ignore[arg-type]  # as a command line reads it
    with pytest.raises(ConfigError, match=r"target='1': the classes are benign"):
        target_number(names, 1)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (["one"], "name two or more, that of normal tissue first"),
        ("ab", "name two or more"),
        (["a", "A"], "'A' is there twice"),
        (["a", "tumor", "Tumour"], "'Tumour' is there twice"),
        (["a", 1], "1 is no name; give text"),
        (["a", " b"], "' b' is no name"),
        (["a", "b\n"], "is no name"),
        (["a", "Mixed"], "is what tables call other tiles"),
    ],
)
def test_names_that_cannot_be(names: list[object], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        checked_classes(names)
    assert checked_classes(["a", "b", "c d"]) == ("a", "b", "c d")
