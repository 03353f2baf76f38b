"""The check of a GPU, tried on the CPU and on a pretended GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch

SCRIPT = Path(__file__).parents[1] / "scripts" / "gpu_check"
# What a bare CUDA machine lacks and the script does not name.
_NOT_THERE = ("tiatoolbox", "captum", "segmentation_models_pytorch", "tensorly", "typer", "jinja2", "glymur")
_BARE = f"""
import runpy, sys

class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {_NOT_THERE!r}:
            raise ImportError(f'{{name}} is not on a bare machine')

sys.meta_path.insert(0, Missing())
sys.argv = sys.argv[1:]
sys.path.insert(0, {str(SCRIPT.parent)!r})
runpy.run_path(sys.argv[0], run_name='__main__')
"""


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", _BARE, str(SCRIPT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""})


def test_every_part_is_right_without_what_a_bare_machine_lacks(tmp_path: Path) -> None:
    done = _run("--out", str(tmp_path), "--small")
    assert done.returncode == 0, done.stderr
    table = (tmp_path / "table.md").read_text()
    assert table.strip() == done.stdout.strip()
    for case in (
        "test_resnet CE",
        "test_resnet SaliencyDecor",
        "test_resnet AIM",
        "one rank",
        "Med-MoCo",
        "deeplift",
    ):
        assert case in table
    assert table.count("| True |") == 6


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPT.parent))
    loader = SourceFileLoader("gpu_check", str(SCRIPT))
    spec = importlib.util.spec_from_loader("gpu_check", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


def test_on_a_gpu_nothing_is_elsewhere_than_the_network(
    check: ModuleType, gpu: torch.device, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(check, "peak_tflops", lambda _device: None)
    monkeypatch.setattr(check, "profile", MagicMock())
    parts = ["training", "pretraining", "maps"]
    assert check.main(["--out", str(tmp_path), "--small", "--device", str(gpu), "--part", *parts]) == 0
    assert (tmp_path / "table.md").read_text().count("| True | 0.0e+00 |") == 4  # but for the map, of half precision


@pytest.fixture
def measured(check: ModuleType, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two cases whose measuring is counted; the second is wrong, or fails."""
    calls: list[str] = []

    def cases(_device: object, small: bool, _folder: object) -> object:
        def good() -> dict[str, object]:
            calls.append("good")
            return {"right": True}

        def bad() -> dict[str, object]:
            calls.append("bad")
            if small:
                raise RuntimeError("CUDA error: out of memory\nat line 5")
            return {"right": False}

        return iter([("good", good), ("bad", bad)])

    monkeypatch.setattr(check, "PARTS", {"ddp": cases})
    return calls


@pytest.mark.parametrize("small", [[], ["--small"]])
def test_what_is_wrong_is_told_and_measured_again(
    check: ModuleType, measured: list[str], tmp_path: Path, small: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path), "--part", "ddp", *small]
    assert check.main(arguments) == check.main(arguments) == 1
    assert measured == ["good", "bad", "bad"]
    assert "out of memory" in capsys.readouterr().out or not small


def test_other_options_are_measured_anew(check: ModuleType, measured: list[str], tmp_path: Path) -> None:
    for arguments in ([], ["--small"]):
        check.main(["--out", str(tmp_path), "--part", "ddp", *arguments])
    assert measured.count("good") == 2


def test_maps_that_saw_other_places_are_not_equal(check: ModuleType) -> None:
    truth = np.array([1.0, np.nan, -4.0])
    assert check.difference(truth, truth) == 0
    assert check.difference(truth + 1, truth) == 0.25
    assert check.difference(np.array([1.0, 2.0, -4.0]), truth) == np.inf
