"""Hook of mkdocs.yml: pages that live elsewhere in the repository, and a page of reference for each folder of medsd.

Links are written as they work in the repository (`../CONTRIBUTING.md` in `docs/`, `docs/evidence.md` at its root) and
are turned into the site's here, so that both can be read. A page that fetches anything from elsewhere fails the build.
"""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
# What pages link to outside `docs/`; in the site it has the same path.
FROM_ROOT = (
    "CHANGELOG.md",
    "CITATION.cff",
    "CONTRIBUTING.md",
    "SECURITY.md",
    "mkdocs.yml",
    "scripts/qupath/import_medsd.groovy",
)
REFERENCE = """Made from the docstrings. A page is a folder; what stands under a module is imported from it:
`from medsd.saliency.registry import make_method`.
"""
OUTWARDS = re.compile(r"\]\((?:\.\./)+(" + "|".join(map(re.escape, FROM_ROOT)) + ")")
PACKAGE = re.compile(r"\]\((?:\.\./)+medsd(?:/(\w+))?\)")
# What a browser fetches by itself when it opens a page; a link that a reader follows is no asset.
FETCHING = {"audio", "embed", "iframe", "img", "link", "object", "script", "source", "video"}
ADDRESS = re.compile(r"(?:https?:)?//[^\s,]+", re.I)
IN_STYLE = re.compile(r"""(?:url\(|@import\s)\s*["']?((?:https?:)?//[^"')\s]+)""", re.I)


class Fetched(HTMLParser):
    """Collects the addresses outside the site that elements of a page name as theirs."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag in FETCHING:
            named = [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data", "poster")]
            self.addresses += [found[0] for value in named if (found := ADDRESS.match(value.strip()))]


class ExampleSections(griffe.Extension):
    """Docstrings say `Example:`, of which griffe makes a note of plain text; `Examples:` is code to it."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring is not None:
            obj.docstring.value = re.sub(r"^Example:$", "Examples:", obj.docstring.value, flags=re.M)


def package_folders() -> dict[str, str]:
    """The folders of medsd, in the order in which data flows, and what each is; CONTRIBUTING.md is where both stand."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    return dict(re.findall(r"^    medsd/(\w+) +(.+)$", text, re.M))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    pages = ["reference/index.md", *(f"reference/{name}.md" for name in package_folders())]
    config.nav = [{"Reference": pages} if part == {"Reference": "reference/"} else part for part in config.nav or []]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    pages = {name: (ROOT / name).read_text("utf-8") for name in FROM_ROOT}
    pages = {name: text.replace("](docs/", "](") if name.endswith(".md") else text for name, text in pages.items()}
    rows = [f"| [medsd.{name}]({name}.md) | {what} |" for name, what in package_folders().items()]
    pages["reference/index.md"] = "\n".join(["# Reference\n", REFERENCE, "| | |", "|---|---|", *rows])
    for name in package_folders():
        pages[f"reference/{name}.md"] = f"# medsd.{name}\n\n::: medsd.{name}\n"
    for path, text in pages.items():
        files.append(File.generated(config, path, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    top = "../" * page.file.src_uri.count("/")
    markdown = OUTWARDS.sub(lambda found: f"]({top}{found[1]}", markdown)
    return PACKAGE.sub(lambda found: f"]({top}reference/{found[1] or 'index'}.md)", markdown)


def outside_assets(text: str) -> list[str]:
    """Addresses outside the site that a browser would fetch to show this page or style sheet."""
    page = Fetched()
    page.feed(text)
    return page.addresses + IN_STYLE.findall(text)


def on_post_build(config: MkDocsConfig) -> None:
    for path in sorted(Path(config.site_dir).rglob("*")):
        if path.suffix in (".html", ".css") and (found := outside_assets(path.read_text("utf-8"))):
            raise PluginError(f"{path}: fetches {found[0]}; the site may use what lies in it alone")
