"""The default bundle in small, as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import shapely
import torch
from monai.bundle import ConfigWorkflow

from medsd.bundle import summary
from medsd.heatmap.tiff import read_ome_tiff
from medsd.networks.weights import load_classifier

ROOT = Path(__file__).parents[2]
BUNDLE = str(ROOT / "bundles" / "camelyon.json")
SMALL = {
    "phantom_slides": 6,
    "phantom_size_px": 1024,
    "encoder": "test_resnet",
    "max_epochs": 2,
    "samples_per_epoch": 128,
    "batch_size": 16,
    "block_px": 256,
    "explained_tiles": 4,
}


def run_stage(stage: str, folder: Path, **overrides: object) -> ConfigWorkflow:
    flow = ConfigWorkflow(
        config_file=BUNDLE,
        workflow_type="train",
        logging_file=False,
        run_id=stage,
        bundle_root=str(ROOT),
        **{"phantom_dir": str(folder / "phantom"), "output_dir": str(folder / "out"), **SMALL, **overrides},
    )
    flow.initialize()
    flow.run()
    return flow


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A whole run by the command line, from a folder that is not the repository's."""
    folder = tmp_path_factory.mktemp("run")
    arguments = [f"--{key}={value}" for key, value in SMALL.items()]
    arguments += [f"--bundle_root={ROOT}", f"--phantom_dir={folder / 'phantom'}", f"--output_dir={folder / 'out'}"]
    command = [sys.executable, "-m", "monai.bundle", "run", f"--config_file={BUNDLE}", *arguments]
    done = subprocess.run(
        command,
        cwd=folder,
        capture_output=True,
        text=True,
        # As many threads as here: sums are rounded by how they are parted, and weights are compared.
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "patch AUC" in done.stdout and "heatmaps" in done.stdout
    assert "ERROR" not in done.stderr
    return folder


def test_every_promised_file_is_there(finished):
    out = finished / "out"
    for name in ("model.safetensors", "scores.json", "summary.png", "training/history.csv", "prepared/tiles.npz"):
        assert (out / name).is_file(), name
    slides = ["test_001", "test_002"]
    for slide in slides:
        for name in ("saliency.ome.tif", "probability.ome.tif", "overlay.png", "regions.geojson", "report.html"):
            assert (out / "heatmaps" / slide / name).is_file(), name
        record = json.loads((out / "heatmaps" / slide / "record.json").read_text())
        assert record["status"] == "ok" and record["scale"]["mpp"] == 0.5
        assert record["scale"]["mpp_source"] == "TIFF resolution tags"
    leftovers = [path for path in finished.rglob("*") if path.is_file() and path.name.startswith(".")]
    assert leftovers == []


def test_scores_are_of_the_held_out_slides(finished):
    scores = json.loads((finished / "out" / "scores.json").read_text())
    assert scores["tiles"]["groups"] == 2 and 0 <= scores["tiles"]["patch_auc"]["value"] <= 1
    assert {name: label for name, (label, _) in scores["slides"]["slides"].items()} == {"test_001": 1, "test_002": 0}
    assert set(scores["slides"]["pointing"]) == {"test_001"}
    _, card, _ = load_classifier(finished / "out" / "model.safetensors")
    assert card.calibration is not None and scores["calibration"]["temperature"] == card.calibration.temperature != 1
    assert scores["explanations"]["judged"] == 4 and set(scores["explanations"]["maps"]) == {"gradient"}


def test_maps_and_regions_agree_with_the_weights(finished):
    heatmaps = finished / "out" / "heatmaps"
    _, card, digest = load_classifier(finished / "out" / "model.safetensors")
    assert card.calibration is not None
    record = json.loads((heatmaps / "test_001" / "record.json").read_text())
    assert record["recipe"]["weights_sha256"] == digest
    probability = read_ome_tiff(heatmaps / "test_001" / "probability.ome.tif")
    assert probability.level0_px == 64 and probability.mpp == 32
    regions = json.loads((heatmaps / "test_001" / "regions.geojson").read_text())["features"]
    whole = shapely.box(0, 0, 1024, 1024)
    assert all(whole.covers(shapely.geometry.shape(region["geometry"])) for region in regions)
    above = np.nansum(probability.values > card.calibration.threshold)
    assert above > 0 or not regions


def test_running_again_keeps_what_is_done(finished):
    files = [path for path in (finished / "phantom").rglob("*") if path.is_file()]
    files += [*(finished / "out" / "heatmaps").glob("*/*"), finished / "out" / "training" / "checkpoint.pt"]
    before = {path: path.stat().st_mtime_ns for path in files}
    for stage in ("prepare", "finetune", "heatmap"):
        run_stage(stage, finished)
    assert {path: path.stat().st_mtime_ns for path in files} == before


def test_monai_finds_what_it_requires_of_a_training_bundle(finished):
    flow = run_stage("prepare", finished)
    assert flow.check_properties() == []


def test_the_same_seed_gives_the_same_weights(finished, tmp_path):
    (tmp_path / "phantom").symlink_to(finished / "phantom")
    for stage in ("prepare", "finetune"):
        run_stage(stage, tmp_path)
    assert (
        load_classifier(tmp_path / "out" / "model.safetensors")[2]
        == load_classifier(finished / "out" / "model.safetensors")[2]
    )


@pytest.mark.parametrize(
    ("stage", "overrides", "words"),
    [
        ("prepare", {"dataset_dir": "nowhere"}, ["nowhere", "no such folder"]),
        ("finetune", {}, ["prepared", "run the stage 'prepare'"]),
        ("evaluate", {}, ["model.safetensors", "finetune"]),
        ("heatmap", {}, ["model.safetensors", "finetune"]),
        ("report", {}, ["scores.json", "evaluate"]),
        ("prepare", {"output_dir": "/dev/null/out"}, ["/dev/null/out", "another output folder"]),
    ],
)
def test_a_stage_that_cannot_run_says_why(finished, tmp_path, stage, overrides, words):
    (tmp_path / "phantom").symlink_to(finished / "phantom")
    with pytest.raises(SystemExit) as stop:
        run_stage(stage, tmp_path, **overrides)
    message = str(stop.value)
    assert message.startswith("medsd: ") and "\n" not in message
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"encoder": "resnet1o"}, ["resnet1o"]),
        ({"frozen": ["layr1"]}, ["layr1", "layer1"]),
        ({"amp": "half"}, ["amp='half'"]),
        ({"mode": "covv"}, ["mode='covv'", "cov"]),
        ({"hard_negative_epoch": -1}, ["hard_negative_epoch=-1"]),
        ({"patience": 0}, ["patience=0"]),
        ({"encoder_weights": "nowhere.safetensors"}, ["nowhere.safetensors"]),
        ({"layer": "layr1"}, ["layr1", "layer1"]),
        ({"tile_px": 32}, ["other slides or settings", "prepare"]),
        ({"validation_share": 0.6}, ["other slides or settings", "prepare"]),
        ({"masked_share": 1.5}, ["masked_share=1.5"]),
        ({"lr": 0.5}, ["another lr", "output_dir"]),
        ({"objective::ranking": "signed"}, ["another objective", "output_dir"]),
        ({"hard_negative_epoch": 2}, ["hard_negative_epoch=2", "max_epochs=2"]),
        ({"batch_size": 4096}, ["batch_size=4096"]),
    ],
)
def test_a_wrong_choice_is_told_before_training(finished, overrides, words):
    with pytest.raises(SystemExit) as stop:
        run_stage("finetune", finished, **overrides)
    message = str(stop.value)
    assert "\n" not in message and all(word in message for word in words), message


def test_maps_of_other_weights_are_not_scored(finished, tmp_path):
    shutil.copytree(finished / "out", tmp_path / "out")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    scores["weights_sha256"] = "0" * 64
    (tmp_path / "out" / "scores.json").write_text(json.dumps(scores))
    with pytest.raises(SystemExit, match="maps of other weights; run the stage 'heatmap'"):
        run_stage("report", tmp_path, phantom_dir=str(finished / "phantom"))


def test_without_annotations_or_with_one_class_there_is_a_summary_all_the_same(finished, tmp_path):
    """Slide AUC and pointing have no value then; nothing crashes on it."""
    shutil.copytree(finished / "phantom", tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "testing" / "lesion_annotations")
    for slide, word in (("test_001", "tumor"), ("test_002", "normal")):
        if word == "tumor":
            (tmp_path / "data" / "testing" / "images" / f"{slide}.tif").unlink()
    overrides = {"dataset_dir": str(tmp_path / "data")}
    for stage in ("prepare", "finetune", "evaluate", "heatmap", "report"):
        run_stage(stage, tmp_path, **{**overrides, "max_epochs": 1, "samples_per_epoch": 32})
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["tiles"]["patch_auc"]["value"] is None and scores["slides"]["slide_auc"] is None
    assert scores["slides"]["mean_pointing_ratio"] is None
    assert "patch AUC    -" in summary(str(tmp_path / "out"))
    assert (tmp_path / "out" / "summary.png").is_file()


def test_a_bad_test_slide_fails_the_run_after_the_rest_is_done(finished, tmp_path):
    shutil.copytree(finished / "phantom", tmp_path / "data")
    bad = tmp_path / "data" / "testing" / "images" / "test_001.tif"
    bad.write_bytes(bad.read_bytes()[:5000])
    overrides = {"dataset_dir": str(tmp_path / "data"), "max_epochs": 1, "samples_per_epoch": 32}
    with pytest.raises(SystemExit, match=r"1 slide\(s\) failed, the others are done; .*test_001\.tif"):
        run_stage("run", tmp_path, **overrides)
    assert (tmp_path / "out" / "heatmaps" / "test_002" / "report.html").is_file()
    assert (tmp_path / "out" / "summary.png").is_file()


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "data").mkdir()
    with pytest.raises(SystemExit, match=r"no \*\.tif slides"):
        run_stage("prepare", tmp_path, dataset_dir=str(tmp_path / "data"))
