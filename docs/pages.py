"""Pages that the documentation has besides docs/*.md: notebooks, the top's documents, public names.

A hook of mkdocs. The reference follows from `adaskip.__all__`, so that no public name is left out.
"""

from __future__ import annotations

import base64
import json
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

from adaskip import _HOMES

ROOT = Path(__file__).resolve().parents[1]
TOP = {
    "README.md": "index.md",
    "CONTRIBUTING.md": "CONTRIBUTING.md",
    "CHANGELOG.md": "CHANGELOG.md",
}
_LINK = re.compile(r"(!?)\[([^\]]+)\]\((?!https?:|#|mailto:)([^)#\s]+)(#[^)\s]*)?\)")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Fills the reference's place in the navigation, chapters that it does not name before it."""
    entries: list[dict[str, Any]] = list(config.nav or [])
    named = {page for entry in entries for page in entry.values() if isinstance(page, str)}
    chapters = sorted(path.name for path in Path(config.docs_dir).glob("*.md"))
    more = [{name[:-3].capitalize(): name} for name in chapters if name not in named]
    pages = [{home.removeprefix("adaskip."): _page(home)} for home in sorted(_HOMES)]
    place = next(i for i, entry in enumerate(entries) if "Reference" in entry)
    config.nav = [*entries[:place], *more, {"Reference": pages}, *entries[place + 1 :]]
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages, and what the top's documents show."""
    for name, page in TOP.items():
        text = _relinked((ROOT / name).read_text(encoding="utf-8"), ROOT, files, config)
        files.append(File.generated(config, page, content=text))
    for path in sorted(Path(config.docs_dir).glob("*.ipynb")):
        page, pictures = _notebook(path)
        text = _relinked(page, path.parent, files, config)
        files.append(File.generated(config, f"{path.stem}.md", content=text))
        for name, content in pictures.items():
            files.append(File.generated(config, name, content=content))
    for home, names in _HOMES.items():
        parts = "\n\n".join(f"::: {home}.{name}" for name in sorted(names))
        text = (
            f"# {home}\n\nAll of it: `from adaskip import {', '.join(sorted(names))}`.\n\n{parts}\n"
        )
        files.append(File.generated(config, _page(home), content=text))
    return files


def on_page_markdown(markdown: str, page: Any, config: MkDocsConfig, files: Files) -> str:
    """Takes the links of docs/ that lead out of it."""
    if page.file.generated_by is not None:
        return markdown
    return _relinked(markdown, Path(config.docs_dir), files, config)


def _notebook(path: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as markdown, and the pictures among its outputs by name."""
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            text = "".join(output.get("text", data.get("text/plain", "")))
            if "image/png" in data:
                name = f"{path.stem}-{len(pictures)}.png"
                pictures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![What the cell above draws]({name})")
            else:
                parts.append(f"```text\n{text.strip()}\n```")
    return "\n\n".join(parts) + "\n", pictures


def _page(home: str) -> str:
    return f"reference/{home.removeprefix('adaskip.').replace('.', '-')}.md"


def _relinked(text: str, folder: Path, files: Files, config: MkDocsConfig) -> str:
    """A document whose links stay within the site: what is not a page is named by its path.

    Args:
        text: the document.
        folder: where its links begin.
        files: the site's, to which figures are added.
        config: the site's.
    """

    def link(match: re.Match[str]) -> str:
        image, label, target, anchor = match[1], match[2], match[3], match[4] or ""
        path = (folder / target).resolve()
        if not path.exists():
            return match[0]  # which mkdocs then reports
        inside = path.relative_to(ROOT).as_posix()
        page = TOP.get(inside) or (inside.removeprefix("docs/") if path.suffix != ".py" else "")
        page = page.replace(".ipynb", ".md")
        if inside in TOP or (inside.startswith("docs/") and page):
            return f"{image}[{label}]({page}{anchor})"
        if path.suffix in (".png", ".html"):
            if files.get_file_from_path(inside) is None:
                made = File(inside, str(ROOT), config.site_dir, config.use_directory_urls)
                files.append(made)
            return f"{image}[{label}]({inside})"
        return f"{label} (`{inside}`)"

    return _LINK.sub(link, text)
