"""The documentation's site fetches nothing from elsewhere, and its links work in the repository, too."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])


@pytest.fixture(scope="module")
def hook() -> ModuleType:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed (extra docs)")
    spec = importlib.util.spec_from_file_location("site_pages", ROOT / "scripts" / "site_pages.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("text", "address"),
    [
        ('<script src="https://unpkg.com/shim"></script>', "https://unpkg.com/shim"),
        ("<link rel=stylesheet href=//fonts.example/css>", "//fonts.example/css"),
        ('<img alt="a > b" src="http://x.example/a.png">', "http://x.example/a.png"),
        ("@import 'https://x.example/a.css';", "https://x.example/a.css"),
        ("a {background: url( 'https://x.example/a.svg')}", "https://x.example/a.svg"),
    ],
)
def test_assets_from_elsewhere_are_found(hook: ModuleType, text: str, address: str) -> None:
    assert hook.outside_assets(text) == [address]


def test_links_and_own_assets_are_no_such(hook: ModuleType) -> None:
    text = '<a href="https://monai.io">MONAI</a><img src="report.jpg"><script src="../assets/a.js"></script>'
    assert hook.outside_assets(text + "a {background: url(data:image/png;base64,//8=)}") == []


def test_folders_of_the_reference_are_those_of_the_package(hook: ModuleType) -> None:
    folders = {path.name for path in (ROOT / "medsd").iterdir() if (path / "__init__.py").is_file()}
    assert set(hook.package_folders()) == folders


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_links_of_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", re.sub(r"```.+?```", "", page.read_text("utf-8"), flags=re.S)):
        if not target.startswith(("https://", "http://", "mailto:")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}, which is not there"
