"""What `medsd export RUN OUT.zip` leaves passes MONAI's own checks, and maps slides as `medsd heatmap` does."""

from __future__ import annotations

import csv
import json
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path

import jsonschema
import monai.bundle
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser
from monai.bundle.properties import TrainProperties

from medsd.audit import audit
from medsd.bundle import check_config
from medsd.cohort.manifest import find_slides_at
from medsd.errors import ConfigError, DatasetError, OutputError
from medsd.export.export import export_run
from medsd.export.source import TrainedClassifier
from medsd.export.zoo_configs import train_config
from medsd.heatmap.cohort import map_slides
from medsd.heatmap.model import MapRequest
from medsd.heatmap.tiff import read_ome_tiff
from medsd.networks.aim import AimClassifier
from medsd.networks.calibrated import calibrated
from medsd.networks.start import save_encoder
from medsd.networks.weights import save_classifier
from medsd.slides.slide import open_slide

SCHEMA = Path(__file__).parents[1] / "bundle" / "meta_schema.json"
INFERENCE, META = "configs/inference.json", "configs/metadata.json"


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory, run_folder: Path) -> Path:
    """The bundle's folder, all that there is of it."""
    folder = tmp_path_factory.mktemp("zoo")
    assert "a MONAI bundle of 9 files" in export_run(run_folder, folder / "colon.zip")
    with zipfile.ZipFile(folder / "colon.zip") as archive:
        archive.extractall(folder)
    (folder / "colon.zip").unlink()
    return folder / "colon"


@pytest.fixture
def inside(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The bundle's folder, copied, as working directory."""
    monkeypatch.chdir(unpacked)
    return unpacked


@pytest.fixture(scope="module")
def slide(phantoms: Path) -> Path:
    return phantoms / "testing" / "images" / "test_001.tif"


def test_the_same_run_gives_the_same_bytes_of_every_time_and_place(
    run_folder: Path, tmp_path: Path, unpacked: Path
) -> None:
    export_run(run_folder, tmp_path / "a" / "colon.zip")
    with zipfile.ZipFile(tmp_path / "a" / "colon.zip") as archive:
        names = archive.namelist()
        assert names == sorted(names) and all(name.startswith("colon/") for name in names)
        assert {member.date_time for member in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}
        for name in names:
            # Names of scripted classes are numbered within a process.
            if not name.endswith("model.ts"):
                assert archive.read(name) == (unpacked.parent / name).read_bytes(), name
    assert list((tmp_path / "a").iterdir()) == [tmp_path / "a" / "colon.zip"]


def test_nothing_in_it_tells_of_this_machine(unpacked: Path, run_folder: Path) -> None:
    places = [str(Path(place)).encode() for place in (run_folder, Path.home(), Path(torch.__file__).parents[1])]
    for path in unpacked.rglob("*"):
        if path.is_file():
            parts = [path.read_bytes()]
            if path.suffix in (".ts", ".pt"):
                with zipfile.ZipFile(path) as archive:
                    parts = [archive.read(name) for name in archive.namelist()]
            assert not [place for place in [*places, b"/somewhere"] for part in parts if place in part], path


def test_metadata_are_verified(inside: Path) -> None:
    monai.bundle.verify_metadata(meta_file=META, filepath=str(SCHEMA))
    jsonschema.validate(json.loads((inside / META).read_text()), json.loads(SCHEMA.read_text()))


def test_the_network_takes_and_gives_what_is_written(inside: Path) -> None:
    monai.bundle.verify_net_in_out(net_id="network_def", meta_file=META, config_file=INFERENCE, device="cpu")
    wrong = {"_meta_#network_data_format#outputs#pred#num_channels": 2}
    with pytest.raises(ValueError, match="doesn't match"):
        monai.bundle.verify_net_in_out(
            net_id="network_def", meta_file=META, config_file=INFERENCE, device="cpu", **wrong
        )


@pytest.mark.parametrize("workflow_type", ["train", "inference"])
def test_load_gives_the_network_with_its_weights(inside: Path, trained: TrainedClassifier, workflow_type: str) -> None:
    network = monai.bundle.load("colon", bundle_dir=inside.parent, workflow_type=workflow_type, device="cpu")
    images = torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        assert torch.equal(network.eval()(images), trained.network(images))


def test_the_scripted_network_is_the_one_that_monai_exports(inside: Path, trained: TrainedClassifier, tmp_path) -> None:
    monai.bundle.ckpt_export(filepath=str(tmp_path / "again.ts"), meta_file=META, config_file=INFERENCE, use_trace=True)
    images = torch.randn(3, 3, 64, 64)
    ours, metadata, files = monai.bundle.load(
        "colon", bundle_dir=inside.parent, load_ts_module=True, device="cpu", config_files=("inference.json",)
    )
    with torch.inference_mode():
        assert torch.equal(ours(images), torch.jit.load(tmp_path / "again.ts")(images))
        assert torch.allclose(ours(images), trained.network(images), atol=1e-6)
    assert metadata["name"] == "colon" and "evaluator" in json.loads(files["inference.json"])


def test_monai_exports_it_to_onnx(inside: Path, trained: TrainedClassifier, tmp_path: Path) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    monai.bundle.onnx_export(
        net_id="network_def", filepath=str(tmp_path / "a.onnx"), ckpt_file="models/model.pt", meta_file=META,
        config_file=INFERENCE, use_trace=True,
    )  # fmt: skip
    images = torch.randn(1, 3, 64, 64)
    session = onnxruntime.InferenceSession(tmp_path / "a.onnx")
    (logits,) = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    with torch.inference_mode():
        assert np.abs(logits - trained.network(images).numpy()).max() < 1e-4


def test_maps_of_a_slide_are_those_of_medsd_heatmap(
    inside: Path, run_folder: Path, slide: Path, tmp_path: Path
) -> None:
    given = {"dataset_dir": str(slide), "output_dir": str(tmp_path / "out"), "target": "carcinoma"}
    check_config(INFERENCE, "run", **given)
    monai.bundle.run(config_file=INFERENCE, workflow_type="infer", faithful_tiles=0, device="cpu", **given)
    request = MapRequest(target="carcinoma", faithful_tiles=0)
    map_slides(find_slides_at([slide]), run_folder / "model.safetensors", tmp_path / "plain", request, "cpu")
    for name in ("saliency.ome.tif", "probability.ome.tif"):
        one, other = (
            read_ome_tiff(tmp_path / folder / slide.stem / name).values for folder in ("out/heatmaps", "plain")
        )
        assert np.array_equal(one, other, equal_nan=True) and np.isfinite(one).any() and np.nanstd(one) > 0


def test_the_workflow_has_all_properties_and_its_evaluator_gives_calibrated_probabilities(
    inside: Path, trained: TrainedClassifier, slide: Path, tmp_path: Path
) -> None:
    given = {"dataset_dir": str(slide), "output_dir": str(tmp_path), "device": "$torch.device('cpu')"}
    flow = monai.bundle.create_workflow(config_file=INFERENCE, workflow_type="infer", **given)
    assert flow.check_properties() == []
    flow.evaluator.run()
    with open(tmp_path / "tiles.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert len(rows) == len(flow.dataset) > 10 and rows[0][0].startswith("test_001/")
    place, *said = rows[3]
    x, y = map(int, place.removeprefix("test_001/").split("_"))
    with open_slide(slide) as opened:
        tile = torch.from_numpy(opened.read(x, y, 64, 64, 1.0).transpose(2, 0, 1).copy())[None]
    calibration = trained.card.calibration
    assert calibration is not None
    with torch.inference_mode():
        expected = calibrated(trained.network(tile), calibration.temperature, calibration.offset).softmax(1)[0]
    assert np.allclose([float(word) for word in said], expected, atol=1e-4)
    assert sum(map(float, said)) == pytest.approx(1, abs=1e-5)


def test_the_training_is_the_runs_own_without_its_places(inside: Path) -> None:
    config = json.loads((inside / "configs" / "train.json").read_text())
    assert config["classes"] == ["normal", "adenoma", "carcinoma"] and config["bundle_root"] == "."
    assert config["dataset_dir"] == "$@bundle_root + '/data/slides'"
    assert config["encoder_weights"] == "$@bundle_root + '/data/encoder.safetensors'"
    check_config("configs/train.json")
    parser = ConfigParser()
    parser.read_config("configs/train.json")
    for name, wanted in TrainProperties.items():
        assert not wanted["required"] or wanted["id"] in parser, name
    assert train_config({"slides": ["/a/b.svs"], "x": {"y": "C:\\z\\w"}, "lr": 0.1, "z": "@lr"}) == {
        "slides": ["$@bundle_root + '/data/b.svs'"], "x": {"y": "$@bundle_root + '/data/w'"}, "lr": 0.1, "z": "@lr",
        "bundle_root": ".", "output_dir": "$@bundle_root + '/runs'",
    }  # fmt: skip


def test_an_audit_knows_all_that_it_runs(inside: Path) -> None:
    findings = audit([inside / INFERENCE])
    assert findings and [finding for finding in findings if finding.unknown] == []


def test_the_card_tells_scores_with_intervals_and_limits(inside: Path, run_folder: Path, tmp_path: Path) -> None:
    text = (inside / "docs" / "README.md").read_text()
    assert "| Patch AUC, resampling tiles | 0.875 | 0.750 to 0.938 |" in text
    for words in ("Research use only", "colon, H&E", "64 px at 1 um", "5 % of the tissue is carcinoma", "drawn slides"):
        assert words in text, words
    assert "No licence was given for the weights" in (inside / "LICENSE").read_text()
    scores = json.loads((run_folder / "scores.json").read_text())
    shutil.copy(run_folder / "model.safetensors", tmp_path)
    (tmp_path / "scores.json").write_text(json.dumps(scores | {"weights_sha256": "of others"}))
    for content in (b"\xff\xd8\xff", b" \n", b"a\0b"):
        (tmp_path / "mine.txt").write_bytes(content)
        with pytest.raises(OutputError, match=r"mine\.txt: no licence to be read \(.*name a text file"):
            export_run(tmp_path, tmp_path / "bare.zip", license_file=tmp_path / "mine.txt")
    (tmp_path / "mine.txt").write_text("mine")
    made = export_run(tmp_path, tmp_path / "bare.zip", license_file=tmp_path / "mine.txt")
    assert "without configs/train.json" in made
    with zipfile.ZipFile(tmp_path / "bare.zip") as archive:
        assert "None were measured" in archive.read("bare/docs/README.md").decode()
        assert archive.read("bare/LICENSE") == b"mine" and "bare/configs/train.json" not in archive.namelist()


def test_a_classifier_that_masks_its_features_goes_too(tmp_path: Path, trained: TrainedClassifier) -> None:
    torch.manual_seed(0)
    network = AimClassifier("test_resnet", trained.card.classes, feature_width=16, end_stage=1).eval()
    card = replace(
        trained.card, architecture="aim", options=network.options, calibration=None, others={},
        input_mean=network.normalise.input_mean, input_std=network.normalise.input_std,
    )  # fmt: skip
    save_classifier(tmp_path / "aim.safetensors", network, card)
    export_run(tmp_path / "aim.safetensors", tmp_path / "aim.zip")
    with zipfile.ZipFile(tmp_path / "aim.zip") as archive:
        archive.extractall(tmp_path)
    again = monai.bundle.load("aim", bundle_dir=tmp_path, workflow_type="inference", device="cpu")
    images = torch.randn(2, 3, 64, 64)
    scripted = torch.jit.load(tmp_path / "aim" / "models" / "model.ts")
    with torch.inference_mode():
        expected = network(images)
        assert torch.equal(again.eval()(images), expected) and torch.allclose(scripted(images), expected, atol=1e-4)
    assert "never calibrated" in (tmp_path / "aim" / "docs" / "README.md").read_text()
    config = json.loads((tmp_path / "aim" / INFERENCE).read_text())
    assert config["run"] == ["@tiles"]  # there are no maps of what was never calibrated


def test_a_damaged_run_leaves_nothing(run_folder: Path, trained: TrainedClassifier, tmp_path: Path) -> None:
    shutil.copytree(run_folder, tmp_path / "run")
    (tmp_path / "run" / "scores.json").write_text("{")
    with pytest.raises(DatasetError, match=r"scores\.json: not JSON"):
        export_run(tmp_path / "run", tmp_path / "a.zip")
    save_encoder(tmp_path / "encoder.safetensors", trained.network.encoder, "test_resnet", "a test")
    with pytest.raises(ConfigError, match="made of a classifier"):
        export_run(tmp_path / "encoder.safetensors", tmp_path / "a.zip")
    assert not list(tmp_path.glob("*.zip")) and not list(tmp_path.glob(".*"))
