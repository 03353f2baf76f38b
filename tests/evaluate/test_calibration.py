"""Calibration keeps what its engine was: threshold, scale, temperature."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import shapely
import torch

from medsd.annotations import Outline, annotations_of, write_geojson
from medsd.cohort.camelyon import find_slides
from medsd.cohort.entry import SlideEntry
from medsd.errors import DatasetError
from medsd.evaluate.calibration import calibrate_on_patches, calibrate_on_slides, find_reference, with_reference
from medsd.heatmap.engine import make_engine
from medsd.heatmap.maps import Engine, MapSettings
from medsd.networks.aim import AimClassifier
from medsd.networks.classifier import TileClassifier

LABELS = np.array([0, 0, 1, 1, 0, 1], np.int8)
PROBABILITIES = np.array([0.1, 0.2, 0.7, 0.8, 0.3, 0.6], np.float32)


def patches(side_px: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shape = len(LABELS), 3, side_px, side_px
    return [{"image": image} for image in torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)]


@pytest.mark.parametrize("way", ["dense", "tiled"])
def test_patches_fix_threshold_scale_and_temperature(way: str) -> None:
    torch.manual_seed(5)  # its strongest values are negative
    network, dataset = TileClassifier("test_resnet").eval(), patches(64)
    settings = MapSettings(("gradient",), "layer3", "none", way=way)  # type: ignore[arg-type]
    engine = make_engine(network, 64, 1.0, settings=settings, temperature=1.7)
    found = calibrate_on_patches(engine, dataset, LABELS, PROBABILITIES)  # type: ignore[arg-type]
    assert found.temperature == 1.7
    assert 0.3 < found.threshold <= 0.6
    assert (found.layer, list(found.limits), found.smoothing) == ("layer3", ["gradient"], "none")
    # Independent: the gradient of each patch's own log-odds at the layer, which is what both engines make of a tile.
    images = torch.stack([item["image"] for item in dataset])
    held: list[torch.Tensor] = []
    handle = network.encoder.layer3.register_forward_hook(lambda _m, _i, output: held.append(output))
    logits = network(images)
    handle.remove()
    (gradient,) = torch.autograd.grad((logits[:, 1] - logits[:, 0]).sum(), held[0])
    limit = np.percentile(gradient.mean(dim=1).abs().numpy(), 99.5)
    assert found.limits["gradient"] == pytest.approx(limit, rel=1e-4)


def test_masks_have_limits_of_their_own() -> None:
    network = AimClassifier("test_resnet", feature_width=8, mask_width=8).eval()
    engine = make_engine(network, 64, 1.0, settings=MapSettings(("mask",)), temperature=0.5)
    found = calibrate_on_patches(engine, patches(64), LABELS, PROBABILITIES)  # type: ignore[arg-type]
    assert (found.limits, found.temperature) == ({"mask": 1.0}, 0.5)


@pytest.mark.parametrize(("normal", "tumour"), [(0.992, 0.998), (1.0, 1.0)])
def test_the_threshold_of_a_sure_network_is_kept_where_something_exceeds_it(normal: float, tumour: float) -> None:
    settings = MapSettings(("gradient",), "layer3", "none")
    engine = make_engine(TileClassifier("test_resnet").eval(), 64, 1.0, settings=settings)
    probabilities = np.where(LABELS == 1, tumour, normal).astype(np.float32)
    found = calibrate_on_patches(engine, patches(64), LABELS, probabilities)  # type: ignore[arg-type]
    assert min(normal, 1 - 1e-6) < found.threshold < probabilities.max()


def test_one_class_alone_is_refused() -> None:
    engine = make_engine(
        TileClassifier("test_resnet"), 64, 1.0, settings=MapSettings(("gradient_x_activation",), "layer3")
    )
    with pytest.raises(DatasetError, match="6 validation patches: tumour is nowhere, or everywhere"):
        calibrate_on_patches(engine, patches(64), np.zeros(6, np.int8), PROBABILITIES)  # type: ignore[arg-type]


def test_the_reference_lies_between_tiles_without_and_with_the_target() -> None:
    def numbers(batches: Iterable[torch.Tensor]) -> list[int]:
        return torch.cat(list(batches))[:, 0, 0, 0].tolist()

    engine = SimpleNamespace(target=2, neutral=lambda without, having, _: (numbers(without), numbers(having)))
    dataset, labels = [{"image": torch.full((3, 1, 1), n)} for n in range(6)], np.array([0, 2, 1, 2, 0, 1], np.int8)
    assert find_reference(engine, dataset, labels, "tiles") == ([0, 2, 4, 5], [1, 3])  # type: ignore[arg-type]


def test_thresholds_on_slides_follow_the_temperature(phantoms: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tempering keeps the order of the probabilities: the threshold becomes the same logit, divided."""
    maps, made = [], Engine.map
    monkeypatch.setattr(Engine, "map", lambda *given: maps.append(made(*given)) or maps[-1])
    slide = next(entry for entry in find_slides(phantoms) if entry.label == 1)
    torch.manual_seed(0)
    network = TileClassifier("test_resnet").eval()
    network.head.bias.data.zero_()
    network.head.weight.data.neg_()  # the strongest values are negative
    plain, tempered = (
        calibrate_on_slides(
            make_engine(network, 64, 1.0, settings=MapSettings(("gradient_x_activation",), "layer3"), temperature=t),
            [slide],
        )
        for t in (1.0, 2.0)
    )
    logit = np.log(plain.threshold / (1 - plain.threshold))
    assert tempered.threshold == pytest.approx(1 / (1 + np.exp(-logit / 2)), abs=1e-5)
    limit = np.nanpercentile(np.abs(maps[0].saliency.values), 99.5)
    assert tempered.limits == plain.limits == {"gradient_x_activation": pytest.approx(limit)}
    assert (plain.temperature, tempered.temperature) == (1.0, 2.0)


def test_slides_whose_tumour_nobody_outlined_have_no_part_in_the_threshold(phantoms: Path, tmp_path: Path) -> None:
    slides = [entry for entry in find_slides(phantoms) if entry.part == "training"]
    normal, outlined, other = slides[0], *slides[2:]
    for name, drawn in {"empty": [], "glass": [Outline("", "Tumor", False, shapely.box(0, 0, 40, 40))]}.items():
        write_geojson(tmp_path / name, annotations_of(drawn))
    unknown = [replace(other, annotation=path) for path in (None, tmp_path / "empty", tmp_path / "glass")]
    torch.manual_seed(0)
    settings = MapSettings(("gradient_x_activation",), "layer3")
    engine = make_engine(TileClassifier("test_resnet").eval(), 64, 1.0, settings=settings)
    known, all_five = (calibrate_on_slides(engine, [normal, outlined, *more]) for more in ([], unknown))
    assert (all_five.threshold, all_five.lesions) == (known.threshold, known.lesions)
    assert known.lesions.slides == 2 and all_five.cut_off.having == 4  # type: ignore[union-attr]


def test_each_class_is_calibrated_against_all_others(phantoms: Path, tmp_path: Path) -> None:
    """Two in situ, one invasive, on a slide that is labelled by one of them."""
    places = {"In situ": ((200, 300, 320, 420), (780, 300, 900, 420)), "Invasive": ((440, 600, 640, 700),)}
    drawn = [Outline("", group, False, shapely.box(*box)) for group, boxes in places.items() for box in boxes]
    write_geojson(tmp_path / "a.geojson", annotations_of(drawn))
    path = next(entry.path for entry in find_slides(phantoms) if entry.label == 1)
    entries = [SlideEntry("a", path, 2, annotation=tmp_path / "a.geojson")]
    torch.manual_seed(0)
    network = TileClassifier("test_resnet", ("benign", "in situ", "invasive")).eval()
    settings, found = MapSettings(("gradient_x_activation",), "layer3", way="dense"), {}
    for target in (1, 2):
        found[target] = calibrate_on_slides(make_engine(network, 64, 1.0, target, settings), entries)
        assert found[target].cut_off is not None and found[target].cut_off.having == 1  # type: ignore[union-attr]
    assert [found[target].lesions.lesions for target in (1, 2)] == [2, 1]  # type: ignore[union-attr]
    assert found[1].limits != found[2].limits
    network = TileClassifier("test_resnet", ("benign", "in situ", "invasive", "other")).eval()
    with pytest.raises(DatasetError, match="1 validation slides: other is nowhere, or everywhere"):
        calibrate_on_slides(make_engine(network, 64, 1.0, 3, settings), entries)


class Patches(list[dict[str, torch.Tensor]]):
    labels = LABELS


@pytest.mark.parametrize(("layer", "instead"), [("stages.2", "gradcam"), ("stages.2.blocks.0.conv_dw", None)])
def test_without_a_reference_maps_are_such_as_the_layer_allows(
    layer: str, instead: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    """At ConvNeXt's stages gradient x activation is rounding, and hours of training are not lost to that."""
    torch.manual_seed(0)
    network = TileClassifier("convnext_atto").eval()
    network.head.bias.data = torch.tensor([0.0, 1e3])  # no answer is neutral
    settings = MapSettings(("gradient_x_activation", "deeplift") if instead is None else ("deeplift",), layer, "none")
    engine = make_engine(network, 64, 1.0, settings=replace(settings, way="tiled"))
    made = with_reference(engine, Patches(patches(64)))  # type: ignore[arg-type]
    word = instead or "gradient_x_activation"
    assert made.settings.methods == (word,) and f"maps by {word}, which do not add up" in caplog.text
    assert calibrate_on_patches(made, patches(64), LABELS, PROBABILITIES).limits[word] > 0  # type: ignore[arg-type]
