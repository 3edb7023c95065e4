"""Plans that were made and kept, in runs, sweeps, speed tests and perplexities."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from run_fixtures import Workplace, rows_of, save_checkpoint, save_data, save_plan
from transformers import AutoModelForCausalLM, PreTrainedModel

from adaskip import AdaskipError, Linear, PlanError, RunError, SkipPlan, Sublayer, Window, sweep
from adaskip.cli.perplexity import perplexity_main
from adaskip.cli.run import run_main
from adaskip.cli.speed import speed_main
from adaskip.entering import skipping
from adaskip.fingerprint import model_fingerprint
from adaskip.plan import Phase, Step
from adaskip.policies import POLICIES
from adaskip.policies.made_plan import MadePlan, PlanFile, read_plans
from adaskip.reports.figures import policy_colour
from adaskip.runs.audit import Audit
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.runner import run
from adaskip.speedtest.benchmark import SpeedTest

PLAN = SkipPlan(
    {
        Sublayer(0, "attn"): Window(16),
        Sublayer(1, "attn"): 1.1,
        Sublayer(2, "ffn"): Linear(torch.zeros(32, 32), torch.full((32,), 0.1)),
    }
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def model(checkpoint: Path) -> PreTrainedModel:
    found: PreTrainedModel = AutoModelForCausalLM.from_pretrained(checkpoint)
    return found


@pytest.fixture
def place(checkpoint: Path, tmp_path: Path) -> Workplace:
    return Workplace(checkpoint, save_data(tmp_path / "data"), tmp_path / "results")


@pytest.fixture
def file(model: PreTrainedModel, tmp_path: Path) -> str:
    path = tmp_path / "plans" / "SLEB-1.2.safetensors"
    SkipPlan(PLAN, fingerprint=model_fingerprint(model)).save(path)
    return str(path)


def of(place: Workplace, file: str, **changes: Any) -> RunConfig:
    config = place.config(limit=1)
    named = config.as_dict() | {"policy": "PLAN", "plan": file, **changes}
    return RunConfig.from_dict(named | {"skip_sub_layer_num": changes.get("skip_sub_layer_num")})


def test_a_run_applies_the_plan_and_keeps_which_it_was(place: Workplace, file: str) -> None:
    folder = run(of(place, file))
    assert folder.name == "llama-SLEB-1.2-PREFILL-SKIP-3"
    record = json.loads((folder / "run.json").read_text())
    assert record["policy"] == {"n_skip": 3, "plan_file": PlanFile.read(file).name}
    assert record["config"]["plan"] == file
    (row,) = rows_of(folder)
    # The window is computed, so that it is not left out.
    assert row["skipped"]["prefill"]["sublayers"] == ["attn1", "ffn2"]
    assert run(of(place, file, limit=2)) == folder
    assert len(rows_of(folder)) == 2


def test_a_plan_of_windows_alone_runs(place: Workplace, file: str) -> None:
    SkipPlan({Sublayer(0, "attn"): Window(16)}).save(file)
    (row,) = rows_of(run(of(place, file)))
    assert row["skipped"]["prefill"] == {
        "forwards": 1,
        "attn": 0,
        "ffn": 0,
        "sublayers": [],
        "windows": 1,
    }


def test_a_run_is_not_continued_with_another_plan_of_that_name(place: Workplace, file: str) -> None:
    run(of(place, file))
    SkipPlan({**PLAN, Sublayer(1, "attn"): 1.2}).save(file)
    with pytest.raises(RunError, match=r"plan_file: 'SLEB-1\.2-\w+' then, 'SLEB-1\.2-\w+' now"):
        run(of(place, file))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"plan": None}, "--plan FILE belongs to policy PLAN"),
        ({"policy": "EE", "skip_full_layer_num": 1, "skip_sub_layer_num": None}, "belongs to pol"),
        ({"plan": "nowhere.safetensors"}, r"no plan at nowhere\.safetensors"),
        ({"skip_sub_layer_num": 2}, "replaces 3 sublayers, not 2; leave the number out"),
    ],
)
def test_what_is_no_plan_of_a_run(
    place: Workplace, file: str, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdaskipError, match=message):
        run(of(place, file, **changes))
    assert not place.results.exists()


def test_a_plan_of_another_model_is_refused(place: Workplace, file: str) -> None:
    SkipPlan(PLAN, fingerprint="llama-4x32-000000:AAAA").save(file)
    with pytest.raises(PlanError, match="was made for model"):
        run(of(place, file))


def test_plans_that_a_table_would_call_alike_are_refused() -> None:
    with pytest.raises(PlanError, match="have the same name, which is all that tells plans apart"):
        read_plans(["smollm2/1.2@1000", "gemma3/1.2@1000"])


def test_a_model_is_looked_at_before_the_first_token(
    model: PreTrainedModel, file: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[SkipPlan] = []
    stock = SkipPlan.check_model

    def counted(plan: SkipPlan, of: PreTrainedModel) -> None:
        looked.append(plan)
        stock(plan, of)

    monkeypatch.setattr(SkipPlan, "check_model", counted)
    with skipping(model, MadePlan(PlanFile.read(file), len(PLAN))):
        assert len(looked) == 1
        model(torch.tensor([[5, 6, 7]]))
    assert len(looked) == 1


def test_command_lines_take_a_plan(
    place: Workplace, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*place.options, "--tasks", "multifieldqa_en", "--limit", "1"]
    assert run_main("prefill", "llama", ["--policy", "PLAN", "--plan", file, *options]) == 0
    assert (place.results / "llama-SLEB-1.2-PREFILL-SKIP-3").is_dir()
    given = ["--policy", "EE", "--skip_full_layer_num", "1", "--plan", file]
    assert run_main("prefill", "llama", [*given, *options]) == 2
    assert "'plan' does not apply to EE; policies that take it: PLAN" in capsys.readouterr().err


def test_perplexity_under_a_plan(
    place: Workplace, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [*place.options, "--tasks", "multifieldqa_en", "--limit", "1"]
    options = [x for x in options if x not in ("--max_new_tokens", "6")]
    given = ["--policy", "PLAN", "EE", "--skip_full_layer_num", "1", "--plan", file]
    assert perplexity_main(["--model", "llama", *given, *options]) == 0
    out = capsys.readouterr().out
    assert f"\n| PLAN {PlanFile.read(file).name} " in out
    assert "\n| EE 1 " in out
    assert perplexity_main(["--model", "llama", "--policy", "PLAN", *options]) == 2
    assert "--plan FILE belongs to policy PLAN" in capsys.readouterr().err


def test_a_sweep_compares_plans(
    place: Workplace, file: str, capsys: pytest.CaptureFixture[str]
) -> None:
    other = str(Path(file).with_name("mine.safetensors"))
    SkipPlan({Sublayer(3, "ffn"): None}).save(other)
    policies = {"LLMDROP": [2], "PLAN": [file, other]}
    asked = {"policies": policies, "experiments": {"prefill": ["multifieldqa_en"]}}
    assert sweep.main([str(save_plan(place, **asked))]) == 0
    report = json.loads((place.results / "report.json").read_text())
    lines = report["tables"][0]["lines"]
    shown = [(line["policy"], line["budget"], line["unit"]) for line in lines]
    expected = [("LLMDROP", 2), ("SLEB-1.2", 3), ("mine", 1)]
    assert shown == [("dense", 0, "layers"), *((name, n, "sublayers") for name, n in expected)]
    assert lines[2]["skipped_share"]["prefill"] == 2 / 8
    # In the colour of its method, and in that of none.
    assert policy_colour("SLEB-1.2") == policy_colour("SLEB")
    assert policy_colour("mine") not in {policy_colour(name) for name in (*POLICIES, "SLEB")}


def test_a_speed_test_measures_plans(
    file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = SkipPlan({s: r for s, r in PLAN.items() if not isinstance(r, Linear)})
    path = tmp_path / "NBL-1.1.safetensors"
    small.save(path)
    options = ["--layers", "2", "--contexts", "20", "--policies", "EE", "--budgets", "2"]
    options += ["--new_tokens", "2", "--rounds", "1", "--device", "cpu"]
    options += ["--results_dir", str(tmp_path), "--plans", str(path)]
    assert speed_main(SpeedTest(model_name="smollm2"), options) == 0
    assert "\n| NBL-1.1 " in capsys.readouterr().out
    (point,) = json.loads((tmp_path / "smollm2-cpu.json").read_text())["points"]
    case = next(case for case in point["cases"] if case["label"] == "NBL-1.1")
    assert (case["windows"], case["skipped_attn"], case["skipped_ffn"]) == (1, 1, 0)
    # By what the window was measured to take, which may be more than it saves in so small a model.
    assert case["prefill"]["ideal_speedup"] != pytest.approx(1, abs=1e-6)
    assert speed_main(SpeedTest(model_name="smollm2"), [*options, "--policies", "PLAN"]) == 2
    assert "measured by its plan: --plans FILE" in capsys.readouterr().err
    assert speed_main(SpeedTest(model_name="smollm2"), [*options, "--plans", "nowhere"]) == 2
    assert "no plan at nowhere" in capsys.readouterr().err


def test_the_policy_applies_its_file(model: PreTrainedModel, file: str) -> None:
    policy = MadePlan(PlanFile.read(file), 3)
    policy.bind(4)
    for phase in Phase:
        assert list(policy.plan(Step(phase, 0, 0, 1))) == list(PLAN)
    ids = torch.arange(3, 40)[None]
    plan = policy.plan_file.plan
    with skipping(model, plan):
        expected = model(ids).logits
    with skipping(model, policy):
        assert torch.equal(model(ids).logits, expected)
    with pytest.raises(AdaskipError, match="replaces 3 sublayers, not 4"):
        MadePlan(PlanFile.read(file), 4).bind(4)


def test_the_audit_sees_windows(model: PreTrainedModel, file: str) -> None:
    ids = torch.arange(3, 40)[None]
    plan = PlanFile.read(file).plan
    with skipping(model, plan) as session, Audit(model, session) as audit:
        model(ids)
        assert audit.counts().prefill.sublayers == ["attn1", "ffn2"]
    # A plan that says of another attention that it has a window.
    wrong = {s: r for s, r in plan.items() if not isinstance(r, Window)}
    told = SimpleNamespace(step=None, plan=SkipPlan({**wrong, Sublayer(3, "attn"): Window(16)}))
    with (
        skipping(model, plan),
        Audit(model, told),
        pytest.raises(RunError, match="planned windows: attn3; seen: attn0"),
    ):
        model(ids)
