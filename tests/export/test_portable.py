"""ONNX, TorchScript and WSInfer files answer as the network does, and say how they are to be used."""

from __future__ import annotations

import copy
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision import transforms

from medsd.errors import ConfigError, NetworkError, OutputError, WeightsError
from medsd.export.export import export_run
from medsd.export.onnx import write_onnx
from medsd.export.portable import Portable, portable
from medsd.export.source import TrainedClassifier, TrainedSegmentation, open_trained
from medsd.export.torchscript import check_traced, trace, write_torchscript
from medsd.export.wsinfer import CONFIG, MODEL
from medsd.export.zoo_configs import network_config
from medsd.networks.calibrated import Calibration, calibrated
from medsd.networks.start import save_encoder
from medsd.networks.weights import save_classifier
from medsd.segment.network import SegmentationNetwork
from medsd.segment.weights import SegmentationCard, save_segmentation


def tiles(count: int, height: int, width: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def answers_of_onnx(path: Path, images: torch.Tensor) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What ONNX Runtime gives by name, and the description in the file."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="the extra 'export' is not installed")
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    given = session.run(None, {session.get_inputs()[0].name: images.numpy()})
    description = json.loads(session.get_modelmeta().custom_metadata_map["medsd"])
    return dict(zip(names, given, strict=True)), description


def load_torchscript(path: Path) -> tuple[torch.jit.ScriptModule, dict[str, Any]]:
    extra = {"medsd.json": ""}
    return torch.jit.load(path, _extra_files=extra), json.loads(extra["medsd.json"])


@pytest.fixture(scope="module")
def expected(trained: TrainedClassifier, calibration: Calibration) -> Any:
    """Probabilities of images as the heatmaps' engine makes them."""

    def of(images: torch.Tensor) -> np.ndarray:
        with torch.inference_mode():
            logits = trained.network(images)
            return calibrated(logits, calibration.temperature, calibration.offset).softmax(1).numpy()

    return of


@pytest.fixture(scope="module")
def segmentation(tmp_path_factory: pytest.TempPathFactory) -> TrainedSegmentation:
    path = tmp_path_factory.mktemp("segmentation") / "segmentation.safetensors"
    torch.manual_seed(0)
    network = SegmentationNetwork("test_resnet", ("background", "gland")).eval()
    save_segmentation(path, network, SegmentationCard("test_resnet", "unet", network.classes, 64, "a test", mpp=0.5))
    found = open_trained(path.parent)
    assert isinstance(found, TrainedSegmentation)
    return found


def test_a_classifier_in_onnx_takes_images_as_read_of_any_number_and_size(
    run_folder: Path, tmp_path: Path, expected: Any
) -> None:
    export_run(run_folder, tmp_path / "a.onnx")
    for images in (tiles(1, 64, 64), tiles(7, 64, 64), tiles(3, 96, 160)):
        given, description = answers_of_onnx(tmp_path / "a.onnx", images)
        assert np.abs(given["probabilities"] - expected(images)).max() < 1e-4
    assert description["classes"] == ["normal", "adenoma", "carcinoma"] and description["input"]["type"] == "uint8"
    assert (description["tile_px"], description["mpp"], description["input"]["height"]) == (64, 1.0, "any")
    assert description["thresholds"] == {"adenoma": 0.4, "carcinoma": 0.4}
    onnx = pytest.importorskip("onnx")
    model = onnx.load(tmp_path / "a.onnx")
    onnx.checker.check_model(model)
    assert max(each.version for each in model.opset_import if each.domain == "") >= 18
    # Where torch's sources lie on this machine is nobody's business.
    assert str(Path(torch.__file__).parent).encode() not in (tmp_path / "a.onnx").read_bytes()
    assert [path.name for path in tmp_path.iterdir()] == ["a.onnx"]


def test_a_segmentation_network_in_onnx_takes_sides_of_multiples_of_32(
    segmentation: TrainedSegmentation, tmp_path: Path
) -> None:
    write_onnx(tmp_path / "a.onnx", portable(segmentation))
    images = tiles(2, 96, 128)
    given, description = answers_of_onnx(tmp_path / "a.onnx", images)
    with torch.inference_mode():
        assert np.abs(given["probabilities"] - segmentation.network(images).softmax(1).numpy()).max() < 1e-4
    assert description["input"]["height"] == "multiples of 32 px" and description["mpp"] == 0.5
    assert "calibration" not in description


def test_an_encoder_in_onnx_gives_features_and_their_map(trained: TrainedClassifier, tmp_path: Path) -> None:
    encoder = trained.network.encoder
    save_encoder(tmp_path / "encoder.safetensors", encoder, "test_resnet", "a test", trained.network.normalise)
    assert "encoder.safetensors in" in export_run(tmp_path, tmp_path / "a.onnx")
    images = tiles(2, 96, 64)
    given, description = answers_of_onnx(tmp_path / "a.onnx", images)
    with torch.inference_mode():
        feature_map = encoder(trained.network.normalise(images))
    assert np.abs(given["feature_map"] - feature_map.numpy()).max() < 1e-4 * float(feature_map.abs().max())
    assert np.allclose(given["features"], given["feature_map"].mean((2, 3)), rtol=1e-4, atol=1e-5)
    assert description["kind"] == "encoder" and description["mpp"] is None


def test_torchscript_says_the_same_and_describes_itself(
    run_folder: Path, segmentation: TrainedSegmentation, tmp_path: Path, expected: Any
) -> None:
    export_run(run_folder, tmp_path / "a.ts")
    network, description = load_torchscript(tmp_path / "a.ts")
    for images in (tiles(1, 64, 64), tiles(5, 96, 160)):
        with torch.no_grad():
            probabilities, _ = network(images)
        assert np.abs(probabilities.numpy() - expected(images)).max() < 1e-5
    assert description["outputs"]["probabilities"]["values"].startswith("calibrated")
    write_torchscript(tmp_path / "s.ts", portable(segmentation))
    with torch.inference_mode():
        (probabilities,) = load_torchscript(tmp_path / "s.ts")[0](tiles(2, 96, 128))
        assert torch.allclose(probabilities, segmentation.network(tiles(2, 96, 128)).softmax(1), atol=1e-5)
    with zipfile.ZipFile(tmp_path / "a.ts") as archive:
        places = str(Path(torch.__file__).parent).encode()
        assert not [name for name in archive.namelist() if places in archive.read(name)]


def test_test_time_augmentation_is_inside(run_folder: Path, tmp_path: Path, trained: TrainedClassifier) -> None:
    network = copy.deepcopy(trained.network)
    network.augment_at_test_time(True)
    (tmp_path / "run").mkdir()
    save_classifier(
        tmp_path / "run" / "model.safetensors",
        network,
        replace(trained.card, options=network.options, calibration=None),
    )
    again = open_trained(tmp_path / "run")
    assert isinstance(again, TrainedClassifier)
    assert network_config(again)["test_time_augmentation"] is True
    export_run(tmp_path / "run", tmp_path / "a.onnx")
    export_run(tmp_path / "run", tmp_path / "a.ts")
    scripted, description = load_torchscript(tmp_path / "a.ts")
    assert description["test_time_augmentation"] is True
    for images in (tiles(3, 64, 64), tiles(2, 96, 160)):
        with torch.no_grad():
            logits, alone = network(images), trained.network(images)
            assert (logits - alone).abs().max() > 1e-2
            torch.testing.assert_close(scripted(images)[1], logits, rtol=1e-4, atol=1e-4)
        given, described = answers_of_onnx(tmp_path / "a.onnx", images)
        torch.testing.assert_close(torch.from_numpy(given["logits"]), logits, rtol=1e-3, atol=1e-4)
    assert described["test_time_augmentation"] is True


class OneSize(torch.nn.Module):
    """Right at 64 px alone, as a trace of a network that asks Python for the size."""

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        side = images.shape[3]
        return ((images.float().mean((2, 3)) if int(side) == 64 else images.float().amax((2, 3))),)


class Forgetful(torch.nn.Module):
    """Gives other answers the second time."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
        self.count += 1
        return (images.float().mean((2, 3)) * self.count,)


def described(module: torch.nn.Module) -> Portable:
    return Portable(module.eval(), ("values",), 64, {"kind": "classifier", "input": {}})


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_a_network_of_one_size_is_written_for_that_size_and_says_so(tmp_path: Path) -> None:
    class Second(OneSize):
        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            # The batches that are compared end at a size that the first was not.
            wide = int(images.shape[3]) != 64 and int(images.shape[2]) != 64
            return ((images.float().amax((2, 3)) if wide else images.float().mean((2, 3))),)

    write_torchscript(tmp_path / "a.ts", described(Second()))
    assert load_torchscript(tmp_path / "a.ts")[1]["input"] == {"height": 64, "width": 64}
    assert torch.equal(load_torchscript(tmp_path / "a.ts")[0](tiles(9, 64, 64))[0], OneSize()(tiles(9, 64, 64))[0])


def test_a_file_that_answers_otherwise_is_not_left(tmp_path: Path) -> None:
    with pytest.raises(NetworkError, match="differ"):
        write_torchscript(tmp_path / "a.ts", described(Forgetful()))
    assert list(tmp_path.iterdir()) == []
    line = torch.nn.Linear(3, 2)
    other = torch.nn.Linear(3, 2)
    with pytest.raises(NetworkError, match="TorchScript: on images"):
        check_traced(trace(line, [torch.ones(1, 3)]), other, [torch.ones(1, 3)])


def test_wsinfer_gets_probabilities_after_its_softmax(run_folder: Path, tmp_path: Path, expected: Any) -> None:
    client = pytest.importorskip("wsinfer_zoo.client", reason="the extra 'peers' is not installed")
    export_run(run_folder, tmp_path / "wsi", wsinfer=True)
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted([CONFIG, MODEL, "wsi"])
    content = json.loads((tmp_path / "wsi" / CONFIG).read_text())
    config = client.ModelConfiguration.from_dict(content)
    assert config.get_slide_patch_size(0.25) == 4 * 64 and list(config.class_names)[2] == "carcinoma"
    # As wsinfer.modellib does it: transforms by name, then the softmax of what the network gives.
    chain = transforms.Compose([getattr(transforms, item.name)(**item.arguments or {}) for item in config.transform])
    images = tiles(4, 64, 64)
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in images]
    network = torch.jit.load(tmp_path / "wsi" / MODEL)
    with torch.no_grad():
        given = network(torch.stack([chain(picture) for picture in pictures]))
    assert np.abs(given.softmax(1).numpy() - expected(images)).max() < 1e-5
    assert np.allclose(given.exp().sum(1), 1, atol=1e-6)
    assert chain(pictures[0].resize((128, 128))).shape == (3, 64, 64)
    assert next(network.parameters()).device.type == "cpu"  # WSInfer asks for it


def test_wsinfer_cannot_normalise_stains(trained: TrainedClassifier, tmp_path: Path) -> None:
    card = replace(trained.card, stain_target={"method": "macenko"})
    save_classifier(tmp_path / "model.safetensors", trained.network, card)
    with pytest.raises(ConfigError, match="normalised to a stain, which WSInfer cannot"):
        export_run(tmp_path, tmp_path / "wsi", wsinfer=True)
    assert "normalise tiles to the stain" in export_run(tmp_path, tmp_path / "a.ts")
    assert load_torchscript(tmp_path / "a.ts")[1]["stain_target"] == {"method": "macenko"}


@pytest.mark.parametrize(
    ("out", "options", "error", "words"),
    [
        ("a.pb", {}, ConfigError, r"a\.pb: what to write\? Let it end in \.zip \(a bundle\), \.onnx or \.ts"),
        ("a.ts", {"license_file": "mine.txt"}, ConfigError, "license: only a bundle"),
        ("a.zip", {"license_file": "nowhere.txt"}, OutputError, r"nowhere\.txt: no licence to be read"),
        ("taken.onnx", {}, OutputError, r"taken\.onnx: is there already and is left as it is; choose another name"),
        ("taken.onnx", {"wsinfer": True}, OutputError, "is there already"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(
    run_folder: Path, tmp_path: Path, out: str, options: dict[str, Any], error: type, words: str
) -> None:
    (tmp_path / "taken.onnx").write_text("mine")
    with pytest.raises(error, match=words) as told:
        export_run(run_folder, tmp_path / out, **options)
    assert "\n" not in str(told.value)
    assert [path.name for path in tmp_path.iterdir()] == ["taken.onnx"]
    assert (tmp_path / "taken.onnx").read_text() == "mine"


def test_a_folder_without_weights_and_weights_of_others_are_named(
    tmp_path: Path, segmentation: TrainedSegmentation
) -> None:
    from safetensors.torch import save_file

    with pytest.raises(WeightsError, match=r"none of model\.safetensors, segmentation\.safetensors"):
        open_trained(tmp_path)
    save_file({"a": torch.zeros(1)}, tmp_path / "a.safetensors")
    with pytest.raises(WeightsError, match=r"a\.safetensors: not weights that medsd wrote"):
        open_trained(tmp_path / "a.safetensors")
    with pytest.raises(ConfigError, match="WSInfer runs classifiers"):
        export_run(segmentation.path, tmp_path / "wsi", wsinfer=True)


def test_a_missing_package_is_named_before_the_network_is_read(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ConfigError, match=r"ONNX: onnxscript is missing; pip install 'medsd\[export\]'"):
        export_run(run_folder, tmp_path / "a.onnx")
    assert list(tmp_path.iterdir()) == []


def test_what_was_never_calibrated_says_so(trained: TrainedClassifier, tmp_path: Path) -> None:
    card = replace(trained.card, calibration=None, others={})
    save_classifier(tmp_path / "a.safetensors", trained.network, card)
    network = portable(open_trained(tmp_path / "a.safetensors"))
    assert network.description["outputs"]["probabilities"]["values"] == "softmax of the logits; never calibrated"
    images = tiles(2, 64, 64)
    with torch.inference_mode():
        probabilities, logits = network.module(images)
    assert torch.equal(probabilities, logits.softmax(1))
