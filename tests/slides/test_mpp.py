"""The order in which sources of the scale are believed, and what is said when none is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from medsd.errors import MissingMppError
from medsd.slides.mpp import PLAUSIBLE_MPP, resolve_mpp

PATH = Path("folder/case.svs")
VENDOR = {"openslide.vendor": "aperio", "openslide.mpp-x": "0.25", "openslide.mpp-y": "0.25"}
TAGS = {"tiff.ResolutionUnit": "centimeter", "tiff.XResolution": "20000", "tiff.YResolution": "20000"}


def test_the_callers_word_comes_first() -> None:
    found = resolve_mpp(PATH, {}, override=0.3)
    assert (found.value, found.source, found.doubt) == (0.3, "given by the caller", "")


@pytest.mark.parametrize(
    ("given", "said", "doubtful"), [(0.25, "", False), (0.254, "", False), (0.26, "0.25", False), (0.5, "0.25", True)]
)
def test_a_word_of_the_caller_against_the_file_is_told(given: float, said: str, doubtful: bool) -> None:
    """One --mpp stands for a whole folder: files that say otherwise are not to be overruled unseen."""
    found = resolve_mpp(PATH, VENDOR | TAGS, given)
    assert (found.value, found.source) == (given, "given by the caller" + (f"; the file says {said}" if said else ""))
    assert bool(found.doubt) == doubtful
    assert not doubtful or found.doubt.startswith("Scale in doubt: 0.5 µm per pixel was given, the file says 0.25.")


def test_pixels_that_are_not_square_are_in_doubt_whatever_is_given() -> None:
    found = resolve_mpp(PATH, {"openslide.mpp-x": "0.25", "openslide.mpp-y": "0.5"}, 0.25)
    assert found.source == "given by the caller; the file says 0.25 x 0.5" and "0.25 x 0.5" in found.doubt


def test_the_vendor_comes_before_the_tags() -> None:
    found = resolve_mpp(PATH, VENDOR | TAGS)
    assert (found.value, found.source) == (0.25, "vendor property")


@pytest.mark.parametrize("vendor", [{}, {"openslide.mpp-x": "0", "openslide.mpp-y": "0"}, {"openslide.mpp-x": "0.25"}])
def test_tags_step_in_for_a_vendor_who_is_silent_or_absurd(vendor: dict[str, str]) -> None:
    found = resolve_mpp(PATH, vendor | TAGS)
    assert (found.value, found.source) == (0.5, "TIFF resolution tags")


def pair(key: str, value: str) -> dict[str, str]:
    return {f"{key}-x": value, f"{key}-y": value}


ORDER = [
    (pair("openslide.mpp", "0.21"), "vendor property"),
    (pair("ome.mpp", "0.22"), "OME-XML"),
    (pair("ngff.mpp", "0.23"), "NGFF scale"),
    (pair("jp2.mpp", "0.24"), "JPEG 2000 capture resolution"),
    (TAGS, "TIFF resolution tags"),
]


@pytest.mark.parametrize("first", range(len(ORDER)))
def test_sources_are_asked_in_order(first: int) -> None:
    properties = {key: value for stated, _ in ORDER[first:] for key, value in stated.items()}
    assert resolve_mpp(PATH, properties).source == ORDER[first][1]


@pytest.mark.parametrize("first", range(len(ORDER) - 1))
def test_an_absurd_source_hands_on_to_the_next(first: int) -> None:
    properties = {key: value for stated, _ in ORDER[first:] for key, value in stated.items()}
    absurd = dict.fromkeys(ORDER[first][0], "352.8")
    assert resolve_mpp(PATH, properties | absurd).source == ORDER[first + 1][1]


def test_ome_xml_comes_before_the_tags_as_openslide_shows_them() -> None:
    tags = {"openslide.vendor": "generic-tiff"} | pair("openslide.mpp", "0.5")
    found = resolve_mpp(PATH, tags | pair("ome.mpp", "0.25"))
    assert (found.value, found.source) == (0.25, "OME-XML")


def test_inches() -> None:
    tags = {"tiff.ResolutionUnit": "inch", "tiff.XResolution": "50800", "tiff.YResolution": "50800"}
    assert resolve_mpp(PATH, tags).value == 0.5


def test_what_openslide_makes_of_tags_is_not_the_vendors_word() -> None:
    assert resolve_mpp(PATH, VENDOR | {"openslide.vendor": "generic-tiff"}).source == "TIFF resolution tags"


def test_single_precision_noise_of_tags_is_dropped() -> None:
    properties = {"openslide.vendor": "generic-tiff", "openslide.mpp-x": "0.49900001287460327"}
    assert resolve_mpp(PATH, properties | {"openslide.mpp-y": "0.49900001287460327"}).value == 0.499


@pytest.mark.parametrize("value", ["352.8", "0.01", "nan", "inf", "-0.5", "", "half", "0,25"])
def test_implausible_scales_are_not_believed(value: str) -> None:
    with pytest.raises(MissingMppError):
        resolve_mpp(PATH, {"openslide.mpp-x": value, "openslide.mpp-y": value})


@pytest.mark.parametrize(
    "tags",
    [
        TAGS | {"tiff.ResolutionUnit": "none"},
        TAGS | {"tiff.XResolution": "0"},
        TAGS | {"tiff.YResolution": "-20000"},
        TAGS | {"tiff.XResolution": "72", "tiff.YResolution": "72"},
        {"tiff.XResolution": "20000", "tiff.YResolution": "20000"},
    ],
)
def test_tags_that_say_nothing(tags: dict[str, str]) -> None:
    with pytest.raises(MissingMppError):
        resolve_mpp(PATH, tags)


def test_pixels_that_are_not_square_are_refused() -> None:
    with pytest.raises(MissingMppError, match=r"case\.svs: pixels are not square \(0\.25 x 0\.5 um\).*mpp="):
        resolve_mpp(PATH, VENDOR | {"openslide.mpp-y": "0.5"})


def test_nearly_square_pixels_get_the_mean() -> None:
    assert resolve_mpp(PATH, VENDOR | {"openslide.mpp-y": "0.252"}).value == pytest.approx(0.251)


def test_the_magnification_is_named_but_not_used() -> None:
    with pytest.raises(
        MissingMppError, match=r"case\.svs: scale unknown \(the file names only a 40x objective\).*mpp="
    ):
        resolve_mpp(PATH, {"openslide.objective-power": "40"})


def test_the_message_quotes_the_absurd_number() -> None:
    with pytest.raises(MissingMppError, match=r"352\.8 um per pixel.*--mpp"):
        resolve_mpp(PATH, {"openslide.mpp-x": "352.8", "openslide.mpp-y": "352.8"})


@pytest.mark.parametrize("override", [0.0, -1.0, float("nan"), float("inf"), 250.0, 40.0, 0.01])
def test_the_caller_cannot_give_nonsense(override: float) -> None:
    """Nanometres and magnifications among it: a map at 250 um a pixel would ask for all memory."""
    with pytest.raises(MissingMppError, match=rf"case\.svs: mpp={override:g} given; give micrometres.*0\.05 to 20$"):
        resolve_mpp(PATH, VENDOR, override)


@given(st.floats(allow_nan=True), st.floats(allow_nan=True))
def test_any_pair_of_numbers_gives_a_plausible_scale_or_the_error(x: float, y: float) -> None:
    try:
        found = resolve_mpp(PATH, {"openslide.mpp-x": str(x), "openslide.mpp-y": str(y)})
    except MissingMppError as error:
        assert "\n" not in str(error)
    else:
        assert PLAUSIBLE_MPP[0] <= found.value <= PLAUSIBLE_MPP[1]
        assert found.value == pytest.approx(x, rel=0.02)
