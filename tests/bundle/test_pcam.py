"""Real lymph-node patches and a real slide with the same bundle; skipped where the data are not present."""

from __future__ import annotations

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from medsd.bundle.data import PatchData
from medsd.cohort.entry import SlideEntry
from medsd.errors import DatasetError
from medsd.heatmap.cohort import map_slides
from medsd.heatmap.engine import make_engine
from medsd.heatmap.maps import MapSettings
from medsd.networks.calibrated import calibrated
from medsd.networks.classifier import TileClassifier
from medsd.networks.weights import ModelCard, load_classifier, save_classifier
from medsd.phantom import PhantomSpec, draw_phantom
from medsd.phantom.files import write_pyramid
from medsd.training.predict import predict_logits

FILES = "bundles/camelyon.json,configs/pcam.json"
SMALL = {"encoder": "test_resnet", "pretrained": False, "layer": "layer3", "local_layer": "layer2"}
SMALL |= {"max_epochs": 1, "samples_per_epoch": 64, "batch_size": 16, "block_px": 512}
# Sixty-four patches teach too little for a neutral reference to lie between the classes.
SMALL |= {"methods": ["gradient_x_activation"], "explained_tiles": 4}


def test_real_patches_train_and_a_real_slide_is_mapped(shared_data, tmp_path, run_bundle):
    slide = shared_data / "wsi" / "CMU-1-Small-Region.svs"
    overrides = {
        "dataset_dir": str(shared_data / "pcam_patches"),
        "slides": [str(slide)],
        "output_dir": str(tmp_path),
        "head_start": "regression",
    }
    run_bundle(FILES, "run", **SMALL, **overrides)
    assert json.loads((tmp_path / "training" / "settings.json").read_text())["start"]["head"] == "regression"
    scores = json.loads((tmp_path / "scores.json").read_text())["tiles"]
    assert 0.15 <= scores["items"] / 1600 <= 0.45 and scores["groups"] >= 2
    low, value, high = (scores["patch_auc"][key] for key in ("low", "value", "high"))
    assert 0 <= low <= value <= high <= 1
    assert (tmp_path / "summary.png").is_file()
    record = json.loads((tmp_path / "heatmaps" / "CMU-1-Small-Region" / "record.json").read_text())
    assert record["status"] == "ok"
    assert record["scale"]["mpp"] == pytest.approx(0.499) and record["scale"]["mpp_source"] == "vendor property"
    assert load_classifier(tmp_path / "model.safetensors")[1].mpp == 0.97


@pytest.fixture
def patch_folder(tmp_path) -> Path:
    """48 patches of six groups."""
    folder = tmp_path / "patches"
    (folder / "images").mkdir(parents=True)
    generator = np.random.default_rng(0)
    with open(folder / "labels.csv", "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["id", "label", "stain_cluster"])
        for number in range(48):
            pixels = generator.integers(0, 255, (96, 96, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "images" / f"p{number}.png")
            writer.writerow([f"p{number}", number % 2, number // 8])
    return folder


@pytest.fixture
def refusal(tmp_path, run_bundle) -> Callable[..., str]:
    def refused(folder: Path | None, **overrides: object) -> str:
        places = {"dataset_dir": None if folder is None else str(folder), "output_dir": str(tmp_path / "out")}
        with pytest.raises(SystemExit) as stop:
            run_bundle(FILES, "prepare", **places, **overrides)
        return str(stop.value)

    return refused


def test_further_patches_are_trained_on_unless_held_out(patch_folder, tmp_path):
    alone, more = PatchData(str(patch_folder), 64, 1.0), tmp_path / "more"
    more.mkdir()
    held, pixels = alone.part("testing").table.pixels(0), np.full((96, 96, 3), 200, np.uint8)
    Image.fromarray(held).save(more / "copy.png")
    Image.fromarray(held[::-1]).save(more / "turned.png")  # of its stain, yet of no known place
    (more / "labels.csv").write_text("id,label\ncopy,0\nturned,1\n")
    both = PatchData(str(patch_folder), 64, 1.0, more_dirs=[str(more)])
    for part in ("training", "validation", "testing"):
        assert both.part(part).fingerprint() == alone.part(part).fingerprint()
    Image.fromarray(pixels[:64, :64]).save(more / "turned.png")
    with pytest.raises(DatasetError, match="patches of several sizes"):
        PatchData(str(patch_folder), 64, 1.0, more_dirs=[str(more)]).prepare()
    Image.fromarray(pixels[:64, :64]).save(more / "copy.png")
    with pytest.raises(DatasetError, match=r"more: patches of 64 x 64 px, those of .*patches have 96 x 96"):
        PatchData(str(patch_folder), 64, 1.0, more_dirs=[str(more)]).prepare()


def test_grades_are_told_apart_by_patient(patch_folder, tmp_path, run_bundle):
    """Three classes, tables that name files, patches made smaller: to the scores of every class."""
    rows = (patch_folder / "labels.csv").read_text().splitlines()[1:]
    grades = ["normal", "cancer", "polyp", "other"]
    lines = [
        f"images/{name}.png,{grades[int(name[1:]) % 4]},{int(group) + 10}"
        for name, _, group in (row.split(",") for row in rows)
    ]
    (patch_folder / "index.csv").write_text("\n".join(["file,label,patient", *lines]))
    (patch_folder / "labels.csv").unlink()
    small = SMALL | {"tile_px": 32, "samples_per_epoch": 33, "batch_size": 11, "explained_tiles": 8}
    places = {"dataset_dir": str(patch_folder), "output_dir": str(tmp_path / "out")}
    grades = {"classes": ["normal", "cancer", "polyp"], "left_out": ["other"]}
    run_bundle("bundles/camelyon.json,configs/ebhi.json", "run", **small, **places, **grades)
    scores = json.loads((tmp_path / "out" / "scores.json").read_text())
    assert scores["classes"]["items"] == scores["tiles"]["items"] == 3 * scores["tiles"]["target_items"]
    assert 0 <= scores["classes"]["auc"]["low"] <= scores["classes"]["auc"]["high"] <= 1
    card = load_classifier(tmp_path / "out" / "model.safetensors")[1]
    assert (card.classes, card.input_mean, card.tile_px) == (tuple(grades["classes"]), (0.5, 0.5, 0.5), 32)
    with pytest.raises(SystemExit, match=r"row 5: label 'other' unknown; use 0 or 1 or 2, or a class"):
        run_bundle("bundles/camelyon.json,configs/ebhi.json", "prepare", **places, **grades | {"left_out": []})
    # A finished training may answer by the mean over the symmetries without another one: it is calibrated anew.
    checkpoint = tmp_path / "out" / "training" / "checkpoint.pt"
    trained = checkpoint.stat().st_mtime_ns
    symmetric = small | places | grades | {"test_time_augmentation": True}
    for stage in ("finetune", "evaluate"):
        workflow = run_bundle("bundles/camelyon.json,configs/ebhi.json", stage, **symmetric)
    assert checkpoint.stat().st_mtime_ns == trained
    network, turning, _ = load_classifier(tmp_path / "out" / "model.safetensors")
    assert network.test_time_augmentation
    assert turning.settings_sha256 == card.settings_sha256
    assert turning.calibration.temperature != card.calibration.temperature
    logits = predict_logits(network, workflow.parser.get_parsed_content("data").part("testing"))
    with np.load(tmp_path / "out" / "test_tiles.npz") as kept:
        answers = calibrated(torch.from_numpy(logits), turning.calibration.temperature, turning.calibration.offset)
        np.testing.assert_allclose(kept["probability"], answers.softmax(dim=1)[:, 1].numpy(), atol=1e-5)


def test_the_card_follows_the_keys_without_another_training(patch_folder, tmp_path, run_bundle):
    """What costs memory alone changes nothing; what the card says does."""
    output = tmp_path / "out"
    settings = SMALL | {"dataset_dir": str(patch_folder), "output_dir": str(output)}
    model, checkpoint = output / "model.safetensors", output / "training" / "checkpoint.pt"
    run_bundle(FILES, "finetune", **settings)
    trained = checkpoint.stat().st_mtime_ns
    for changes, anew in (({"block_px": 256}, False), ({"tissue": "breast, H&E"}, True)):
        before = model.stat().st_mtime_ns
        run_bundle(FILES, "finetune", **settings | changes)
        assert (model.stat().st_mtime_ns != before) == anew
    assert load_classifier(model)[1].tissue == "breast, H&E"
    assert checkpoint.stat().st_mtime_ns == trained


def test_mistakes_in_a_patch_folder_are_named(patch_folder, tmp_path, refusal):
    assert "dataset_dir" in refusal(None)
    assert "validation_share=15: must be a number" in refusal(patch_folder, validation_share=15.0).replace("15.0", "15")
    assert "stain_target: patches are too small" in refusal(patch_folder, stain_target={"method": "macenko"})
    assert "no such folder" in refusal(tmp_path / "nowhere")
    table = patch_folder / "labels.csv"
    good = table.read_text()
    table.write_text(good.replace("stain_cluster", "stain_clust"))
    assert "no column 'stain_cluster'" in refusal(patch_folder)
    table.write_text(good.replace("p3,1", "p3,tumor"))
    assert "row 5" in refusal(patch_folder) and "'tumor' unknown" in refusal(patch_folder)
    table.write_text(good.replace("p3,", "p333,"))
    assert "p333" in refusal(patch_folder)
    table.write_text(good)
    shutil.rmtree(patch_folder / "images")
    assert "no patch named" in refusal(patch_folder)


def test_a_network_without_a_neutral_reference_is_calibrated_all_the_same(patch_folder, tmp_path, caplog):
    """Whose training would be lost otherwise; what it lacks is one line, and its weights map slides."""
    classifier = TileClassifier("test_resnet")
    torch.nn.init.zeros_(classifier.head.weight)
    torch.nn.init.constant_(classifier.head.bias, 1.0)
    classifier.head.bias.data[0] = -1.0
    data = PatchData(str(patch_folder), 64, 1.0)
    settings = MapSettings(("deeplift", "gradient"), "layer2", "none", smooth_um=8.0)
    calibration = data.calibrate(make_engine(classifier, 64, 1.0, settings=settings, temperature=2.0))
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert (
        "and not 0 near that line" in line
        and "weights are kept, with maps by gradient_x_activation" in line
        and "train" in line
    )
    assert list(calibration.limits) == ["gradient_x_activation", "gradient"] and calibration.reference is None
    assert (calibration.temperature, calibration.layer) == (2.0, "layer2")
    card = ModelCard("test_resnet", classifier.classes, 64, 1.0, "noise", calibration)
    save_classifier(tmp_path / "model.safetensors", classifier, card)
    slide = tmp_path / "slide.tif"
    write_pyramid(slide, draw_phantom(PhantomSpec(seed=1, tumour=False, size_px=512)).image, 0.5, 2)
    (row,) = map_slides([SlideEntry("slide", slide)], tmp_path / "model.safetensors", tmp_path / "out", isolate=False)
    assert row.status == "ok"
