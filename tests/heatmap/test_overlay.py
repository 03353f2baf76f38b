from __future__ import annotations

import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
import shapely
from PIL import Image

from medsd.drawing import Canvas, fitted, text_width
from medsd.errors import OutputError
from medsd.heatmap.legend import legend, unit_of
from medsd.heatmap.overlay import (
    Findings,
    MappedSlide,
    Panel,
    draw_overlay,
    head_px,
    layout,
    length_text,
    number_places,
    round_length_um,
    shown_explanation,
)
from medsd.heatmap.regions import Region
from medsd.heatmap.scale import TUMOUR, explanation_scale
from medsd.heatmap.value_map import ValueMap

LEVEL0 = 20.0
GREY = 200
PALE = 228  # of that grey


def as_map(values: npt.NDArray[np.float64], side: float, quantity: str = "probability") -> ValueMap:
    return ValueMap(values.astype(np.float32), side, side * 0.25, quantity, "tumour", "drawn", "logit")


class Written(NamedTuple):
    """A line of text in a picture: what is seen of it, and from where to where."""

    text: str
    left: float
    right: float
    baseline: float


@pytest.fixture
def written(monkeypatch: pytest.MonkeyPatch) -> list[Written]:
    """Every line that pictures of a test have."""
    lines: list[Written] = []
    plain = Canvas.text

    def text(canvas: Canvas, x: float, y: float, text: str, size: float, *rest: Any, **more: Any) -> None:
        plain(canvas, x, y, text, size, *rest, **more)
        seen = fitted(text, size, more.get("width"), more.get("bold", False))
        long = text_width(seen, size, more.get("bold", False))
        left = x - {"l": 0, "m": long / 2, "r": long}[more.get("align", "l")]
        lines.append(Written(seen, left, left + long, y))

    monkeypatch.setattr(Canvas, "text", text)
    return lines


BLANK = as_map(np.full((60, 80), np.nan), 100.0)


def draw(
    path: Path,
    probability: ValueMap = BLANK,
    regions: Sequence[Region] = (),
    shape: tuple[int, int] = (300, 400),
    name: str = "slide_1",
    opacity: float = 0.45,
    methods: Sequence[str] = ("gradient",),
    misfits: Sequence[str] = (),
    threshold: float = 0.5,
    score: float = 0.0,
) -> npt.NDArray[np.uint8]:
    height, width = shape
    slide = MappedSlide(
        name=name,
        model="Trained on drawings.",
        misfits=misfits,
        dimensions=(round(width * LEVEL0), round(height * LEVEL0)),
        mpp=0.25,
        mpp_source="override",
        thumbnail=np.full((*shape, 3), GREY, np.uint8),
        thumbnail_level0_px=LEVEL0,
        damaged=False,
        explanations=[shown_explanation(method, replace(BLANK, quantity="saliency"), 1.0, "") for method in methods],
        findings=Findings(
            probability, threshold, "fixed on a test", regions, [], score, ["Below the cut-off."], 0.0744
        ),
        provenance={},
        caveats=[],
    )
    draw_overlay(path, slide, opacity)
    return np.asarray(Image.open(path).convert("RGB"))


def places(count: int = 3, aspect: float = 400 / 300, lines: int = 2) -> list[Panel]:
    return layout(count, aspect, head_px(lines))[0]


def tint(pixels: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """Where a panel is not grey: hue is the map's alone."""
    coloured: npt.NDArray[np.bool_] = np.ptp(pixels, axis=2) > 8
    return coloured


def panel(picture: npt.NDArray[np.uint8], box: Panel) -> npt.NDArray[np.int64]:
    return picture[box.top : box.top + box.height, box.left : box.left + box.width].astype(int)


def hot_block(side: float = 100.0) -> ValueMap:
    """A map of 60 x 80 pixels over the slide of 8000 x 6000 px; seen and 1 in rows 10..19, columns 50..69 only."""
    values = np.full((60, 80), np.nan)
    values[10:20, 50:70] = 1.0
    return as_map(values, side)


def test_a_hot_block_is_drawn_where_it_is_and_nowhere_else(tmp_path: Path) -> None:
    picture = draw(tmp_path / "o.png", hot_block())
    first, second, third = places()
    assert second.left > first.left
    assert not tint(panel(picture, third)).any() and not tint(panel(picture, first)).any()
    changed = tint(panel(picture, second))
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert rows[0] == pytest.approx(second.height * 10 / 60, abs=1.5)
    assert rows[-1] + 1 == pytest.approx(second.height * 20 / 60, abs=1.5)
    assert columns[0] == pytest.approx(second.width * 50 / 80, abs=1.5)
    assert columns[-1] + 1 == pytest.approx(second.width * 70 / 80, abs=1.5)
    assert changed[rows[0] : rows[-1], columns[0] : columns[-1]].all()


def test_the_colour_is_the_scale_blended_at_the_opacity(tmp_path: Path) -> None:
    picture = draw(tmp_path / "o.png", hot_block(), opacity=0.3)
    box = places()[1]
    found = panel(picture, box)[round(box.height * 15 / 60), round(box.width * 60 / 80)]
    assert found == pytest.approx(0.3 * np.array(TUMOUR) + 0.7 * PALE, abs=2)
    # Faded where nothing was looked at, as it is on the panel of the slide.
    assert (panel(picture, box)[5, 5] == round(0.3 * 255 + 0.7 * PALE)).all()
    assert (panel(picture, places()[0])[5, 5] == GREY).all()


def test_a_map_larger_than_the_picture_and_the_slide_stays_aligned(tmp_path: Path) -> None:
    values = np.full((4001, 5335), np.nan)
    values[2000:2400, 1000:1600] = 1.0
    picture = draw(tmp_path / "o.png", as_map(values, 1.5))
    second = places()[1]
    changed = tint(panel(picture, second))
    rows, columns = np.flatnonzero(changed.any(axis=1)), np.flatnonzero(changed.any(axis=0))
    assert (rows[0], rows[-1] + 1) == pytest.approx((second.height * 3000 / 6000, second.height * 3600 / 6000), abs=2)
    assert (columns[0], columns[-1] + 1) == pytest.approx(
        (second.width * 1500 / 8000, second.width * 2400 / 8000), abs=2
    )


def test_contours_are_on_every_panel_along_the_region(tmp_path: Path) -> None:
    square = shapely.box(2000, 1000, 6000, 3000)
    region = Region(square, 1.0, 1.0, 1.0, None, (0.0, 0.0))
    picture = draw(tmp_path / "o.png", regions=[region])
    for box in places():
        dark = panel(picture, box).max(axis=2) < 100
        top = dark[: box.height // 3, box.width // 2]
        assert np.flatnonzero(top).mean() == pytest.approx(box.height * 1000 / 6000, abs=1.5)
        left = dark[box.height // 3, : box.width // 2]
        assert np.flatnonzero(left).mean() == pytest.approx(box.width * 2000 / 8000, abs=1.5)


@pytest.mark.parametrize(("count", "columns"), [(2, 2), (3, 3), (4, 2), (5, 3), (7, 3)])
def test_panels_stand_in_even_rows(count: int, columns: int) -> None:
    boxes, bottom = layout(count, 1.0)
    assert len({box.left for box in boxes}) == columns and len(boxes) == count
    assert len({box.top for box in boxes}) == -(-count // columns)
    corners = {(box.left, box.top) for box in boxes}
    assert len(corners) == count and all(box.top + box.height < bottom for box in boxes)


def test_numbers_stand_at_the_regions_and_never_on_each_other() -> None:
    box = Panel(0, 0, 400, 300, 0, 400)
    tops = [(4000.0, 3000.0), (4010.0, 3005.0), (7990.0, 0.0), (0.0, 5000.0)]
    found = number_places(tops, (20.0, 20.0), box)
    assert sorted(found) == [1, 3, 4]  # the second would cover the first, which is larger
    assert found[1] == pytest.approx((203, 150 - 14))
    for number, (x, y) in found.items():
        assert 0 <= x <= box.width - text_width(str(number), 11, True) and 0 <= y <= box.height - 14


def test_what_does_not_fit_is_said_in_red_above_the_panels(tmp_path: Path) -> None:
    red = [
        (np.ptp(draw(tmp_path / "o.png", misfits=words)[:110].astype(int), axis=2) > 60).any()
        for words in ((), ("Does not fit: too coarse.",))
    ]
    assert red == [False, True]
    long = draw(tmp_path / "o.png", misfits=("Does not fit: " + "too coarse " * 40,))
    coloured = np.flatnonzero((np.ptp(long[:150].astype(int), axis=2) > 60).any(axis=0))
    assert coloured.max() < long.shape[1] - 30  # bold, and still within the margin


@pytest.mark.parametrize("threshold", [0.0004, 0.9996, 0.29])
def test_threshold_and_score_are_no_round_numbers_that_they_are_not(
    tmp_path: Path, written: list[Written], threshold: float
) -> None:
    draw(tmp_path / "o.png", threshold=threshold, score=0.0743)
    words = " ".join(line.text for line in written)
    assert f"tumour probability above {threshold} (fixed on a test)" in words
    assert "Slide score, tumour: 0.0743. Below the cut-off." in words


def test_every_method_has_a_panel(tmp_path: Path) -> None:
    region = Region(shapely.box(2000, 1000, 6000, 3000), 1.0, 1.0, 1.0, None, (0.0, 0.0))
    picture = draw(tmp_path / "o.png", hot_block(), [region], methods=("deeplift", "gradcam", "tsm"))
    boxes = places(5)
    for box in boxes:
        top = panel(picture, box).max(axis=2)[: box.height // 3, box.width // 2] < 100
        assert np.flatnonzero(top).mean() == pytest.approx(box.height * 1000 / 6000, abs=1.5)
    hot = [panel(picture, box)[round(box.height * 15 / 60), round(box.width * 65 / 80)] for box in boxes]
    assert [np.ptp(colour) > 8 for colour in hot] == [False, True, False, False, False]


def test_the_scale_bar_has_the_length_it_says(tmp_path: Path) -> None:
    picture = draw(tmp_path / "o.png")
    box = places()[0]
    black = panel(picture, box).max(axis=2) < 60
    longest = max(row.sum() for row in black[box.height * 9 // 10 :])
    assert round_length_um(8000 * 0.25) == 500
    assert longest == pytest.approx(box.width * 500 / 2000, abs=3)


@pytest.mark.parametrize(
    ("width_um", "text"), [(2000, "500 µm"), (4000, "1 mm"), (26_000, "5 mm"), (90, "20 µm"), (4000 - 5e-13, "500 µm")]
)
def test_round_lengths(width_um: float, text: str) -> None:
    assert length_text(round_length_um(width_um)) == text


def test_is_a_picture_of_1800_px_that_says_what_it_is_for(tmp_path: Path) -> None:
    draw(tmp_path / "o.png")
    with Image.open(tmp_path / "o.png") as image:
        assert image.width == 1800
        assert image.info["Software"] == "medsd"
        assert "Research use only" in image.info["Description"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["o.png"]


@pytest.mark.parametrize("name", ["a$x^{$", "$\\frac{$ & <b>", "\\alpha_", "x" * 400, "tab\tnew\nline\x00\ud800"])
def test_any_name_is_drawn_as_it_is(tmp_path: Path, name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        draw(tmp_path / "o.png", shape=(30, 40), name=name)


@pytest.mark.parametrize("shape", [(40, 800), (800, 40), (1, 1)])
def test_odd_shapes_are_drawn_inside_the_picture(tmp_path: Path, shape: tuple[int, int]) -> None:
    picture = draw(tmp_path / "o.png", as_map(np.ones((4, 4)), 100.0), shape=shape)
    for box in places(3, shape[1] / shape[0]):
        assert box.left >= 0 and box.left + box.width <= picture.shape[1]
        assert box.top >= 0 and box.top + box.height <= picture.shape[0]
    assert picture.shape[0] < 6000


@pytest.mark.parametrize("shape", [(600, 100), (1000, 100), (5100, 100), (100, 1300), (100, 5100), (20, 20)])
def test_words_and_scale_bar_of_long_slides_are_read_in_full(
    tmp_path: Path, written: list[Written], shape: tuple[int, int]
) -> None:
    picture = draw(tmp_path / "o.png", as_map(np.ones((4, 4)), 100.0), shape=shape, methods=("deeplift",))
    words = [line.text for line in written]
    assert "Evidence: DeepLift (tumour)" in words
    assert "orange: for; blue: against; uncoloured: neither; faded: not looked at" in words
    for line in written:
        others = [other for other in written if other is not line and abs(other.baseline - line.baseline) < 10]
        assert all(line.right < other.left or other.right < line.left for other in others), line
    labels = [line for line in written if line.text.endswith((" µm", " mm"))]
    assert len(labels) == 3
    for box, label in zip(places(3, shape[1] / shape[0]), labels, strict=True):
        if min(box.width, box.height) >= 120:  # or below it, beside the bar
            assert box.left <= label.left and label.right <= box.left + box.width
            black = panel(picture, box).max(axis=2) < 60
            thick = black[:, : box.width // 2].any(axis=1)[-40:].sum()
            assert 2 <= thick <= 0.05 * min(box.width, box.height) + 12  # with its label
        else:
            assert label.baseline > box.top + box.height and not (panel(picture, box).max(axis=2) < 60).any()


def test_a_heading_names_the_class_whatever_it_is_called(tmp_path: Path, written: list[Written]) -> None:
    draw(tmp_path / "o.png", replace(BLANK, target="P"), shape=(30, 40))
    assert "Probability (P)" in [line.text for line in written]


def test_evidence_of_three_classes_has_a_unit_that_says_what_it_is() -> None:
    names = [legend("deeplift", "layer3", "none", "in situ", "dense", classes).unit for classes in (2, 3)]
    scales = [explanation_scale("deeplift", 1.0, unit).title for unit in names]
    assert scales == ["Evidence (log-odds)", "Evidence (logit above the others' mean)"]
    assert unit_of("gradcam", "evidence") == "evidence, sum of channels"


def test_threads_draw_the_same_picture(tmp_path: Path) -> None:
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda name: draw(tmp_path / name, hot_block(), shape=(60, 80)), ["a.png", "b.png"])
    np.testing.assert_array_equal(first, second)


def test_a_folder_that_is_a_file_is_an_output_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OutputError, match="file"):
        draw(tmp_path / "file" / "o.png")
