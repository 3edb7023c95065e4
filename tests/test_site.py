"""The documentation: it is built without a warning, and leaves out no public name."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

import adaskip
from adaskip import _HOMES

pytest.importorskip("mkdocstrings", reason="no mkdocs (requirements-dev.txt)")


def built(folder: Path, config: Path = ROOT / "mkdocs.yml") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config)]
    return subprocess.run(
        [*command, "-d", str(folder)], cwd=ROOT, capture_output=True, text=True, timeout=120
    )


def test_the_site_is_whole(tmp_path: Path) -> None:
    done = built(tmp_path)
    assert done.returncode == 0, done.stderr
    pages = {
        path.parent.name: path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")
    }
    text = "\n".join(pages.values())
    for home, names in _HOMES.items():
        for name in names:
            assert f'id="{home}.{name}"' in text, f"{home}.{name} is not in the reference"
    assert "![" not in text
    assert (tmp_path / "quickstart-0.png").is_file()
    assert {"quickstart", "METHOD", "GLOSSARY", "FIDELITY", "SPEED", "SCALE"} <= set(pages)
    assert "Use it" in pages[tmp_path.name]
    # Nothing is fetched.
    sources = re.findall(r'<(?:script|img|link)[^>]+(?:src|href)="(https?:[^"]+)"', text)
    assert sources == []


def test_a_link_that_leads_nowhere_fails(tmp_path: Path) -> None:
    docs = tmp_path / "docs"
    docs.mkdir()
    (docs / "index.md").write_text("[there](THERE.md) [here](#nowhere)\n")
    settings = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    kept = settings.partition("hooks:")[0].replace("docs_dir: docs", f"docs_dir: {docs}")
    rules = re.search(r"^validation:\n(?:  .+\n)+", settings, flags=re.M)
    assert rules is not None
    config = tmp_path / "mkdocs.yml"
    config.write_text(kept + rules[0])
    done = built(tmp_path / "site", config)
    assert done.returncode != 0
    assert "THERE.md" in done.stderr
    assert "#nowhere" in done.stderr


def test_names_are_public_once() -> None:
    names = [name for home in _HOMES.values() for name in home]
    assert sorted([*names, "__version__"]) == adaskip.__all__
    assert len(set(names)) == len(names)
