"""Plans that come with the package: found by name wherever a plan is named."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from conftest import ROOT

from adaskip import Importance, PlanError, SkipPlan, Sublayer, shipped
from adaskip.fingerprint import same_model
from adaskip.policies.made_plan import PlanFile
from adaskip.runs.runconfig import RunConfig

PLAN = SkipPlan({Sublayer(1, "attn"): 1.5}, about={"method": "SEARCH"})
NAME = "smollm2/1.3@4000"
# As documents name those that are shipped.
NAMED = re.compile(r"\b(?:smollm2|gemma3|qwen)/[0-9][\w.-]*@\d+")


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where shipped plans lie: one of them."""
    monkeypatch.setattr(shipped, "_SHIPPED", tmp_path / "plans")
    monkeypatch.chdir(tmp_path)
    PLAN.save(tmp_path / "plans" / f"{NAME}.safetensors")
    return tmp_path / "plans"


def test_a_plan_is_loaded_by_its_name(folder: Path) -> None:
    assert shipped.shipped_plans() == (NAME,)
    assert SkipPlan.load(NAME) == PLAN
    assert SkipPlan.load(NAME).about == PLAN.about


def test_a_file_of_that_name_comes_first(folder: Path) -> None:
    own = SkipPlan({Sublayer(0, "ffn"): None})
    own.save(NAME)
    assert SkipPlan.load(NAME) == own


def test_a_name_that_is_not_shipped_gets_a_suggestion(folder: Path) -> None:
    with pytest.raises(
        PlanError,
        match=r"no plan at smollm/1\.3@4000\. Did you mean 'smollm2/1\.3@4000'\? Shipped are: s",
    ):
        SkipPlan.load("smollm/1.3@4000")
    (folder / f"{NAME}.safetensors").unlink()
    with pytest.raises(PlanError, match=r"There is no plan at smollm2/1\.3@4000\. None is shipped"):
        SkipPlan.load(NAME)


def test_scripts_take_the_name_as_a_plan(folder: Path) -> None:
    assert PlanFile.read(NAME).name.startswith("1.3-at-4000-")
    given = {"experiment": "e2e", "model_name": "smollm2", "policy": "PLAN", "plan": NAME}
    config = RunConfig.from_dict(given)
    config.check()
    assert config.folder_name == "smollm2-1.3-at-4000-E2E-SKIP-1"


def test_what_is_shipped_is_small() -> None:
    files = [path for path in shipped._SHIPPED.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= shipped.LIMIT
    documents = [ROOT / "README.md", *ROOT.glob("docs/*.md")]
    named = {name for path in documents for name in NAMED.findall(path.read_text("utf-8"))}
    assert named
    assert named <= set(shipped.shipped_plans())
    for name in shipped.shipped_plans():
        plan = SkipPlan.load(name)
        own = Importance.load(name.split("/")[0]).fingerprint
        assert plan.fingerprint
        assert own
        assert same_model(plan.fingerprint, own)
        assert {"method", "calibration", "measured acceleration", "gap"} <= set(plan.about)
