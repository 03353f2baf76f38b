"""Hook of mkdocs.yml: a page for each notebook in docs/notebooks, as it was run and kept there.

The pictures become files of the site, so that a page stays small; links to a notebook lead to its page.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

_LINK = re.compile(r"(\]\((?:[\w./]*/)?notebooks/[\w]+)\.ipynb\)")
_PICTURE = "image/jpeg"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for path in sorted(Path(config.docs_dir, "notebooks").glob("*.ipynb")):
        text, pictures = page_of(json.loads(path.read_text("utf-8")), path.stem)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    return _LINK.sub(r"\1.md)", markdown)


def page_of(notebook: dict[str, Any], name: str) -> tuple[str, dict[str, bytes]]:
    """A notebook as Markdown, and its pictures by the names that the page shows them by."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for text, picture in _outputs(cell):
            if picture is None:
                parts.append(f"```text\n{text.rstrip()}\n```")
                continue
            file = f"{name}_{len(pictures) + 1}.jpg"
            pictures[file] = picture
            alt = re.sub(r"[\[\]\s]+", " ", text).strip()
            parts.append(f"[![{alt}]({file})]({file})")
    title, _, rest = parts[0].partition("\n")
    whole = f"[The notebook itself]({name}.ipynb), as it was run: the page below is made from it."
    return "\n\n".join([title, whole, rest.strip(), *parts[1:]]) + "\n", pictures


def _outputs(cell: dict[str, Any]) -> Iterator[tuple[str, bytes | None]]:
    """Of a cell, the text of each output and its picture, if it has one."""
    for output in cell["outputs"]:
        if "data" not in output:
            yield "".join(output["text"]), None
            continue
        data = output["data"]
        picture = base64.b64decode("".join(data[_PICTURE])) if _PICTURE in data else None
        yield "".join(data["text/plain"]), picture
