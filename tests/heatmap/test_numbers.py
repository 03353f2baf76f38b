"""Probabilities and scores in words: nothing is rounded to what it is not."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsd.heatmap.numbers import probability_text, score_texts


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((0.0, "0"), (1.0, "1"), (0.5, "0.5"), (0.29, "0.29"), (0.2887, "0.289"), (0.0741, "0.074")),
        *((0.0004, "0.0004"), (0.00437, "0.0044"), (0.9996, "0.9996"), (0.99996, "0.99996"), (0.9704, "0.97")),
    ],
)
def test_near_0_and_near_1_digits_tell_how_near(value: float, text: str) -> None:
    assert probability_text(value) == text


@given(st.floats(1e-9, 1 - 1e-9))
def test_it_is_no_round_number_that_it_is_not(value: float) -> None:
    text = probability_text(value)
    assert 0 < float(text) < 1
    assert abs(float(text) - value) <= min(0.0005, 0.05 * min(value, 1 - value) + 1e-12)


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_score_and_its_cut_off_never_look_alike(score: float, cut_off: float) -> None:
    texts = score_texts(score, cut_off)
    values = [float(text) for text in texts]
    assert (values[0] >= values[1]) == (score >= cut_off)
    assert (texts[0] == texts[1]) == (score == cut_off)


def test_they_take_no_more_digits_than_they_need() -> None:
    assert score_texts(0.07421, 0.07443) == ("0.0742", "0.0744")
    assert score_texts(0.91, 0.0744) == ("0.91", "0.074")
    assert score_texts(0.91, None) == ("0.91", "")
