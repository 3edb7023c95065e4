"""What the documents say is what the code says."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
import textwrap
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from run_fixtures import save_checkpoint
from test_layers import ORDER

import adaskip
from adaskip.cli.main import command

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


def test_the_examples_of_the_documents_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a tiny model, one after the other, as a reader would paste them."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADASKIP_CACHE", str(tmp_path))
    checkpoint, load = str(save_checkpoint(tmp_path)), adaskip.load_model
    monkeypatch.setattr(adaskip, "load_model", lambda name: load(checkpoint, device="cpu"))
    tokenizer = adaskip.load_tokenizer(checkpoint)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    monkeypatch.setattr(adaskip, "load_tokenizer", lambda name: tokenizer)
    names: dict[str, Any] = {
        "my_long_documents": ["one text", "another text"],
        "my_long_prompt": "a third text",
        "my_prompts_and_answers": [("a text of some length " * 5, " an answer")],
        "my_prompts": ["another text of some length " * 5, "a third of them " * 9],
    }
    for document, least in (("README.md", 1), ("docs/USE.md", 5)):
        text = (ROOT / document).read_text(encoding="utf-8")
        blocks = re.findall(r"```python\n(.*?)```", text, flags=re.S)
        assert len(blocks) >= least
        for block in blocks:
            exec(compile(block, document, "exec"), names)  # noqa: S102 - our own text
    assert names["answer"].shape[1] > names["inputs"].input_ids.shape[1]


def test_what_examples_import_is_there() -> None:
    n_names = 0
    for document in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        text = document.read_text(encoding="utf-8")
        for block in re.findall(r"```python\n(.*?)```", text, flags=re.S):
            for node in ast.walk(ast.parse(textwrap.dedent(block))):
                if isinstance(node, ast.ImportFrom) and str(node.module).startswith("adaskip"):
                    module = importlib.import_module(str(node.module))
                    for name in node.names:
                        assert hasattr(module, name.name), f"{document.name}: {name.name}"
                        n_names += 1
    assert n_names > 20


def test_commands_of_the_documents_are_understood() -> None:
    n_commands = 0
    for document in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        text = document.read_text(encoding="utf-8").replace("\\\n", " ")
        for name, line in re.findall(r"^adaskip (\w+)(.*)$", text, flags=re.M):
            command(name).parser(f"adaskip {name}").parse_args(shlex.split(line, comments=True))
            n_commands += 1
    assert n_commands >= 5


def test_scripts_are_thin() -> None:
    for folder in ("prefill", "decode", "e2e", "speed", "observations", "eval"):
        scripts = list((ROOT / folder).glob("*.py"))
        assert scripts, folder
        for script in scripts:
            assert len(script.read_text(encoding="utf-8").splitlines()) <= 25, script


CITING = [
    path
    for folder in ("adaskip", "configs", "tests", "speed", "observations", "eval")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".yaml")
]


def headings(name: str) -> set[str]:
    """The headings of a document, at any level."""
    text = (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    return set(re.findall(r"^#+ (.+)$", text, flags=re.M))


def test_what_comments_cite_is_written_down() -> None:
    """`METHOD, "Policies"` is a heading of docs/METHOD.md, `TRAPS 14` an item of docs/TRAPS.md."""
    items = set(
        re.findall(r"^(\d+)\. ", (ROOT / "docs/TRAPS.md").read_text(encoding="utf-8"), flags=re.M)
    )
    wrong, n_cited = [], 0
    for path in CITING:
        text = path.read_text(encoding="utf-8")
        for heading in re.findall(r'METHOD,\s+"([^"]+)"', text):
            n_cited += 1
            if heading not in headings("METHOD"):
                wrong.append(f"{path.relative_to(ROOT)}: METHOD has no {heading!r}")
        for number in re.findall(r"TRAPS (\d+)", text):
            n_cited += 1
            if number not in items:
                wrong.append(f"{path.relative_to(ROOT)}: TRAPS has no {number}")
    assert n_cited > 20
    assert wrong == []


def test_what_documents_name_is_there() -> None:
    """Files by their path; functions, classes and tests as `path.py:name`."""
    wrong = []
    for document in ("docs/METHOD.md", "docs/TRAPS.md", "docs/GLOSSARY.md", "CONTRIBUTING.md"):
        text = (ROOT / document).read_text(encoding="utf-8")
        for path, name in re.findall(r"`((?:\w+/)*\w+\.py)(?:::?([\w.]+))?`", text):
            found = [base / path for base in (ROOT, ROOT / "adaskip", ROOT / "tests")]
            found = [file for file in found if file.is_file()]
            if not found:
                wrong.append(f"{document}: there is no {path}")
            elif name and not defines(found[0], name):
                wrong.append(f"{document}: {path} defines no {name}")
    assert wrong == []


def test_every_word_of_the_glossary_has_its_module() -> None:
    text = (ROOT / "docs/GLOSSARY.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1:-1] for line in text.splitlines() if line.startswith("| ")]
    rows = [row for row in rows if row[0].strip() not in ("word", "---")]
    words = [row[0].strip() for row in rows]
    assert len(words) > 40
    assert len(set(words)) == len(words)
    assert [row for row in rows if not (ROOT / row[-1].strip(" `")).is_file()] == []


def test_the_house_has_the_packages_there_are() -> None:
    """In CONTRIBUTING.md, from the bottom up."""
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `adaskip/(\w+)/`", text, flags=re.M) == list(ORDER[1:])


def test_the_readme_is_read_in_a_minute_or_two() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) < 150
    # Whatever else there is, it leads to.
    chapters = {path.name for path in (ROOT / "docs").glob("*.md")} - {"LOG.md", "TRAPS.md"}
    read = text + (ROOT / "docs/USE.md").read_text(encoding="utf-8")
    read += (ROOT / "docs/RESULTS.md").read_text(encoding="utf-8")
    assert [name for name in sorted(chapters) if f"{name}" not in read] == []


def defines(path: Path, name: str) -> bool:
    """Whether a file defines a function or class, or a class's method as `Class.method`."""
    scope: list[ast.stmt] = ast.parse(path.read_text(encoding="utf-8")).body
    for part in name.split("."):
        node = next((n for n in scope if getattr(n, "name", None) == part), None)
        if node is None:
            return False
        scope = getattr(node, "body", [])
    return True
