"""bundles/segmentation.json: from masks to scores and a sheet, on folders, slides and volumes; what it refuses."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medsd.bundle import check_config
from medsd.bundle.data import Phantoms
from medsd.bundle.masks import LabelledVolumes, MaskFolder, OutlinedSlides
from medsd.bundle.segmentation import segmentation_summary
from medsd.cohort.index import TileGrid
from medsd.cohort.learnt import group_sources
from medsd.errors import ConfigError, DatasetError
from medsd.networks.classifier import TileClassifier, create_encoder
from medsd.networks.start import load_encoder
from medsd.networks.weights import ModelCard, save_classifier
from medsd.pretrain.volumes import SliceSettings
from medsd.segment.weights import load_segmentation
from medsd.tables import read_table

ROOT = Path(__file__).parents[2]
FILES = "bundles/segmentation.json,configs/ebhi_segmentation.json"
Run = Callable[..., Any]


@pytest.fixture(scope="module")
def stage(run_bundle: Run, small_masks: SimpleNamespace) -> Run:
    def run(folder: Path, *stages: str, **overrides: Any) -> Any:
        places = {"dataset_dir": str(folder / "masks"), "output_dir": str(folder / "out")}
        return run_bundle(FILES, *stages, **{**places, **small_masks.settings, **overrides})

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, stage: Run, small_masks: SimpleNamespace) -> Path:
    folder = tmp_path_factory.mktemp("segmentation")
    small_masks.write(folder / "masks")
    # Three patients, whichever are tested on: the test below says whether those that are among them were told.
    start, learnt = TileClassifier("test_resnet"), _digests("p0", "p1", "p2")
    card = ModelCard("test_resnet", start.classes, 32, 1.0, "a test", learnt_from=learnt)
    save_classifier(folder / "encoder.safetensors", start, card)
    stage(folder, "run", protocol="linear", lr=0.05, encoder_weights=str(folder / "encoder.safetensors"))
    return folder


def _digests(*patients: str) -> tuple[str, ...]:
    return tuple(sorted(frozenset[str]().union(*group_sources("patient", patients, "").values())))


def test_who_the_start_learnt_from_is_told_where_they_are_tested_on(finished: Path) -> None:
    scores, card = json.loads((finished / "out" / "scores.json").read_text()), load_segmentation(_weights(finished))[1]
    tested = set(read_table(finished / "out" / "masks.csv")["patient"])
    assert set(scores.get("learnt_before", ())) == tested & {"p0", "p1", "p2"}
    assert set(card.learnt_from) == set(_digests("p0", "p1", "p2", *({f"p{n}" for n in range(8)} - tested)))
    (finished / "out" / "scores.json").write_text(json.dumps(scores | {"learnt_before": ["p1"]}))
    told = segmentation_summary(str(finished / "out"))
    (finished / "out" / "scores.json").write_text(json.dumps(scores))
    assert "beware       scores are too good: 1 of what is tested on was learnt from before, going by" in told


def _weights(folder: Path) -> Path:
    return folder / "out" / "segmentation.safetensors"


def test_the_linear_protocol_reads_masks_off_the_encoder_it_was_given(finished: Path) -> None:
    network, card, digest = load_segmentation(_weights(finished))
    assert (card.decoder, card.protocol, card.side_px) == ("linear8", "linear", 32)
    assert card.start.startswith("encoder.safetensors, SHA-256 ")
    given, _ = create_encoder("test_resnet", pretrained=False)
    load_encoder(given, finished / "encoder.safetensors")
    for name, tensor in network.encoder.state_dict().items():
        assert torch.equal(tensor, given.state_dict()[name]), name
    scores = json.loads((finished / "out" / "scores.json").read_text())
    assert scores["weights_sha256"] == digest and scores["length"] == "px"
    (name, found), *others = scores["masks"].items()
    assert name == "gland or lesion" and not others
    assert found["dice"]["value"] > 0.6 and found["dice"]["low"] <= found["dice"]["value"] <= found["dice"]["high"]
    rows = read_table(finished / "out" / "masks.csv")
    assert len(rows) == scores["units"] and set(rows["patient"]) <= {f"p{n}" for n in range(8)}
    assert not any(Path(unit).is_absolute() for unit in rows["unit"])
    assert all((finished / "masks" / unit).is_file() for unit in rows["unit"])
    history = read_table(finished / "out" / "training" / "history.csv")
    assert list(history.columns) == ["epoch", "loss", "validation_dice"]
    best = history["validation_dice"].astype(float).max()
    assert card.validation == {"validation_dice": pytest.approx(best, abs=1e-4)}
    with Image.open(finished / "out" / "sheet.png") as sheet:
        assert sheet.width >= 900


def test_a_finished_training_is_kept_and_another_setting_refused(finished: Path, stage: Run) -> None:
    same = {"protocol": "linear", "lr": 0.05, "encoder_weights": str(finished / "encoder.safetensors")}
    path = finished / "out" / "segmentation.safetensors"
    before = path.stat().st_mtime_ns
    stage(finished, "segment", **same)
    assert path.stat().st_mtime_ns == before
    with pytest.raises(SystemExit, match=r"another .*protocol.*; choose another output_dir"):
        stage(finished, "segment", **{**same, "protocol": "full", "decoder": "linear8"})
    with pytest.raises(SystemExit, match="trained on another split of the data"):
        stage(finished, "evaluate", **same, label_fraction=0.3)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"protocol": "liner"}, r"protocol='liner': use one of .*did you mean 'linear'"),
        ({"decoder": "unet++"}, "decoder='unet\\+\\+'"),
        ({"encoder": "resnet18x"}, "encoder 'resnet18x'"),
        ({"encoder_weights": "nowhere.pt"}, "nowhere.pt: no such encoder weights"),
        ({"dataset_dir": None}, "dataset_dir: not set"),
        ({"labels": ["c"]}, r"index\.csv: no row has the label 'c'"),
        ({"group_column": "slide"}, "no column 'slide'"),
        ({"side_px": 64}, r"\.png: 32 x 32 px is smaller than side_px=64"),
        ({"classes": ["background"]}, "name two or more"),
        ({"mask_values": [0, 7]}, "value 255 is no class"),
        ({"label_fraction": 0.0}, r"label_fraction=0\.0"),
        ({"samples_per_epoch": 4}, "batch_size=8: .*samples_per_epoch=4"),
        ({"val_interval": 3, "max_epochs": 2}, "val_interval=3: .*above max_epochs=2 no epoch is validated"),
        ({"max_epochs": 0}, "max_epochs=0: must be"),
        ({"start_weights": 5}, "start_weights=5: must be text"),
        ({"crop_px": 48}, "crop_px=48: images are 32 x 32"),
    ],
)
def test_a_wrong_choice_is_told_in_a_line(
    finished: Path, stage: Run, tmp_path: Path, overrides: dict[str, Any], words: str
) -> None:
    with pytest.raises(SystemExit, match=words):
        stage(finished, "segment", **{"output_dir": str(tmp_path), "decoder": "linear", **overrides})
    assert not (tmp_path / "segmentation.safetensors").exists()


def test_nothing_is_trained_on_half_a_data_set(finished: Path, stage: Run, tmp_path: Path) -> None:
    shutil.copytree(finished / "masks", tmp_path / "masks")
    (tmp_path / "masks" / "5m.png").write_bytes(b"")
    with pytest.raises(SystemExit, match=r"5m\.png: cannot be read as a mask"):
        stage(tmp_path, "segment")
    assert not (tmp_path / "out" / "training").exists()


def test_phantom_slides_are_data(phantoms: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    grid = TileGrid(64, 64, 1.0)
    data = OutlinedSlides(str(phantoms), Phantoms("unused"), str(tmp_path), grid, label_fraction=0.5, seed=1)
    with caplog.at_level("INFO", "medsd.bundle.masks"):
        data.prepare()
    parts = {part: data.part(part) for part in ("training", "validation", "testing")}
    assert all((items.shares > 0).any() and (items.shares == 0).any() for items in parts.values())
    names = [set(items.units.tolist()) for items in parts.values()]
    assert not set.intersection(*names) and names[2] == {"test_001", "test_002"}
    assert "label_fraction=0.5: " in caplog.text
    tile = int(np.argmax(parts["testing"].shares))
    share = float((parts["testing"][tile]["label"] > 0).float().mean())
    assert share == pytest.approx(parts["testing"].shares[tile], abs=0.02)
    assert "nothing is outlined as" not in caplog.text
    caplog.clear()
    replace(data, classes=("background", "tumour", "stroma")).prepare()
    told = [line for line in caplog.messages if "nothing is outlined as the class 'stroma' on any slide of " in line]
    assert [line.partition(":")[0] for line in told] == ["training", "validation", "testing"]
    assert "the class 'tumour'" not in caplog.text and "check classes" in told[0]
    table = tmp_path / "slides.csv"
    rows = [f"{path},{path.stem},background,test" for path in sorted(phantoms.rglob("normal_*.tif"))]
    table.write_text("\n".join(["slide,patient,label,part", *rows]))
    with pytest.raises(DatasetError, match=r"slides\.csv: column 'part': 2 of 2 patients are given to testing"):
        replace(data, dataset_dir=str(table)).part("training")


def test_volumes_are_split_by_their_cases(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for word in ("img", "label"):
        (tmp_path / "ct" / word).mkdir(parents=True)
        for case in range(1, 7):
            array = np.zeros((16, 16, 3), np.int16)
            array[4:9, 4:9, 1:] = 6 if word == "label" else 200 + case
            np.save(tmp_path / "ct" / word / f"{word}{case:04d}.npy", array)
    given = (str(tmp_path / "ct"), str(tmp_path / "work"), SliceSettings(every=1, side_px=32), ("background", "liver"))
    with pytest.raises(DatasetError, match="no case 9 of test_cases"):
        LabelledVolumes(*given, values=(0, 6), test_cases=(9,)).part("testing")
    assert not (tmp_path / "work").exists()  # told before any volume is made into slices
    data = LabelledVolumes(*given, values=(0, 6), test_cases=(2, 5), validation_share=0.2)
    data.prepare()
    assert "check organs" not in caplog.text
    replace(data, classes=("background", "liver", "spleen"), values=(0, 6, 1)).prepare()
    assert "testing: no voxel of its volumes is 'spleen', 1 in the labels; check organs" in caplog.text
    assert [path.stem for path in data.part("testing").files] == ["0002", "0005"]
    assert len(data.part("training").files) + len(data.part("validation").files) == 4
    assert len(data.part("testing")) == 6 and len(data.part("training")) % 2 == 0
    items = data.part("testing")
    found, mask = data.judged(items, 1, items[1]["label"][0])
    assert found.shape == mask.shape == (16, 16) and torch.equal(found, mask)
    with pytest.raises(DatasetError, match=r"ct: test_cases: 6 of 6 patients are given to testing, none .* training"):
        LabelledVolumes(*given, values=(0, 6), test_cases=range(1, 7)).part("testing")
    with pytest.raises(ConfigError, match=r"organs=\[0\]: give a different one for each of the 2 classes"):
        LabelledVolumes(*given, values=(0,), test_cases=(2,))


@pytest.mark.parametrize("mpp", [0, -1, "a", float("nan"), 250, True])
def test_a_scale_that_no_microscope_has_is_refused(mpp: Any) -> None:
    with pytest.raises(ConfigError, match=rf"mpp={mpp!r}: must be a number from 0.05 to 20; micrometres per pixel"):
        MaskFolder("masks", ("background", "gland"), 32, mpp=mpp)


def test_parts_of_a_folder_are_told_with_table_and_column(tmp_path: Path) -> None:
    rows = []
    for number in range(4):
        for name in (f"{number}.png", f"{number}m.png"):
            (tmp_path / name).touch()
        rows.append(f"{number}.png,{number}m.png,p{number // 2},test")
    table = tmp_path / "index.csv"
    table.write_text("\n".join(["file,mask,patient,part", *rows]))
    source = rf"^{re.escape(str(table))}: column 'part': "
    with pytest.raises(DatasetError, match=rf"{source}2 of 2 patients are given to testing, none is left for training"):
        MaskFolder(str(tmp_path), ("background", "gland"), 32).part("training")
    table.write_text(table.read_text().removesuffix("test") + "train")
    with pytest.raises(DatasetError, match=rf"{source}patient 'p1' is in testing and in training; give all"):
        MaskFolder(str(tmp_path), ("background", "gland"), 32).part("training")


@pytest.mark.parametrize("name", ["ebhi_segmentation", "nuinsseg", "btcv"])
def test_configurations_are_accepted(name: str) -> None:
    check_config([str(ROOT / "bundles" / "segmentation.json"), str(ROOT / "configs" / f"{name}.json")])
