"""Examples in docstrings run as they stand, and what the pages of Python import has one."""

from __future__ import annotations

import doctest
import importlib
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
WITH_EXAMPLES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
    for path in (ROOT / "medsd").rglob("*.py")
    if ">>> " in path.read_text("utf-8")
)
BLOCKS = re.findall(r"^```python\n(.+?)^```", (ROOT / "CONTRIBUTING.md").read_text("utf-8"), re.M | re.S)
PAGES = "".join((ROOT / page).read_text("utf-8") for page in ("README.md", "docs/python.md"))
IMPORTED = sorted(
    {
        (module, name)
        for module, names in re.findall(r"^ +from (medsd[\w.]*) import (.+)$", PAGES, re.M)
        for name in names.split(", ")
    }
)


@pytest.fixture
def lab(phantoms: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder holds `slide.tif`, a small phantom with tumour, its outlines `slide.xml`, and `bundles`."""
    outlines = sorted((phantoms / "training" / "lesion_annotations").glob("*.xml"))[0]
    slide = phantoms / "training" / "tumor" / f"{outlines.stem}.tif"
    (tmp_path / "slide.tif").symlink_to(slide)
    (tmp_path / "slide.xml").symlink_to(outlines)
    (tmp_path / "bundles").symlink_to(ROOT / "bundles")
    monkeypatch.chdir(tmp_path)


@pytest.mark.usefixtures("lab")
@pytest.mark.parametrize("module", WITH_EXAMPLES)
def test_examples_run(module: str) -> None:
    options = doctest.IGNORE_EXCEPTION_DETAIL | doctest.ELLIPSIS
    tried = doctest.testmod(importlib.import_module(module), optionflags=options)
    assert tried.attempted and not tried.failed


@pytest.mark.usefixtures("lab")
@pytest.mark.parametrize("code", BLOCKS, ids=["reader", "method", "objective", "stage"])
def test_how_to_add_is_true(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module = ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)  # where dataclasses look up their annotations
    exec(compile(code, "CONTRIBUTING.md", "exec"), vars(module))


@pytest.mark.parametrize(("module", "name"), IMPORTED)
def test_what_pages_import_has_an_example(module: str, name: str) -> None:
    found = getattr(importlib.import_module(module), name, None) or importlib.import_module(f"{module}.{name}")
    documented = [found, *(getattr(found, member) for member in getattr(found, "__all__", ()))]
    assert any(">>> " in (thing.__doc__ or "") for thing in documented)
