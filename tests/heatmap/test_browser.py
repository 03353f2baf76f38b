"""Pages in headless Chromium: what a reader sees, sets and prints."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsd.drawing import pale
from medsd.heatmap.numbers import probability_text
from medsd.heatmap.regions import find_regions
from medsd.heatmap.report import SlideResult, write_index, write_report
from medsd.heatmap.scale import probability_scale
from medsd.heatmap.tiff import read_ome_tiff
from medsd.heatmap.view import ViewServer
from medsd.record import read_record, rewrite_record
from tests.heatmap.browser import PROGRAM, Browser
from tests.heatmap.test_report import NASTY, content, judged

pytestmark = pytest.mark.skipif(PROGRAM is None, reason="no Chromium here; install the package 'chromium'")

AXE = Path(__file__).parents[2] / "node_modules" / "axe-core" / "axe.min.js"
A4, LETTER = (8.27, 11.69), (8.5, 11.0)
PIXEL = """(([x, y]) => { draw(1); const place = [(x - view.x) * view.scale, (y - view.y) * view.scale].map(Math.floor);
    return [...context.getImageData(...place, 1, 1).data].slice(0, 3); })"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    running = Browser()
    yield running
    running.close()


@pytest.fixture
def report(browser: Browser, mapped: Path) -> Browser:
    browser.open((mapped / "report.html").as_uri())
    return browser


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page of hostile texts, whose first region has a hole."""
    found = judged()
    values = found.probability.values.copy()
    values[10:50, 10:70], values[25:35, 30:45] = 0.9, 0.1
    probability = replace(found.probability, values=values)
    regions = find_regions(probability, 0.5, 0.25, (8000, 6000))
    findings = replace(found, probability=probability, regions=regions, threshold_source=NASTY)
    shown = replace(content(), name=NASTY, model=NASTY, misfits=[NASTY], caveats=[NASTY], findings=findings)
    path = tmp_path_factory.mktemp("drawn") / "report.html"
    write_report(path, shown)
    return path


def test_a_page_starts_without_a_fault_and_asks_for_nothing(report: Browser, mapped: Path) -> None:
    assert report.errors == [] and report.requests == [(mapped / "report.html").as_uri()]
    assert report.evaluate("state.layer") == "probability" and report.evaluate("byId('notice').hidden")


def test_colours_are_the_scales_over_the_slide_in_grey(
    report: Browser, mapped: Path, fiducials: tuple[tuple[int, int], ...]
) -> None:
    report.evaluate("set('outline', false)")
    probability = read_ome_tiff(mapped / "probability.ome.tif")
    for x, y in fiducials:
        column, row = (int(place / probability.level0_px) for place in (x, y))
        # At the centre of a map pixel there is nothing between values.
        place = [(column + 0.5) * probability.level0_px, (row + 0.5) * probability.level0_px]
        value = report.evaluate(f"valueAt(data.layers.probability, ...{place})")
        assert value == pytest.approx(probability.values[row, column], abs=1e-4)
        report.evaluate(f"fit([{place[0]} - 40, {place[1]} - 40, {place[0]} + 40, {place[1]} + 40])")
        report.wait("[...loaded.values()].every((image) => image.ready)")
        shown = np.array(report.evaluate(f"{PIXEL}({place})"))
        report.evaluate("set('layer', 'none')")
        plain = np.array([[report.evaluate(f"{PIXEL}({place})")]], np.uint8)
        report.evaluate("set('layer', 'probability')")
        expected = probability_scale().over(pale(plain), np.array([[value]]))[0, 0]
        assert np.abs(shown - expected).max() <= 6 and shown[0] - shown[2] > 30


def test_between_map_pixels_values_are_interpolated_and_the_unseen_is_white(report: Browser) -> None:
    found = report.evaluate("""(() => {
      const values = Float32Array.of(0, 1, NaN, 1);
      const layer = { ...data.layers.probability, words: null, canvas: null,
        levels: [{ rows: 1, columns: 4, side: 100, values }] };
      Object.assign(view, { scale: 1, x: 0, y: 0 });
      const pixels = painted(layer, 400, 100).getContext("2d").getImageData(0, 50, 400, 1).data;
      return [50, 75, 100, 125, 150, 199, 201, 299, 301, 399].map((x) => [pixels[4 * x + 2], pixels[4 * x + 3]]);
    })()""")
    blue, alpha = zip(*found, strict=True)
    assert alpha == pytest.approx([0, 64, 128, 191, *[255] * 6], abs=3)
    assert [value > 250 for value in blue] == [False] * 6 + [True] * 2 + [False] * 2


def test_the_sliders_change_the_picture(report: Browser, fiducials: tuple[tuple[int, int], ...]) -> None:
    place, before = list(fiducials[0]), None
    for opacity in (0, 40, 100):
        report.evaluate(f"""(() => {{ const slider = byId("opacity"); slider.value = {opacity};
            slider.dispatchEvent(new Event("input")); }})()""")
        red, _, blue = report.evaluate(f"{PIXEL}({place})")
        assert before is None or red - blue > before + 10
        before = red - blue
        assert report.evaluate("getComputedStyle(document.querySelector('.ramp i')).opacity") == f"{opacity / 100:g}"
    assert report.evaluate("traced === null && byId('moved').hidden")
    report.evaluate("""(() => { const slider = byId("threshold"); slider.value = 0.9;
        slider.dispatchEvent(new Event("input")); })()""")
    assert report.evaluate("traced !== null && !byId('moved').hidden")
    assert "not the validated threshold" in report.evaluate("byId('shown').textContent")
    report.evaluate("byId('reset').click()")
    assert report.evaluate("traced === null && byId('moved').hidden")


def test_a_linked_threshold_next_to_the_validated_one_is_that(browser: Browser, drawn: Path) -> None:
    for linked, own in (("0.5012", True), ("0.51", False)):
        browser.open(f"{drawn.as_uri()}#threshold={linked}")
        assert browser.evaluate("[traced === null, byId('moved').hidden]") == [own, own]


def test_the_page_writes_probabilities_as_every_output_does(report: Browser) -> None:
    values = [0.0, 1.0, 0.2887, 0.0004, 0.00437, 0.9996, 0.99996, 3e-7, 1e-12, 0.9704, 0.5, -1e-9]
    found = report.evaluate(f"{json.dumps(values)}.map(probabilityText)")
    assert found == [probability_text(value) for value in values]


def test_show_moves_to_the_region_and_zooms_in(report: Browser) -> None:
    whole = report.evaluate("view.scale")
    report.evaluate("document.querySelector('[data-region=\"1\"]').click()")
    report.settle()
    left, top, right, bottom = report.evaluate("data.regions[1].box")
    x, y, scale = report.evaluate(
        "[view.x + viewer.clientWidth / 2 / view.scale, view.y + viewer.clientHeight / 2 / view.scale, view.scale]"
    )
    assert (x, y) == pytest.approx(((left + right) / 2, (top + bottom) / 2), abs=1)
    assert scale > 2 * whole and report.evaluate("document.activeElement === viewer")
    report.wait("byId('sharp').textContent === '0.5 µm per pixel'")


def test_the_keyboard_reaches_everything(report: Browser) -> None:
    report.evaluate("document.activeElement.blur()")
    reached = set()
    for _ in range(40):
        report.press("Tab")
        reached.add(report.evaluate("document.activeElement.id || document.activeElement.dataset.region || ''"))
    regions = {str(number) for number in range(report.evaluate("data.regions.length"))}
    assert (
        reached >= {"viewer", "zoom-in", "zoom-out", "fit", "layer", "opacity", "grey", "threshold", "reset"} | regions
    )
    report.evaluate("viewer.focus()")
    before = report.evaluate("[view.x, view.scale]")
    for key in ("ArrowRight", "+"):
        report.press(key)
    after = report.evaluate("[view.x, view.scale]")
    assert after[0] > before[0] and after[1] == pytest.approx(1.25 * before[1])
    assert report.evaluate("byId('at-probability').textContent") != "–"
    report.press("0")
    assert report.evaluate("view.scale") == pytest.approx(before[1])


def test_the_values_are_those_at_the_cross_however_the_view_is_moved(report: Browser) -> None:
    centre = "[(view.x + viewer.clientWidth / 2 / view.scale), (view.y + viewer.clientHeight / 2 / view.scale)]"
    report.evaluate("viewer.focus()")
    for key in ("ArrowLeft", "ArrowUp", "+"):
        report.press(key)
    wheel = "new WheelEvent('wheel', { deltaY: -200, clientX: 100, clientY: 300 })"
    for move in (
        "byId('fit').focus(), byId('fit').click()",
        f"viewer.dispatchEvent({wheel})",
        "viewer.style.height = '400px', window.dispatchEvent(new Event('resize'))",
    ):
        before = report.evaluate(centre)
        report.evaluate(move)
        report.settle()
        after = report.evaluate(centre)
        assert report.evaluate("cross") and after != pytest.approx(before, abs=1)
        assert report.evaluate("byId('at-px').textContent") == f"{int(after[0])}, {int(after[1])} px"
    for threshold, above in ((0.0, "yes"), (1.0, "no")):
        report.evaluate(f"fit(data.regions[0].box), setThreshold({threshold})")
        assert report.evaluate("byId('above').textContent") == above


@pytest.mark.parametrize("paper", [A4, LETTER], ids=["A4", "Letter"])
def test_the_printed_page_has_picture_bar_scale_and_legend(report: Browser, paper: tuple[float, float]) -> None:
    before = report.evaluate("[view.x, view.y, view.scale]")
    assert report.pdf(paper).startswith(b"%PDF")
    assert report.evaluate("[view.x, view.y, view.scale]") == before and report.errors == []
    report.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    report.call("Emulation.setEmulatedMedia", media="print", features=[])
    width = round(96 * (paper[0] - 2 * 14 / 25.4))
    report.call("Emulation.setDeviceMetricsOverride", width=width, height=1000, deviceScaleFactor=1, mobile=False)
    shown = """(name) => { const box = document.querySelector(name).getBoundingClientRect();
        return box.width > 100 && box.height > 8 && box.right <= innerWidth; }"""
    for part in (
        "#viewer",
        "#bar-probability .ramp",
        "#bar-probability .ticks",
        ".hues",
        "#shown",
        ".model",
        ".regions",
    ):
        assert report.evaluate(f"({shown})({part!r})"), part
    assert report.evaluate("[...document.querySelectorAll('button, input, select')].every((one) => !one.offsetWidth)")
    assert report.evaluate("document.documentElement.scrollWidth <= innerWidth")
    # As wide for its height as it is drawn, at three times the resolution of the screen; the scale line is on it.
    drawn, stretched = report.evaluate("[canvas.width / canvas.height, canvas.clientWidth / canvas.clientHeight]")
    assert drawn == pytest.approx(stretched, rel=0.01) and report.evaluate("canvas.width / canvas.clientWidth") == 3
    black = report.evaluate("""[...context.getImageData(0, canvas.height - 60, canvas.width, 1).data]
        .filter((value, at, all) => at % 4 === 0 && value === 0 && all[at + 3] === 255).length / 3""")
    assert black * report.evaluate("data.mpp / view.scale") == pytest.approx(200, rel=0.05)
    report.evaluate("window.dispatchEvent(new Event('afterprint'))")


def test_hostile_texts_stay_texts(browser: Browser, drawn: Path) -> None:
    browser.open(drawn.as_uri())
    assert browser.errors == [] and browser.evaluate("document.querySelector('h1').textContent") == NASTY
    assert browser.evaluate("document.scripts.length") == 2


def test_a_hole_is_no_part_of_its_region(browser: Browser, drawn: Path) -> None:
    browser.open(drawn.as_uri())
    inside = "context.setTransform(1, 0, 0, 1, 0, 0), context.isPointInPath(data.regions[0].path, {}, {}, 'evenodd')"
    assert browser.evaluate("data.regions[0].rings.length") == 2
    assert browser.evaluate(inside.format(1500, 1500)) and not browser.evaluate(inside.format(3700, 3000))


@pytest.mark.parametrize("dark", [False, True])
def test_it_reads_on_a_phone_and_in_the_dark(browser: Browser, drawn: Path, mapped: Path, dark: bool) -> None:
    rows = [
        SlideResult("a" * 60, "ok", score=0.9, model="m", misfit="Does not fit."),
        SlideResult("b", "failed", "c" * 80),
    ]
    write_index(drawn.parent / "index.html", rows, "Slides")
    for page in (drawn, mapped / "report.html", drawn.parent / "index.html"):
        browser.open(page.as_uri(), 390, 844, dark)
        assert browser.evaluate("document.documentElement.scrollWidth") == 390
        # WCAG AA asks for 4.5.
        faint = browser.evaluate("""[...document.querySelectorAll("h1, p, dt, dd, td, th, li, a, summary, button")]
          .filter((one) => one.offsetWidth && one.textContent.trim()).map((one) => {
            const light = (colour) => { const [r, g, b] = colour.match(/[\\d.]+/g).map(Number).map((value) =>
              value / 255 <= 0.04045 ? value / 255 / 12.92 : ((value / 255 + 0.055) / 1.055) ** 2.4);
              return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
            let below = one;
            while (getComputedStyle(below).backgroundColor === "rgba(0, 0, 0, 0)") below = below.parentElement;
            const [high, low] = [getComputedStyle(one).color, getComputedStyle(below).backgroundColor].map(light)
              .sort((a, b) => b - a);
            return [(high + 0.05) / (low + 0.05), one.outerHTML.slice(0, 80)];
          }).filter(([ratio]) => ratio < 4.5)""")
        assert faint == []


def test_no_name_takes_the_room_of_the_other_columns(browser: Browser, tmp_path: Path) -> None:
    said = "Below the cut-off 0.5, which found 10 of 10 validation slides with tumour and raised 1 of 9 without it."
    rows = [SlideResult("x" * 160, "ok", score=0.4, cut_off=0.5, verdict=said), SlideResult("y" * 160, "failed", said)]
    write_index(tmp_path / "index.html", rows, "Slides")
    (tmp_path / rows[0].slide).mkdir()
    Image.new("RGB", (1800, 900)).save(tmp_path / rows[0].slide / "overlay.png")
    for width in (1400, 780):
        browser.open((tmp_path / "index.html").as_uri(), width, 900)
        assert browser.evaluate("document.documentElement.scrollWidth") == width
        widths = browser.evaluate("""["Verdict", "Reason"].map((name) => document.querySelector(`[data-label=${name}]`))
          .concat(document.querySelector(".overlay")).map((one) => one.offsetWidth)""")
        assert min(widths) >= 150 and (width < 1000 or widths[-1] >= 300)
    browser.open((tmp_path / "index.html").as_uri(), 390, 844)
    labels = browser.evaluate("""[...document.querySelectorAll("[data-label]")]
      .map((one) => parseFloat(getComputedStyle(one, "::before").width))""")
    assert len(labels) == 6 and min(labels) > 30  # a word, not a letter


def test_every_control_and_picture_has_a_name(report: Browser) -> None:
    nameless = report.evaluate("""[...document.querySelectorAll("input, select, button, img")]
        .filter((one) => !(one.ariaLabel || one.textContent.trim() || one.labels?.length || one.hidden || one.alt))
        .map((one) => one.outerHTML)""")
    assert nameless == []
    assert report.evaluate("[document.documentElement.lang, document.querySelectorAll('h1').length]") == ["en", 1]


@pytest.mark.skipif(not AXE.is_file(), reason="no axe-core here; 'npm install axe-core' puts it into node_modules")
def test_axe_finds_no_serious_fault(browser: Browser, drawn: Path, mapped: Path) -> None:
    for page in (drawn, mapped / "report.html"):
        for width, dark in ((1400, False), (390, True)):
            browser.open(page.as_uri(), width, 1000, dark)
            browser.call("Runtime.evaluate", expression=AXE.read_text("utf-8"))
            found = browser.evaluate("axe.run().then((result) => result.violations.map((one) => [one.impact, one.id]))")
            assert [name for impact, name in found if impact in ("serious", "critical")] == []


def test_a_viewer_of_no_width_is_no_fault(report: Browser) -> None:
    for width in (0, 300):
        report.evaluate(f"viewer.style.width = '{width}px', draw(1)")
        report.settle()
    assert report.errors == []


@contextmanager
def serving(folder: Path) -> Iterator[ViewServer]:
    with ViewServer(folder) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_behind_the_server_all_of_the_slide_is_there(browser: Browser, mapped: Path) -> None:
    with serving(mapped.parent) as server:
        browser.open(f"{server.address}fiducials/report.html")
        assert browser.evaluate("location.search") == "?tiles"
        # Glass, of which the page itself holds the overview alone.
        browser.evaluate("fit([0, 0, 150, 150])")
        browser.wait("byId('sharp').textContent === '0.5 µm per pixel'")
        assert any(address.endswith("/fiducials/tiles/0/0_0.jpg") for address in browser.requests)
        assert browser.errors == [] and browser.evaluate("byId('untiled').offsetHeight") == 0


def test_behind_the_server_the_page_says_that_the_slide_is_gone(browser: Browser, mapped: Path, tmp_path: Path) -> None:
    shutil.copytree(mapped, tmp_path / "fiducials")
    record = read_record(tmp_path / "fiducials" / "record.json")
    assert record is not None
    record["result"]["path"] = str(tmp_path / "gone.tif")
    rewrite_record(tmp_path / "fiducials" / "record.json", record)
    with serving(tmp_path) as server:
        browser.open(f"{server.address}fiducials/report.html")
        browser.evaluate("fit([0, 0, 150, 150])")
        browser.wait("byId('untiled').offsetHeight > 0")
