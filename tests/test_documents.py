"""What the documents say is what the code says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from run_fixtures import save_checkpoint

import adaskip

TRACKED = [
    path
    for pattern in ("*.md", "docs/*.md", "data/*.md", "results/**/*.md")
    for path in ROOT.glob(pattern)
]


def test_every_difference_names_a_test_that_exists() -> None:
    text = (ROOT / "docs" / "FIDELITY.md").read_text(encoding="utf-8")
    table = text.partition("## What differs on purpose")[2].partition("\n## ")[0]
    rows = re.findall(r"^\|(.+)\|$", table, flags=re.M)
    head, rule, *cells = [[cell.strip() for cell in row.split("|")] for row in rows]
    assert head == ["Topic", "Released code", "Here", "Reason", "Checked by"]
    assert set(rule) == {"---"}
    assert cells
    for row in cells:
        assert len(row) == len(head)
        assert all(row), row
        assert re.findall(r"`test_\w+\.py`", row[-1]), row


def test_the_tests_that_fidelity_names_exist() -> None:
    text = (ROOT / "docs" / "FIDELITY.md").read_text(encoding="utf-8")
    files = {path.name: path.read_text(encoding="utf-8") for path in ROOT.glob("tests/test_*.py")}
    functions = set(re.findall(r"def (test_\w+)\(", "\n".join(files.values())))
    named = set(re.findall(r"\b(test_\w+(?:\.py)?)", text))
    assert sorted(named - set(files) - functions) == []


@pytest.mark.parametrize("path", TRACKED, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"\]\((?!https?:|#|mailto:)([^)#]+)", text)
    assert [link for link in links if not (path.parent / link).exists()] == []


def test_the_examples_of_the_readme_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tiny model, one after the other, as a reader would paste them."""
    checkpoint, load = str(save_checkpoint(tmp_path)), adaskip.load_model
    monkeypatch.setattr(adaskip, "load_model", lambda name: load(checkpoint, device="cpu"))
    tokenizer = adaskip.load_tokenizer(checkpoint)
    monkeypatch.setattr(adaskip, "load_tokenizer", lambda name: tokenizer)
    names: dict[str, Any] = {
        "my_long_documents": ["one text", "another text"],
        "my_long_prompt": "a third text",
    }
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102 - our own text
    assert names["answer"].shape[1] > names["inputs"].input_ids.shape[1]


def test_scripts_are_thin() -> None:
    for folder in ("prefill", "decode", "e2e", "speed", "observations", "eval"):
        scripts = list((ROOT / folder).glob("*.py"))
        assert scripts, folder
        for script in scripts:
            assert len(script.read_text(encoding="utf-8").splitlines()) <= 25, script
