"""Slides become folders of outputs: at the right place, whole or not at all, each slide on its own."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import shapely
import tifffile
import torch
from PIL import Image

import medsd.heatmap.findings as findings
from medsd.cohort.entry import SlideEntry
from medsd.cohort.kept import gather
from medsd.cohort.learnt import learnt_from, slide_sources
from medsd.cohort.manifest import find_slides_at
from medsd.errors import ConfigError, DatasetError, OutputError, WeightsError
from medsd.heatmap.cohort import Maps, map_slides, read_results, read_slide_record
from medsd.heatmap.model import MapRequest
from medsd.heatmap.overlay import head_px, layout
from medsd.heatmap.tiff import read_ome_tiff
from medsd.networks.aim import AimClassifier
from medsd.networks.calibrated import Calibration, SlideCutOff
from medsd.networks.classifier import TileClassifier
from medsd.networks.weights import save_classifier
from medsd.record import rewrite_record
from medsd.tables import read_table
from tests.heatmap.made_up import trained_looking
from tests.heatmap.mapping import job_of, map_here


def blank_slide(path: Path) -> Path:
    white = np.full((512, 512, 3), 245, np.uint8)
    tifffile.imwrite(path, white, tile=(256, 256), photometric="rgb", resolution=(20000, 20000), resolutionunit=3)
    return path


@pytest.mark.parametrize("quantity", ["probability", "saliency"])
def test_maps_show_the_fiducials_at_their_place(mapped, fiducials, quantity):
    value_map = read_ome_tiff(mapped / f"{quantity}.ome.tif")
    values = np.nan_to_num(value_map.values)
    rows, columns = np.indices(values.shape)
    for x, y in fiducials:
        near = np.hypot((columns + 0.5) * value_map.level0_px - x, (rows + 0.5) * value_map.level0_px - y) < 160
        assert values[near].max() > 0.5 * values.max()
        weight = values * near
        found = [((axis + 0.5) * value_map.level0_px * weight).sum() / weight.sum() for axis in (columns, rows)]
        assert np.abs(np.subtract(found, (x, y))).max() <= value_map.level0_px


def test_contours_show_the_fiducials_at_their_place(mapped, fiducials):
    features = json.loads((mapped / "regions.geojson").read_text())["features"]
    assert len(features) == len(fiducials)
    centres = np.array([shapely.geometry.shape(feature["geometry"]).centroid.coords[0] for feature in features])
    map_pixel = read_ome_tiff(mapped / "probability.ome.tif").level0_px
    for place in fiducials:
        assert np.abs(centres - place).max(axis=1).min() <= map_pixel


def test_the_overlay_shows_the_fiducials_at_their_place(mapped, fiducials, fiducial_spec):
    """In the probability panel the orange end of the scale lies over the discs, nowhere else."""
    with Image.open(mapped / "overlay.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(float)
    box = layout(3, 1.0, head_px(2))[0][1]
    panel = pixels[box.top : box.top + box.height, box.left : box.left + box.width]
    level0_px = fiducial_spec.size_px / box.width
    # The slide is grey there: red far above blue is the map's.
    rows, columns = np.nonzero(panel[..., 0] - panel[..., 2] > 60)
    places = np.stack([(columns + 0.5) * level0_px, (rows + 0.5) * level0_px], axis=1)
    nearest = np.array([[np.abs(place - centre).max() for centre in fiducials] for place in places])
    assert len(places) and nearest.min(axis=1).max() <= 160
    for number, centre in enumerate(fiducials):
        own = places[nearest.argmin(axis=1) == number]
        assert np.abs(own.mean(axis=0) - centre).max() <= 64


def test_what_is_complete_is_kept_and_another_recipe_redone(tmp_path, small_slide, green_weights, monkeypatch):
    monkeypatch.setattr(findings, "_TOP_SHARE", 0.5)  # a hundredth of so small a map is a single value
    (first,) = map_here([small_slide], green_weights, tmp_path)
    folder = tmp_path / "small"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert map_here([small_slide], green_weights, tmp_path) == [first]
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    probability = read_ome_tiff(folder / "probability.ome.tif")
    score = findings.top_mean(probability.values[probability.seen])
    assert first.status == "ok" and first.seconds > 0 and first.score == pytest.approx(score)
    (folder / "overlay.png").unlink()
    map_here([small_slide], green_weights, tmp_path)
    assert (folder / "overlay.png").is_file()
    map_slides([job_of(small_slide, mpp=0.25)], green_weights, tmp_path, isolate=False)
    record = read_slide_record(folder)
    assert record["recipe"]["mpp"] == record["scale"]["mpp"] == 0.25
    assert record["scale"]["mpp_source"] == "given by the caller; the file says 0.5"
    words = (
        "Classifier trained on green discs; tissue: not stated; at 1 µm per pixel. Probabilities are not corrected for"
    )
    assert record["model"] == first.model and first.model.startswith(words)
    assert record["misfits"][0].startswith("Scale in doubt: 0.25 µm per pixel was given, the file says 0.5.")
    assert (
        "Scale in doubt" in (tmp_path / "index.html").read_text()
        and first.misfit == ""
        and first.model in (tmp_path / "slides.csv").read_text(encoding="utf-8")
    )
    assert read_ome_tiff(folder / "probability.ome.tif").level0_px == 128


def test_one_bad_slide_costs_only_itself(tmp_path, small_slide, green_weights):
    broken = tmp_path / "broken.tif"
    broken.write_bytes(b"not a slide")
    truncated = tmp_path / "truncated.tif"
    truncated.write_bytes(small_slide.read_bytes()[:20_000])
    jobs = [job_of(path) for path in (broken, tmp_path / "missing.tif", blank_slide(tmp_path / "blank.tif"), truncated)]
    results = map_slides([*jobs, job_of(small_slide)], green_weights, tmp_path / "out")
    assert [result.status for result in results] == ["failed", "failed", "empty", "failed", "ok"]
    assert str(broken) in results[0].reason and "no such file" in results[1].reason
    assert (tmp_path / "out" / "blank" / "thumbnail.png").is_file()
    assert not (tmp_path / "out" / "blank" / "overlay.png").exists()
    assert [path.name for path in (tmp_path / "out" / "truncated").iterdir()] == ["record.json"]
    assert read_results(tmp_path / "out") == results
    # No regions were looked for: a mean over the table is one of slides that were judged.
    table = read_table(tmp_path / "out" / "slides.csv").set_index("slide")[["regions", "region_area_mm2"]]
    assert (table.drop("small") == "").all(axis=None) and (table.loc["small"] != "").all()
    page = (tmp_path / "out" / "index.html").read_text()
    assert "no tissue" in page and "no such file" in page
    assert map_slides(jobs[2:3], green_weights, tmp_path / "out")[0].status == "empty"
    record = read_slide_record(tmp_path / "out" / "blank")
    record["result"] |= {"regions": 0, "region_area_mm2": 0.0}  # as records of before have it
    rewrite_record(tmp_path / "out" / "blank" / "record.json", record)
    (blank,) = [row for row in gather(Maps(tmp_path / "out")) if row.slide == "blank"]
    assert (blank.regions, blank.region_area_mm2) == (None, None)


def test_no_old_output_stands_beside_a_new_status(tmp_path, small_slide, green_weights):
    slide = tmp_path / "slide.tif"
    slide.write_bytes(small_slide.read_bytes())
    out = tmp_path / "out"
    map_here([slide], green_weights, out, methods=("gradient_x_activation", "captum.LayerGradientXActivation"))
    assert (out / "slide" / "captum.LayerGradientXActivation.ome.tif").is_file()
    (out / "slide" / ".4194305-overlay.png").touch()  # as a killed run leaves it
    slide.unlink()
    assert map_here([slide], green_weights, out)[0].status == "failed"
    blank_slide(slide)
    assert map_here([slide], green_weights, out)[0].status == "empty"
    assert sorted(path.name for path in (out / "slide").iterdir()) == ["record.json", "thumbnail.png"]


def test_what_nobody_foresaw_costs_one_slide_too(tmp_path, small_slide, green_weights, monkeypatch):
    def full(*_arguments):
        raise MemoryError("cannot allocate")

    monkeypatch.setattr(findings, "find_regions", full)
    (result,) = map_here([small_slide], green_weights, tmp_path)
    assert result.status == "failed" and "MemoryError" in result.reason and "\n" not in result.reason
    assert (tmp_path / "index.html").is_file()


def test_a_strip_thinner_than_a_map_pixel_is_no_crash(tmp_path, green_weights):
    pixels = np.full((512, 512, 3), 245, np.uint8)
    pixels[256:284, 100:400] = (190, 80, 160)
    path = tmp_path / "strip.tif"
    tifffile.imwrite(path, pixels, tile=(256, 256), photometric="rgb", resolution=(20000, 20000), resolutionunit=3)
    (result,) = map_here([path], green_weights, tmp_path / "out")
    assert result.status in ("ok", "empty")


def test_bad_requests_are_named(tmp_path, fiducial_slide, green_weights, green_classifier, green_card):
    job = job_of(fiducial_slide)
    with pytest.raises(DatasetError, match="fiducials"):
        map_slides([job, job], green_weights, tmp_path)
    with pytest.raises(DatasetError, match="no slides"):
        map_slides([], green_weights, tmp_path)
    with pytest.raises(WeightsError, match="no such weights"):
        map_slides([job], tmp_path / "none.safetensors", tmp_path)
    save_classifier(tmp_path / "raw.safetensors", green_classifier, replace(green_card, calibration=None))
    with pytest.raises(WeightsError, match="not calibrated"):
        map_slides([job], tmp_path / "raw.safetensors", tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="another output folder"):
        map_slides([job], green_weights, tmp_path / "file" / "out")
    with pytest.raises(ConfigError, match="device 'cuda:99'"):
        map_slides([job], green_weights, tmp_path, device="cuda:99")
    with pytest.raises(ConfigError, match="block_px=0"):
        map_slides([job], green_weights, tmp_path, MapRequest(block_px=0))
    with pytest.raises(DatasetError, match="run the stage 'heatmap'"):
        read_results(tmp_path / "nowhere")


def test_prevalence_and_verdict_stand_on_every_output(tmp_path, small_slide, green_classifier, green_card):
    """The map is that of other class shares, and every file says of which, and what the score means."""
    cut_off = SlideCutOff(0.9, 4, 4, 3, 0, (1.0, 0.4, 1.0), (1.0, 0.29, 1.0))
    shares = {"drawn_shares": (0.5, 0.5), "tissue_shares": (0.96, 0.04)}
    new = replace(green_card.calibration, **shares, cut_off=cut_off)
    maps = {}
    for name, calibration, said, assumed in (
        ("new", new, "the cut-off 0.9, which found 4 of 4", "assume that 4 % of the tissue is tumour, as in the green"),
        ("old", green_card.calibration, "No cut-off is known", "are not corrected for how rare tumour is."),
    ):
        out, weights = tmp_path / name, tmp_path / f"{name}.safetensors"
        save_classifier(weights, green_classifier, replace(green_card, calibration=calibration))
        map_here([small_slide], weights, out)
        (row,) = read_results(out)
        assert said in row.verdict and assumed in row.model
        for file in ("small/record.json", "small/report.html", "index.html"):
            text = (out / file).read_text("utf-8").replace("\u00a0", " ")
            assert row.verdict in text and assumed in text
        maps[name] = read_ome_tiff(out / "small" / "probability.ome.tif").values
    seen = np.isfinite(maps["old"])
    odds = {name: values[seen].astype(np.float64) / (1 - values[seen]) for name, values in maps.items()}
    np.testing.assert_allclose(odds["new"], odds["old"] * 0.04 / 0.96, rtol=2e-4)


def test_the_class_asked_for_is_mapped_by_its_name(tmp_path, fiducial_slide, green_classifier, green_card, mapped):
    """Of three classes the third is green: its map is the one of two classes, and every file speaks of it alone."""
    classes = ("benign", "in situ", "invasive")
    network = TileClassifier("test_resnet", classes).eval()
    state = green_classifier.state_dict()
    for name in ("head.weight", "head.bias"):
        # As likely as both of the others are together where there is nothing green.
        state[name] = torch.stack([state[name][0], state[name][0], state[name][1] + (name == "head.bias") * np.log(2)])
    network.load_state_dict(state)
    cut_off = SlideCutOff(0.4, 3, 3, 9, 1, (1.0, 0.3, 1.0), (8 / 9, 0.52, 0.997))
    other = replace(green_card.calibration, cut_off=cut_off)
    card = replace(green_card, classes=classes, others={"invasive": other})
    save_classifier(tmp_path / "w.safetensors", network, card)
    slide, weights = [fiducial_slide], tmp_path / "w.safetensors"
    (first,) = map_here(slide, weights, tmp_path / "out")
    (row,) = map_here(slide, weights, tmp_path / "out", target="Invasive", workers=2)
    assert (first.target, row.target) == ("in situ", "invasive") and row.score > first.score
    assert [result.target for result in read_results(tmp_path / "out")] == ["invasive"]
    folder = tmp_path / "out" / fiducial_slide.stem
    found, alone = (read_ome_tiff(place / "probability.ome.tif") for place in (folder, mapped))
    np.testing.assert_allclose(found.values, alone.values, atol=1e-5)
    assert found.target == "invasive" and read_slide_record(folder)["target"] == "invasive"
    drawn = json.loads((folder / "regions.geojson").read_text())["features"]
    assert {feature["properties"]["classification"]["name"] for feature in drawn} == {"Invasive (model)"}
    assert "3 of 3 validation slides with invasive" in row.verdict
    told = "Mapped: invasive alone, against benign and in situ, which are not told apart here: tissue in grey or blue"
    assert told in row.model and "against benign and invasive, which" in first.model
    page = (folder / "report.html").read_text("utf-8")
    assert (
        told in page and "<dt>Slide score, invasive</dt>" in page and told in (tmp_path / "out/index.html").read_text()
    )
    for path in ("record.json", "report.html", "regions.geojson", "../index.html", "../slides.csv"):
        text = re.sub("[A-Za-z0-9+/]{60,}", "", (folder / path).read_text("utf-8"))  # without pictures
        assert "tumo" not in text.casefold()
    for target, words in {
        "benign": "these weights map in situ, invasive; thresholds of 'benign' were never fixed",
        "tumour": "target='tumour': the classes are benign, in situ, invasive",
    }.items():
        with pytest.raises(ConfigError, match=words):
            map_here(slide, weights, tmp_path / "none", target=target)


def hurt_tiles(slide: Path, copy: Path, level: int, numbers: list[int]) -> None:
    """A copy of a slide whose tiles of those numbers hold zeros in that level."""
    data = bytearray(slide.read_bytes())
    with tifffile.TiffFile(slide) as file:
        page = file.pages[level]
        for number in numbers:
            start, count = page.dataoffsets[number], page.databytecounts[number]
            data[start : start + count] = bytes(count)
    copy.write_bytes(data)


def test_what_cannot_be_decoded_is_not_judged_and_said_so(tmp_path, mapped, fiducial_slide, green_weights):
    damaged = tmp_path / fiducial_slide.name
    hurt_tiles(fiducial_slide, damaged, 1, [2 * 4 + 1])  # level-0 pixels 512 to 1024 across, 1024 to 1536 down
    (result,) = map_slides([job_of(damaged)], green_weights, tmp_path / "out", MapRequest(max_unseen=0.3))
    assert result.status == "ok" and "of the tissue could not be decoded" in result.reason
    folder = tmp_path / "out" / result.slide
    assert 0 < read_slide_record(folder)["unseen_share"] < 0.3
    whole, part = (read_ome_tiff(at / "saliency.ome.tif") for at in (mapped, folder))
    left, top, right, bottom = (round(place / part.level0_px) for place in (512, 1024, 1024, 1536))
    hole = np.isfinite(whole.values) & ~np.isfinite(part.values)
    assert hole[top:bottom, left:right].all()
    # Map pixels beside the tile whose first pixel is mixed with the tile's last count as well.
    assert hole.sum() <= (bottom - top + 1) * (right - left + 1)
    # Nothing moves elsewhere, but for the rim of the network's sight around the hole.
    far = np.isfinite(part.values)
    far[top - 24 : bottom + 24, left - 24 : right + 24] = False
    assert np.allclose(part.values[far], whole.values[far], rtol=0, atol=1e-6 * np.nanmax(np.abs(whole.values)))
    assert "could not be decoded and was not judged" in (folder / "report.html").read_text("utf-8")


def test_a_slide_with_too_much_damage_has_failed(tmp_path, small_slide, green_weights):
    damaged, out = tmp_path / "bad.tif", tmp_path / "out"
    hurt_tiles(small_slide, damaged, 0, [1, 2])
    bad, fine = map_here([damaged, small_slide], green_weights, out)
    assert bad.status == "failed" and "cannot be decoded, more than 5 %" in bad.reason and "bad.tif" in bad.reason
    assert fine.status == "ok"
    assert map_here([damaged], green_weights, out, max_unseen=0.9)[0].status == "ok"


def test_a_tempered_classifier_with_masks_is_mapped(tmp_path, small_slide, green_card):
    torch.manual_seed(0)
    network = AimClassifier("test_resnet", feature_width=8, mask_width=8).eval()
    torch.nn.init.zeros_(network.head.weight)
    network.head.bias.data = torch.tensor([0.0, 3.0])
    calibration = Calibration(0.5, {"mask": 1.0}, "layer2", "none", "green discs", temperature=2.0)
    card = replace(green_card, tile_px=64, architecture="aim", options=network.options, calibration=calibration)
    save_classifier(tmp_path / "aim.safetensors", network, card)
    (result,) = map_here([small_slide], tmp_path / "aim.safetensors", tmp_path)
    assert result.status == "ok" and result.score == pytest.approx(1 / (1 + np.exp(-1.5)), abs=1e-6)
    masks = read_ome_tiff(tmp_path / "small" / "saliency.ome.tif")
    seen = masks.values[masks.seen]
    assert masks.quantity == "mask" and seen.min() >= 0 and seen.max() <= 1
    assert "blended tiles of 64 px" in read_slide_record(tmp_path / "small")["methods"][0]


def test_two_slides_of_one_name_are_told_apart_everywhere(tmp_path, small_slide, green_weights):
    """A pathologist has two reports open, and both would be headed HE."""
    for folder in "ab":
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "HE.tif").write_bytes(small_slide.read_bytes())
    rows = map_slides(find_slides_at([tmp_path / "a", tmp_path / "b"]), green_weights, tmp_path / "out", isolate=False)
    index = (tmp_path / "out" / "index.html").read_text()
    ids = set()
    for row, folder in zip(rows, "ab", strict=True):
        page = (tmp_path / "out" / row.slide / "report.html").read_text()
        assert row.slide.startswith("HE-") and f"<h1>{row.slide}</h1>" in page and f"{folder}/HE.tif, read by" in page
        assert f"{folder}/HE.tif" in index
        drawn = json.loads((tmp_path / "out" / row.slide / "regions.geojson").read_text())["features"]
        ids |= {feature["id"] for feature in drawn}
    assert len(ids) == 2 * len(drawn)
    assert [row.path for row in read_results(tmp_path / "out")] == [row.path for row in rows]


def test_runs_into_one_folder_add_up_and_another_slide_of_a_name_is_refused(tmp_path, small_slide, green_weights):
    out, other = tmp_path / "out", blank_slide(tmp_path / small_slide.name)
    map_here([small_slide], green_weights, out)
    assert map_here([blank_slide(tmp_path / "blank.tif")], green_weights, out)[0].status == "empty"
    assert [result.slide for result in read_results(out)] == ["blank", "small"]
    assert "small/report.html" in (out / "index.html").read_text()
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    with pytest.raises(DatasetError, match=r"out holds outputs of another slide of this name, .*; rename"):
        map_here([other], green_weights, out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_an_index_of_two_networks_tells_them_apart(tmp_path, small_slide, green_classifier, green_card):
    """Both say of themselves what they were trained on, in the same words."""
    out, other = tmp_path / "out", tmp_path / "other.tif"
    other.write_bytes(small_slide.read_bytes())
    for name, state in (
        ("first", green_classifier.state_dict()),
        ("second", trained_looking("test_resnet").state_dict()),
    ):
        network = TileClassifier("test_resnet").eval()
        network.load_state_dict(state)
        save_classifier(tmp_path / name, network, green_card)
    (first,) = map_here([small_slide], tmp_path / "first", out)
    assert first.weights and "networks" not in (out / "index.html").read_text()
    record = read_slide_record(out / "small")
    del record["result"]["weights"]  # as records of before have none
    rewrite_record(out / "small" / "record.json", record)
    (second,) = map_here([other], tmp_path / "second", out)
    assert first.model == second.model and len({first.weights, second.weights}) == 2
    page = (out / "index.html").read_text()
    assert f"Slides of 2 networks (weights {second.weights}, {first.weights})" in page and "<th>Weights</th>" in page
    assert {row.slide: row.weights for row in read_results(out)} == {"small": first.weights, "other": second.weights}
    assert map_here([small_slide], tmp_path / "first", out) == [first]


def test_the_map_of_a_slide_that_was_learnt_from_is_no_test(tmp_path, small_slide, green_classifier, green_card):
    entry = SlideEntry("small", small_slide, patient="p1")
    learnt = learnt_from(SimpleNamespace(sources=lambda _: slide_sources([entry])))
    save_classifier(tmp_path / "w.safetensors", green_classifier, replace(green_card, learnt_from=learnt))
    (row,) = map_slides([entry], tmp_path / "w.safetensors", tmp_path / "out")
    words = "No test: the network learnt from this slide."
    assert words in row.misfit and words in (tmp_path / "out" / "small" / "report.html").read_text()
    assert read_slide_record(tmp_path / "out" / "small")["misfits"][0].startswith(words)
