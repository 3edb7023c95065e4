"""What stands around the code: the citation, the workflow, the forms for issues."""

from __future__ import annotations

import re
from typing import Any

import pytest
import yaml
from conftest import ROOT

from adaskip.version import __version__

MAKE = (ROOT / "Makefile").read_text(encoding="utf-8")
FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml"))


def content(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_the_citation_is_of_this_version() -> None:
    citation = content("CITATION.cff")
    assert citation["version"] == __version__
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    paper = citation["preferred-citation"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"{{{paper['title']}}}" in readme
    assert f"year      = {{{paper['year']}}}" in readme


def test_the_workflow_runs_what_contributors_run() -> None:
    jobs = content(".github/workflows/test.yml")["jobs"]
    commands = [step["run"] for job in jobs.values() for step in job["steps"] if "run" in step]
    targets = [command.split()[1] for command in commands]
    assert targets == ["test", "docs", "oldest"]
    for target in targets:
        assert re.search(rf"^{target}:", MAKE, flags=re.M), target


@pytest.mark.parametrize("form", FORMS, ids=lambda path: path.stem)
def test_forms_ask_for_the_environment(form: Any) -> None:
    fields = {field["id"]: field for field in content(form)["body"]}
    assert "`adaskip env`" in fields["environment"]["attributes"]["description"]
    assert all(field["validations"]["required"] for field in fields.values())


def test_there_are_forms() -> None:
    assert [form.stem for form in FORMS] == ["figure", "problem"]
