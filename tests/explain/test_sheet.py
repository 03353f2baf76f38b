"""The contact sheet: its colours are those of the scales, its maps whole cells, its pages complete."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from medsd.errors import DatasetError
from medsd.explain import sheet
from medsd.explain.sheet import CELL_PX, SheetColumn, SheetRow, draw_sheets, small_picture
from medsd.heatmap.scale import OPACITY, ColourScale, saliency_scale

COLUMNS = (
    SheetColumn("gradient", saliency_scale(2.0, "log-odds"), "limit: given", "explains"),
    SheetColumn("tsm", ColourScale(0.0, 4.0, (140, 125, 0), (0, 0, 0), "Strength", "activation"), "limit: given", ""),
)
SIGNED = np.array([[-2.0, 0.0], [1.0, 2.0]], np.float32)
POSITIVE = np.array([[0.0, 1.0], [2.0, 4.0]], np.float32)


def row(name: str = "a.png", signed: np.ndarray = SIGNED) -> SheetRow:
    white = np.full((CELL_PX, CELL_PX, 3), 255, np.uint8)
    return SheetRow(white, None, (name, "predicted tumour 0.90"), "tumour", (signed, POSITIVE))


def cell(path, place: int, number: int = 0) -> np.ndarray:
    left = sheet._MARGIN_PX + place * (CELL_PX + sheet._GAP_PX)
    top = sheet._TITLE_PX + sheet._HEAD_PX + number * (CELL_PX + sheet._CAPTION_PX)
    return np.asarray(Image.open(path).convert("RGB"))[top : top + CELL_PX, left : left + CELL_PX].astype(float)


def test_a_pixel_is_the_colour_of_its_value_over_the_picture(tmp_path):
    (path,) = draw_sheets(tmp_path, [row()], COLUMNS, "title", ["A note."])
    for place, (column, values) in enumerate(zip(COLUMNS, (SIGNED, POSITIVE), strict=True), start=1):
        shown = cell(path, place)
        for y, x in np.ndindex(2, 2):
            quarter = shown[y * 100 : y * 100 + 100, x * 100 : x * 100 + 100]
            assert np.ptp(quarter, axis=(0, 1)).max() == 0  # nearest neighbour: one value, one colour
            *colour, alpha = column.scale.rgba(values)[y, x]
            share = OPACITY * alpha / 255
            np.testing.assert_allclose(quarter[0, 0], (1 - share) * 255 + share * np.array(colour), atol=1.01)


def test_one_value_has_one_colour_in_every_row(tmp_path):
    """Not scaled image by image: the second row's map is half the first one's, and looks so."""
    (path,) = draw_sheets(tmp_path, [row(), row("b.png", SIGNED / 2)], COLUMNS, "title", [])
    assert (cell(path, 1)[150, 50] == cell(path, 1, 1)[150, 150]).all()  # 1.0 in both
    assert (cell(path, 1)[150, 150] != cell(path, 1, 1)[150, 150]).any()


def test_what_is_not_finite_is_refused_and_nothing_written(tmp_path):
    wrong = SIGNED.copy()
    wrong[0, 1] = np.nan
    with pytest.raises(DatasetError, match=r"b\.png: the map of gradient is not finite"):
        draw_sheets(tmp_path, [row(), row("b.png", wrong)], COLUMNS, "title", [])
    assert list(tmp_path.iterdir()) == []


def test_many_images_take_pages_and_old_pages_go(tmp_path, monkeypatch):
    monkeypatch.setattr(sheet, "ROWS", 2)
    first = draw_sheets(tmp_path, [row()] * 3, COLUMNS, "title", [])
    assert [path.name for path in first] == ["sheet-01.png", "sheet-02.png"]
    assert sorted(tmp_path.iterdir()) == first
    with Image.open(first[0]) as page, Image.open(first[1]) as last:
        assert page.height > last.height
    (tmp_path / "sheet-notes.png").touch()  # somebody's own
    draw_sheets(tmp_path, [row()], COLUMNS, "title", [])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sheet-notes.png", "sheet.png"]


def test_names_are_no_markup(tmp_path):
    draw_sheets(tmp_path, [row("$x$\n" + 200 * "y")], COLUMNS, "$t$", ["$\\frac$"])


def test_a_region_is_outlined_outside_itself(tmp_path):
    region = np.zeros((CELL_PX, CELL_PX), bool)
    region[50:100, 50:100] = True
    grey = SheetRow(np.full((CELL_PX, CELL_PX, 3), 128, np.uint8), region, ("a", "b"), "", (SIGNED, POSITIVE))
    (path,) = draw_sheets(tmp_path, [grey], COLUMNS, "title", [])
    shown = cell(path, 0)
    assert (shown[region] == 128).all() and (shown[49, 50:100] == 0).all() and (shown[48, 50:100] == 255).all()


def test_thumbnails_keep_the_aspect():
    assert small_picture(np.zeros((30, 60, 3), np.uint8)).shape == (CELL_PX // 2, CELL_PX, 3)
    assert small_picture(np.zeros((4000, 10, 3), np.uint8)).shape == (CELL_PX, 1, 3)
