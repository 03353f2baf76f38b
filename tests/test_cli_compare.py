"""`medsd compare` as a user runs it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from medsd import cli


def run(monkeypatch: pytest.MonkeyPatch, capsys: Any, *arguments: object) -> tuple[int, str, str]:
    monkeypatch.setattr(sys, "argv", ["medsd", "compare", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


def write_run(folder: Path, objective: str, items: int = 9) -> Path:
    (folder / "training").mkdir(parents=True)
    auc = {"value": 0.8, "low": 0.7, "high": 0.9}
    content = {"data_sha256": "abc", "tiles": {"patch_auc": auc, "items": items}}
    (folder / "scores.json").write_text(json.dumps(content))
    (folder / "training" / "settings.json").write_text(json.dumps({"objective": objective, "seed": 0}))
    return folder


def test_runs_are_compared(monkeypatch, capsys, tmp_path):
    first, second = write_run(tmp_path / "a", "saliency_decor"), write_run(tmp_path / "b", "aim")
    out = tmp_path / "out"
    code, said, err = run(monkeypatch, capsys, first, second, "--out", out)
    assert (code, err) == (0, "")
    assert said == (
        f"{first}: objective=saliency_decor\n{second}: objective=aim\n"
        f"2 runs; see {out / 'compare.md'} and {out / 'compare.png'}\n"
    )
    assert sorted(path.name for path in out.iterdir()) == ["compare.csv", "compare.md", "compare.png"]


def test_a_mistake_is_one_line(monkeypatch, capsys, tmp_path):
    first, other = write_run(tmp_path / "a", "aim"), write_run(tmp_path / "b", "aim", items=10)
    for wrong, words in ((other, "another number of test tiles"), (tmp_path / "c", "no scores.json")):
        code, said, err = run(monkeypatch, capsys, first, wrong, "--out", tmp_path / "out")
        assert (code, said) == (1, "")
        assert err.startswith(f"medsd: {wrong}: ") and words in err and err.count("\n") == 1
        assert not (tmp_path / "out").exists()
