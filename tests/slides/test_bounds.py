"""The scanned area of a canvas, as OpenSlide states it for some formats (MIRAX)."""

from __future__ import annotations

import pytest

from medsd.slides.slide import _bounds

SIZE = (90_000, 180_000)
AREA = {f"openslide.bounds-{key}": value for key, value in zip("xy", ("1200", "35000"), strict=True)}
AREA |= {"openslide.bounds-width": "40000", "openslide.bounds-height": "50000"}


def test_the_stated_area_is_taken() -> None:
    assert _bounds(AREA, SIZE) == (1200, 35_000, 40_000, 50_000)


@pytest.mark.parametrize("key", AREA)
@pytest.mark.parametrize("value", [None, "", "-5", "1e4", "12.5", "nan"])
def test_an_area_that_is_not_whole_is_the_whole_slide(key: str, value: str | None) -> None:
    properties = dict(AREA)
    if value is None:
        del properties[key]
    else:
        properties[key] = value
    assert _bounds(properties, SIZE) == (0, 0, *SIZE)


def test_most_slides_state_none() -> None:
    assert _bounds({"openslide.vendor": "aperio"}, SIZE) == (0, 0, *SIZE)
