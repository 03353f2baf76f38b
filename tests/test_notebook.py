"""The notebook of the documentation runs as it stands, and what it shows was made by it."""

from __future__ import annotations

import ast
import base64
import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "notebooks" / "slide_to_map.ipynb"
CELLS: list[dict[str, Any]] = [
    cell for cell in json.loads(NOTEBOOK.read_text("utf-8"))["cells"] if cell["cell_type"] == "code"
]


def run_cell(source: str, names: dict[str, Any]) -> Any:
    """As a notebook runs it: the value of a last line that is an expression, else None."""
    tree, last = ast.parse(source), "_last"
    if isinstance(tree.body[-1], ast.Expr):
        tree.body[-1] = ast.Assign([ast.Name(last, ast.Store())], tree.body[-1].value)
    exec(compile(ast.fix_missing_locations(tree), NOTEBOOK.name, "exec"), names)
    return names.pop(last, None)


def test_it_goes_from_a_slide_to_a_map_that_adds_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process: a kernel's would import everything again. What it claims of the sums it asserts itself."""
    monkeypatch.chdir(tmp_path)
    names = vars(ModuleType("__main__"))
    pictures = 0
    for cell in CELLS:
        shown = run_cell("".join(cell["source"]), names)
        kept = [output["data"] for output in cell["outputs"] if "data" in output]
        assert (shown is not None) == bool(kept)
        if kept:
            assert shown._repr_jpeg_().startswith(b"\xff\xd8") and "image/jpeg" in kept[0]
            pictures += 1
    assert pictures == 1
    said = capsys.readouterr().out
    assert "521 tiles, 106 of them tumour" in said and "largest miss below a thousandth: True" in said


def test_outputs_are_kept_small_and_name_no_machine() -> None:
    text = NOTEBOOK.read_text("utf-8")
    assert len(text) < 500_000 and "/home/" not in text and "/tmp/" not in text
    for cell in CELLS:
        for output in cell["outputs"]:
            assert output["output_type"] in ("stream", "execute_result") and output.get("name", "stdout") == "stdout"
            if "data" in output:
                assert base64.b64decode("".join(output["data"]["image/jpeg"])).startswith(b"\xff\xd8")


def test_the_page_of_the_site_holds_all_of_it() -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (extra docs)")
    spec = importlib.util.spec_from_file_location("site_notebooks", ROOT / "scripts" / "site_notebooks.py")
    assert spec is not None and spec.loader is not None
    hook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hook)
    page, pictures = hook.page_of(json.loads(NOTEBOOK.read_text("utf-8")), NOTEBOOK.stem)
    assert page.startswith("# ") and all("".join(cell["source"]) in page for cell in CELLS)
    assert "521 tiles, 106 of them tumour" in page
    (name,) = pictures
    assert page.count(f"({name})") == 2 and pictures[name].startswith(b"\xff\xd8")
    link = "[it](notebooks/slide_to_map.ipynb), [text](../slide_to_map.ipynb)"
    assert hook.on_page_markdown(link, None, None, None) == link.replace(
        "notebooks/slide_to_map.ipynb", "notebooks/slide_to_map.md"
    )
