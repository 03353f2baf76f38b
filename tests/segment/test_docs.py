"""The example of docs/segmentation.md runs as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from medsd.networks.classifier import create_encoder
from medsd.networks.start import save_encoder

PAGE = Path(__file__).parents[2] / "docs" / "segmentation.md"


def test_ten_lines_train_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_encoder("encoder.safetensors", create_encoder("resnet10t", False)[0], "resnet10t", "a test")
    (tmp_path / "masks").mkdir()
    for name in ("a", "b"):
        Image.new("RGB", (64, 64), (200, 100, 150)).save(tmp_path / "masks" / f"{name}.png")
        Image.fromarray(np.tri(64, dtype=np.uint8)).save(tmp_path / "masks" / f"{name}m.png")
    (tmp_path / "masks" / "index.csv").write_text("file,mask,patient\na.png,am.png,p1\nb.png,bm.png,p2\n")
    (code,) = re.findall(r"^```python\n(.+?)^```", PAGE.read_text("utf-8"), re.M | re.S)
    found: dict[str, object] = {}
    exec(compile(code, str(PAGE), "exec"), found)
    assert any(parameter.grad is not None for parameter in found["network"].parameters())  # type: ignore[attr-defined]
