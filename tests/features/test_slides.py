"""Features of slides' tiles against the encoder called by hand, in the layout that TRIDENT documents."""

from __future__ import annotations

import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import h5py
import numpy as np
import pytest
import tifffile
import timm
import torch
from safetensors.torch import save_file

from medsd import cli
from medsd.cohort import making
from medsd.cohort.entry import SlideEntry
from medsd.cohort.kept import gather
from medsd.errors import ConfigError, DatasetError, MedsdError, WeightsError
from medsd.features.encoder import FeatureRequest
from medsd.features.slides import Features, write_features
from medsd.networks.classifier import Normalise, TileClassifier
from medsd.networks.start import save_encoder
from medsd.networks.weights import ModelCard, save_classifier
from medsd.phantom import PhantomSpec, draw_phantom
from medsd.phantom.files import write_pyramid
from medsd.record import write_record
from medsd.slides.slide import open_slide
from medsd.tables import read_table

TILE_PX, MPP = 64, 1.0
# Of coords: written by `coords_to_h5` (trident/IO.py of github.com/mahmoodlab/TRIDENT), kept in files of features by
# `WSI.extract_patch_features`.
OF_COORDS = {
    "patch_size": int,
    "patch_size_level0": int,
    "level0_magnification": (int, float),
    "target_magnification": (int, float),
    "overlap": int,
    "name": str,
    "savetodir": str,
    "level0_width": int,
    "level0_height": int,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, phantoms: Path) -> SimpleNamespace:
    """A classifier's file, a slide of tissue and one of glass, and their features."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("features")
    classifier = TileClassifier("test_resnet").eval()
    weights = folder / "model.safetensors"
    save_classifier(weights, classifier, ModelCard("test_resnet", classifier.classes, TILE_PX, MPP, "noise"))
    write_pyramid(folder / "glass.tif", np.full((512, 512, 3), 244, np.uint8), 0.5, 2)
    slide = phantoms / "training" / "normal" / "normal_001.tif"
    entries = [SlideEntry("tissue", slide), SlideEntry("glass", folder / "glass.tif")]
    rows = write_features(entries, weights, folder / "out", device="cpu", isolate=False)
    return SimpleNamespace(
        classifier=classifier, weights=weights, slide=slide, entries=entries, rows=rows, out=folder / "out"
    )


def read(path: Path) -> tuple[np.ndarray, np.ndarray, dict[str, Any], dict[str, Any]]:
    """Features, coords, and the attributes of either."""
    with h5py.File(path) as file:
        assert set(file) == {"features", "coords"}
        return file["features"][:], file["coords"][:], dict(file["features"].attrs), dict(file["coords"].attrs)


def test_layout_of_trident(made: SimpleNamespace) -> None:
    features, coords, of_features, of_coords = read(made.out / "tissue.h5")
    assert features.shape == (len(coords), made.classifier.feature_dim) and features.dtype == np.float32
    assert coords.shape[1] == 2 and coords.dtype == np.int64
    for name, kind in OF_COORDS.items():
        value = of_coords[name]
        assert isinstance(value.item() if isinstance(value, np.generic) else value, kind), name
    assert {"name", "savetodir"} <= of_features.keys()
    with open_slide(made.slide) as slide:
        assert (of_coords["level0_width"], of_coords["level0_height"]) == slide.dimensions
        side = TILE_PX * MPP / slide.mpp
    # What TRIDENT's patcher makes of them, and what its slide encoders take.
    ratio = of_coords["level0_magnification"] / of_coords["target_magnification"]
    assert round(of_coords["patch_size"] * ratio) == of_coords["patch_size_level0"] == round(side)
    assert (of_coords["patch_size"], of_coords["overlap"], of_coords["name"]) == (TILE_PX, 0, "tissue")


def test_features_are_what_the_head_takes_of_each_place(made: SimpleNamespace) -> None:
    features, coords, *_ = read(made.out / "tissue.h5")
    assert len(coords) == len(np.unique(coords, axis=0)) == made.rows[0].tiles > 20
    with open_slide(made.slide) as slide:
        for number in (0, len(coords) // 2, len(coords) - 1):
            pixels = slide.read(*coords[number].tolist(), TILE_PX, TILE_PX, MPP)
            with torch.no_grad():
                expected = made.classifier.features(torch.from_numpy(pixels).permute(2, 0, 1)[None])
            np.testing.assert_allclose(features[number], expected[0].numpy(), rtol=1e-4, atol=1e-5)


def test_what_is_done_stays_and_is_gathered(made: SimpleNamespace, tmp_path: Path) -> None:
    assert [row.status for row in made.rows] == ["ok", "empty"], [row.reason for row in made.rows]
    assert not (made.out / "glass.h5").exists()
    out = tmp_path / "out"
    shutil.copytree(made.out, out)
    before = (out / "tissue.h5").stat().st_mtime_ns
    assert write_features(made.entries, made.weights, out, device="cpu", isolate=False) == made.rows
    assert (out / "tissue.h5").stat().st_mtime_ns == before
    (out / "slides.csv").unlink()
    assert [row.slide for row in gather(Features(out))] == ["glass", "tissue"]
    assert read_table(out / "slides.csv")["tiles"].tolist() == ["0", str(made.rows[0].tiles)]
    request = FeatureRequest(stride_px=32)
    (row,) = write_features(made.entries[:1], made.weights, out, request, "cpu", isolate=False)
    assert row.tiles > 3 * made.rows[0].tiles and read(out / "tissue.h5")[3]["overlap"] == 32


def test_a_run_that_is_stopped_in_a_slide_leaves_nothing(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(items: Any, _total: int, unit: str) -> Any:
        for number, item in enumerate(items):
            if "tile" in unit and number == 20:
                raise KeyboardInterrupt
            yield item

    with pytest.raises(KeyboardInterrupt):
        write_features(made.entries[:1], made.weights, tmp_path, device="cpu", progress=stopped, isolate=False)
    assert not list(tmp_path.glob("*.h5*")) and not list(tmp_path.glob("records/*.json"))
    write_features(made.entries[:1], made.weights, tmp_path, device="cpu", isolate=False)
    assert np.array_equal(read(tmp_path / "tissue.h5")[0], read(made.out / "tissue.h5")[0])


def test_tiles_that_cannot_be_decoded_are_left_out(made: SimpleNamespace, tmp_path: Path, coding: Any) -> None:
    tissue = draw_phantom(PhantomSpec(5, False, 1024)).image
    path, request = tmp_path / "damaged.tif", FeatureRequest(max_unseen=0.2)
    coding.write_levels(path, [tissue, coding.halved(tissue, 2), coding.halved(tissue, 4)], 0.5, 2)
    (whole,) = write_features(
        [SlideEntry("damaged", path)], made.weights, tmp_path / "whole", request, "cpu", isolate=False
    )
    with tifffile.TiffFile(path) as file:
        offset, count = file.pages[1].dataoffsets[4 * 8 + 4], file.pages[1].databytecounts[4 * 8 + 4]
    with open(path, "r+b") as handle:
        handle.seek(offset)
        handle.write(b"\xff" * count)
    (row,) = write_features(
        [SlideEntry("damaged", path)], made.weights, tmp_path / "out", request, "cpu", isolate=False
    )
    assert (row.status, row.unseen_tiles, row.tiles) == ("ok", 1, whole.tiles - 1)
    coords = read(tmp_path / "out" / "damaged.h5")[1]
    assert [4 * 128, 4 * 128] not in coords.tolist() and len(coords) == row.tiles


def test_a_transformer_of_timm_pools_itself(
    made: SimpleNamespace, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    network = timm.create_model("test_vit", num_classes=3, img_size=64).eval()
    save_file(network.state_dict(), tmp_path / "timm.safetensors")
    request = FeatureRequest("test_vit", {"img_size": 64}, network_mpp=1.0)
    write_features(made.entries[:1], tmp_path / "timm.safetensors", tmp_path, request, "cpu", isolate=False)
    features, coords, *_ = read(tmp_path / "tissue.h5")
    assert list(network.pretrained_cfg["mean"]) != list(Normalise().input_mean) and "input_mean" in caplog.text
    with open_slide(made.slide) as slide, torch.no_grad():
        images = torch.from_numpy(slide.read(*coords[3].tolist(), 64, 64, 1.0)).permute(2, 0, 1)[None]
        tokens = network.forward_features(Normalise()(images))
        expected = network.forward_head(tokens, pre_logits=True)
    np.testing.assert_allclose(features[3], expected[0].numpy(), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_used_is_told_in_a_line(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoder = tmp_path / "encoder.safetensors"
    save_encoder(encoder, made.classifier.encoder, "test_resnet", "noise")
    torch.save({"x": SimpleNamespace()}, tmp_path / "code.pt")
    write_record(tmp_path / "mapped" / "a" / "record.json", {}, [], status="ok", result={"slide": "a"})

    def told(kind: type[Exception], words: str, weights: Path, request: FeatureRequest, out: str = "out") -> None:
        with pytest.raises(kind, match=words) as caught:
            write_features(made.entries, weights, tmp_path / out, request, "cpu", isolate=False)
        assert "\n" not in str(caught.value)

    told(ConfigError, "network_mpp=0.5: .*says it itself", made.weights, FeatureRequest(network_mpp=0.5))
    told(ConfigError, "network_mpp: encoder 'test_resnet' does not say its scale", encoder, FeatureRequest())
    told(
        ConfigError, "tile_px: encoder 'test_resnet' takes tiles of any size", encoder, FeatureRequest(network_mpp=1.0)
    )
    named = FeatureRequest("test_vit", {"img_size": 64, "dynamic_img_size": False}, network_mpp=1.0, tile_px=96)
    told(MedsdError, "more than tensors", tmp_path / "code.pt", named)
    without = FeatureRequest("test_vit", {"class_token": False}, network_mpp=1.0)
    told(ConfigError, "encoder 'test_vit': timm cannot make it with encoder_options", encoder, without)
    save_file(made.classifier.encoder.state_dict(), tmp_path / "timm.safetensors")
    told(WeightsError, "no network of medsd; name their encoder", tmp_path / "timm.safetensors", FeatureRequest())
    told(MedsdError, "timm has no such network", encoder, FeatureRequest("test_vitt", network_mpp=1.0))
    told(DatasetError, "outputs of another verb", made.weights, FeatureRequest(), "mapped")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="goes with an encoder of timm's"):
        FeatureRequest(encoder_options={"img_size": 64})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told(ConfigError, r"pip install 'medsd\[features\]'", made.weights, FeatureRequest())


def test_as_a_user_runs_it(
    made: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(making, "IsolatedSlide", open_slide)

    def run(*words: object) -> tuple[Any, str]:
        monkeypatch.setattr(sys, "argv", ["medsd", *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return stop.value.code, "".join(capsys.readouterr())

    asked = ("features", made.slide, "--weights", made.weights, "--out", tmp_path, "--device", "cpu", "--shard", "1/1")
    code, said = run(*asked)
    assert code == 0 and "tiles of 64 px at 1" in said and "'medsd gather" in said
    assert not (tmp_path / "slides.csv").exists() and (tmp_path / "normal_001.h5").exists()
    code, said = run("gather", tmp_path)
    assert code == 0 and read_table(tmp_path / "slides.csv")["slide"].tolist() == ["normal_001"]
    assert json.loads((tmp_path / "records" / "normal_001.json").read_text())["tiles"] > 0
    code, said = run(*asked[:-2], "--encoder", "test_vit", "--encoder-options", "{img_size")
    assert code == 1 and "no JSON" in said and "Traceback" not in said
