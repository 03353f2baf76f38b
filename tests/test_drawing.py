"""Text that fits, colours where they belong, files that say what they are for."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from PIL import Image

from medsd.drawing import Canvas, fitted, outline, pale, text_width, wrapped


@pytest.mark.parametrize("name", [200 * "y", 200 * "W", "a b.png", "x"])
def test_text_fits_with_both_its_ends(name):
    shown = fitted(name, 11, 120)
    assert text_width(shown, 11) <= 120 and shown[0] == name[0] and shown[-1] == name[-1]
    assert (shown == name) == (text_width(name, 11) <= 120)
    assert text_width(shown[: len(shown) // 2] + name[0] + shown[len(shown) // 2 :], 11) > 120 or shown == name


def test_letters_that_cannot_be_drawn_are_question_marks():
    assert fitted("日本 µm\t\ud800", 11, None) == "?? µm??"
    assert fitted("", 11, 10) == ""


@pytest.mark.parametrize("bold", [False, True])
def test_lines_are_broken_between_words(bold: bool) -> None:
    text = "Contours: tumour probability above 0.50. " * 9
    lines = wrapped(text, 13, 400, bold)
    assert " ".join(lines).split() == text.split() and all(text_width(line, 13, bold) <= 400 for line in lines)
    assert all(text_width(f"{a} {b.split()[0]}", 13, bold) > 400 for a, b in pairwise(lines))


def test_text_is_no_markup(tmp_path):
    """A formula would be set smaller and in another place."""
    for text in ("$x^{2}$", "<b>x</b>"):
        picture = Canvas(200, 40)
        picture.text(10, 30, text, 20)
        columns = np.flatnonzero((np.asarray(picture.image) < 128).any(axis=(0, 2)))
        assert columns[-1] - columns[0] == pytest.approx(text_width(text, 20), abs=6)
    picture.save(tmp_path / "p.png", "a\n\ud800")
    with Image.open(tmp_path / "p.png") as image:
        assert image.info["Title"] == "a??" and image.info["Description"] == "Research use only."


def test_outlines_are_dark_on_light_where_the_ring_is():
    pixels = np.full((60, 80, 3), 128, np.uint8)
    hole = np.array([[35.0, 20.0], [35.0, 30.0], [45.0, 30.0], [45.0, 20.0]])
    outline(pixels, [[np.array([[20.0, 10.0], [60.0, 10.0], [60.0, 40.0], [20.0, 40.0]]), hole]])
    column = pixels[:, 40, 0].astype(int)
    assert np.argmin(column[:15]) in (9, 10)
    # Light within the shape: below its upper line, above that of its hole.
    assert (column[11:13] > 240).all() and (column[:8] == 128).all()
    assert (column[17:19] > 240).all() and (column[22:28] == 128).all()
    assert (pixels[15, 40] == 128).all()


def test_pale_grey_keeps_what_is_darker_darker_and_leaves_no_hue():
    ramp = np.arange(256, dtype=np.uint8).repeat(3).reshape(1, 256, 3)
    assert np.abs(pale(ramp)[0, :, 0] - (127.5 + np.arange(256) / 2)).max() <= 0.5
    coloured = pale(np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8))
    assert coloured.shape == (5, 7, 3) and np.ptp(coloured, axis=2).max() == 0 and coloured.min() >= 128


def test_a_bar_has_its_colours_in_order():
    picture = Canvas(120, 60)
    colours = np.tile(np.arange(100, dtype=np.uint8)[:, np.newaxis], (2, 1, 3))
    picture.colour_bar(10, 10, 100, 12, colours, ["-1", "0", "1"], 11)
    np.testing.assert_array_equal(np.asarray(picture.image)[15, 10:110, 0], np.arange(100))
