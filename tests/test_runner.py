"""Runs on a tiny checkpoint: what is written, how a run continues, what stops it."""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from run_fixtures import (
    N_LAYERS,
    Workplace,
    lasting,
    raw_row,
    rows_of,
    save_checkpoint,
    save_data,
)
from tiny_loaded import tiny_rows

from adaskip.configuration import read_config
from adaskip.errors import (
    AdaskipError,
    DataError,
    ProfileError,
    RunError,
)
from adaskip.importance import Importance
from adaskip.models.loading import load_model
from adaskip.plan import SkipPlan, Step
from adaskip.policies import POLICIES, SkipPolicy
from adaskip.policies.factory import LEARNED, takes
from adaskip.runs import batches
from adaskip.runs.audit import Audit
from adaskip.runs.batches import make_batches, pending_batches
from adaskip.runs.generation import generate_greedy
from adaskip.runs.ledger import made_otherwise
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.rows import GeneratedRow
from adaskip.runs.runner import is_finished, resolve, run, run_folder
from adaskip.runs.scoring import score_run
from adaskip.runs.store import Share, Store
from adaskip.tasks import spec
from adaskip.tasks.prompts import prompt_template
from adaskip.tasks.spec import Row


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(checkpoint: Path, tmp_path: Path) -> Workplace:
    return Workplace(checkpoint, save_data(tmp_path / "data"), tmp_path / "results")


BUDGETS = {
    **dict.fromkeys(("EE", "SD", "US", "SHORTGPT"), ("layers", 2)),
    **dict.fromkeys(("ADA", "LLMDROP", "LLMDROP_ATTN", "LLMDROP_FFN"), ("sublayers", 4)),
}


def budget(policy: str) -> dict[str, Any]:
    unit, number = BUDGETS[policy]
    flag = "skip_full_layer_num" if unit == "layers" else "skip_sub_layer_num"
    return {"policy": policy, flag: number}


def test_every_registered_policy_is_run() -> None:
    # A plan that was made has tests of its own.
    assert set(BUDGETS) == set(POLICIES) - {"PLAN"}
    assert all(POLICIES[name].budget == unit for name, (unit, _) in BUDGETS.items())


@dataclass
class Half(SkipPolicy):
    """Learned, with a budget, and nothing else that the command line has an option for."""

    importance: Importance
    n_skip: int
    order: int = 1

    def plan(self, step: Step) -> SkipPlan:
        return SkipPlan(dict.fromkeys(self.importance.ranking()[: self.n_skip]))


def test_a_policy_is_given_the_options_it_has_fields_for(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(POLICIES, "HALF", Half)
    config = resolve(place.config(policy="HALF", skip_full_layer_num=2))
    policy = LoadedModel.open(config).policy(config, "trec")
    assert isinstance(policy, Half)
    assert (policy.n_skip, policy.order, policy.importance.n_layers) == (2, 1, N_LAYERS)


@pytest.mark.parametrize("experiment", ["prefill", "decode", "e2e"])
@pytest.mark.parametrize("policy", BUDGETS)
def test_what_was_skipped_is_kept_with_every_row(
    place: Workplace, policy: str, experiment: Any
) -> None:
    folder = run(place.config(experiment, **budget(policy), limit=2))
    assert folder.name == f"llama-{policy}-{experiment.upper()}-SKIP-{BUDGETS[policy][1]}"
    rows = rows_of(folder)
    assert [row["id"] for row in rows] == ["row0", "row1"]
    for row in rows:
        prefill, decode = row["skipped"]["prefill"], row["skipped"]["decode"]
        assert prefill["forwards"] == 1
        assert decode["forwards"] == row["generated_tokens"] - 1 > 0
        # SkipDecode begins with one layer of its two, except in the prefill experiment.
        first = 2 if policy == "SD" and experiment != "prefill" else 4
        assert prefill["attn"] + prefill["ffn"] == (0 if experiment == "decode" else first)
        assert decode["attn"] + decode["ffn"] >= first * decode["forwards"]
        assert row["skipped"]["online_extension"] == []
    record = json.loads((folder / "run.json").read_text())
    assert (record["importance"] is not None) == takes(policy, LEARNED)
    share = record["tasks"]["multifieldqa_en"]["skipped_share"]["prefill"]
    assert share == (0 if experiment == "decode" else first / (2 * N_LAYERS))


def test_a_row_holds_all_that_scoring_and_reading_need(place: Workplace) -> None:
    folder = run(place.config(tasks=("trec", "gov_report")))
    row = rows_of(folder, "trec")[0]
    assert row["references"] == ["number 0", "a number"]
    assert row["classes"] == ["a number", "a letter"]
    assert row["length"] == 4001
    assert row["tokens_before"] > 96 >= row["tokens_after"] - 1
    assert row["truncated"]
    assert row["seconds"]["total"] >= row["seconds"]["ttft"] > 0
    record = json.loads((folder / "run.json").read_text())
    assert set(record["tasks"]) == {"trec", "gov_report"}
    assert record["sessions"][0]["id"] == row["session"]
    assert record["config"]["seed"] == 2025


def test_the_online_extension_is_kept(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("adaskip.policies.AdaSkip.threshold", property(lambda self: -1.0))
    config = place.config("e2e", policy="ADA", skip_sub_layer_num=1, max_new_tokens=25, limit=1)
    (row,) = rows_of(run(config))
    skipped = row["skipped"]
    # With every FFN above the threshold, all of them are skipped once the window has passed.
    assert row["generated_tokens"] == 25 > 20
    assert skipped["online_extension"]
    assert {f"ffn{layer}" for layer in range(N_LAYERS)} <= set(skipped["decode"]["sublayers"])


def test_importance_is_learned_once_and_used_again(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = place.config(**budget("ADA"))
    run(config)
    (profile,) = (place.results / "importance").iterdir()
    monkeypatch.setattr("adaskip.runs.loaded.learn_importance", None)
    again = place.config("e2e", **budget("ADA"))
    assert lasting(rows_of(run(again)))
    given = place.config(**budget("ADA"), importance=str(profile), name="given")
    assert lasting(rows_of(run(given))) == lasting(rows_of(run_folder(resolve(config))))


def test_a_profile_of_another_model_is_refused_and_nothing_is_written(place: Workplace) -> None:
    run(place.config(**budget("ADA")))
    (profile,) = (place.results / "importance").iterdir()
    content = json.loads(profile.read_text())
    other = profile.with_name("other.json")
    other.write_text(json.dumps({**content, "fingerprint": "llama-of-somebody"}))
    with pytest.raises(ProfileError, match="llama-of-somebody"):
        run(place.config(**budget("ADA"), importance=str(other), name="other"))
    assert not (place.results / "other-SKIP-4").exists()


def test_a_run_continued_from_any_byte_is_the_run_never_stopped(place: Workplace) -> None:
    config = place.config(**budget("EE"))
    path = run(config) / "multifieldqa_en.jsonl"
    whole, expected = path.read_bytes(), lasting(rows_of(path.parent))
    loaded = LoadedModel.open(resolve(config))
    for end in range(0, len(whole), len(whole) // 7):
        path.write_bytes(whole[:end])
        run(config, loaded)
        assert lasting(rows_of(path.parent)) == expected
        assert (
            path.read_bytes()[: whole.rfind(b"\n", 0, end) + 1]
            == whole[: whole.rfind(b"\n", 0, end) + 1]
        )


def test_a_finished_run_needs_no_model(place: Workplace) -> None:
    config = place.config()
    before = (run(config) / "multifieldqa_en.jsonl").read_bytes()
    config = place.config(data_dir="nowhere", limit=2)
    assert (run(config, loaded=None) / "multifieldqa_en.jsonl").read_bytes() == before


def test_a_limit_can_grow(place: Workplace) -> None:
    assert len(rows_of(run(place.config(limit=1)))) == 1
    folder = run(place.config())
    assert [row["id"] for row in rows_of(folder)] == ["row0", "row1", "row2"]


def test_a_limit_can_grow_beyond_what_an_offline_task_has_by_default(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaskip.tasks.spec.OFFLINE_ROWS", 2)
    options: dict[str, Any] = {"tasks": ("needle_single",), "sample_tokens": 300}
    options |= {"max_length": 700, "max_new_tokens": 2}
    assert len(rows_of(run(place.config(**options)), "needle_single")) == 2
    assert is_finished(resolve(place.config(**options, limit=2)))
    grown = run(place.config(**options, limit=3))
    assert len(rows_of(grown, "needle_single")) == 3
    assert json.loads((grown / "run.json").read_text())["tasks"]["needle_single"]["rows"] == 3


def test_other_settings_under_the_same_name_change_nothing(place: Workplace) -> None:
    folder = run(place.config(limit=1))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for changes, named in [
        ({"seed": 1}, "seed: 2025 then, 1 now"),
        ({"max_length": 80}, "max_length"),
        ({"max_new_tokens": 5, "limit": 2}, "answers of up to 6"),
        ({"resume": False}, "exists already"),
    ]:
        with pytest.raises(RunError, match=named):
            run(place.config(**{"limit": 1, **changes}))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_another_profile_under_the_same_name_changes_nothing(place: Workplace) -> None:
    folder = run(place.config(**budget("ADA"), limit=1))
    path = folder / "run.json"
    path.write_text(path.read_text().replace('"importance": "llama', '"importance": "other'))
    with pytest.raises(RunError, match="importance profile other"):
        run(place.config(**budget("ADA")))
    assert len(rows_of(folder)) == 1
    # Reports know it without a model where the profile is given.
    (profile,) = (place.results / "importance").iterdir()
    given = resolve(place.config(**budget("ADA"), importance=str(profile)))
    what = made_otherwise(given, "multifieldqa_en")
    assert what.startswith("importance: 'other")
    path.write_text(path.read_text().replace('"importance": "other', '"importance": "llama'))
    assert made_otherwise(given, "multifieldqa_en") == ""


def test_other_weights_under_the_same_name_change_nothing(place: Workplace) -> None:
    folder = run(place.config(limit=1))
    path = folder / "run.json"
    record = json.loads(path.read_text())
    name, _, weights = record["model"].partition(":")
    # Another precision of the same weights is no other model; nothing is known of older records.
    for model in (f"{name}:{weights}", ""):
        path.write_text(json.dumps(record | {"model": model}))
        run(place.config(limit=2))
        assert json.loads(path.read_text())["model"] == record["model"]
    path.write_text(json.dumps(record | {"model": f"{name}:{weights[::-1]}"}))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(RunError, match=f"was made with model {name}-.* is now {name}-"):
        run(place.config())
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_finished_run_looks_at_weights_that_were_written_since(
    place: Workplace, tmp_path: Path
) -> None:
    folder = save_checkpoint(tmp_path / "own")
    config = resolve(place.config(model_path=str(folder), limit=1))
    run(config)
    assert is_finished(config)
    # The same ones: it goes on, and has nothing to do.
    save_checkpoint(folder)
    assert not is_finished(config)
    run(config)
    assert is_finished(config)
    model = load_model(folder, device="cpu")
    with torch.no_grad():
        model.lm_head.weight.neg_()
        model.model.norm.weight.neg_()
    model.save_pretrained(folder)
    with pytest.raises(RunError, match="was made with model"):
        run(config)


def test_rows_of_other_data_are_not_mixed_in(place: Workplace, tmp_path: Path) -> None:
    run(place.config(limit=2))
    data = save_data(tmp_path / "other")
    for path in data.iterdir():
        path.write_text(path.read_text().replace('"row', '"line'))
    with pytest.raises(RunError, match="not among those asked for"):
        run(place.config(data_dir=str(data)))


def test_a_finished_run_is_not_looked_at_again_for_another_way_to_its_files(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    run(place.config())
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(LoadedModel, "open", lambda config: pytest.fail("the model was loaded"))
    monkeypatch.chdir(place.data)
    for same in (".", f"{place.data}/", str(tmp_path / "empty")):
        run(place.config(data_dir=same))


def test_rows_of_a_killed_process_are_compared_too(place: Workplace, tmp_path: Path) -> None:
    folder = run(place.config(limit=2))
    path = folder / "multifieldqa_en.jsonl"
    path.rename(folder / "multifieldqa_en.jsonl.shard1")
    data = save_data(tmp_path / "other")
    for file in data.iterdir():
        file.write_text(file.read_text().replace('"number ', '"another '))
    with pytest.raises(RunError, match="an answer to row row0 of multifieldqa_en"):
        run(place.config(data_dir=str(data)))


@pytest.mark.parametrize("limit", [2, 3])
def test_rows_of_other_data_with_the_same_ids_are_refused(
    place: Workplace, tmp_path: Path, limit: int
) -> None:
    folder = run(place.config(limit=2))
    before = {path: path.read_bytes() for path in folder.iterdir()}
    data = save_data(tmp_path / "other")
    for path in data.iterdir():
        path.write_text(path.read_text().replace('"number ', '"another '))
    with pytest.raises(RunError, match="an answer to row row0 of multifieldqa_en"):
        run(place.config(data_dir=str(data), limit=limit))
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    # The same rows may lie elsewhere.
    assert len(rows_of(run(place.config(data_dir=str(save_data(data)), limit=limit)))) == limit


def test_records_without_rows_tell_where_files_were(place: Workplace) -> None:
    config = place.config(tasks=("sample_qa", "multifieldqa_en"))
    assert config.data_settings(["sample_qa", "multifieldqa_en"]) == {"data_dir": str(place.data)}
    assert config.data_settings(["sample_qa"]) == {}
    assert place.config(data_dir="./data/").data_settings(["qasper"]) == {"data_dir": "data"}


def test_importance_is_learned_anew_from_other_data(place: Workplace) -> None:
    # Prompts that hold of their rows what changes.
    given = {**budget("ADA"), "max_length": 900}
    run(place.config(**given))
    path = place.data / "qasper_e.jsonl"
    path.write_text(path.read_text().replace("Number", "Numeral"))
    run(place.config(**given, name="anew"))
    assert len([*(place.results / "importance").iterdir()]) == 2


def test_importance_is_learned_anew_for_other_templates_and_packaged_documents(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = 0
    monkeypatch.setattr(
        "adaskip.runs.loaded.sample_rows",
        lambda task, tokenizer, n, **_: tiny_rows(task, first + n)[first:],
    )

    def n_profiles(task: str, template: str | None = None) -> int:
        config = resolve(place.config(**budget("ADA"), tasks=(task,), max_length=300))
        loaded = LoadedModel.open(config)
        loaded.spec = replace(loaded.spec, template=template)
        loaded.importance(config)
        return len([*(place.results / "importance").iterdir()])

    assert [n_profiles("trec"), n_profiles("trec"), n_profiles("trec", "Q: {prompt}")] == [1, 1, 2]
    assert [n_profiles("sample_qa"), n_profiles("sample_qa")] == [3, 3]
    first = 1
    assert n_profiles("sample_qa") == 4


def test_rows_that_are_learned_from_and_scored_are_told_of_in_every_run(
    place: Workplace, caplog: pytest.LogCaptureFixture
) -> None:
    run(place.config(**budget("ADA"), warmup_task="qasper"))
    assert "has no split" not in caplog.text
    # Learned by the run before.
    run(place.config(**budget("ADA"), warmup_task="qasper", tasks=("qasper",), name="scored"))
    told = "qasper has no split: the first 2 rows that are learned from are scored"
    assert told in caplog.text
    # Or given.
    caplog.clear()
    (profile,) = (place.results / "importance").iterdir()
    given = {**budget("ADA"), "importance": str(profile)}
    run(place.config(**given, name="other"))
    assert told not in caplog.text
    run(place.config(**given, tasks=("qasper",), name="given"))
    assert told in caplog.text


def test_another_chat_template_or_prompt_limit_is_another_run(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = resolve(place.config(max_length=None, tasks=("multifieldqa_en",)))
    run(config)
    assert is_finished(config)
    file = read_config("models.yaml")
    for key, value in (("prompt_limit", 99), ("template", "Q: {prompt}")):
        changed = file | {"llama": file["llama"] | {key: value}}
        with monkeypatch.context() as patched:
            patched.setattr("adaskip.models.spec.read_config", lambda name: changed)  # noqa: B023
            assert not is_finished(config)
            assert made_otherwise(config, "multifieldqa_en")
            with pytest.raises(RunError, match=f"has multifieldqa_en with another {key}"):
                run(config)
    # Records of earlier versions do not tell.
    path = run_folder(config) / "run.json"
    record = json.loads(path.read_text())
    for key in ("prompt_limit", "template_sha256"):
        del record["tasks"]["multifieldqa_en"][key]
    path.write_text(json.dumps(record))
    assert is_finished(config)


@pytest.mark.parametrize(
    ("facts", "message"),
    [
        ({"metric": "qa_f2"}, r"metric of the task 'mine' in .*: 'qa_f2'. Did you mean 'qa_f1'"),
        ({"metrik": "qa_f1"}, r"fact of the task 'mine' in .*: 'metrik'. Did you mean 'metric'"),
        ({"prompt": "{input}"}, r"prompt of the task 'mine' in .* must have {context} in it"),
        ({"prompt": "{context} {x}"}, "needs its other braces doubled: {{ and }}"),
        ({"prompt": "{context} {"}, "needs its other braces doubled: {{ and }}"),
        ({"max_new_tokens": None}, "'mine' in .* has no 'max_new_tokens'"),
        (
            {"max_new_tokens": "64"},
            "task 'mine' in .* 'max_new_tokens' is '64': it must be a valid",
        ),
        ({"max_new_tokens": 0}, "'max_new_tokens' is 0: it must be greater than 0"),
        ({"chat": "false"}, "'chat' is 'false': it must be a valid boolean"),
        ({"chance": 25}, "'chance' is 25: it must be less than or equal to 1"),
        ({"language": "de"}, "'language' is 'de': it must be 'en' or 'zh'"),
        ({"prompt": "{context} {{x}}"}, None),
    ],
)
def test_a_task_that_cannot_be_is_refused_before_a_model_is_loaded(
    place: Workplace,
    monkeypatch: pytest.MonkeyPatch,
    facts: dict[str, Any],
    message: str | None,
) -> None:
    whole = {"metric": "qa_f1", "max_new_tokens": 3, "prompt": "{context} {input}", **facts}
    mine = {key: value for key, value in whole.items() if value is not None}
    file = read_config("tasks.yaml")
    changed = file | {"longbench": {**file["longbench"], "mine": mine}}
    monkeypatch.setattr("adaskip.tasks.spec.read_config", lambda name: changed)
    spec._specs.cache_clear()
    try:
        if message is None:
            resolve(place.config(tasks=("mine",)))
            return
        with pytest.raises(AdaskipError, match=message):
            resolve(place.config(tasks=("mine",)))
    finally:
        spec._specs.cache_clear()


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"tasks": ("hotpotqa",)}, "^No hotpotqa_e.jsonl or hotpotqa.jsonl in .*no hub here"),
        (
            {**budget("ADA"), "warmup_task": "hotpotqa"},
            "warm-up prompts of ADA are to be those of hotpotqa, but: No hotpotqa_e.* --importance",
        ),
        ({"tasks": ("multifieldqa_en",), "min_length": 10**6}, "none longer than 1000000 words"),
    ],
)
def test_what_is_missing_is_refused_before_a_model_is_loaded(
    place: Workplace, monkeypatch: pytest.MonkeyPatch, config: dict[str, Any], message: str
) -> None:
    def no_hub(*_: object) -> None:
        raise DataError("no hub here")

    monkeypatch.setattr("adaskip.tasks.longbench._load_hub", no_hub)
    monkeypatch.setattr(LoadedModel, "open", lambda config: pytest.fail("loaded"))
    with pytest.raises(DataError, match=message):
        run(place.config(**config))


def test_a_missing_lm_eval_is_refused_before_a_model_is_loaded(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LoadedModel, "open", lambda config: pytest.fail("loaded"))
    monkeypatch.setattr("adaskip.tasks.prompts.LM_EVAL", "no-lm-eval==1")
    prompt_template.cache_clear()
    with pytest.raises(DataError, match="The package no-lm-eval is needed for"):
        run(place.config(tasks=("multifieldqa_en",)))


def test_prompts_beyond_the_positions_are_told_of(
    place: Workplace, caplog: pytest.LogCaptureFixture
) -> None:
    for limit, told in ((1024, True), (1000, False)):
        caplog.clear()
        path = place.data / "multifieldqa_en_e.jsonl"
        path.write_text(json.dumps(raw_row(0, context="Number. " * 200)) + "\n")
        config = place.config(max_length=limit, max_new_tokens=20, name=f"to{limit}")
        assert rows_of(run(config))[0]["truncated"]
        said = "1 of 1 prompts of multifieldqa_en with answers of 20 tokens are longer than the"
        assert (said in caplog.text) == told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_length": 1}, "--max_length is 1"),
        ({"seed": 2**63}, "--seed is"),
        ({"seed": -1}, "--seed is -1"),
    ],
)
def test_what_would_fail_later_is_refused_before(
    place: Workplace, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(AdaskipError, match=message):
        run(place.config(**changes))
    assert not place.results.exists()


@pytest.mark.parametrize("name", ["context", "answers"])
def test_half_a_character_is_no_text(place: Workplace, name: str) -> None:
    half = "Number \ud83d"
    changes: dict[str, Any] = {name: [half] if name == "answers" else half}
    path = place.data / "multifieldqa_en_e.jsonl"
    path.write_text(json.dumps(raw_row(0, **changes)) + "\n")
    with pytest.raises(DataError, match=f"line 1: field '{name}' has half of a character pair"):
        run(place.config())
    assert not place.results.exists()


def test_rows_that_are_there_twice_count_once(place: Workplace) -> None:
    folder = run(place.config(limit=1))
    path = folder / "multifieldqa_en.jsonl"
    path.write_bytes(3 * path.read_bytes())
    assert score_run(folder).tasks["multifieldqa_en"].n_rows == 1
    assert not is_finished(resolve(place.config(limit=3)))
    assert len(rows_of(run(place.config(limit=3)))) == 3


def test_rows_without_a_record_are_not_touched(place: Workplace) -> None:
    folder = run(place.config(limit=1))
    (folder / "run.json").unlink()
    with pytest.raises(RunError, match=r"has rows but no run\.json"):
        run(place.config(limit=1))


def test_a_budget_larger_than_the_model_writes_nothing(place: Workplace) -> None:
    for changes in (
        {"policy": "EE", "skip_full_layer_num": 5},
        {"policy": "ADA", "skip_sub_layer_num": 9},
    ):
        with pytest.raises(AdaskipError, match=r"cannot skip [59] .* from 0 to [48] with"):
            run(place.config(**changes))
    assert not place.results.exists()


def test_ctrl_c_keeps_what_is_done(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate_greedy(*args, **kwargs)

    monkeypatch.setattr(batches, "generate_greedy", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(place.config())
    monkeypatch.undo()
    folder = run_folder(resolve(place.config()))
    assert len(rows_of(folder)) == 1
    assert len(rows_of(run(place.config()))) == 3


def test_a_batch_answers_as_its_rows_alone(place: Workplace) -> None:
    alone = rows_of(run(place.config(**budget("EE"))))
    config = place.config(**budget("EE"), batch_size=2, name="batched")
    batched = rows_of(run(config))
    answers = {row["id"]: row["prediction"] for row in batched}
    assert answers == {row["id"]: row["prediction"] for row in alone}
    # Killed within a batch: the batch is made again, and its kept row stays as it was.
    path = run_folder(resolve(config)) / "multifieldqa_en.jsonl"
    first = path.read_bytes().split(b"\n")[0] + b"\n"
    path.write_bytes(first)
    assert lasting(rows_of(run(config))) == lasting(batched)
    assert path.read_bytes().startswith(first)


def test_batches_are_the_same_every_time_and_shards_leave_no_row_out(tmp_path: Path) -> None:
    rows = [Row(str(n), "trec", "", "x" * (n % 4), ("a",), 1, "en") for n in range(11)]
    assert make_batches(rows, 1) == [[row] for row in rows]
    sizes = [len(batch) for batch in make_batches(rows, 4)]
    assert sizes == [4, 4, 3]
    lengths = [len(row.context) for batch in make_batches(rows, 4) for row in batch]
    assert lengths == sorted(lengths)
    kept = Store(tmp_path / "trec.jsonl", GeneratedRow)
    shares = [
        pending_batches(make_batches(rows, 2), Share(frozenset({"0", "4"}), kept, rank, 3))
        for rank in range(3)
    ]
    # Rows 0 and 4 made a batch, which is done.
    assert sorted(int(row.id) for share in shares for b in share for row in b) == [
        *(1, 2, 3),
        *range(5, 11),
    ]
    assert {len(share) for share in shares} == {1, 2}


def test_a_mismatch_fails_the_run_and_the_row_is_not_kept(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaskip.runs.batches.Audit", lambda model, session: Audit(model, None))
    with pytest.raises(RunError, match="What ran is not the plan"):
        run(place.config(**budget("EE")))
    assert not list(place.results.glob("*/*.jsonl"))


def test_a_policy_that_skips_nothing_fails_the_run(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("adaskip.policies.EarlyExit.plan", lambda self, step: SkipPlan())
    with pytest.raises(RunError, match="nothing was skipped in prefill"):
        run(place.config(**budget("EE")))
    assert not list(place.results.glob("*/*.jsonl"))


def test_names_of_files_come_from_known_tasks_only(place: Workplace) -> None:
    with pytest.raises(AdaskipError, match="Unknown task"):
        run(place.config(tasks=("../trec",)))
    assert not place.results.exists()
