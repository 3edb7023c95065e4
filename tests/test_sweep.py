"""The sweep: its cells, what it runs again, what a failure does, and what its report says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from run_fixtures import Workplace, raw_row, rows_of, save_checkpoint, save_data, save_plan

from adaskip import sweep
from adaskip.configuration import config_path, read_config
from adaskip.errors import AdaskipError, RunError
from adaskip.reports.comparison import collect
from adaskip.runs.files import lock
from adaskip.runs.ledger import run_folder
from adaskip.runs.runner import resolve
from adaskip.runs.sweepfile import Sweep, read_sweep, select


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(checkpoint: Path, tmp_path: Path) -> Workplace:
    return Workplace(checkpoint, save_data(tmp_path / "data"), tmp_path / "results")


def test_a_dense_cell_serves_every_experiment(place: Workplace) -> None:
    plan = read_sweep(save_plan(place))
    labels = [cell.label for cell in plan.cells]
    assert len(labels) == 2 + 3 * 3
    assert labels[:3] == [
        "llama prefill dense multifieldqa_en",
        "llama decode+e2e dense gov_report",
        "llama prefill EE 1 multifieldqa_en",
    ]
    assert [cell.config.warmup_task for cell in plan.cells] == ["qasper"] * 11
    assert plan.cells[1].config.max_new_tokens == 5


def test_only_selects(place: Workplace) -> None:
    cells = read_sweep(save_plan(place)).cells
    chosen = select(cells, ["policy=EE", "budget=2", "experiment=e2e"])
    assert [cell.label for cell in chosen] == ["llama e2e EE 2 gov_report"]
    assert len(select(cells, ["policy=dense", "experiment=e2e"])) == 1


def test_the_demo_is_a_sweep_at_equal_shares() -> None:
    plan = read_sweep(config_path("demo.yaml"))
    assert set(plan.experiments) == {"prefill", "decode", "e2e"}
    policies = [cell.config.policy for cell in plan.cells]
    assert set(policies) == {"dense", "EE", "SD", "US", "ADA", "PLAN"}
    assert policies.count("PLAN") == policies.count("ADA")
    assert {cell.config.plan for cell in plan.cells} == {None, "smollm2/1.2@1000"}
    for config in (cell.config for cell in plan.cells if cell.config.policy != "PLAN"):
        halves = config.skip_sub_layer_num or 2 * (config.skip_full_layer_num or 0)
        assert halves == (0 if config.policy == "dense" else 8)


BAD = [
    ({"polices": {}}, "Did you mean 'policies'"),
    ({"models": []}, "'models' is []: it must have at least 1 item"),
    ({"models": ["lama"]}, "Did you mean 'llama'"),
    ({"policies": {"EEE": [1]}}, "Did you mean 'EE'"),
    ({"policies": {"EE": [-1]}}, "cannot skip -1 full layers"),
    ({"experiments": {"prefil": ["trec"]}}, "Did you mean 'prefill'"),
    ({"experiments": {"prefill": ["terc"]}}, "Did you mean 'trec'"),
    ({"settings": {"policy": "EE"}}, "sets 'policy' itself"),
    ({"settings": {"sead": 1}}, "Did you mean 'seed'"),
    ({"name": "../x"}, "cannot name a file"),
    ({"perplexity": {"row": 1}}, "'perplexity.row' is 1: it is unknown"),
    ({"perplexity": {"rows": 0}}, "'perplexity.rows' is 0: it must be greater than 0"),
    ({"estimate": {"rows": 1}}, "Unknown key 'estimate'"),
    ({"models": "llama"}, "'models' is 'llama': it must be a valid list"),
    ({"policies": {"EE": ["1"]}}, "'policies.EE.0' is '1': it must be a valid integer"),
    ({"settings": {"seed": "x"}}, "'seed' is 'x': it must be a valid integer"),
    ({"tasks": {"gov_repot": {"limit": 1}}}, "Did you mean 'gov_report'"),
    ({"tasks": {"trec": {"limit": 1}}}, "Unknown task of the sweep 'trec'"),
    ({"models": ["llama", "llama"]}, "names the model 'llama' twice"),
    ({"policies": {"EE": [1, 2, 1]}}, "names the budget of EE 1 twice"),
    ({"policies": {"dense": [1]}}, "every sweep has dense rows"),
    ({"policies": {"PLAN": ["plans/dense.safetensors"]}}, "would be called 'dense'"),
    ({"experiments": {"e2e": ["gov_report", "gov_report"]}}, "names the task 'gov_report' twice"),
    (
        {
            "experiments": {"e2e": ["multifieldqa_en", "gov_report"]},
            "tasks": {"gov_report": {"max_length": 50}},
        },
        "dense gov_report would be one run, but their settings differ (max_length: 96 then, 50 now",
    ),
    (
        {
            "policies": {"ADA": [2]},
            "experiments": {"e2e": ["multifieldqa_en", "gov_report"]},
            "tasks": {"gov_report": {"gain": "norm"}},
        },
        "ADA 2 gov_report would be one run, but their settings differ (gain:",
    ),
]


@pytest.mark.parametrize(("changes", "expected"), BAD)
def test_a_bad_file_is_one_sentence(
    place: Workplace, changes: Any, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([str(save_plan(place, **changes))]) == 2
    assert expected in capsys.readouterr().err
    assert not place.results.exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", "is not YAML"),
        ("a", "must be a mapping with the keys"),
        (": :", "is not YAML"),
        ("name: a\nname: b", "the key 'name' is there twice"),
        ("name: a\npolicies: {EE: [1], EE: [2]}", "the key 'EE' is there twice"),
        (None, "cannot be read"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused(
    tmp_path: Path, text: str | None, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "x.yaml"
    if text is not None:
        path.write_text(text)
    assert sweep.main([str(path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error


def test_a_file_may_merge_what_it_said_before(place: Workplace) -> None:
    path = save_plan(place)
    text = path.read_text().replace("settings:", "settings: &common", 1)
    merged = text.replace("gov_report:\n    limit: 1", "gov_report:\n    <<: *common\n    limit: 1")
    assert merged != text
    path.write_text(merged)
    cell = read_sweep(path).cells[1]
    assert (cell.task, cell.config.limit, cell.config.max_length) == ("gov_report", 1, 96)
    path.write_text(merged.replace("    limit: 1", "    limit: 1\n    limit: 2"))
    with pytest.raises(AdaskipError, match="'limit' is there twice"):
        read_sweep(path)


@pytest.mark.parametrize(
    ("only", "message"),
    [
        ("policy", "must be key=value"),
        ("polcy=EE", "Did you mean 'policy'"),
        ("policy=US", "No cell matches --only policy=US"),
        ("policy=EE policy=ADA", "--only has policy twice"),
    ],
)
def test_a_bad_selection_is_refused(
    place: Workplace, only: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([str(save_plan(place)), "--only", *only.split()]) == 2
    assert message in capsys.readouterr().err


def test_two_selections_hold_together(place: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    given = [str(save_plan(place)), "--dry_run", "--only", "policy=EE"]
    assert sweep.main([*given, "--only", "budget=2", "experiment=e2e"]) == 0
    assert "1 cells" in capsys.readouterr().out
    assert sweep.main([*given, "--only", "policy=ADA"]) == 2
    assert "--only has policy twice" in capsys.readouterr().err


def test_what_was_made_with_other_settings_is_left_out_of_the_report(place: Workplace) -> None:
    given: dict[str, Any] = {"policies": {"EE": [1], "US": [1]}, "experiments": {"e2e": ["trec"]}}
    given |= {"tasks": {"trec": {"limit": 2, "max_new_tokens": 3}}}
    few = {"perplexity": {"rows": 1, "max_tokens": 4}}

    def lines(only: str, **changes: Any) -> dict[str, float | None]:
        file = save_plan(place, **{**given, **changes})
        assert sweep.main([str(file), "--only", f"policy={only}"]) == 0
        (table,) = json.loads((place.results / "report.json").read_text())["tables"]
        return {line["policy"]: line["tasks"]["trec"]["perplexity"] for line in table["lines"]}

    assert lines("dense", **few).keys() == {"dense"}
    before = lines("EE", **few)
    assert all(before.values())
    # A perplexity of other rows is none to compare with.
    after = lines("US", perplexity={"rows": 2, "max_tokens": 8})
    assert [name for name, value in after.items() if value] == ["US"]
    assert before.keys() | {"US"} == after.keys()
    longer = {"trec": {"limit": 2, "max_new_tokens": 5}}
    assert lines("US", tasks=longer, policies={"US": [2]}).keys() == {"US"}
    (note,) = json.loads((place.results / "report.json").read_text())["notes"]
    assert note == (
        "llama e2e dense trec: left out, its rows were made with other settings "
        "(max_new_tokens: 3 then, 5 now)."
    )


def test_a_dry_run_lists_and_writes_nothing(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([str(save_plan(place)), "--dry_run", "--only", "policy=ADA"]) == 0
    out = capsys.readouterr().out
    (line,) = [x for x in out.splitlines() if x.startswith("| llama decode ADA 2 gov_report ")]
    assert [cell.strip() for cell in line.split("|")[2:-1]] == ["0", "1"]
    assert "3 cells, 4 rows left" in out
    assert not place.results.exists()
    # Without a limit only the data tells.
    file = save_plan(place, tasks={})
    assert sweep.main([str(file), "--dry_run", "--only", "policy=dense", "task=gov_report"]) == 0
    assert "1 cells, ? rows left" in capsys.readouterr().out


def test_a_dry_run_counts_what_is_done(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(save_plan(place))
    assert sweep.main([file, "--only", "policy=dense", "task=multifieldqa_en"]) == 0
    capsys.readouterr()
    assert sweep.main([file, "--dry_run", "--only", "policy=dense"]) == 0
    lines = [[x.strip() for x in x.split("|")[1:-1]] for x in capsys.readouterr().out.splitlines()]
    assert ["llama prefill dense multifieldqa_en", "2", "0"] in lines
    assert ["llama decode+e2e dense gov_report", "0", "1"] in lines


def test_the_paper_is_a_sweep_of_all_its_tables(capsys: pytest.CaptureFixture[str]) -> None:
    file = config_path("paper.yaml")
    plan = read_sweep(file)
    assert plan.models == ("llama", "internlm", "vicuna")
    # Per model five dense cells, and seven columns of four policies with three budgets.
    assert len(plan.cells) == 3 * (5 + 7 * 4 * 3)
    budgets = read_config("budgets.yaml")
    for experiment, tasks in plan.experiments.items():
        assert list(tasks) == budgets["experiments"][experiment]["tasks"]
    for cell in plan.cells:
        config = cell.config
        units = budgets["budgets"]["sublayers" if config.policy == "ADA" else "layers"]
        assert config.policy == "dense" or config.budget in units
    assert sweep.main([str(file), "--dry_run", "--only", "model=vicuna", "policy=ADA"]) == 0
    assert "21 cells" in capsys.readouterr().out


def test_a_sweep_runs_once_and_then_only_reports(
    place: Workplace, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = str(save_plan(place, perplexity={"rows": 1, "max_tokens": 4}))
    opened = []
    real = sweep.LoadedModel.open

    def counting(config: Any) -> Any:
        opened.append(config)
        return real(config)

    monkeypatch.setattr(sweep.LoadedModel, "open", counting)
    assert sweep.main([file]) == 0
    assert len(opened) == 1
    first = capsys.readouterr().out
    assert len(list((place.results / "runs/importance").iterdir())) == 1
    report = json.loads((place.results / "report.json").read_text())
    assert [table["experiment"] for table in report["tables"]] == ["prefill", "decode", "e2e"]
    for table in report["tables"]:
        assert [line["policy"] for line in table["lines"]] == ["dense", "EE", "EE", "ADA"]
        dense, one, two, ada = table["lines"]
        phase = "decode" if table["experiment"] == "decode" else "prefill"
        assert [line["skipped_share"][phase] for line in (dense, one, two, ada)] == [
            0,
            1 / 4,
            1 / 2,
            1 / 4,
        ]
        (task,) = two["tasks"].values()
        (base,) = dense["tasks"].values()
        assert task["delta"] == pytest.approx(task["score"] - base["score"])
        assert task["perplexity"] > 0
    # The dense row of gov_report was made once.
    assert len(rows_of(place.results / "runs/llama-dense-SKIP-0", "gov_report")) == 1
    assert (place.results / "report.png").read_bytes().startswith(b"\x89PNG")
    assert "| EE" in (place.results / "report.md").read_text()

    assert sweep.main([file]) == 0
    assert len(opened) == 1
    assert capsys.readouterr().out.split("Took")[0] == first.split("Took")[0]


def test_deltas_are_to_the_dense_rows(place: Workplace) -> None:
    file = str(save_plan(place, policies={"EE": [1]}))
    assert sweep.main([file]) == 0
    # A random model finds nothing: the answers are given.
    for run, answers in (("dense", ["number 0", "number 1"]), ("EE-PREFILL", ["number 0", "x"])):
        path = next((place.results / "runs").glob(f"llama-{run}-SKIP-*")) / "multifieldqa_en.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        told = [row | {"prediction": text} for row, text in zip(rows, answers, strict=True)]
        path.write_text("".join(f"{json.dumps(row)}\n" for row in told))
    assert sweep.main([file]) == 0
    report = json.loads((place.results / "report.json").read_text())
    dense, skipped = (line["tasks"]["multifieldqa_en"] for line in report["tables"][0]["lines"])
    assert (dense["score"], dense["delta"]) == (100, None)
    assert (skipped["score"], skipped["delta"]) == (50, -50)
    assert skipped["delta_interval"] == [-100, 0]
    # As if the weights had been rewritten between the two.
    record = next((place.results / "runs").glob("llama-dense-*")) / "run.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"model": "llama-of-before"}))
    _, skipped = collect(read_sweep(Path(file)), {}).tables[0].lines
    assert skipped.tasks["multifieldqa_en"].delta is None


ONE_TASK: dict[str, Any] = {
    "policies": {"EE": [1]},
    "experiments": {"prefill": ["multifieldqa_en"]},
}


def compared(file: Path, *only: str) -> tuple[list[list[str]], tuple[str, ...]]:
    """Runs a sweep of `ONE_TASK`: the ids that each line rests on, dense first, and all notes."""
    options = [part for each in only for part in ("--only", each)]
    assert sweep.main([str(file), *options]) == 0
    report = collect(read_sweep(file), {})
    scores = [line.tasks["multifieldqa_en"] for line in report.tables[0].lines]
    return [[*score.row_scores] for score in scores], report.notes


def test_the_first_rows_are_those_of_any_run_in_batches_too(place: Workplace) -> None:
    # The later ones are shorter.
    rows = [raw_row(i, context="A number is a number. " * (7 - i)) for i in range(6)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (place.data / "multifieldqa_en_e.jsonl").write_text(lines)

    def asked(limit: int) -> Path:
        task = {"limit": limit, "max_new_tokens": 3, "batch_size": 2}
        return save_plan(place, tasks={"multifieldqa_en": task}, **ONE_TASK)

    assert compared(asked(6), "policy=dense") == ([[f"row{i}" for i in range(6)]], ())
    first = [f"row{i}" for i in range(3)]
    assert compared(asked(3)) == ([first, first], ())
    # As earlier versions left it: by length.
    folder = next((place.results / "runs").glob("llama-dense-*"))
    record = json.loads((folder / "run.json").read_text())
    del record["tasks"]["multifieldqa_en"]["in_order"]
    (folder / "run.json").write_text(json.dumps(record))
    kept, (note,) = compared(asked(3))
    assert kept == [first]
    assert "left out" in note
    assert "the first 3 of its 6 rows are the shortest" in note


def test_a_cell_of_fewer_rows_than_asked_says_so(place: Workplace) -> None:
    def asked(limit: int | None) -> Path:
        task = {"max_new_tokens": 3} | ({} if limit is None else {"limit": limit})
        return save_plan(place, tasks={"multifieldqa_en": task}, **ONE_TASK)

    compared(asked(1))
    of = "multifieldqa_en, EE 1: {}."
    common = of.format("to dense over the 1 rows that both have")
    for limit, planned in ((3, "3"), (None, "all")):
        kept, notes = compared(asked(limit), "policy=dense")
        assert kept == [["row0", "row1", "row2"], ["row0"]]
        assert notes == (of.format(f"1 of {planned} rows"), common)


def test_a_perplexity_is_measured_once(place: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    measured, stock = [], sweep.measure_perplexity

    def counted(*given: Any) -> None:
        measured.append(given)
        stock(*given)

    monkeypatch.setattr(sweep, "measure_perplexity", counted)
    few = {"perplexity": {"rows": 2, "max_tokens": 4}}
    # The runs have more rows than are asked for later.
    for limit, asked, calls in ((3, {}, 0), (1, few, 2), (1, few, 2)):
        tasks = {"multifieldqa_en": {"limit": limit, "max_new_tokens": 3}}
        compared(save_plan(place, tasks=tasks, **ONE_TASK, **asked))
        assert len(measured) == calls
    # What is under way is another command's.
    config = resolve(measured[0][0])
    perplexity = run_folder(config) / "multifieldqa_en.perplexity.json"
    perplexity.unlink()
    with lock(run_folder(config)), pytest.raises(RunError, match="Another process is working"):
        stock(config, *measured[0][1:])
    stock(config, *measured[0][1:])
    assert perplexity.exists()
    assert not perplexity.with_suffix("").exists()


def test_a_failed_cell_is_reported_and_the_rest_goes_on(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    file = save_plan(
        place,
        policies={"EE": [1, 9]},
        experiments={"prefill": ["multifieldqa_en", "trec"]},
    )
    (place.data / "trec_e.jsonl").write_text("{")
    assert sweep.main([str(file)]) == 1
    out = capsys.readouterr().out
    assert "FAILED: llama prefill EE 9 multifieldqa_en: AdaskipError: EarlyExit cannot" in out
    assert "FAILED: llama prefill EE 1 trec: DataError" in out
    report = json.loads((place.results / "report.json").read_text())
    assert [line["policy"] for line in report["tables"][0]["lines"]] == ["dense", "EE"]
    assert len(report["failures"]) == 4


def test_short_rows_count_in_a_sweep_that_asks_for_them(place: Workplace) -> None:
    path = place.data / "gov_report_e.jsonl"
    path.write_text(path.read_text().replace('"length": 400', '"length": 10'))
    settings = {k: v for k, v in place.settings.items() if k != "results_dir"}
    changes = {"policies": {"EE": [1]}, "experiments": {"e2e": ["gov_report"]}, "tasks": {}}
    file = save_plan(place, settings=settings | {"min_length": 0, "limit": 1}, **changes)
    assert sweep.main([str(file)]) == 0
    report = json.loads((place.results / "report.json").read_text())
    lines = report["tables"][0]["lines"]
    assert [line["tasks"]["gov_report"]["n_rows"] for line in lines] == [1, 1]
    assert report["notes"] == []


def test_a_model_that_cannot_be_loaded_is_tried_once(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    tried = []
    monkeypatch.setattr(sweep.LoadedModel, "open", lambda config: tried.append(1) or 1 / 0)
    plan = read_sweep(save_plan(place))
    failures = sweep.run_cells(plan.cells[:3], None)
    assert len(failures) == 3
    assert len(tried) == 1


def test_pickles_are_allowed_by_the_command_alone(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Sweep] = []
    monkeypatch.setattr(sweep, "sweep", lambda plan, only: seen.append(plan) or 0)
    path = str(save_plan(place))
    assert sweep.main([path]) == sweep.main([path, "--allow_pickle"]) == 0
    allowed = [{cell.config.allow_pickle for cell in plan.cells} for plan in seen]
    assert allowed == [{False}, {True}]
    # The rows are the same either way.
    assert seen[0].cells[0].config.settings() == seen[1].cells[0].config.settings()


def test_a_sweep_can_be_kept_elsewhere(place: Workplace, tmp_path: Path) -> None:
    plan = read_sweep(save_plan(place), tmp_path / "other")
    assert plan.folder == tmp_path / "other"
    assert {cell.config.results_dir for cell in plan.cells} == {str(tmp_path / "other/runs")}
