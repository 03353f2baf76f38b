"""The stage pretrain: what it leaves, where it goes, what it refuses; slides, folders and volumes without labels."""

from __future__ import annotations

import csv
import json
import logging
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from segmentation_models_pytorch.encoders import get_encoder

from medsd.bundle.data import SlideData
from medsd.bundle.pretraining import check_negatives
from medsd.bundle.unlabelled import CtVolumes, UnlabelledFolders, UnlabelledSlides
from medsd.cohort.index import TileGrid
from medsd.errors import ConfigError, NoTissueError
from medsd.explain.model import load_model
from medsd.networks.classifier import Normalise, TileClassifier
from medsd.networks.start import load_encoder, save_encoder, weights_sha256
from medsd.networks.weights import load_classifier
from medsd.phantom.files import write_pyramid
from medsd.pretrain.med_moco import MedMoCoSettings
from medsd.pretrain.start import EncoderStart, settle
from medsd.pretrain.volumes import SliceSettings
from medsd.tables import read_table

FILES = "bundles/camelyon.json,configs/pcam.json"
SMALL = {
    "encoder": "test_resnet",
    "pretrained": False,
    "layer": "layer3",
    "local_layer": "layer2",
    "tile_px": 32,
    "pretrain_epochs": 2,
    "pretrain_samples": 32,
    "pretrain_batch_size": 8,
    "queue": 8,
    "pretraining::settings::group_size": 8,
    "max_epochs": 1,
    "samples_per_epoch": 32,
    "batch_size": 16,
    "methods": ["gradient_x_activation"],
}
Run = Callable[..., Any]


WITHOUT_MLFLOW = pytest.mark.skipif(find_spec("mlflow") is not None, reason="MLflow is installed")


def write_patches(folder: Path, count: int = 96) -> None:
    """Coarse noise in groups of eight."""
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    with open(folder / "labels.csv", "w", newline="") as handle:
        writer = csv.writer(handle)
        writer.writerow(["id", "label", "stain_cluster"])
        for number in range(count):
            coarse = generator.integers(0, 255, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((32, 32)).save(folder / f"p{number}.png")
            writer.writerow([f"p{number}", number % 2, number // 8])


@pytest.fixture(scope="module")
def stage(run_bundle: Run) -> Run:
    def run(folder: Path, *stages: str, **overrides: Any) -> Any:
        places = {"dataset_dir": str(folder / "patches"), "output_dir": str(folder / "out")}
        return run_bundle(FILES, *stages, **{**places, **SMALL, **overrides})

    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, stage: Run) -> Path:
    folder = tmp_path_factory.mktemp("pretrain")
    write_patches(folder / "patches")
    stage(folder, "pretrain", "finetune")
    return folder


def test_the_encoder_is_plain_and_says_where_it_comes_from(finished: Path) -> None:
    out = finished / "out"
    network = TileClassifier("test_resnet")
    assert load_file(out / "encoder.safetensors").keys() == network.encoder.state_dict().keys()
    load_encoder(network.encoder, out / "encoder.safetensors")
    record = json.loads((out / "pretraining" / "encoder.json").read_text())
    assert record["recipe"]["source"].startswith("Med-MoCo from random weights, 2 epochs of 4 steps on ")
    spectra = read_table(out / "pretraining" / "spectrum.csv", ["features", "embeddings"])
    values = spectra["features"][spectra["features"] != ""].astype(float).tolist()
    assert values == sorted(values, reverse=True) and (spectra["embeddings"] != "").sum() == 128
    settings = json.loads((out / "pretraining" / "settings.json").read_text())
    assert settings["network"]["queue"] == 8 and settings["step"]["views"]["size_px"] == 32
    assert settings["start"]["weights"] is None and settings["sampler"]["samples"] == 32
    checkpoint = torch.load(out / "pretraining" / "checkpoint.pt", weights_only=True)["network"]
    for name, tensor in network.encoder.state_dict().items():
        assert torch.equal(tensor, checkpoint[f"encoder.{name}"]), name


def test_an_encoder_that_ends_early_does_so_in_every_stage(finished: Path, tmp_path: Path, stage: Run) -> None:
    shutil.copytree(finished / "patches", tmp_path / "patches")
    short = {"encoder_options": {"end": "layer3"}, "pretrain_epochs": 1, "pretrain_samples": 8}
    stage(tmp_path, "pretrain", "finetune", "probe", **short)
    encoder = load_model(tmp_path / "out" / "encoder.safetensors").network
    _, card, _ = load_classifier(tmp_path / "out" / "model.safetensors")
    for cut in (encoder, TileClassifier("test_resnet", encoder_options=card.options["encoder_options"]).encoder):
        assert not any(name.startswith("layer4") for name in cut.state_dict())
    assert len(read_table(tmp_path / "out" / "probe.csv")) == 8


def test_the_stage_finetune_starts_from_it(finished: Path, tmp_path: Path, stage: Run) -> None:
    _, card, _ = load_classifier(finished / "out" / "model.safetensors")
    assert card.start.startswith("encoder.safetensors, SHA-256 ")
    shutil.copytree(finished / "patches", tmp_path / "patches")
    with pytest.raises(SystemExit, match=r"encoder\.safetensors: .* run the stage 'pretrain'"):
        stage(tmp_path, "finetune")
    flow = stage(tmp_path, "finetune", pretrain_epochs=0, max_epochs=1)
    assert load_classifier(tmp_path / "out" / "model.safetensors")[1].start == "random weights"
    assert not (tmp_path / "out" / "pretraining").exists()
    assert flow.parser.get_parsed_content("network").encoder_weights is None


def test_a_finished_run_is_kept_and_stages_one_by_one_equal_the_run(finished: Path, tmp_path: Path, stage: Run) -> None:
    shutil.copytree(finished / "patches", tmp_path / "patches")
    stage(tmp_path, "run", run=["@pretrain", "@finetune"])
    one, other = (load_file(folder / "out" / "model.safetensors") for folder in (finished, tmp_path))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())
    files = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    before = {path: path.stat().st_mtime_ns for path in files}
    stage(tmp_path, "pretrain", "finetune")
    assert {path: path.stat().st_mtime_ns for path in files} == before
    path = tmp_path / "out" / "encoder.safetensors"
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    stage(tmp_path, "pretrain")  # written anew from the checkpoint
    assert weights_sha256(path) == weights_sha256(finished / "out" / "encoder.safetensors")


def test_the_stage_probe_scores_the_encoder_beside_its_start(
    finished: Path, tmp_path: Path, stage: Run, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(finished / "patches", tmp_path / "patches")
    for number in range(0, 96, 2):  # so that there is something to find: label 0 is dark
        path = tmp_path / "patches" / f"p{number}.png"
        Image.fromarray(np.asarray(Image.open(path)) // 3).save(path)
    (tmp_path / "out").mkdir()
    shutil.copy(finished / "out" / "encoder.safetensors", tmp_path / "out")
    with caplog.at_level(logging.INFO, "medsd.bundle.probing"):
        stage(tmp_path, "probe")
    table = read_table(tmp_path / "out" / "probe.csv")
    assert table["encoder"].tolist() == ["encoder.safetensors"] * 4 + ["random weights"] * 4
    assert table["probe"].tolist() == ["linear", "k-NN"] * 4 and set(table["groups"]) == {"3"}
    numbers = table[["auc_low", "auc", "auc_high", "accuracy_low", "accuracy", "accuracy_high"]]
    numbers = numbers.replace("", "nan").astype(float).to_numpy()  # an AUC of 1 has no interval
    assert not (np.diff(numbers[:, :3]) < 0).any() and not (np.diff(numbers[:, 3:]) < 0).any()
    assert (numbers[[0, 4], 1] > 0.9).all()
    assert (table["effective_rank"].astype(float) > 1).all()
    assert len(set(table["effective_rank"])) == 4  # of two encoders, whitened and not
    (line,) = [record.getMessage() for record in caplog.records if record.name == "medsd.bundle.probing"]
    assert line.startswith("linear probe, AUC on 24 test items in 3 groups: ") and "of random weights" in line
    with pytest.raises(SystemExit, match=r"probe_items=0: must be"):
        stage(tmp_path, "probe", probe_items=0)
    (tmp_path / "out" / "encoder.safetensors").unlink()
    with pytest.raises(SystemExit, match=r"encoder\.safetensors: no such encoder weights; .* run the stage 'pretrain'"):
        stage(tmp_path, "probe")


def test_the_start_is_the_one_that_was_trained() -> None:
    start = EncoderStart("test_resnet", seed=3)
    before = torch.random.get_rng_state()
    alone, moco = start.encoder_alone(), start.network(MedMoCoSettings(queue=8), torch.device("cpu"))
    assert torch.equal(torch.random.get_rng_state(), before)
    for name, tensor in moco.encoder.state_dict().items():
        assert torch.equal(tensor, alone.state_dict()[name]), name


def test_a_device_that_is_not_there_is_told() -> None:
    with pytest.raises(ConfigError, match=r"^device 'cuda:99': cannot be used here"):
        EncoderStart("test_resnet").network(MedMoCoSettings(queue=8), torch.device("cuda:99"))


def test_a_random_start_is_judged_with_the_statistics_of_images() -> None:
    encoder = EncoderStart("test_resnet").encoder_alone().eval()
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    batches = torch.randint(256, (2, 4, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    settle(encoder, batches, Normalise())
    convolution, norm = encoder.conv1[:2]
    stem = [convolution(Normalise()(batch)) for batch in batches]
    assert torch.allclose(norm.running_mean, torch.stack([each.mean((0, 2, 3)) for each in stem]).mean(0))
    assert torch.allclose(norm.running_var, torch.stack([each.var((0, 2, 3)) for each in stem]).mean(0))
    assert norm.momentum == 0.1 and not any(module.training for module in encoder.modules())
    after = encoder.state_dict()
    assert all(
        torch.equal(after[name], tensor)
        for name, tensor in before.items()
        if "running" not in name and "num_" not in name
    )


def test_the_full_job_is_probed_on_data_of_its_own(finished: Path, tmp_path: Path, run_bundle: Run) -> None:
    files = "bundles/camelyon.json,bundles/pretrain.json"
    given = {"output_dir": str(finished / "out"), "encoder": "test_resnet", "tile_px": 32, "probe_items": 40}
    with pytest.raises(SystemExit, match=r"labelled_dir: not set, .*, --labelled_dir FOLDER"):
        run_bundle(files, "probe", **given)
    masked = tmp_path / "masked"
    masked.mkdir()
    for number in range(4):
        pixels = np.random.default_rng(number).integers(256, size=(32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(masked / f"{number}.png")
        Image.fromarray(pixels[..., 0] // 128).save(masked / f"mask{number}.png")
    rows = [f"{number}.png,mask{number}.png,patient{number}" for number in range(4)]
    (masked / "index.csv").write_text("\n".join(["file,mask,patient", *rows]))
    sides = {"masked_dir": str(masked), "pretraining::views::size_px": 32}
    run_bundle(files, "probe", labelled_dir=str(finished / "patches"), **given, **sides)
    assert len(read_table(finished / "out" / "probe.csv")) == 8
    of_masks = read_table(finished / "out" / "probe_masks.csv")
    assert of_masks["layer"].tolist() == ["layer2"] * 2 and of_masks["encoder"][2] == "encoder.safetensors"
    for name in ("probe.csv", "probe_masks.csv"):
        (finished / "out" / name).unlink()


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"queue": 12}, ["queue=12", "multiple", "batch_size"]),
        ({"pretrain_epochs": -1}, ["pretrain_epochs=-1", "0 leaves pre-training out"]),
        ({"queue": 1024}, ["queue=1024", "more than a quarter of the", "images"]),
        ({"pretrain_batch_size": 64}, ["pretrain_batch_size=64", "pretrain_samples=32"]),
        ({"pretrain_lr": 0.5}, ["another optimizer::lr; ", "output_dir"]),
        ({"pretraining::settings::temperature": 0}, ["temperature=0"]),
        ({"pretraining::settings::decorrelation": "w3"}, ["decorrelation='w3'"]),
        ({"local_layer": "layr2"}, ["layr2", "layer2"]),
        ({"encoder": "test_vit"}, ["test_vit", "not pre-trained here"]),
        ({"encoder_options": {"end": "layr3"}}, ["end: layer 'layr3'", "layer3"]),
        ({"save_every": 0}, ["save_every=0"]),
        ({"encoder_weights": "nowhere.safetensors"}, ["nowhere.safetensors", "no such encoder weights"]),
        ({"pretraining::views::kind": "ct"}, ["kind='ct'"]),
        ({"output_dir": "alone", "pretraining::settings::group_size": 64}, ["group_size=64"]),
        ({"pretraining::views::scale": 0.5}, ["scale=0.5", "largest share"]),
        pytest.param({"mlflow": True}, ["MLFlowHandler: ", "mlflow"], marks=WITHOUT_MLFLOW),
    ],
)
def test_a_wrong_choice_is_told_in_a_line(
    finished: Path,
    stage: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    overrides: dict[str, Any],
    words: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint = finished / "out" / "pretraining" / "checkpoint.pt"
    before = checkpoint.read_bytes()
    with pytest.raises(SystemExit) as stop:
        stage(finished, "pretrain", **overrides)
    assert all(word in str(stop.value) for word in words), stop.value
    assert checkpoint.read_bytes() == before


def test_one_slide_alone_leaves_no_key_to_tell_apart(tmp_path: Path) -> None:
    write_patches(tmp_path / "patches", 32)
    images = UnlabelledFolders([str(tmp_path / "patches")], 32, ["label"], 0.1).unlabelled(
        "training"
    )  # label 0 or 1 alone
    network = EncoderStart("test_resnet").network(MedMoCoSettings(queue=4, separate_slides=True), torch.device("cpu"))
    with pytest.raises(ConfigError, match=r"separate_slides: all 16 images .* one slide"):
        check_negatives(network, images, 4)
    several = UnlabelledFolders([str(tmp_path / "patches")], 32, ["stain_cluster"], 0.1).unlabelled("training")
    check_negatives(network, several, 4)


def test_small_slides_that_are_drawn_often_make_a_queue_too_large() -> None:
    class Images(list[int]):
        @property
        def groups(self) -> Any:
            return np.array(self)

    def check(sizes: list[int], queue: int = 25, even: bool = True, separate: bool = False) -> None:
        settings = MedMoCoSettings(queue=queue, separate_slides=separate)
        network = EncoderStart("test_resnet").network(settings, torch.device("cpu"))
        images: Any = Images(np.repeat(range(len(sizes)), sizes))
        check_negatives(network, images, 1, even)

    unequal = 9 * [5] + [55]
    check(10 * [10])
    check(unequal, even=False)
    check(unequal, separate=True)
    check(unequal, queue=13)
    with pytest.raises(ConfigError, match=r"queue=25: .* 36% of all draws .* at most 13, or set even_groups to False"):
        check(unequal)


def test_segmentation_models_pytorch_and_explain_take_the_encoder(tmp_path: Path) -> None:
    moco = EncoderStart("resnet18").network(MedMoCoSettings(queue=8), torch.device("cpu")).eval()
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, moco.plain_encoder(), "resnet18", "a test")
    theirs = get_encoder("resnet18", weights=None).eval()
    theirs.load_state_dict(load_file(path))
    images = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = moco.encoder(images)
        torch.testing.assert_close(theirs(images)[-1], expected)
        torch.testing.assert_close(load_model(path).network(images), expected)


def test_slides_are_read_whatever_their_labels(phantoms: Path, tmp_path: Path) -> None:
    slides, grid = phantoms / "training", TileGrid(64, 64, 1.0)
    data = UnlabelledSlides(str(slides), str(tmp_path / "work"), grid, held_out=0.3)
    data.prepare()
    training, held_out = data.unlabelled("training"), data.unlabelled("validation")
    names = set(training.groups.tolist()), set(held_out.groups.tolist())
    assert names[1] and not names[0] & names[1] and training.fingerprint() != held_out.fingerprint()
    assert training[0]["image"].shape == (3, 64, 64) and data.description.endswith(" slides of training")


def test_tiles_that_no_label_fits_are_trained_on_too(phantoms: Path, tmp_path: Path) -> None:
    """Those that an outline cuts."""
    grid = TileGrid(64, 64, 1.0)
    data = SlideData(str(phantoms), None, str(tmp_path / "work"), grid)  # type: ignore[arg-type]
    data.prepare()
    assert len(data.unlabelled("training")) > len(data.part("training"))
    assert set(data.unlabelled("training").groups) == set(data.part("training").groups)


def test_slides_without_tissue_are_told(tmp_path: Path) -> None:
    (tmp_path / "slides").mkdir()
    for name in ("one", "other"):
        write_pyramid(tmp_path / "slides" / f"{name}.tif", np.full((1024, 1024, 3), 250, np.uint8), 0.5, 2)
    data = UnlabelledSlides(str(tmp_path / "slides"), str(tmp_path / "work"), TileGrid(64, 64, 1.0))
    data.prepare()
    with pytest.raises(NoTissueError, match="slides: no tissue in any slide; look at the thumbnails in"):
        data.unlabelled("training")


def test_folders_and_volumes_are_data_too(tmp_path: Path) -> None:
    write_patches(tmp_path / "patches", 32)
    folders = UnlabelledFolders([str(tmp_path / "patches")], 24, ["stain_cluster"], 0.25)
    folders.prepare()
    assert (len(folders.unlabelled("training")), len(folders.unlabelled("validation"))) == (24, 8)
    assert folders.unlabelled("training")[0]["image"].shape == (3, 24, 24)
    (tmp_path / "ct").mkdir()
    for name in ("a", "b"):
        np.save(tmp_path / "ct" / f"{name}.npy", np.random.default_rng(0).integers(-500, 500, (16, 16, 6)))
    volumes = CtVolumes(str(tmp_path / "ct"), str(tmp_path / "slices"), SliceSettings(side_px=16), 0.5)
    volumes.prepare()
    assert len(volumes.unlabelled("training")) == len(volumes.unlabelled("validation")) == 2
    assert volumes.description == "2 CT volumes of ct"


def test_slices_below_the_volumes_are_no_volumes(tmp_path: Path) -> None:
    for name in ("a", "b"):
        np.save(tmp_path / f"{name}.npy", np.random.default_rng(0).integers(-500, 500, (16, 16, 6)))
    work = tmp_path / "runs" / "slices"
    for _ in range(2):  # the second run finds what the first one left
        volumes = CtVolumes(str(tmp_path), str(work), SliceSettings(side_px=16), 0.5)
        volumes.prepare()
        assert np.load(work / "a.npy").shape == (2, 16, 16)
    assert volumes.description.startswith("2 CT volumes of ")


@pytest.mark.parametrize(
    ("files", "overrides", "words"),
    [
        ("bundles/pretrain.json", {}, ["dataset_dir: not set"]),
        ("bundles/pretrain.json", {"dataset_dir": "nowhere"}, ["nowhere"]),
        ("bundles/pretrain.json,configs/image_folders.json", {}, ["image_dirs: empty"]),
        ("bundles/pretrain.json,configs/image_folders.json", {"image_dirs": ["nowhere"]}, ["nowhere", "image_dirs"]),
        ("bundles/pretrain.json,configs/abdomenct.json", {"dataset_dir": "nowhere"}, ["nowhere", "no volumes"]),
        ("bundles/pretrain.json,configs/abdomenct.json", {"slices::window": [5, 1]}, ["window=[5, 1]"]),
    ],
)
def test_the_full_job_says_what_it_lacks(
    tmp_path: Path, run_bundle: Run, files: str, overrides: dict[str, Any], words: list[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        run_bundle(f"bundles/camelyon.json,{files}", "prepare", output_dir=str(tmp_path), **overrides)
    assert all(word in str(stop.value) for word in words), stop.value
