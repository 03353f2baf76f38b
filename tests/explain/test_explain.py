"""Images become sheets, tables and maps that agree with the methods and measures called by hand."""

from __future__ import annotations

import csv
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

from medsd.drawing import RED
from medsd.errors import ConfigError, DatasetError, NetworkError, WeightsError
from medsd.evaluate.scores import bootstrap_mean
from medsd.explain import explain as module
from medsd.explain.explain import explain_images
from medsd.explain.settings import CLASS_METHODS, ExplainSettings, method_names
from medsd.networks.aim import AimClassifier
from medsd.networks.classifier import TileClassifier
from medsd.networks.weights import ModelCard, save_classifier
from medsd.saliency import smooth
from medsd.saliency.metrics.insertion_deletion import curve_area, insertion_curve
from medsd.saliency.metrics.perturb import at_pixels
from medsd.saliency.metrics.pointing import energy_pointing
from medsd.saliency.metrics.scoring import Perturbation
from medsd.saliency.metrics.smoothness import normalised_variation
from medsd.saliency.registry import METHODS, make_method

QUICK = ExplainSettings(methods=("gradient_x_activation", "tsm"), layer="layer3", measured=False)


def image(folder, name, classifier):
    pixels = torch.from_numpy(np.asarray(Image.open(folder / f"{name}.png")).copy()).permute(2, 0, 1)[None]
    return classifier.normalise(pixels)


def read_maps(out):
    with safe_open(out / "maps.safetensors", framework="pt") as file:
        card = json.loads(file.metadata()["card"])
        return {name: file.get_tensor(name) for name in file.keys()}, card  # noqa: SIM118 (not a dict)


def rows_of(out):
    with open(out / "metrics.csv", newline="", encoding="utf-8") as handle:
        return list(csv.DictReader(handle))


def test_maps_are_those_of_the_methods(folder, weights, classifier, tmp_path):
    """Whatever shared a batch, and at sizes that differ; smoothed as asked."""
    out = tmp_path / "out"
    settings = ExplainSettings(("gradient", "eigencam"), "layer2", "tumour", "backward_hook", measured=False)
    explain_images([folder], weights, out, settings)
    maps, card = read_maps(out)
    assert len(maps) == 8 and card["layer"] == "encoder.layer2"
    for name in "abcd":
        x = image(folder, name, classifier)
        with smooth.backward_hook(classifier.encoder, "symmetric"):
            expected = make_method("gradient", classifier, "encoder.layer2", "evidence")(x, 1)[0]
        torch.testing.assert_close(maps[f"{name}.png/gradient"], expected, rtol=1e-5, atol=1e-9)
        expected = make_method("eigencam", classifier, "encoder.layer2")(x)[0]
        torch.testing.assert_close(maps[f"{name}.png/eigencam"], expected, rtol=1e-4, atol=1e-6)


def test_a_gpu_has_the_cpus_maps_and_measures(gpu, folder, weights, tmp_path):
    """Also where numbers are drawn. On a single image no reference is neutral, so "deeplift" is not among them."""
    names = (*sorted(METHODS.keys() - {"deeplift"}), "captum.LayerIntegratedGradients", "captum.Occlusion")
    for settings in (ExplainSettings(names, "layer3", measured=False), replace(QUICK, measured=True)):
        for device in ("cpu", gpu):
            explain_images([folder / "a.png"], weights, tmp_path / str(device), settings, device=device)
        (on_cpu, _), (on_gpu, _) = (read_maps(tmp_path / str(device)) for device in ("cpu", gpu))
        assert len(on_cpu) == len(settings.methods)
        assert all(torch.equal(on_gpu[name], values) for name, values in on_cpu.items())
        assert rows_of(tmp_path / str(gpu)) == rows_of(tmp_path / "cpu")


def test_the_table_says_what_the_network_and_the_measures_say(folder, weights, classifier, tmp_path):
    out = tmp_path / "out"
    settings = ExplainSettings(("gradient_x_activation", "tsm"), "layer3")
    summary = explain_images([folder], weights, out, settings, masks=folder.parent / "masks")
    table = rows_of(out)
    assert [(row["image"], row["method"]) for row in table] == [
        (f"{name}.png", method) for name in "abcd" for method in settings.methods
    ]
    for row in table[::2]:
        x = image(folder, row["image"][0], classifier)
        with torch.no_grad():
            probability = (classifier(x) / 3.0).softmax(dim=1)[0]
        predicted = int(probability.argmax())
        assert row["predicted"] == row["explained"] == classifier.classes[predicted]
        assert float(row["probability"]) == pytest.approx(float(probability.max()), abs=1e-5)
        maps = make_method("gradient_x_activation", classifier, "encoder.layer3", "evidence")(x)
        assert float(row["variation"]) == pytest.approx(float(normalised_variation(maps[:, None])), rel=1e-4)
        full, target = at_pixels(maps, x), torch.tensor([predicted])
        step_px = -(-x.shape[2] * x.shape[3] // 20)
        area = curve_area(insertion_curve(classifier, x, target, full, Perturbation(step_px=step_px)))
        # Pixels of one cell are equal and go in random order.
        assert float(row["insertion"]) == pytest.approx(float(area), abs=0.05)
        region = torch.zeros(1, *x.shape[2:], dtype=torch.bool)
        region[:, : x.shape[2] // 2] = True
        if row["image"][0] in "ab":
            assert float(row["energy_pointing"]) == pytest.approx(float(energy_pointing(full, region)), rel=1e-4)
            assert float(row["area_share"]) == 0.5
        else:
            assert row["energy_pointing"] == row["area_share"] == ""
    for method, measured in summary.measures.items():
        values = [float(row["variation"]) for row in table if row["method"] == method]
        by_hand = bootstrap_mean(values)
        assert measured["variation"].value == pytest.approx(by_hand.value, rel=1e-5)
        assert measured["variation"].low == pytest.approx(by_hand.low, rel=1e-5)
    written = json.loads((out / "metrics.json").read_text())
    assert written["images"] == 4 and written["failed"] == {} and len(written["weights_sha256"]) == 64
    assert written["agreement"]["tsm"]["tsm"] == pytest.approx(1.0)
    assert written["measures"]["tsm"]["best_iou"]["value"] >= 0.5  # never below chance
    text = summary.in_words()
    assert "insertion +" in text and "rank correlation" in text and max(map(len, text.splitlines())) <= 105


def test_a_class_that_is_not_predicted_has_no_masking_gap(folder, weights, tmp_path):
    explain_images([folder], weights, tmp_path / "one", replace(QUICK, methods=("tsm",), measured=True))
    predicted = {row["image"]: row["predicted"] for row in rows_of(tmp_path / "one")}
    assert all(row["masking_gap"] for row in rows_of(tmp_path / "one"))
    explain_images(
        [folder], weights, tmp_path / "two", replace(QUICK, methods=("tsm",), measured=True, target="normal")
    )
    for row in rows_of(tmp_path / "two"):
        assert bool(row["masking_gap"]) == (predicted[row["image"]] == "normal")
        assert row["insertion"] and row["explained"] == "normal"


def test_measures_are_the_same_again(folder, weights, tmp_path):
    settings = ExplainSettings(("gradient_x_activation",), "layer3")
    for name in ("one", "two"):
        explain_images([folder / "a.png", folder / "c.png"], weights, tmp_path / name, settings)
    assert (tmp_path / "one" / "metrics.csv").read_bytes() == (tmp_path / "two" / "metrics.csv").read_bytes()


def test_a_bad_image_costs_itself_only(folder, weights, tmp_path, caplog):
    (folder / "b.png").write_bytes((folder / "b.png").read_bytes()[:-900])
    Image.new("L", (10, 10)).save(folder.parent / "masks" / "a.png")
    Image.new("L", (64, 64), 1).save(folder.parent / "masks" / "c.png")
    summary = explain_images([folder], weights, tmp_path / "out", QUICK, folder.parent / "masks")
    assert sorted(summary.failed) == ["a.png", "b.png"] and summary.images == 2
    assert "its image 64 x 64" in summary.failed["a.png"] and str(folder / "b.png") in summary.failed["b.png"]
    assert any("2 image(s) could not be used" in note for note in summary.notes)
    assert sum(record.levelname == "ERROR" for record in caplog.records) == 2
    assert {row["image"] for row in rows_of(tmp_path / "out")} == {"c.png", "d.png"}


def test_nothing_is_left_when_nothing_could_be_done(folder, weights, tmp_path):
    for path in folder.iterdir():
        path.write_text("hello")
    with pytest.raises(DatasetError, match=r"none of 4 image\(s\) can be explained; the first: .*a\.png"):
        explain_images([folder], weights, tmp_path / "out", QUICK)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_encoder_is_explained_without_classes(folder, encoder_weights, tmp_path):
    summary = explain_images([folder], encoder_weights, tmp_path / "out")
    assert list(summary.measures) == ["eigencam", "tsm", "mtsm_b"]
    assert set(summary.measures["tsm"]) == {"insertion", "deletion", "variation", "nyquist"}
    assert 0 <= summary.measures["tsm"]["insertion"].value <= 1
    assert rows_of(tmp_path / "out")[0]["predicted"] == ""
    with pytest.raises(ConfigError, match=r"'gradcam' explains a class.*label-free ones: eigencam"):
        explain_images([folder], encoder_weights, tmp_path / "two", ExplainSettings(("gradcam",)))
    assert not (tmp_path / "two").exists()


def test_the_weights_own_limit_is_taken_where_it_holds(folder, weights, tmp_path):
    settings = ExplainSettings(("gradient_x_activation", "gradient"), measured=False)
    tiles = [folder / "a.png", folder / "c.png"]
    scales = explain_images(tiles, weights, tmp_path / "out", settings).scales
    assert scales["gradient_x_activation"]["vmax"] == 0.25 and "kept with the weights" in str(scales)
    assert scales["gradient"]["vmax"] != 0.25 and scales["gradient"]["vmin"] == -scales["gradient"]["vmax"]
    maps, _ = read_maps(tmp_path / "out")
    both = np.concatenate([maps[f"{name}.png/gradient"].ravel() for name in "ac"])
    assert scales["gradient"]["vmax"] == pytest.approx(np.percentile(np.abs(both), 99.5))
    # Another size of image, smoothing, output or layer has other values.
    for places, other in (
        ([folder / "a.png", folder / "b.png"], {}),
        (tiles, {"smoothing": "backward_hook"}),
        (tiles, {"output": "logit"}),
    ):
        changed = ExplainSettings(**{"methods": ("gradient_x_activation",), "measured": False, **other})
        assert "kept with" not in str(explain_images(places, weights, tmp_path / "out", changed).scales)


def test_what_a_reader_must_know_is_said(folder, weights, tmp_path):
    Image.new("RGB", (200, 200)).save(folder / "e.png")
    notes = " ".join(explain_images([folder], weights, tmp_path / "out", QUICK).notes)
    for words in (
        "Research use only",
        "not where any class is",
        "expect 0.5 µm per pixel",
        "differ in size",
        "1 image(s) are over",
    ):
        assert words in notes
    assert len(Image.open(tmp_path / "out" / "sheet.png").info["Description"]) > 0


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"methods": ("gradcamm",)}, ConfigError, "did you mean 'gradcam'"),
        ({"layer": "layer33"}, NetworkError, "did you mean 'layer3"),
        ({"layer": "input"}, ConfigError, "needs a hidden layer"),
        ({"layer": "head"}, NetworkError, "head"),
        ({"target": "tumur"}, ConfigError, "did you mean 'tumour'"),
        ({"smoothing": "surrogate", "surrogate": "none.safetensors"}, WeightsError, "none.safetensors"),
    ],
)
def test_a_mistake_is_told_before_anything_is_written(folder, weights, tmp_path, changes, error, words):
    settings = ExplainSettings(**{"methods": ("tsm",), "measured": False, **changes})
    with pytest.raises(error, match=words) as refused:
        explain_images([folder], weights, tmp_path / "out", settings)
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="did you mean 'backward_hook'"):
        ExplainSettings(smoothing="backwards_hook")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="give both or neither"):
        ExplainSettings(smoothing="surrogate")
    with pytest.raises(ConfigError, match="'evidence'"):
        ExplainSettings(output="evidance")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="'tsm' is named twice"):
        ExplainSettings(("tsm", "tsm"))
    with pytest.raises(ConfigError, match="seed=-1: must be a whole number from 0 on"):
        ExplainSettings(seed=-1)
    assert method_names("a, b,") == method_names(["a", "b"]) == ("a", "b") and method_names(None) == ()


def test_masks_of_no_image_are_refused(folder, weights, tmp_path):
    with pytest.raises(DatasetError, match=r"no mask of any image; name them as the images, such as a\.png"):
        explain_images([folder], weights, tmp_path / "out", QUICK, masks=weights.parent)


def test_few_pixels_wait_at_a_time(folder, monkeypatch):
    """Images of many sizes do not pile up in memory."""
    paths = sorted(folder.iterdir())
    monkeypatch.setattr(module, "_WAITING_PX", 64 * 64 + 1)
    names = [[loaded.name for loaded in batch] for batch in module._batches(paths, {}, 32, {}, module.no_progress)]
    assert names == [["a.png"], ["b.png"], ["c.png", "d.png"]]
    monkeypatch.setattr(module, "_BATCH_PX", 64 * 64)
    assert all(len(batch) == 1 for batch in module._batches(paths, {}, 32, {}, module.no_progress))


def test_a_second_call_replaces_the_first(folder, weights, tmp_path):
    out = tmp_path / "out"
    explain_images([folder], weights, out, QUICK)
    (out / "mine.txt").touch()
    explain_images([folder / "a.png"], weights, out, QUICK)
    assert sorted(path.name for path in out.iterdir()) == [
        "maps.safetensors",
        "metrics.csv",
        "metrics.json",
        "mine.txt",
        "sheet.png",
    ]
    assert len(rows_of(out)) == 2 and all(not math.isnan(float(row["probability"])) for row in rows_of(out))


def test_one_mask_of_several_images_is_refused(folder, weights, tmp_path):
    (folder / "again").mkdir()
    (folder / "again" / "a.png").write_bytes((folder / "d.png").read_bytes())
    with pytest.raises(DatasetError, match=r"a\.png: the mask of 2 images of that name"):
        explain_images([folder], weights, tmp_path / "out", QUICK, masks=tmp_path / "masks")
    with pytest.raises(DatasetError, match="no such folder of masks"):
        explain_images([folder], weights, tmp_path / "out", QUICK, masks=tmp_path / "none")


def test_colours_for_a_class_are_no_others(folder, weights, tmp_path):
    settings = ExplainSettings(("gradcam", "eigencam", "tsm"), "layer3", measured=False)
    summary = explain_images([folder], weights, tmp_path / "out", settings)
    colours = {name: scale["above"] for name, scale in summary.scales.items()}
    assert colours["gradcam"] not in (colours["eigencam"], colours["tsm"])
    assert summary.scales["eigencam"]["vmin"] == -summary.scales["eigencam"]["vmax"]
    assert summary.scales["tsm"]["vmin"] == 0
    (said,) = [note for note in summary.notes if "blank glass" in note]
    assert "yellow is above 0, violet below" in said and "taken apart for itself" in said
    unsigned = replace(settings, methods=("tsm", "mtsm_b"), smoothing="backward_hook")
    unsigned = explain_images([folder], weights, tmp_path / "out", unsigned)
    assert any("smooths gradients: maps for no class are as without it" in note for note in unsigned.notes)
    assert any("yellow is strong" in note for note in unsigned.notes) and "violet" not in " ".join(unsigned.notes)
    assert {scale["unit"] for scale in unsigned.scales.values()} == {"activation"}


def test_rows_of_different_classes_and_empty_masks_are_told(folder, weights, classifier, tmp_path):
    generator = np.random.default_rng(5)
    for number in range(12):  # until both classes are predicted
        shade = generator.integers(0, 256, (1, 1, 3)) + np.zeros((64, 64, 1))
        Image.fromarray(shade.astype(np.uint8)).save(folder / f"s{number}.png")
    for name, size in (("a", (64, 64)), ("b", (96, 80))):
        Image.new("L", size).save(tmp_path / "masks" / f"{name}.png")
    summary = explain_images([folder], weights, tmp_path / "out", QUICK, masks=tmp_path / "masks")
    predicted = {row["predicted"] for row in rows_of(tmp_path / "out")}
    assert len(predicted) == 2 and summary.notes[0].startswith(
        "Orange changes its meaning from row to row: of 16 images"
    )
    assert "No mask marks anything, so nothing is compared with masks." in summary.notes
    named = replace(QUICK, target="tumour")
    summary = explain_images([folder], weights, tmp_path / "out", named, masks=tmp_path / "masks")
    assert not any("Orange" in note and "is above 0" not in note for note in summary.notes)
    assert not warned(tmp_path / "out")


def test_where_orange_is_for_another_class_the_sheet_begins_with_it(folder, weights, tmp_path):
    summary = explain_images([folder], weights, tmp_path / "out", replace(QUICK, target="normal"))
    assert summary.notes[0].startswith("Orange speaks for normal here, blue against it: name tumour as target")
    assert warned(tmp_path / "out")
    free = replace(QUICK, target="predicted", methods=("tsm",))
    assert not explain_images([folder], weights, tmp_path / "out", free).notes[0].startswith("Orange")
    assert not warned(tmp_path / "out")


def warned(out):
    """Whether the sheet has red letters below its title."""
    with Image.open(min(out.glob("sheet*.png"))) as sheet:
        head = np.asarray(sheet.convert("RGB"))[36:80].astype(int)
    return bool((np.abs(head - RED).max(axis=2) < 30).any())


def test_a_single_image_has_no_interval(folder, weights, tmp_path):
    summary = explain_images([folder / "a.png"], weights, tmp_path / "out", ExplainSettings(("tsm",), "layer3"))
    assert "(" not in summary.in_words().partition("Means (")[0]


def test_a_network_that_masks_itself_shows_its_masks(folder, weights, tmp_path):
    torch.manual_seed(0)
    network = AimClassifier("test_resnet", feature_width=8, mask_width=4).eval()
    for estimator in network.mask_estimators.values():
        torch.nn.init.normal_(estimator.spatial.weight)
        torch.nn.init.zeros_(estimator.spatial.bias)
    card = ModelCard("test_resnet", network.classes, 64, 0.5, "noise", architecture="aim", options=network.options)
    save_classifier(tmp_path / "aim.safetensors", network, card)
    settings = ExplainSettings(measured=False)
    summary = explain_images([folder], tmp_path / "aim.safetensors", tmp_path / "out", settings)
    assert list(summary.scales) == [*CLASS_METHODS, "mask"]
    scale = summary.scales["mask"]
    assert (scale["vmin"], scale["vmax"], scale["unit"]) == (0.0, 1.0, "share of masks open")
    assert any(note.startswith("mask: which of its features the model used") for note in summary.notes)
    found = read_maps(tmp_path / "out")[0]["a.png/mask"]
    with torch.no_grad():
        deep, fine = network.masked(image(folder, "a", network)).masks
    expected = (deep.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3) + fine)[0, 0] / 2
    assert torch.equal(found, expected) and 0 < found.mean() < 1
    with pytest.raises(ConfigError, match=r"method 'mask': .*model.safetensors is no network that masks itself"):
        explain_images([folder], weights, tmp_path / "none", replace(settings, methods=("mask",)))


def test_a_method_whose_channels_cancel_is_left_out_or_refused_by_name(folder, tmp_path, caplog):
    """Where a LayerNorm reads the layer: ConvNeXt's last stage, of which gradients were drawn as noise."""
    torch.manual_seed(0)
    network = TileClassifier("convnext_atto").eval()
    path = tmp_path / "convnext.safetensors"
    save_classifier(path, network, ModelCard("convnext_atto", network.classes, 64, 0.5, "noise"))
    summary = explain_images([folder / "a.png"], path, tmp_path / "out", ExplainSettings(measured=False))
    assert list(summary.measures) == ["gradcam", "tsm"]
    told = [record.getMessage() for record in caplog.records if "left out" in record.getMessage()]
    assert [message.split("'")[1] for message in told] == ["gradient", "gradient_x_activation"]
    with pytest.raises(NetworkError, match=r"^Gradient at 'encoder.stages.3': its channels cancel"):
        explain_images([folder / "a.png"], path, tmp_path / "out", ExplainSettings(("gradcam", "gradient")))
