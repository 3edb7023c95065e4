"""What the documents say is what the code says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT

import adaskip
from adaskip.differences import DIFFERENCES, differences_table

TRACKED = [
    path
    for pattern in ("*.md", "docs/*.md", "data/*.md", "results/**/*.md")
    for path in ROOT.glob(pattern)
]


@pytest.mark.parametrize("name", ["README.md", "docs/FIDELITY.md"])
def test_the_differences_are_shown_as_they_are(name: str) -> None:
    assert differences_table() in (ROOT / name).read_text(encoding="utf-8")


def test_the_tests_that_check_the_differences_exist() -> None:
    named = {name for row in DIFFERENCES for name in re.findall(r"test_\w+\.py", row.checked)}
    assert named
    assert [name for name in sorted(named) if not (ROOT / "tests" / name).is_file()] == []


@pytest.mark.parametrize("path", TRACKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_example_of_the_readme_runs() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert blocks
    for block in blocks:
        compile(block, "README.md", "exec")
        imported = re.findall(r"^from adaskip import (.+)$", block, flags=re.M)
        for name in [n.strip() for line in imported for n in line.split(",")]:
            assert hasattr(adaskip, name)


def test_scripts_are_thin() -> None:
    for folder in ("prefill", "decode", "e2e", "speed", "observations"):
        for script in (ROOT / folder).glob("*.py"):
            assert len(script.read_text(encoding="utf-8").splitlines()) <= 25, script
