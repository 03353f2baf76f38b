from __future__ import annotations

import base64
import io
import json
import re
import zlib
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from medsd.heatmap.overlay import Findings, MappedSlide, shown_explanation
from medsd.heatmap.regions import find_regions
from medsd.heatmap.report import (
    LISTED_REGIONS,
    MAX_MAP_SIDE_PX,
    PAGE_BYTES,
    SlideResult,
    pack_values,
    write_index,
    write_report,
)
from medsd.heatmap.value_map import ValueMap
from medsd.heatmap.zoom import BUDGET_BYTES, ZoomTiles

NASTY = "<script>alert(1)</script>\"'&{{ 7 * 7 }}</title>"


class Page(HTMLParser):
    """Start tags with their attributes, and the text of each kind of element."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append((self.tags[-1][0] if self.tags else "", data))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def words(self) -> str:
        return " ".join(" ".join(text.split()) for tag, text in self.texts if tag not in ("script", "style"))


def drawn(words: str, target: str, meaning: str) -> ValueMap:
    values = np.random.default_rng(1).normal(size=(120, 160)).astype(np.float32)
    values[:10] = np.nan
    return ValueMap(values, 50.0, 12.5, "saliency", target, words, "logit", meaning)


SALIENCY = drawn("gradient", "tumour", "Its sign is no evidence.")
FEATURES = drawn("TSM at layer3", "no class", "What the features hold.")


def judged() -> Findings:
    found = content().findings
    assert found is not None
    return found


def content() -> MappedSlide:
    rng = np.random.default_rng(0)
    probability = np.full((60, 80), np.nan, np.float32)
    probability[5:55, 5:75] = rng.random((50, 70)) * 0.3
    probability[20:30, 20:40] = 0.9
    probability[40:45, 60:65] = 0.8
    value_map = ValueMap(probability, 100.0, 25.0, "probability", "tumour", "dense", "")
    return MappedSlide(
        name="slide_1",
        model="Classifier trained on drawings; at 1 µm per pixel.",
        misfits=["Does not fit: too coarse."],
        dimensions=(8000, 6000),
        mpp=0.25,
        mpp_source="vendor",
        thumbnail=rng.integers(0, 255, (300, 400, 3), dtype=np.uint8),
        thumbnail_level0_px=20.0,
        damaged=False,
        explanations=[
            shown_explanation("gradient", SALIENCY, 2.0, "The same on every slide."),
            shown_explanation("tsm", FEATURES, 3.0, "Of this slide."),
        ],
        findings=Findings(
            probability=value_map,
            threshold=0.5,
            threshold_source="best F1 on validation slides",
            regions=find_regions(value_map, 0.5, 0.25, (8000, 6000)),
            score=0.9704,
            verdict=["At or above the cut-off.", "Sensitivity 100 %."],
            region_pictures=[np.zeros((300, 500, 3), np.uint8)],
        ),
        provenance={"Weights": "abc"},
        caveats=["Trained on two hospitals."],
    )


def write(folder: Path, report: MappedSlide) -> tuple[str, Page]:
    write_report(folder / "report.html", report)
    text = (folder / "report.html").read_text(encoding="utf-8")
    return text, Page(text)


def data_of(text: str) -> dict[str, Any]:
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', text, re.DOTALL)
    assert match
    result: dict[str, Any] = json.loads(match.group(1), parse_constant=pytest.fail)
    return result


def unpack(layer: dict[str, Any]) -> npt.NDArray[np.float64]:
    """Independent of the packing: written after its description."""
    raw = zlib.decompress(base64.b64decode(layer["data"]))
    differences = np.frombuffer(raw, "<u2").reshape(layer["rows"], layer["columns"]).astype(np.int64)
    codes = np.cumsum(differences, axis=1) % 65536
    return np.where(codes == 0, np.nan, layer["low"] + (codes - 1) * layer["step"])


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Page]:
    return write(tmp_path_factory.mktemp("report"), content())


def test_is_one_file_that_asks_for_nothing(page: tuple[str, Page], tmp_path: Path) -> None:
    text, parsed = page
    assert not re.search(r"https?:|@import|url\(|XMLHttpRequest|WebSocket", text)
    assert not parsed.all("link") + parsed.all("iframe") + parsed.all("object")
    assert all((image["src"] or "").startswith("data:image/") for image in parsed.all("img"))
    assert all("src" not in script for script in parsed.all("script"))
    policy = next(meta["content"] for meta in parsed.all("meta") if meta.get("http-equiv"))
    assert policy and policy.startswith(
        "default-src 'none'; img-src 'self' data:; connect-src 'self'; style-src 'unsafe-inline'; "
        "script-src 'unsafe-inline'; base-uri 'none'"
    )
    write(tmp_path, content())
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


def test_embedded_maps_are_the_maps_within_half_a_step(page: tuple[str, Page]) -> None:
    data, report = data_of(page[0]), content()
    assert list(data["layers"]) == ["gradient", "probability", "tsm"] and data["first"] == "probability"
    for name, _, value_map, _, _ in report.maps:
        layer = data["layers"][name]
        found = unpack(layer)
        np.testing.assert_array_equal(np.isnan(found), np.isnan(value_map.values))
        assert np.nanmax(np.abs(found - value_map.values)) <= layer["step"] / 2 * 1.001
        assert layer["step"] == pytest.approx(np.ptp(value_map.values[value_map.seen]) / 65534)
        assert (layer["side"], layer["mpp"]) == (value_map.level0_px, value_map.mpp)
    assert (data["layers"]["gradient"]["vmin"], data["layers"]["gradient"]["vmax"]) == (-2.0, 2.0)
    assert (data["layers"]["tsm"]["vmin"], data["layers"]["tsm"]["vmax"]) == (0.0, 3.0)


@settings(max_examples=60, deadline=None)
@given(
    hnp.arrays(
        np.float32,
        hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
        elements=st.floats(-1e6, 1e6, width=32) | st.sampled_from([float("nan"), float("inf"), float("-inf")]),
    )
)
def test_any_map_is_packed_within_half_a_step(values: npt.NDArray[np.float32]) -> None:
    packed = pack_values(values)
    found = unpack({**packed, "rows": values.shape[0], "columns": values.shape[1]})
    seen = np.isfinite(values)
    np.testing.assert_array_equal(~np.isnan(found), seen)
    assert (np.abs(found[seen] - values[seen].astype(float)) <= packed["step"] / 2 * 1.001).all()


def test_a_large_map_is_halved_and_says_so(tmp_path: Path) -> None:
    large = ValueMap(np.ones((1000, 2000), np.float32), 4.0, 1.0, "saliency", "tumour", "gradient", "")
    text, parsed = write(tmp_path, replace(content(), explanations=[shown_explanation("gradient", large, 2.0, "")]))
    layer = data_of(text)["layers"]["gradient"]
    assert (layer["rows"], layer["columns"], layer["side"], layer["mpp"]) == (500, 1000, 8.0, 2.0)
    assert "one map pixel is 2 µm wide here" in parsed.words


def test_pictures_decode_to_the_thumbnail(page: tuple[str, Page]) -> None:
    slide = next(image for image in page[1].all("img") if image.get("id") == "slide")
    picture = np.asarray(Image.open(io.BytesIO(base64.b64decode((slide["src"] or "").split(",")[1]))))
    assert picture.shape == content().thumbnail.shape
    assert abs(picture.mean() - content().thumbnail.mean()) < 2


def test_untrusted_text_stays_text(tmp_path: Path) -> None:
    report = replace(
        content(),
        name=NASTY,
        model=NASTY,
        misfits=[NASTY],
        mpp_source=NASTY,
        provenance={NASTY: NASTY},
        caveats=[NASTY],
        findings=replace(
            judged(), threshold_source=NASTY, probability=replace(judged().probability, method=NASTY, target=NASTY)
        ),
        explanations=[
            shown_explanation("gradient", replace(SALIENCY, method=NASTY, target=NASTY, unit=NASTY), 2.0, NASTY)
        ],
    )
    text, parsed = write(tmp_path, report)
    assert "alert(1)" in text and "<script>alert" not in text
    assert len(parsed.all("script")) == len(write(tmp_path, content())[1].all("script"))
    assert NASTY in "".join(data for _, data in parsed.texts)


def test_says_what_a_reader_must_know(page: tuple[str, Page]) -> None:
    words = page[1].words
    for sentence in (
        "Research use only",
        "Classifier trained on drawings; at 1 µm per pixel.",
        "Does not fit: too coarse.",
        "Its sign is no evidence.",
        "Trained on two hospitals.",
        "best F1 on validation slides",
        "0.25 µm per pixel (vendor)",
        "one map pixel is 25 µm wide here",
        "Saliency: gradient (logit)",
        "Strength: TSM (logit)",
        "The same on every slide.",
        "What the features hold.",
        "Of this slide.",
        "8,000 × 6,000 px",
        "Slide score, tumour 0.97 (mean of the highest 1 % of the probability in tissue)",
        "abc",
    ):
        assert sentence in words


@pytest.mark.parametrize(("threshold", "text"), [(0.0004, "0.0004"), (0.9996, "0.9996"), (0.2887, "0.289")])
def test_a_threshold_is_no_round_number_that_it_is_not(tmp_path: Path, threshold: float, text: str) -> None:
    found = replace(judged(), threshold=threshold, score=threshold, cut_off=threshold + 1e-6)
    words = write(tmp_path, replace(content(), findings=found))[1].words
    for sentence in (f"Back to {text}", f"with a probability above {text} (", f"the table keeps to {text}."):
        assert sentence in words
    assert f"Slide score, tumour {threshold} (mean" in words
    assert "No region" in write(tmp_path, replace(content(), findings=replace(found, regions=[])))[1].words
    assert f"has a probability above {text};" in Page((tmp_path / "report.html").read_text()).words


def test_regions_are_listed_with_a_button_that_shows_them(page: tuple[str, Page]) -> None:
    text, parsed = page
    regions = judged().regions
    assert [button["data-region"] for button in parsed.all("button") if "data-region" in button] == ["0", "1"]
    shown = data_of(text)["regions"]
    assert [region["box"] for region in shown] == [list(region.polygon.bounds) for region in regions]
    for region, known in zip(shown, regions, strict=True):
        rings = [shapely.Polygon(np.reshape(ring, (-1, 2))) for ring in region["rings"]]
        assert rings[0].difference(shapely.union_all(rings[1:])).equals(known.polygon)
    assert f"{regions[0].area_um2 / 1e6:.4f}" in parsed.words
    assert sum("Region" in (image.get("alt") or "") for image in parsed.all("img")) == 1


def test_controls_start_at_the_agreed_values(page: tuple[str, Page]) -> None:
    inputs = {each.get("id"): each for each in page[1].all("input") if each.get("id")}
    assert inputs["opacity"]["value"] == "60"
    assert "checked" in inputs["grey"] and "checked" in inputs["outline"] and "checked" not in inputs["mask"]
    assert inputs["threshold"]["value"] == "0.5"
    options = [each["value"] for each in page[1].all("option")]
    assert options == ["probability", "gradient", "tsm", "none"]
    bars = {each["id"]: "hidden" in each for each in page[1].all("figure")}
    assert bars == {"bar-probability": False, "bar-gradient": True, "bar-tsm": True}
    labels = {label.get("for") for label in page[1].all("label")}
    assert {"opacity", "threshold", "layer"} <= labels


def test_an_encoder_alone_has_maps_and_nothing_that_is_judged(tmp_path: Path) -> None:
    text, parsed = write(tmp_path, replace(content(), findings=None, explanations=content().explanations[1:]))
    assert list(data_of(text)["layers"]) == ["tsm"] and data_of(text)["threshold"] is None
    assert not re.search("robability|hreshold|Regions|Slide score", parsed.words)
    assert "Strength: TSM" in parsed.words and {each.get("id") for each in parsed.all("input")} == {"opacity", "grey"}


def test_a_slide_without_regions_or_sight_has_a_report(tmp_path: Path) -> None:
    blind = replace(judged().probability, values=np.full((60, 80), np.nan, np.float32))
    found = replace(judged(), probability=blind, regions=[], region_pictures=[])
    text, parsed = write(tmp_path, replace(content(), findings=found))
    assert (
        "No region as large as a tile of the network has a probability above 0.5; smaller ones are left out."
        in parsed.words
    )
    assert np.isnan(unpack(data_of(text)["layers"]["probability"])).all()


def test_every_region_is_listed_those_beyond_the_first_behind_a_fold(tmp_path: Path) -> None:
    found = judged()
    many = found.regions[:1] * (LISTED_REGIONS + 3)
    text, parsed = write(tmp_path, replace(content(), findings=replace(found, regions=many)))
    numbers = [button["data-region"] for button in parsed.all("button") if "data-region" in button]
    assert numbers == [str(number) for number in range(len(many))] and len(data_of(text)["regions"]) == len(many)
    assert "The other 3" in parsed.words and len(parsed.all("details")) == 1


def test_tiles_for_zooming_are_in_the_page(tmp_path: Path) -> None:
    tiles = ZoomTiles([1, 2], {(0, 3, 4): b"fine", (1, 0, 0): b"coarse"}, "Regions at 0.25.")
    write_report(tmp_path / "report.html", content(), lambda _: tiles)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    shown = data_of(text)["tiles"]
    assert shown["steps"] == [1, 2] and "Regions at 0.25." in Page(text).words
    kept = [{place: base64.b64decode(data) for place, data in level.items()} for level in shown["kept"]]
    assert kept == [{"3_4": b"fine"}, {"0_0": b"coarse"}]


def test_a_page_stays_within_its_size_whatever_is_asked_for(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).random((4, MAX_MAP_SIDE_PX, MAX_MAP_SIDE_PX), np.float32)
    explanations = [
        shown_explanation("tsm", replace(FEATURES, values=values), 1.0, "")._replace(key=f"noise{number}")
        for number, values in enumerate(noise)
    ]
    budgets: list[int] = []

    def cut(budget: int) -> ZoomTiles:
        budgets.append(budget)
        return ZoomTiles([1, 2], {(0, 0, 0): bytes(budget)}, "")

    path = tmp_path / "report.html"
    for shown in (explanations, explanations[:1]):
        write_report(path, replace(content(), explanations=shown), cut)
        assert path.stat().st_size <= PAGE_BYTES
        layers = data_of(path.read_text(encoding="utf-8"))["layers"]
        # Noise packs badly: only one map of it has room as it is.
        assert {layers[one.key]["rows"] for one in shown} == {MAX_MAP_SIDE_PX if len(shown) == 1 else 768}
    assert 0 < budgets[0] <= BUDGET_BYTES and 0 < budgets[1] <= BUDGET_BYTES


def test_index_lists_slides_and_failures(tmp_path: Path) -> None:
    rows = [
        SlideResult(
            *("slide #1", "ok"),
            score=0.9101,
            regions=2,
            region_area_mm2=1.5,
            model="A model.",
            misfit="No fit.",
            verdict="Below the cut-off 0.9104.",
            cut_off=0.9104,
        ),
        SlideResult(NASTY, "failed", reason=NASTY),
        SlideResult("blank", "empty", reason="no tissue found"),
        SlideResult("javascript:alert(1)", "ok"),
    ]
    write_index(tmp_path / "index.html", rows, "Cohort & co")
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    parsed = Page(text)
    assert [link["href"] for link in parsed.all("a")] == [
        "blank/thumbnail.png",
        "slide%20%231/report.html",
        "javascript%3Aalert%281%29/report.html",
    ]
    assert [image["src"] for image in parsed.all("img")] == [
        "slide%20%231/overlay.png",
        "javascript%3Aalert%281%29/overlay.png",
    ]
    assert not parsed.all("script")
    assert "2 done, 1 without tissue, 1 failed." in parsed.words
    for words in (
        "A model.",
        "No fit.",
        "Below the cut-off 0.9104.",
        "no tissue found",
        "0.9101",
        "1.5000",
        "Cohort & co",
        "Research use only.",
    ):
        assert words in parsed.words


def test_names_that_are_not_text_are_written(tmp_path: Path) -> None:
    write(tmp_path, replace(content(), name="caf\udce9"))
    rows = [SlideResult("caf\udce9", "failed", reason="x"), SlideResult("th\udce9", "ok", score=0.5)]
    write_index(tmp_path / "index.html", rows, "t")
    text = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "caf?" in text and 'href="th%E9/report.html"' in text


def test_masks_are_called_masks(page: tuple[str, Page], tmp_path: Path) -> None:
    report = content()
    masks = replace(
        SALIENCY, values=np.abs(SALIENCY.values).clip(0, 1), quantity="mask", unit="share", meaning="Masks."
    )
    found = judged()
    regions = find_regions(found.probability, 0.5, 0.25, (8000, 6000), masks)
    explanations = [shown_explanation("mask", masks, 1.0, "")]
    _, parsed = write(tmp_path, replace(report, explanations=explanations, findings=replace(found, regions=regions)))
    assert "aliency" in page[1].words and "aliency" not in parsed.words
    assert "Mean mask" in parsed.words and "Mask (share)" in parsed.words
    assert f"{regions[0].mean_saliency:.3g}" in parsed.words and "+0." not in parsed.words
