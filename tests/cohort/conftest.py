"""What the tests of cohorts share."""

from __future__ import annotations

from pathlib import Path

import pytest

from medsd.cohort import making
from medsd.cohort.camelyon import find_slides
from medsd.cohort.entry import SlideEntry
from medsd.slides.slide import FileSlide, open_slide


@pytest.fixture(scope="session")
def entries(phantoms: Path) -> list[SlideEntry]:
    return find_slides(phantoms)


@pytest.fixture
def opened(quick_tiling: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the slides that are opened in the test, which it may clear."""
    names: list[str] = []

    def open_and_tell(path: Path, mpp: float | None) -> FileSlide:
        names.append(path.stem)
        return open_slide(path, mpp)

    monkeypatch.setattr(making, "IsolatedSlide", open_and_tell)
    return names
