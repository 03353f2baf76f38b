"""The default bundle in small, as a user runs it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import shapely
import torch

from medsd.bundle import check_slides, summary
from medsd.cohort.entry import SlideEntry
from medsd.errors import SlideError
from medsd.heatmap.tiff import read_ome_tiff
from medsd.networks.start import weights_sha256
from medsd.networks.weights import load_classifier
from medsd.tables import write_table

ROOT = Path(__file__).parents[2]
BUNDLE = "bundles/camelyon.json"
SMALL = {
    "phantom_slides": 6,
    "phantom_size_px": 1024,
    "encoder": "test_resnet",
    "pretrain_epochs": 1,
    "pretrain_samples": 32,
    "pretrain_batch_size": 16,
    "queue": 16,
    "pretraining::settings::group_size": 8,
    "max_epochs": 2,
    "samples_per_epoch": 128,
    "batch_size": 16,
    "block_px": 256,
    "explained_tiles": 4,
}


WITHOUT_TENSORBOARD = pytest.mark.skipif(find_spec("tensorboard") is not None, reason="TensorBoard is installed")


def places(folder: Path) -> dict[str, str]:
    return {"phantom_dir": str(folder / "phantom"), "output_dir": str(folder / "out")}


def command(*words: object, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-m", "monai.bundle", "run", *map(str, words)]
    # As many threads as here: sums are rounded by how they are parted, and weights are compared.
    env = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    return subprocess.run(line, cwd=cwd, capture_output=True, text=True, env=env)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A whole run by the command line, from a folder that is not the repository's."""
    folder = tmp_path_factory.mktemp("run")
    overrides = {**SMALL, **places(folder), "bundle_root": ROOT, "config_file": ROOT / BUNDLE, "statistics": True}
    done = command(*(f"--{key}={value}" for key, value in overrides.items()), cwd=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "patch AUC" in done.stdout and "heatmaps" in done.stdout
    assert "ERROR" not in done.stderr and "Epoch: 2/2, Iter: 8/8 -- Loss" in done.stdout + done.stderr
    return folder


def test_every_promised_file_is_there(finished):
    out = finished / "out"
    assert (out / "encoder.safetensors").is_file() and (out / "pretraining" / "history.csv").is_file()
    for name in ("model.safetensors", "scores.json", "summary.png", "training/history.csv", "prepared/tiles.npz"):
        assert (out / name).is_file(), name
    for slide in ("test_001", "test_002"):
        for name in ("saliency.ome.tif", "probability.ome.tif", "overlay.png", "regions.geojson", "report.html"):
            assert (out / "heatmaps" / slide / name).is_file(), name
        record = json.loads((out / "heatmaps" / slide / "record.json").read_text())
        assert record["status"] == "ok" and record["scale"]["mpp"] == 0.5
        assert record["scale"]["mpp_source"] == "TIFF resolution tags"
    assert [path for path in finished.rglob("*") if path.is_file() and path.name.startswith(".")] == []


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


def test_settings_are_those_that_the_training_followed(finished):
    settings = json.loads((finished / "out" / "training" / "settings.json").read_text())
    assert settings["max_epochs"] == 2 and settings["batch_size"] == 16
    assert settings["loss_function"] == {
        "name": "SaliencyDecor", "consistency": 1.0, "decorrelation": 0.1, "masked_share": 0.2, "warm_epochs": 1,
        "ranking": "absolute", "fill": "mean", "block_px": 1, "mode": "cov", "group_size": None,
        "decorrelated": "clean", "saliency_pass": "eval", "bn": "own",
    }  # fmt: skip
    assert settings["optimizer"]["name"] == "AdamW" and settings["optimizer"]["lr"] == [0.001]
    assert settings["step"] == {
        "name": "ObjectiveStep", "seed": 0, "stain": 0.1, "stain_apart": 0.0, "amp": "none", "accumulation": 1
    }  # fmt: skip
    assert settings["sampler"]["samples"] == 128 and settings["network"]["encoder"] == "test_resnet"
    assert settings["start"] == {
        "pretrained": False, "encoder_weights": weights_sha256(finished / "out" / "encoder.safetensors")
    }  # fmt: skip
    _, card, _ = load_classifier(finished / "out" / "model.safetensors")
    assert card.start == f"encoder.safetensors, SHA-256 {settings['start']['encoder_weights']}"


def test_running_again_keeps_what_is_done_in_another_process_too(finished, run_bundle):
    """What a process starts from does not matter either: the same settings find their training, and go on from it."""
    files = [path for path in (finished / "phantom").rglob("*") if path.is_file()]
    files += [*(finished / "out" / "heatmaps").glob("*/*"), finished / "out" / "training" / "checkpoint.pt"]
    files += [finished / "out" / "model.safetensors", finished / "out" / "encoder.safetensors"]
    files += [finished / "out" / "pretraining" / "checkpoint.pt"]
    before = {path: path.stat().st_mtime_ns for path in files}
    flow = run_bundle(BUNDLE, "prepare", "pretrain", "finetune", "heatmap", **SMALL, **places(finished))
    assert {path: path.stat().st_mtime_ns for path in files} == before
    assert flow.check_properties() == []


def test_damaged_weights_are_written_anew_and_equal(finished, tmp_path, run_bundle):
    shutil.copytree(finished / "out", tmp_path / "out")
    path = tmp_path / "out" / "model.safetensors"
    good, (_, card, digest) = path.read_bytes(), load_classifier(path)
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    run_bundle(BUNDLE, "finetune", **SMALL, phantom_dir=str(finished / "phantom"), output_dir=str(tmp_path / "out"))
    _, again, same = load_classifier(path)
    assert again == card and same == digest


@pytest.mark.parametrize(
    ("stage", "overrides", "words"),
    [
        ("prepare", {"dataset_dir": "nowhere"}, ["nowhere", "no such folder"]),
        ("pretrain", {}, ["prepared", "run the stage 'prepare'"]),
        ("finetune", {}, ["prepared", "run the stage 'prepare'"]),
        ("evaluate", {}, ["model.safetensors", "finetune"]),
        ("evaluate", {"device": "cuda:99"}, ["device 'cuda:99': cannot be used here"]),
        ("heatmap", {}, ["model.safetensors", "finetune"]),
        ("report", {}, ["scores.json", "evaluate"]),
        ("prepare", {"output_dir": "/dev/null/out"}, ["/dev/null/out", "another output folder"]),
    ],
)
def test_a_stage_that_cannot_run_says_why(finished, tmp_path, run_bundle, stage, overrides, words):
    (tmp_path / "phantom").symlink_to(finished / "phantom")
    with pytest.raises(SystemExit) as stop:
        run_bundle(BUNDLE, stage, **{**SMALL, **places(tmp_path), **overrides})
    assert all(word in str(stop.value) for word in words), stop.value


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"encoder": "resnet1o"}, ["resnet1o"]),
        ({"frozen": ["layr1"]}, ["layr1", "layer1"]),
        ({"amp": "half"}, ["amp='half'"]),
        ({"mode": "covv"}, ["mode='covv'", "cov"]),
        ({"hard_negative_epoch": -1}, ["hard_negative_epoch=-1"]),
        ({"patience": 0}, ["EarlyStopping: Argument patience should be positive"]),
        pytest.param({"tensorboard": True}, ["TensorBoardStatsHandler: ", "tensorboard"], marks=WITHOUT_TENSORBOARD),
        ({"weight_decay": -1.0}, ["weight_decay=-1.0"]),
        ({"patience": 1.5}, ["patience=1.5", "whole number"]),
        ({"patience": True}, ["patience=True", "whole number"]),
        ({"max_epochs": 0}, ["max_epochs=0"]),
        ({"val_interval": 2, "max_epochs": 1}, ["val_interval=2", "max_epochs=1"]),
        ({"val_interval": 2}, ["another val_interval;", "output_dir"]),
        ({"encoder_weights": "nowhere.safetensors", "pretrain_epochs": 0}, ["nowhere.safetensors"]),
        ({"layer": "layr1"}, ["layr1", "layer1"]),
        ({"tile_px": 32}, ["other slides or settings", "prepare"]),
        ({"masked_share": 1.5}, ["masked_share=1.5"]),
        ({"bn": "none"}, ["bn='none'", "own, shared"]),
        ({"head_start": "regress"}, ["head_start='regress'", "random, regression"]),
        ({"head_start": "regression"}, ["another start::head", "output_dir"]),
        ({"warm_epochs": 0}, ["another loss_function::warm_epochs;", "output_dir"]),
        ({"lr": 0.5}, ["another optimizer::lr", "output_dir"]),
        ({"objective::ranking": "signed"}, ["another loss_function::ranking;", "output_dir"]),
        ({"hard_negative_epoch": 2}, ["hard_negative_epoch=2", "max_epochs"]),
        ({"batch_size": 4096}, ["batch_size=4096", "samples_per_epoch=128"]),
    ],
)
def test_a_wrong_choice_is_told_before_training(finished, run_bundle, overrides, words):
    with pytest.raises(SystemExit) as stop:
        run_bundle(BUNDLE, "finetune", **{**SMALL, **places(finished), **overrides})
    assert all(word in str(stop.value) for word in words), stop.value


def test_maps_of_other_weights_are_not_scored(finished, tmp_path, run_bundle):
    shutil.copytree(finished / "out", tmp_path / "out")
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    scores["weights_sha256"] = "0" * 64
    (tmp_path / "out" / "scores.json").write_text(json.dumps(scores))
    with pytest.raises(SystemExit, match="maps of other weights; run the stage 'heatmap'"):
        overrides = {**places(tmp_path), "phantom_dir": str(finished / "phantom")}
        run_bundle(BUNDLE, "report", **SMALL, **overrides)


@pytest.fixture
def mapped(finished, tmp_path, run_bundle, write_weights):
    """Runs the stages after the training on a changed data set, with weights that have learnt nothing."""

    def run() -> None:
        overrides = {**SMALL, **places(tmp_path), "dataset_dir": str(tmp_path / "data")}
        flow = run_bundle(BUNDLE, "prepare", **overrides)
        write_weights(tmp_path / "out" / "model.safetensors", flow.parser.get_parsed_content("data"))
        run_bundle(BUNDLE, "run", **overrides, run=["@evaluate", "@maps", "@report", "@check"])

    shutil.copytree(finished / "phantom", tmp_path / "data")
    return run


def test_without_annotations_or_with_one_class_there_is_a_summary_all_the_same(mapped, tmp_path):
    """Slide AUC and pointing have no value then; nothing crashes on it."""
    shutil.rmtree(tmp_path / "data" / "testing" / "lesion_annotations")
    (tmp_path / "data" / "testing" / "images" / "test_001.tif").unlink()
    mapped()
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["tiles"]["patch_auc"]["value"] is None and scores["slides"]["slide_auc"] is None
    assert scores["slides"]["mean_pointing_ratio"] is None
    assert "patch AUC    -" in summary(str(tmp_path / "out"))
    assert (tmp_path / "out" / "summary.png").is_file()


def test_a_bad_test_slide_fails_the_run_after_the_rest_is_done(mapped, tmp_path):
    bad = tmp_path / "data" / "testing" / "images" / "test_001.tif"
    bad.write_bytes(bad.read_bytes()[:5000])
    with pytest.raises(SystemExit, match=r"1 slide\(s\) failed, the others are done; .*test_001\.tif"):
        mapped()
    assert (tmp_path / "out" / "heatmaps" / "test_002" / "report.html").is_file()
    assert (tmp_path / "out" / "summary.png").is_file()


def test_a_failed_slide_of_another_run_in_the_folder_is_not_this_runs(tmp_path):
    rows = [{"slide": "ours", "status": "ok", "reason": ""}, {"slide": "theirs", "status": "failed", "reason": "torn"}]
    numbers = {"score": 0.5, "regions": 0, "region_area_mm2": 0.0, "seconds": 1.0}
    write_table(tmp_path / "heatmaps" / "slides.csv", [row | numbers for row in rows])

    def check(*names: str) -> None:
        check_slides(SimpleNamespace(jobs=lambda: [SlideEntry(name, Path(name)) for name in names]), str(tmp_path))

    check("ours")
    check("another")
    with pytest.raises(SlideError, match="the first: torn"):
        check("ours", "theirs")
