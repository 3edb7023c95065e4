"""What the documents say is what the code says."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from run_fixtures import save_checkpoint

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
