"""`medsd methods` and `medsd explain` as a user runs them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from medsd import cli
from medsd.networks.classifier import TileClassifier
from medsd.networks.weights import ModelCard, save_classifier
from medsd.saliency.registry import METHODS


def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["medsd", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    torch.manual_seed(0)
    network = TileClassifier("test_resnet").eval()
    save_classifier(path, network, ModelCard("test_resnet", network.classes, 64, 0.5, "nothing"))
    return path


@pytest.fixture
def images(tmp_path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in "ab"]
    for seed, path in enumerate(paths):
        Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(path)
    return paths


def test_methods_are_listed_in_narrow_lines_at_once():
    code = """
import sys, medsd.cli
sys.argv = ["medsd", "methods"]
try:
    medsd.cli.main()
except SystemExit:
    pass
assert not {"torch", "captum", "monai", "matplotlib"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 100
    names = [line.split()[0] for line in lines[1:] if not line.startswith(" ")]
    assert names == [*METHODS, "captum.NAME:", "mask:"]


def test_images_are_explained(monkeypatch, capsys, caplog, weights, images, tmp_path):
    out = tmp_path / "out"
    arguments = ["explain", *images, "--weights", weights, "--out", out, "--methods", "gradient,tsm"]
    code, said, err = run(monkeypatch, capsys, *arguments, "--target", "tumour", "--no-metrics")
    assert (
        (code, err) == (0, "")
        and said.startswith("computing on cpu\n")
        and said.endswith(f"2 image(s); see {out}\n")
        and "rank correlation" in said
    )
    images[0].write_bytes(images[0].read_bytes()[:200])
    code, said, _ = run(monkeypatch, capsys, *arguments, "--no-metrics")
    assert code == 1 and "1 image(s), 1 failed" in said
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]
    assert line.startswith(f"{images[0]}: ") and "copy it again" in line


def test_a_mistake_is_one_line(monkeypatch, capsys, weights, images, tmp_path):
    for arguments, words in (
        (["--methods", "gradientt"], "did you mean 'gradient'"),
        (["--target", "tumur"], "did you mean 'tumour'"),
        (["--smoothing", "backward_hok"], "did you mean 'backward_hook'"),
        (["--layer", "layer9"], "has no such layer"),
        (["--explained", "logits"], "explained='logits': use one of"),
        (["--device", "cuda:99"], "cannot be used here"),
    ):
        out = tmp_path / "out"
        code, said, err = run(monkeypatch, capsys, "explain", images[0], "--weights", weights, "--out", out, *arguments)
        assert code == 1 and said in ("", "computing on cpu\n")
        assert err.startswith("medsd: ") and words in err and err.count("\n") == 1
        assert not out.exists()
