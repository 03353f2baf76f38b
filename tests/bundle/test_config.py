"""Mistakes in a configuration end a run before it starts, in one line."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import monai.bundle
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser, ConfigWorkflow

from medsd.bundle import check, check_config, mistake
from medsd.bundle.config import command_config
from medsd.errors import ConfigError, DatasetError

ROOT = Path(__file__).parents[2]
BUNDLE = str(ROOT / "bundles" / "camelyon.json")
OF_SEGMENTATION = ("btcv", "ebhi_segmentation", "nuinsseg", "weak_labels")
CONFIGS = sorted(str(path) for path in (ROOT / "configs").glob("*.json") if path.stem not in OF_SEGMENTATION)


def refusal(*overlays: str, stage: str = "run", **overrides: object) -> str:
    with pytest.raises(ConfigError) as stop:
        check_config([BUNDLE, *overlays], stage, **overrides)
    assert "\n" not in str(stop.value)
    return str(stop.value)


@pytest.mark.parametrize("overlay", [None, *CONFIGS])
def test_the_default_and_every_overlay_are_accepted(overlay):
    below = {str(ROOT / "configs" / "lite0.json"): [str(ROOT / "configs" / "pcam.json")]}  # of patches alone
    overlays = [] if overlay is None else [*below.get(overlay, []), overlay]
    check_config([BUNDLE, *overlays], bundle_root=str(ROOT))


@pytest.mark.parametrize("bundle", [["camelyon"], ["camelyon", "pretrain"], ["segmentation"]])
def test_on_several_gpus_every_bundle_runs_what_learns_alone(bundle):
    files = [str(ROOT / "bundles" / f"{name}.json") for name in bundle]
    files += [str(ROOT / "configs" / f"{name}.json") for name in ("gpu", "multi_gpu")]
    check_config(files, bundle_root=str(ROOT))
    parser = ConfigParser()
    parser.read_config(files)
    stages = [parser["learn"] if name == "@learn" else name for name in parser["run"]]
    words = json.dumps(stages)
    learning = {"camelyon": ["@pretrain", "@finetune"], "pretrain": ["@pretrain"], "segmentation": ["bundle.segment("]}
    assert all(stage in words for stage in learning[bundle[-1]])
    assert words.count("@finetune") == (bundle[-1] == "camelyon") and "prepare" not in words


@pytest.mark.parametrize("bundle", ["camelyon", "segmentation"])
def test_every_loader_hands_its_batches_to_a_gpu_without_making_it_wait(bundle):
    parts = [json.loads((ROOT / "bundles" / f"{bundle}.json").read_text())]
    for part in parts:  # which grows
        parts += [each for each in part.values() if isinstance(each, dict)]
    loaders = [part for part in parts if part.get("_target_") == "torch.utils.data.DataLoader"]
    assert {part.get("pin_memory") for part in loaders} == {"$'cuda' in str(@device)"}
    assert [part["non_blocking"] for part in parts if part.get("_target_") == "SupervisedEvaluator"] == [True]


@pytest.mark.parametrize("names", [["pcam"], ["pcam", "lite0"], ["ebhi"]])
@pytest.mark.parametrize("scale", [2, 0.5])
def test_patches_can_be_made_larger_and_smaller(names, scale):
    check_config([BUNDLE, *(str(ROOT / "configs" / f"{name}.json") for name in names)], scale=scale)


@pytest.mark.parametrize("stage", ["pretraining", None])
def test_every_number_of_steps_has_rates_that_rise_and_fall(stage):
    """torch divides by 0 where the warm-up's share of the steps is one step exactly."""
    config = json.loads(Path(BUNDLE).read_text("utf-8"))
    shape = (config if stage is None else config[stage])["scheduler"]
    options = {key: shape[key] for key in ("pct_start", "cycle_momentum") if key in shape}
    for steps in range(2, 200):
        optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], 1.0)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.0, steps, **options)
        rates = [optimizer.param_groups[0]["lr"]]
        for _ in range(steps - 1):
            optimizer.step()
            schedule.step()
            rates.append(optimizer.param_groups[0]["lr"])
        top = int(np.argmax(rates))
        assert sorted(rates[: top + 1]) == rates[: top + 1] and sorted(rates[top:], reverse=True) == rates[top:]
        assert top < steps / 2 and rates[top] > 0.5 and rates[-1] < 0.01


def test_overlays_are_accepted_together():
    check_config([BUNDLE, *(str(ROOT / "configs" / f"{name}.json") for name in ("aim", "camelyon16", "gpu"))])


@pytest.mark.parametrize(
    ("wrong", "right"), [("max_epoch", "max_epochs"), ("encodr", "encoder"), ("output_dirr", "output_dir")]
)
def test_a_misspelt_key_is_refused_and_the_nearest_named(wrong, right):
    message = refusal(**{wrong: 1})
    assert f"'{wrong}'" in message and f"'{right}'" in message


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("grid::tile_pxx", "tile_px"),
        ("train::samplr", "train::sampler"),
        ("train#samplr", "train::sampler"),
        ("train::dataloader::num_worker", "num_workers"),
        ("optimizer::weigth_decay", "weight_decay"),
        ("pretraining::settings::temperatur", "temperature"),
        ("validate::evaluator::val_data_loadr", "val_data_loader"),
    ],
)
def test_a_misspelt_nested_key_is_refused_and_the_nearest_named(wrong, right):
    message = refusal(**{wrong: 3})
    assert f"'{wrong.replace('#', '::')}'" in message and f"'{right}'" in message


def test_a_misspelt_stage_is_refused_and_the_nearest_named():
    message = refusal(stage="heatmp")
    assert "'heatmp'" in message and "'heatmap'" in message


def test_a_key_that_an_overlay_left_without_use_is_refused():
    message = refusal(str(ROOT / "configs" / "aim.json"), consistency=0.5)
    assert message == "config key 'consistency': what used it was replaced by another file; leave it out"
    check_config([BUNDLE], consistency=0.5)


def test_what_an_overlay_sets_in_vain_is_said(caplog):
    files = {name: str(ROOT / "configs" / f"{name}.json") for name in ("pcam", "lite0", "aim")}
    check_config([BUNDLE, files["pcam"], files["lite0"]])
    check_config([BUNDLE, files["aim"]])
    assert not caplog.messages
    check_config([BUNDLE, *files.values()])  # AIM's network ends nowhere
    (told,) = caplog.messages
    assert told.startswith(f"{files['lite0']}: its 'encoder_options' does nothing here")


def test_a_component_that_does_not_exist_is_refused():
    assert "medsd.bundle.data.SlideDat" in refusal(**{"data::_target_": "medsd.bundle.data.SlideDat"})


def test_an_overlay_may_bring_keys_that_it_uses(tmp_path):
    overlay = tmp_path / "overlay.json"
    overlay.write_text(json.dumps({"grid_px": 96, "tile_px": "@grid_px"}))
    check_config([BUNDLE, str(overlay)], grid_px=128)
    overlay.write_text(json.dumps({"grid_px": 96}))
    assert "'grid_px': nothing uses it" in refusal(str(overlay))


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("tile_px", 64.5, "tile_px=64.5: must be a whole number"),
        ("tile_px", True, "tile_px=True"),
        ("mpp", (0, 5), "mpp=(0, 5): must be a number, with a point before decimals"),
        ("output_dir", 202405, "output_dir=202405: must be text"),
        ("dataset_dir", 2024, "dataset_dir=2024: must be text"),
        ("bundle_root", 1, "bundle_root=1"),
        ("encoder", 5, "encoder=5"),
        ("cache", "false", "cache='false': must be True or False"),
        ("frozen", "layer1", "frozen='layer1': must be a list"),
        ("encoder_weights", 5, "encoder_weights=5: must be text"),
        ("encoder_options", "abc", "encoder_options='abc': must be a dictionary"),
        ("data::seed", "a", None),
    ],
)
def test_a_value_of_another_kind_is_refused_by_its_key(key, value, words):
    if words is None:  # what it replaces is a reference, and says nothing of its kind
        check_config([BUNDLE], **{key: value})
    else:
        assert words in refusal(**{key: value})


@pytest.mark.parametrize(
    ("key", "value"),
    [("mpp", 1), ("frozen", ("layer1", "layer2")), ("max_epochs", "@seed"), ("dataset_dir", "2024"), ("patience", 3)],
)
def test_values_of_the_same_kind_pass(key, value):
    check_config([BUNDLE], **{key: value})


def test_none_is_refused_where_monai_would_leave_it_out():
    assert refusal(max_epochs=None) == "max_epochs=None: MONAI takes that for not given; write --max_epochs '$None'"
    check_config([BUNDLE], patience=None)
    check_config([BUNDLE], max_epochs="$None")


RUN = ["run", "prepare", "--config_file", f"['{BUNDLE}']"]


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--bundle_root", "elsewhere", "--max_epoch", "3"], "did you mean 'max_epochs'?"),
        (["--output_dir", "2024_05"], "output_dir=202405: must be text"),
        (["--args_file", "arguments.json"], "config key 'stidePx'"),
    ],
)
def test_the_command_line_is_read_as_monai_reads_it(tmp_path, monkeypatch, words, told):
    (tmp_path / "arguments.json").write_text(json.dumps({"stidePx": 1}))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # which `check` replaces
    monkeypatch.setattr(sys, "argv", [str(Path(monai.bundle.__file__).with_name("__main__.py")), *RUN, *words])
    with pytest.raises(ConfigError, match=re.escape(told)):
        check()


@pytest.mark.parametrize("seed", [-1, 2**63])
def test_a_seed_that_numpy_or_torch_does_not_take_is_refused(monkeypatch, seed):
    for bundle in (BUNDLE, str(ROOT / "bundles" / "segmentation.json")):
        flow = ConfigWorkflow(config_file=bundle, logging_file=False, bundle_root=str(ROOT), seed=seed)
        with pytest.raises(RuntimeError, match=r"bundle\.check") as stop:
            flow.initialize()
        assert mistake(stop.value) == f"seed={seed}: must be a whole number from 0 to 1e18"


def test_the_command_lines_configuration_is_whole_and_unresolved(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    words = ["--max_epochs", "3", "--map_settings::smooth_um", "8.0", "--classes", "['a','b']"]
    monkeypatch.setattr(sys, "argv", [str(Path(monai.bundle.__file__).with_name("__main__.py")), *RUN, *words])
    config, before = command_config(), json.loads(Path(BUNDLE).read_text())
    changed = {"max_epochs": 3, "classes": ["a", "b"], "map_settings": {**before["map_settings"], "smooth_um": 8.0}}
    assert config == {**before, **changed}
    monkeypatch.setattr(sys, "argv", ["python", "run"])
    assert command_config() is None


def test_a_mistake_that_the_library_finds_is_the_last_line_too(tmp_path):
    words = ["--output_dir", str(tmp_path), "--validation_share", "30"]
    command = [sys.executable, "-m", "monai.bundle", *RUN, *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stdout + done.stderr
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("medsd: validation_share=30: must be a number from 0")


def test_in_a_process_of_its_own_a_workflow_is_not_checked_twice_and_leaves_its_hook():
    before = sys.excepthook
    ConfigWorkflow(config_file=BUNDLE, logging_file=False, bundle_root=str(ROOT)).initialize()
    assert sys.excepthook is before


def test_a_mistake_is_found_in_a_chain_of_exceptions():
    def chain(first: Exception, *others: Exception) -> Exception:
        for other in others:
            other.__cause__, first = first, other
        return first

    worker = DatasetError("Caught DatasetError in worker 0.\nTraceback:\nmedsd.errors.DatasetError: a.png: damaged")
    assert mistake(chain(worker, RuntimeError("Failed to evaluate"), RuntimeError("x"))) == "a.png: damaged"
    built = RuntimeError("Failed to instantiate component 'torch.optim.adamw.AdamW' with keywords: lr")
    assert mistake(chain(ValueError("Invalid\nlr: -1"), built)) == "torch.optim.adamw.AdamW: Invalid lr: -1"
    of_kind = "torch.optim.adamw.AdamW: no float; check lr, betas"
    built_of_two = RuntimeError(
        "Failed to instantiate component 'torch.optim.adamw.AdamW' with keywords: lr,betas\n set"
    )
    assert mistake(chain(TypeError("no float"), built_of_two)) == of_kind
    assert mistake(chain(KeyError("a bug"), built)) is None and mistake(ValueError("a bug")) is None
    assert mistake(None) is None


@pytest.mark.parametrize("bundle", [BUNDLE, str(ROOT / "bundles" / "explain.json")])
def test_json_keeps_choices(bundle):
    """Bundle files stay short; their targets are classes and functions of libraries, with no wrapper between."""
    assert len(Path(bundle).read_text().splitlines()) <= 250
    parser = ConfigParser(ConfigParser.load_config_files(bundle))
    targets = [value["_target_"] for value in _dicts(parser.get()) if "_target_" in value]
    assert targets and not any(target.startswith("medsd.bundle.") and target.count(".") < 3 for target in targets)


def _dicts(config):
    if isinstance(config, dict):
        yield config
    for value in config.values() if isinstance(config, dict) else config if isinstance(config, list) else ():
        yield from _dicts(value)
