"""A policy written outside the package: runs, resumes, sweeps and speed tests follow its fields."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest
from run_fixtures import Workplace, rows_of, save_checkpoint, save_data, save_plan
from tiny_loaded import TinyLoaded, tiny_rows
from typing_extensions import override

from adaskip import sweep
from adaskip.cli.perplexity import cells_of, key_of, measure, perplexity_main
from adaskip.cli.run import eval_main, run_main
from adaskip.cli.speed import speed_main
from adaskip.errors import AdaskipError, ProfileError, RunError
from adaskip.importance import Importance
from adaskip.plan import Phase, SkipPlan, Step, Sublayer
from adaskip.policies import POLICIES, SkipPolicy
from adaskip.policies.factory import describe
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.runner import resolve, run
from adaskip.speedtest.benchmark import SpeedTest

NAME = "OWN"


@dataclass
class Own(SkipPolicy):
    """Skips the `n_skip` sublayers of highest similarity, with a gain."""

    budget: ClassVar[Literal["layers", "sublayers"]] = "sublayers"

    importance: Importance = field(repr=False)
    n_skip: int
    gain: Literal["token", "norm"] | None = "token"
    strength: float = 0.5

    @override
    def plan(self, step: Step) -> SkipPlan:
        chosen = self.importance.ranking()[: self.n_skip]
        return SkipPlan({s: self.importance.gain(s, self.gain) for s in chosen})


@dataclass
class Plain(SkipPolicy):
    """Learned, without any other field."""

    budget: ClassVar[Literal["layers", "sublayers"]] = "sublayers"

    importance: Importance = field(repr=False)
    n_skip: int

    @override
    def plan(self, step: Step) -> SkipPlan:
        return SkipPlan(dict.fromkeys(self.importance.ranking()[: self.n_skip]))


class NoDataclass(SkipPolicy):
    """Cannot say what it is made with."""

    @override
    def plan(self, step: Step) -> SkipPlan:
        return SkipPlan()


@pytest.fixture
def registered(monkeypatch: pytest.MonkeyPatch) -> Callable[[type[SkipPolicy]], None]:
    return lambda policy: monkeypatch.setitem(POLICIES, NAME, policy)


@pytest.fixture(autouse=True)
def own(registered: Callable[[type[SkipPolicy]], None]) -> None:
    registered(Own)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(checkpoint: Path, tmp_path: Path) -> Workplace:
    return Workplace(checkpoint, save_data(tmp_path / "data"), tmp_path / "results")


def of(place: Workplace, policy: str = NAME, **changes: Any) -> Any:
    return place.config(**{"policy": policy, "skip_sub_layer_num": 2, "limit": 1, **changes})


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.iterdir()}


def test_a_run_keeps_what_its_policy_is_made_with(place: Workplace) -> None:
    folder = run(of(place))
    record = json.loads((folder / "run.json").read_text())
    assert record["policy"] == {"n_skip": 2, "gain": "token", "strength": 0.5}
    assert record["importance"].startswith("llama-4x32-")
    (row,) = rows_of(folder)
    assert row["skipped"]["prefill"]["attn"] + row["skipped"]["prefill"]["ffn"] == 2
    # The same, spelled out, is the same run.
    assert run(of(place, gain="token", limit=2)) == folder
    assert len(rows_of(folder)) == 2


@pytest.mark.parametrize("limit", [1, 3])  # finished, and not
@pytest.mark.parametrize("policy", [NAME, "ADA"])
def test_a_run_is_not_continued_with_another_gain(
    place: Workplace, policy: str, limit: int
) -> None:
    folder = run(of(place, policy))
    before = contents(folder)
    with pytest.raises(RunError, match="gain: 'token' then, 'norm' now"):
        run(of(place, policy, gain="norm", limit=limit))
    assert contents(folder) == before


def test_a_run_is_not_continued_with_another_default(
    place: Workplace, registered: Callable[[type[SkipPolicy]], None]
) -> None:
    folder = run(of(place))
    before = contents(folder)
    registered(make_dataclass("Stronger", [("strength", float, 0.7)], bases=(Own,)))
    with pytest.raises(RunError, match=r"strength: 0\.5 then, 0\.7 now"):
        run(of(place))
    assert contents(folder) == before


@pytest.mark.parametrize("limit", [1, 3])
@pytest.mark.parametrize("policy", [NAME, "ADA"])
def test_a_run_is_not_continued_with_another_profile(
    place: Workplace, policy: str, limit: int
) -> None:
    folder = run(of(place, policy))
    before = contents(folder)
    (learned,) = (place.results / "importance").iterdir()
    known = Importance.load(learned)
    other = place.data / "profile.json"
    replace(known, similarity=dict.fromkeys(known.similarity, 0.5)).save(other)
    with pytest.raises(RunError, match="made with importance profile llama"):
        run(of(place, policy, importance=str(other), limit=limit))
    with pytest.raises(ProfileError, match=r"nowhere\.json"):
        run(of(place, policy, importance="nowhere.json"))
    assert contents(folder) == before
    # Also where it was the other profile that had been given.
    run(of(place, policy, importance=str(other), name="given"))
    with pytest.raises(RunError, match="made with importance profile llama"):
        run(of(place, policy, name="given"))


def test_a_record_without_the_policys_own_account_is_read_by_its_options(
    place: Workplace,
) -> None:
    folder = run(of(place, "ADA"))
    path = folder / "run.json"
    record = json.loads(path.read_text())
    del record["policy"]
    record["config"] |= {"gain": "norm", "online": True}
    path.write_text(json.dumps(record))
    assert run(of(place, "ADA", gain="norm")) == folder
    with pytest.raises(RunError, match="online: True then, False now"):
        run(of(place, "ADA", gain="norm", online=False))


def test_what_a_policy_has_no_use_for_is_not_recorded(place: Workplace) -> None:
    config = place.config(policy="EE", skip_full_layer_num=1, gain="norm", limit=1)
    record = json.loads((run(config) / "run.json").read_text())
    assert record["policy"] == {"n_skip": 1}
    assert not {"gain", "online", "importance", "warmup", "warmup_task"} & set(record["config"])


def test_a_sweep_runs_it(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    only = {"policies": {NAME: [2]}, "experiments": {"prefill": ["multifieldqa_en"]}}
    assert sweep.main([str(save_plan(place, **only))]) == 0
    report = json.loads((place.results / "report.json").read_text())
    lines = report["tables"][0]["lines"]
    assert [line["policy"] for line in lines] == ["dense", NAME]
    assert lines[1]["skipped_share"]["prefill"] == 1 / 4
    settings = {k: v for k, v in place.settings.items() if k not in ("results_dir",)}
    settings |= {"gain": "norm", "limit": 2, "max_new_tokens": 3}
    capsys.readouterr()
    assert sweep.main([str(save_plan(place, **only, settings=settings))]) == 1
    assert "gain: 'token' then, 'norm' now" in capsys.readouterr().out
    # A setting that nothing in the sweep takes is refused before anything runs.
    assert sweep.main([str(save_plan(place, **only, settings={"online": False}))]) == 2
    assert "'online' does not apply to OWN; policies that take it: ADA" in capsys.readouterr().err


def test_command_lines_run_resume_and_measure_it(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--policy", NAME, "--skip_sub_layer_num", "2", *place.options]
    options += ["--tasks", "multifieldqa_en"]
    assert run_main("e2e", "llama", [*options, "--limit", "1"]) == 0
    folder = place.results / f"llama-{NAME}-E2E-SKIP-2"
    first = rows_of(folder)
    assert run_main("e2e", "llama", [*options, "--limit", "2"]) == 0
    assert rows_of(folder)[:1] == first
    assert len(rows_of(folder)) == 2
    assert eval_main(["--name", f"llama-{NAME}-E2E", "--results_dir", str(place.results)]) == 0
    more = [x for x in options if x not in ("--max_new_tokens", "6")]
    assert perplexity_main(["--model", "llama", *more, "--limit", "1"]) == 0
    assert f"{NAME} 2 (gain token, 2 rows of qasper)" in capsys.readouterr().out
    # A budget larger than the model is refused, though the policy's file says nothing of it.
    large = [x if x != "2" else "9" for x in options[:4]]
    assert run_main("e2e", "llama", [*large, *options[4:], "--name", "large"]) == 2
    assert "Own cannot skip 9 sublayers" in capsys.readouterr().err


def test_a_speed_test_runs_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--layers", "2", "--contexts", "8", "--budgets", "2", "--new_tokens", "2"]
    options += ["--rounds", "1", "--device", "cpu", "--results_dir", str(tmp_path)]
    assert speed_main(SpeedTest(model_name="smollm2"), options) == 0
    assert "\n| OWN 2 " in capsys.readouterr().out
    (point,) = json.loads((tmp_path / "smollm2-cpu.json").read_text())["points"]
    case = next(case for case in point["cases"] if case["label"] == "OWN 2")
    assert case["skipped_attn"] + case["skipped_ffn"] == 2


def test_perplexities_of_two_gains_stand_side_by_side(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadedModel, "open", lambda config: TinyLoaded.make())
    monkeypatch.setattr(
        "adaskip.runs.loaded.sample_rows", lambda task, tokenizer, n, **_: tiny_rows(task, n)
    )
    given = {"policy": "dense", "tasks": ("sample_qa",), "limit": 2, "warmup": 2, "name": "tiny"}
    given |= {"experiment": "e2e", "model_name": "smollm2", "results_dir": str(tmp_path)}
    found = []
    for gain in ("token", "norm"):
        base = resolve(RunConfig(**given, gain=gain))
        cell = cells_of(base, [NAME], {"skip_full_layer_num": [], "skip_sub_layer_num": [3]})[1]
        _, losses = measure([base, cell], 8)
        assert key_of(cell) == f"OWN 3 (gain {gain}, 2 rows of sample_qa)"
        found.append(losses[key_of(cell)].nll)
    assert found[0] != found[1]


NO_BUDGET = make_dataclass("NoBudget", [], bases=(NoDataclass,))
NO_DEFAULT = make_dataclass("NoDefault", [("n_skip", int), ("depth", int)], bases=(NoDataclass,))


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        (NoDataclass, "NoDataclass has no fields to be set: make it a dataclass"),
        (NO_BUDGET, "NoBudget has no budget: give it a field n_skip"),
        (NO_DEFAULT, "nothing sets its field depth; give it a default"),
    ],
)
def test_a_class_that_no_setting_can_make_is_refused(
    place: Workplace,
    registered: Callable[[type[SkipPolicy]], None],
    capsys: pytest.CaptureFixture[str],
    policy: type[SkipPolicy],
    expected: str,
) -> None:
    registered(policy)
    options = ["--policy", NAME, "--skip_full_layer_num", "1", *place.options]
    assert run_main("prefill", "llama", options) == 2
    assert expected in capsys.readouterr().err
    assert not place.results.exists()


@dataclass
class Later(SkipPolicy):
    """Leaves prompts whole."""

    n_skip: int

    @override
    def plan(self, step: Step) -> SkipPlan:
        return SkipPlan({Sublayer(1, "ffn"): None} if step.phase is Phase.DECODE else {})


@pytest.mark.parametrize("may_rest", [False, True])
def test_a_policy_says_that_a_phase_may_go_without_a_skip(
    place: Workplace,
    registered: Callable[[type[SkipPolicy]], None],
    capsys: pytest.CaptureFixture[str],
    may_rest: bool,
) -> None:
    registered(type("Resting", (Later,), {"may_rest": may_rest}))
    options = ["--policy", NAME, "--skip_full_layer_num", "1", *place.options, "--limit", "1"]
    options += ["--tasks", "multifieldqa_en"]
    assert run_main("e2e", "llama", options) == (0 if may_rest else 2)
    if not may_rest:
        said = capsys.readouterr().err
        assert "nothing was skipped in prefill in the e2e experiment" in said
        assert "says so by may_rest = True" in said


def test_a_learned_policy_needs_no_other_field(
    place: Workplace,
    registered: Callable[[type[SkipPolicy]], None],
    capsys: pytest.CaptureFixture[str],
) -> None:
    registered(Plain)
    options = ["--policy", NAME, "--skip_sub_layer_num", "2", *place.options, "--limit", "1"]
    options += ["--tasks", "multifieldqa_en"]
    assert run_main("prefill", "llama", options) == 0
    assert run_main("prefill", "llama", [*options, "--gain", "norm"]) == 2
    assert "'gain' does not apply to OWN; policies that take it: ADA" in capsys.readouterr().err


def test_values_that_a_record_cannot_tell_apart_are_refused() -> None:
    assert describe({"a": (1, "b", None), "c": {2: 0.5}}) == {"a": [1, "b", None], "c": {"2": 0.5}}
    with pytest.raises(AdaskipError, match="field a is a object, which a record cannot tell"):
        describe({"a": object()})
