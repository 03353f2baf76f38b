"""A stain target kept in the configuration goes with the weights, and every slide is shown in it."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from monai.bundle import ConfigWorkflow

from medsd.cohort.dataset import TileDataset
from medsd.cohort.entry import SlideEntry
from medsd.cohort.prepare import load_prepared
from medsd.heatmap.cohort import map_slides, read_slide_record
from medsd.heatmap.tiff import read_ome_tiff
from medsd.networks.weights import load_classifier, save_classifier
from medsd.phantom import PhantomSpec, write_phantom
from medsd.slides.slide import open_slide
from medsd.slides.stain import TwoStains, profile_from_dict
from medsd.slides.stain.slide import StainNormaliser, fit_slide

ROOT = Path(__file__).parents[2]
SMALL = {
    "phantom_slides": 6,
    "phantom_size_px": 1024,
    "encoder": "test_resnet",
    "max_epochs": 1,
    "samples_per_epoch": 64,
    "batch_size": 16,
    "block_px": 256,
    "stain_apart": 0.3,
}


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> TwoStains:
    path = tmp_path_factory.mktemp("target") / "target.tif"
    write_phantom(PhantomSpec(seed=77, tumour=False, size_px=1024, shortcut="tint"), path)
    with open_slide(path) as slide:
        fitted = fit_slide(slide, "macenko")
    assert isinstance(fitted, TwoStains)
    return fitted


def workflow(stage: str, folder: Path, config: Path, **overrides: object) -> ConfigWorkflow:
    flow = ConfigWorkflow(
        config_file=[str(ROOT / "bundles" / "camelyon.json"), str(config)],
        workflow_type="train",
        logging_file=False,
        run_id=stage,
        bundle_root=str(ROOT),
        **{"phantom_dir": str(folder / "phantom"), "output_dir": str(folder / "out"), **SMALL, **overrides},
    )
    flow.initialize()
    return flow


@pytest.fixture(scope="module")
def finished(tmp_path_factory, target) -> Path:
    folder = tmp_path_factory.mktemp("stained")
    config = folder / "stain.json"
    config.write_text(json.dumps({"stain_target": asdict(target)}))
    workflow("run", folder, config).run()
    return folder


def test_the_target_goes_from_configuration_to_weights_and_records(finished, target):
    _, card, _ = load_classifier(finished / "out" / "model.safetensors")
    assert profile_from_dict(card.stain_target) == target
    record = read_slide_record(next((finished / "out" / "heatmaps").glob("*/record.json")).parent)
    assert record["stain"]["method"] == "macenko" and record["stain"] != asdict(target)


def test_training_tiles_are_normalised_by_fits_that_are_kept(finished, target):
    flow = workflow("prepare", finished, finished / "stain.json")
    data = flow.parser.get_parsed_content("data")
    prepared = load_prepared(data._slides, data.work_dir, data.grid, data.validation_share, data.seed)
    assert len(list((data.work_dir / "stains").glob("*.json"))) == len(np.unique(prepared.index.slide))
    tiles = data.part("training")
    index = tiles.index
    with open_slide(index.paths[index.slide[0]]) as slide:
        raw = slide.read(int(index.x[0]), int(index.y[0]), index.tile_px, index.tile_px, index.mpp)
        shown = StainNormaliser(target).slide(slide)
        wanted = shown.read(int(index.x[0]), int(index.y[0]), index.tile_px, index.tile_px, index.mpp)
    got = tiles[0]["image"].permute(1, 2, 0).numpy()
    assert np.array_equal(got, wanted) and not np.array_equal(got, raw)
    assert np.array_equal(TileDataset(index)[0]["image"].permute(1, 2, 0).numpy(), raw)


def test_another_target_is_another_training(finished, target, tmp_path):
    config = tmp_path / "other.json"
    other = replace(target, strongest=tuple(1.2 * value for value in target.strongest))
    config.write_text(json.dumps({"stain_target": asdict(other)}))
    with pytest.raises(SystemExit, match="another split"):
        workflow("finetune", finished, config).run()


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
        assert all(result.status == "ok" for result in map_slides(jobs, file, tmp_path / kind, 512, isolate=False))
        maps = [read_ome_tiff(tmp_path / kind / job.name / "probability.ome.tif").values for job in jobs]
        both = np.isfinite(maps[0]) & np.isfinite(maps[1])
        apart[kind] = float(np.abs(maps[0][both] - maps[1][both]).mean())
    assert apart["normalised"] < 0.5 * apart["raw"]


@pytest.mark.parametrize(
    ("value", "words"),
    [({"method": "macenkoo"}, "macenkoo"), ({}, "stain"), ("target.png", "stain")],
)
def test_a_target_that_is_none_is_named(tmp_path, value, words):
    config = tmp_path / "stain.json"
    config.write_text(json.dumps({"stain_target": value}))
    with pytest.raises(SystemExit, match=words):
        workflow("prepare", tmp_path, config).run()
