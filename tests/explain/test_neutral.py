"""DeepLift on images: against the weights' neutral reference or one found from the images; its sums, its words."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from medsd.errors import ConfigError
from medsd.explain.explain import explain_images
from medsd.explain.settings import CLASS_METHODS, ExplainSettings
from medsd.networks.calibrated import Calibration
from medsd.networks.classifier import TileClassifier
from medsd.networks.weights import ModelCard, load_classifier, save_classifier
from medsd.saliency.neutral import NeutralReference, neutral_from_images
from medsd.saliency.registry import make_method

TEMPERATURE = 3.0
OFFSET = math.log(0.2 / 0.8)  # the tissue's prevalence
SETTINGS = ExplainSettings(("deeplift", "gradient"), "layer3", "tumour", measured=False)
Write = Callable[..., Path]


@pytest.fixture(scope="module")
def network() -> TileClassifier:
    """Sure of half the images of `folder`: its bias lies between their log-odds."""
    torch.manual_seed(0)
    network = TileClassifier("test_resnet").eval().requires_grad_(False)
    torch.nn.init.normal_(network.head.weight, std=20.0)
    return network


@pytest.fixture
def pixels(folder) -> dict[str, torch.Tensor]:
    """Images (1, 3, H, W) uint8 by name; those of 64 px get stains apart from each other."""
    for name, shade in (("a", (200, 60, 160)), ("c", (90, 140, 60)), ("d", (20, 30, 220))):
        noise = np.random.default_rng(7).integers(-20, 20, (64, 64, 3))
        Image.fromarray((np.array(shade) + noise).astype(np.uint8)).save(folder / f"{name}.png")
    return {
        path.name: torch.from_numpy(np.asarray(Image.open(path)).copy()).permute(2, 0, 1)[None]
        for path in sorted(folder.iterdir())
    }


@pytest.fixture
def write(network, pixels, tmp_path) -> Write:
    """Writes weights whose card holds a reference, or none."""
    with torch.no_grad():
        network.head.bias.zero_()
        odds = sorted(float(network(image) @ torch.tensor([-1.0, 1.0])) for image in pixels.values())
        network.head.bias[1] = -(odds[1] + odds[2]) / 2 - TEMPERATURE * OFFSET

    def written(reference: NeutralReference | None = None, layer: str = "layer3") -> Path:
        fields = None if reference is None else asdict(reference)
        shares = {"drawn_shares": (0.5, 0.5), "tissue_shares": (0.8, 0.2)}
        calibration = Calibration(0.5, {}, layer, "none", "a test", TEMPERATURE, reference=fields, **shares)
        card = ModelCard("test_resnet", network.classes, 64, 0.5, "noise", calibration)
        save_classifier(tmp_path / "model.safetensors", network, card)
        return tmp_path / "model.safetensors"

    return written


def read(out: Path) -> tuple[dict[str, torch.Tensor], dict, dict[str, dict[str, str]]]:
    """Maps by "image/method", the card, and DeepLift's rows of the table by image."""
    with safe_open(out / "maps.safetensors", framework="pt") as file:
        maps, card = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()["card"]  # noqa: SIM118
    with open(out / "metrics.csv", newline="", encoding="utf-8") as handle:
        rows = {row["image"]: row for row in csv.DictReader(handle) if row["method"] == "deeplift"}
    return maps, json.loads(card), rows


def log_odds(network: TileClassifier, x: torch.Tensor, vector: torch.Tensor | None = None) -> float:
    """Tempered, and of the tissue's prevalence, of an image or of the layer's uniform map at its size."""
    hook = network.encoder.layer3.register_forward_hook(
        lambda _module, _inputs, output: None if vector is None else vector[:, None, None].expand_as(output)
    )
    logits = network(x)[0]
    hook.remove()
    return float(logits[1] - logits[0]) / TEMPERATURE + OFFSET


def test_a_map_and_what_it_lacks_are_the_log_odds(write, network, pixels, folder, tmp_path):
    """What it lacks is the log-odds of the weights' reference, which is a plane's, as a map of the image's size."""
    vector = torch.rand(network.encoder.feature_info[-2]["num_chs"], generator=torch.Generator().manual_seed(2))
    weights = write(NeutralReference("layer3", tuple(vector.tolist()), 1e-7, 0.5, "plane", "64 validation tiles"))
    out = tmp_path / "out"
    summary = explain_images([folder], weights, out, SETTINGS)
    maps, card, rows = read(out)
    assert len(rows) == 4 and len({image.shape for image in pixels.values()}) == 2
    for name, image in pixels.items():
        total, lacking = float(maps[f"{name}/deeplift"].sum()), float(rows[name]["unexplained"])
        assert float(rows[name]["output"]) == pytest.approx(log_odds(network, image), rel=1e-4)
        assert total + lacking == pytest.approx(log_odds(network, image), rel=1e-4)
        assert lacking == pytest.approx(log_odds(network, image, vector), rel=1e-3, abs=1e-4)
    assert summary.reference == {
        "layer": "layer3",
        "log_odds": 1e-7,
        "position": 0.5,
        "extent": "plane",
        "source": "64 validation tiles",
        "beside": 0.0,
    }
    sums = {name: float(maps[f"{name}/deeplift"].sum()) for name in rows}
    sure = [name for name in rows if abs(float(rows[name]["output"])) > 1]
    alike = sum(sums[name] * float(rows[name]["output"]) > 0 for name in sure)
    assert sure and f"sign of that in {alike} of {len(sure)} image(s)" in " ".join(summary.in_words().split())
    assert card["reference"]["vector"] == pytest.approx(vector.tolist())
    assert summary.scales["deeplift"]["unit"] == "log-odds"


def test_the_other_class_is_the_negative(write, network, folder, tmp_path):
    vector = torch.rand(network.encoder.feature_info[-2]["num_chs"])
    weights = write(NeutralReference("layer3", tuple(vector.tolist()), 0.0, 0.5, "plane", "tiles"))
    for target in ("tumour", "normal"):
        explain_images([folder], weights, tmp_path / target, replace(SETTINGS, target=target))
    (maps, *_), (others, *_) = read(tmp_path / "tumour"), read(tmp_path / "normal")
    torch.testing.assert_close(maps["a.png/deeplift"], -others["a.png/deeplift"], rtol=1e-4, atol=1e-6)


def test_a_reference_is_found_from_images_of_either_answer(write, network, pixels, folder, tmp_path):
    weights, out = write(), tmp_path / "out"
    summary = explain_images([folder], weights, out, replace(SETTINGS, target="predicted"))
    _, card, rows = read(out)
    assert len({row["predicted"] for row in rows.values()}) == 2
    vector = torch.tensor(card["reference"]["vector"])
    assert summary.reference is not None and summary.reference["source"] == "4 images, by the network's answers"
    square = [name for name, image in pixels.items() if image.shape[2:] == (64, 64)]
    for name in square:  # complete and neutral: the map's sum is all there is
        assert log_odds(network, pixels[name], vector) == pytest.approx(0, abs=1e-4)
        assert float(rows[name]["unexplained"]) == pytest.approx(0, abs=1e-3)
    one = [next(name for name in square if rows[name]["predicted"] == answer) for answer in network.classes]
    found = neutral_from_images(
        *(network, "encoder.layer3", [network.normalise(pixels[name]) for name in one], "evidence", 1),
        added=TEMPERATURE * OFFSET,
    )
    assert found.extent == "tile" and found.log_odds == pytest.approx(0, abs=1e-4)


def test_no_reference_is_one_line_and_nothing_is_written(write, network, folder, tmp_path):
    weights = write()
    out = tmp_path / "out"
    for places, changes, words in (
        ([folder / "a.png"], {}, r"all 1 images are \w+ class 1 by the network's answer; give some that are \w+ it as"),
        ([folder], {"layer": "input"}, "the input has no neutral reference; name a hidden layer"),
        ([folder], {"target": "predicted", "output": "logit"}, "depends on the class; name one as target: normal, tum"),
    ):
        with pytest.raises(ConfigError, match=words) as refused:
            explain_images(places, weights, out, replace(SETTINGS, methods=("deeplift",), **changes))
        assert "\n" not in str(refused.value) and not out.exists()


def test_a_bad_image_is_told_once(write, folder, tmp_path, caplog):
    (folder / "b.png").write_text("hello")
    assert list(explain_images([folder], write(), tmp_path / "out", SETTINGS).failed) == ["b.png"]
    assert sum(record.levelname == "ERROR" for record in caplog.records) == 1


def test_only_what_adds_up_speaks_for_or_against(write, network, folder, tmp_path):
    settings = replace(SETTINGS, methods=("deeplift", "gradient", "gradcam", "tsm"))
    summary = explain_images([folder], write(), tmp_path / "out", settings)
    said = {note.partition(": ")[0]: note for note in summary.notes if ": " in note}
    assert "speaks for" in said["deeplift"] and "add up to its log-odds" in said["deeplift"]
    for others in ("gradient", "gradcam"):
        words = next(note for names, note in said.items() if others in names)
        assert "no evidence for or against" in words and "do not add up" in words and "speaks" not in words
    assert any(note.startswith("deeplift compares with the neutral reference from 4 images") for note in summary.notes)


def test_the_weights_reference_is_used_where_it_fits(write, network, folder, tmp_path):
    """At its layer, by `explain` unasked and by `make_method` by name."""
    vector = torch.rand(network.encoder.feature_info[-2]["num_chs"])
    weights = write(NeutralReference("layer3", tuple(vector.tolist()), 0.0, 0.5, "tile", "tiles"))
    first = [folder / "a.png"]
    usual = explain_images(first, weights, tmp_path / "usual", ExplainSettings(measured=False))
    assert usual.settings["methods"] == ("deeplift", *CLASS_METHODS)
    usual = explain_images(first, weights, tmp_path / "two", ExplainSettings(layer="layer2", measured=False))
    assert usual.settings["methods"] == CLASS_METHODS and usual.reference is None
    loaded, _, _ = load_classifier(weights)
    x = loaded.normalise(torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8))
    found = make_method("deeplift", loaded, "encoder.layer3", "evidence", reference="neutral")(x, 1)
    given = make_method("deeplift", loaded, "encoder.layer3", "evidence", reference=vector)(x, 1)
    torch.testing.assert_close(found, given)
