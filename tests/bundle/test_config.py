"""Mistakes in a configuration end a run before it starts, in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from monai.bundle import ConfigParser, ConfigWorkflow

from medsd.bundle.config import boundary, check_config
from medsd.errors import ConfigError, DatasetError

ROOT = Path(__file__).parents[2]
BUNDLE = str(ROOT / "bundles" / "camelyon.json")
CONFIGS = sorted(str(path) for path in (ROOT / "configs").glob("*.json"))


def workflow(*overlays: str, **overrides: object) -> ConfigWorkflow:
    return ConfigWorkflow(
        config_file=[BUNDLE, *overlays], workflow_type="train", logging_file=False, bundle_root=str(ROOT), **overrides
    )


def refusal(flow: ConfigWorkflow) -> str:
    with pytest.raises(SystemExit) as stop:
        flow.initialize()
    message = str(stop.value)
    assert "\n" not in message and message.startswith("medsd: ")
    return message


def test_the_default_is_accepted():
    workflow().initialize()


@pytest.mark.parametrize("overlay", CONFIGS)
def test_every_overlay_is_accepted(overlay):
    if overlay.endswith("multi_gpu.json"):
        assert "run torchrun" in refusal(workflow(overlay))
    else:
        workflow(overlay).initialize()


def test_overlays_are_accepted_together():
    aim, camelyon16, gpu = (str(ROOT / "configs" / f"{name}.json") for name in ("aim", "camelyon16", "gpu"))
    workflow(aim, camelyon16, gpu).initialize()


@pytest.mark.parametrize(
    ("wrong", "right"), [("max_epoch", "max_epochs"), ("encodr", "encoder"), ("output_dirr", "output_dir")]
)
def test_a_misspelt_key_is_refused_and_the_nearest_named(wrong, right):
    message = refusal(workflow(**{wrong: 1}))
    assert f"'{wrong}'" in message and f"'{right}'" in message


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("data::tile_pxx", "tile_px"),
        ("train::samplr", "train::sampler"),
        ("train::dataloader::num_worker", "num_workers"),
        ("optimizer::weigth_decay", "weight_decay"),
        ("validate::evaluator::val_data_loadr", "val_data_loader"),
    ],
)
def test_a_misspelt_nested_key_is_refused_and_the_nearest_named(wrong, right):
    message = refusal(workflow(**{wrong: 3}))
    assert f"'{wrong}'" in message and f"'{right}'" in message


def test_a_misspelt_stage_is_refused_and_the_nearest_named():
    message = refusal(workflow(run_id="heatmp"))
    assert "'heatmp'" in message and "'heatmap'" in message


def test_an_error_of_a_loader_worker_is_still_one_line():
    @boundary
    def fail():
        raise DatasetError("Caught DatasetError in worker 0.\nTraceback:\nmedsd.errors.DatasetError: a.png: damaged")

    with pytest.raises(SystemExit, match=r"^medsd: a\.png: damaged$"):
        fail()


def test_a_component_that_does_not_exist_is_refused():
    assert "medsd.bundle.slide_dat" in refusal(workflow(**{"data::_target_": "medsd.bundle.slide_dat"}))


def test_an_overlay_may_bring_keys_that_it_uses(tmp_path):
    overlay = tmp_path / "overlay.json"
    overlay.write_text(json.dumps({"grid_px": 96, "tile_px": "@grid_px"}))
    flow = workflow(str(overlay))
    flow.initialize()
    assert flow.parser.get_parsed_content("tile_px") == 96


def test_the_check_needs_a_workflow():
    with pytest.raises(SystemExit, match="outside a MONAI workflow"):
        check_config(BUNDLE)


def test_a_bundle_root_elsewhere_is_named(tmp_path):
    message = refusal(ConfigWorkflow(config_file=BUNDLE, logging_file=False, bundle_root=str(tmp_path)))
    assert "bundle_root" in message and str(tmp_path) in message


@pytest.mark.parametrize("bundle", [BUNDLE, str(ROOT / "bundles" / "explain.json")])
def test_json_keeps_choices(bundle):
    """Bundle files stay short and speak of medsd's own functions, MONAI's and torch's only."""
    assert len(Path(bundle).read_text().splitlines()) <= 150
    parser = ConfigParser(ConfigParser.load_config_files(bundle))
    targets = [value["_target_"] for _, value in _dicts(parser.get()) if "_target_" in value]
    assert targets and all(target.startswith(("medsd.", "torch.")) or "." not in target for target in targets)


def _dicts(config, key=""):
    if isinstance(config, dict):
        yield key, config
        for name, value in config.items():
            yield from _dicts(value, name)


def test_errors_keep_their_class_for_callers_of_the_library():
    assert issubclass(ConfigError, Exception) and not issubclass(DatasetError, SystemExit)
