"""A stain target kept in the configuration goes with the weights, and every slide is shown in it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from medsd.bundle.data import Phantoms, SlideData
from medsd.cohort.dataset import TileDataset
from medsd.cohort.entry import SlideEntry
from medsd.cohort.index import TileGrid
from medsd.cohort.prepare import load_prepared
from medsd.cohort.tiling import Tiling
from medsd.errors import ConfigError
from medsd.heatmap.cohort import map_slides, read_slide_record
from medsd.heatmap.model import MapRequest
from medsd.heatmap.tiff import read_ome_tiff
from medsd.networks.weights import load_classifier, save_classifier
from medsd.phantom import PhantomSpec, write_phantom
from medsd.slides.slide import open_slide
from medsd.slides.stain import TwoStains, profile_from_dict
from medsd.slides.stain.slide import StainNormaliser, fit_slide

SMALL = {
    "phantom_slides": 6,
    "phantom_size_px": 1024,
    "encoder": "test_resnet",
    "block_px": 256,
}


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> TwoStains:
    path = tmp_path_factory.mktemp("target") / "target.tif"
    write_phantom(PhantomSpec(seed=77, tumour=False, size_px=1024, shortcut="tint"), path)
    with open_slide(path) as slide:
        fitted = fit_slide(slide, "macenko")
    assert isinstance(fitted, TwoStains)
    return fitted


FILE = "bundles/camelyon.json"


@pytest.fixture(scope="module")
def finished(tmp_path_factory, phantoms, target, run_bundle, write_weights) -> Path:
    """Data prepared in a stain, and maps of a network that has learnt nothing in it."""
    folder = tmp_path_factory.mktemp("stained")
    (folder / "stain.json").write_text(json.dumps({"stain_target": asdict(target)}))
    data = run_bundle(
        f"{FILE},{folder / 'stain.json'}", "prepare", **places(folder, phantoms)
    ).parser.get_parsed_content("data")
    write_weights(folder / "out" / "model.safetensors", data)
    run_bundle(f"{FILE},{folder / 'stain.json'}", "heatmap", **places(folder, phantoms))
    return folder


def places(folder: Path, phantoms: Path) -> dict[str, Any]:
    return {**SMALL, "phantom_dir": str(phantoms), "output_dir": str(folder / "out")}


def test_the_target_goes_from_configuration_to_weights_and_records(finished, target):
    _, card, _ = load_classifier(finished / "out" / "model.safetensors")
    assert profile_from_dict(card.stain_target) == target
    record = read_slide_record(next((finished / "out" / "heatmaps").glob("*/record.json")).parent)
    assert record["stain"]["method"] == "macenko" and record["stain"] != asdict(target)


def test_training_tiles_are_normalised_by_fits_that_are_kept(finished, phantoms, target, run_bundle):
    flow = run_bundle(f"{FILE},{finished / 'stain.json'}", "prepare", **places(finished, phantoms))
    data = flow.parser.get_parsed_content("data")
    prepared = load_prepared(data._slides, data.work_dir, Tiling(data.grid), data.validation_share, data.seed)
    assert len(list((Path(data.work_dir) / "stains").glob("*.json"))) == len(np.unique(prepared.index.slide))
    tiles = data.part("training")
    index = tiles.index
    with open_slide(index.paths[index.slide[0]]) as slide:
        raw = slide.read(int(index.x[0]), int(index.y[0]), index.tile_px, index.tile_px, index.mpp)
        shown = StainNormaliser(target).slide(slide)
        wanted = shown.read(int(index.x[0]), int(index.y[0]), index.tile_px, index.tile_px, index.mpp)
    got = tiles[0]["image"].permute(1, 2, 0).numpy()
    assert np.array_equal(got, wanted) and not np.array_equal(got, raw)
    assert np.array_equal(TileDataset(index)[0]["image"].permute(1, 2, 0).numpy(), raw)


def test_weights_of_another_target_are_refused(finished, phantoms, target, tmp_path, run_bundle):
    config = tmp_path / "other.json"
    other = replace(target, strongest=tuple(1.2 * value for value in target.strongest))
    config.write_text(json.dumps({"stain_target": asdict(other)}))
    with pytest.raises(SystemExit, match="another split of the data"):
        run_bundle(f"{FILE},{config}", "evaluate", **places(finished, phantoms))


def test_maps_hardly_depend_on_the_stain_any_more(finished, tmp_path):
    """One phantom with and without a tint: normalising to one target brings their maps together."""
    weights = finished / "out" / "model.safetensors"
    network, card, _ = load_classifier(weights)
    save_classifier(tmp_path / "raw.safetensors", network, replace(card, stain_target=None))
    for shortcut in ("none", "tint"):
        spec = PhantomSpec(seed=5, tumour=True, size_px=1024, shortcut=shortcut)
        write_phantom(spec, tmp_path / f"{shortcut}.tif")
    jobs = [SlideEntry(name, tmp_path / f"{name}.tif") for name in ("none", "tint")]
    apart = {}
    for kind, file in (("normalised", weights), ("raw", tmp_path / "raw.safetensors")):
        assert all(
            result.status == "ok"
            for result in map_slides(jobs, file, tmp_path / kind, MapRequest(block_px=512), isolate=False)
        )
        maps = [read_ome_tiff(tmp_path / kind / job.name / "probability.ome.tif").values for job in jobs]
        both = np.isfinite(maps[0]) & np.isfinite(maps[1])
        apart[kind] = float(np.abs(maps[0][both] - maps[1][both]).mean())
    assert apart["normalised"] < 0.5 * apart["raw"]


@pytest.mark.parametrize(
    ("value", "words"),
    [
        ({"method": "macenkoo"}, "macenkoo"),
        ({}, "stain"),
        ("target.png", "target.png: no stain target"),
        ({"method": "$print('run')"}, "config key 'stain_target::method': .* would be run; give plain values"),
        (
            {"method": "macenko", "white": {"_target_": "os.getcwd"}},
            "'stain_target::white::_target_': 'os.getcwd' would",
        ),
        ("$print('run')", "config key 'stain_target': .* would be run"),
    ],
)
def test_a_target_that_is_none_is_named(tmp_path, phantoms, run_bundle, value, words):
    config = tmp_path / "stain.json"
    config.write_text(json.dumps({"stain_target": value}))
    with pytest.raises(SystemExit, match=words):
        run_bundle(f"{FILE},{config}", "prepare", **places(tmp_path, phantoms))


def test_a_target_given_as_a_file_is_read_as_plain_values(tmp_path, target):
    path, grid = tmp_path / "stain.json", TileGrid(64, 64, 1.0)
    path.write_text(json.dumps({"stain_target": asdict(target)}))
    assert SlideData(None, Phantoms("none"), "work", grid, stain_target=str(path)).stain_target == target
    for text in ("{", "[]", '{"stain_target": {"method": "$print(1)"}}', '{"other": 1}'):
        path.write_text(text)
        with pytest.raises(ConfigError):
            SlideData(None, Phantoms("none"), "work", grid, stain_target=str(path))
