"""Scores of hand-made runs, checked against numbers worked by hand."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

from adaskip import metrics
from adaskip.cli.run import eval_main
from adaskip.errors import AdaskipError, RunError
from adaskip.runs.evaluation import evaluate
from adaskip.runs.files import SCHEMA, write_json
from adaskip.runs.ledger import task_rows
from adaskip.runs.rows import GeneratedRow
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.scoring import dense_scores, runs_of, score_rows, score_run
from adaskip.tasks import rouge, words
from adaskip.tasks.optional import optional_module

CACHED = (rouge._official_scorer, rouge._rouge_score_scorer, words._segmenter, metrics._fuzz)


def made_row(number: int, prediction: str, **changes: Any) -> dict[str, Any]:
    skipped = {"forwards": 1, "attn": 1, "ffn": 2, "sublayers": []}
    return {
        "id": str(number),
        "task": "multifieldqa_en",
        "prediction": prediction,
        "references": ["red fox", "dog"],
        "classes": None,
        "length": 4001,
        "tokens_before": 10,
        "tokens_after": 10,
        "truncated": number == 0,
        "generated_tokens": 2,
        "skipped": {"prefill": skipped, "decode": {**skipped, "forwards": 3}},
        "seconds": {"ttft": 1.0 + number, "per_token": 0.5, "total": 2.0},
        "session": "s",
        **changes,
    }


def save_run(results: Path, rows: list[dict[str, Any]], planned: int = 2, **changes: Any) -> Path:
    given: dict[str, Any] = {"experiment": "prefill", "model_name": "llama", **changes}
    config = RunConfig(**given)
    folder = results / config.folder_name
    task = rows[0]["task"]
    facts = {"rows": planned, "limit": None, "max_new_tokens": 8, "prompt_sha256": "0" * 64}
    record = {
        "schema": SCHEMA,
        "config": config.as_dict(),
        "n_layers": 4,
        "importance": None,
        "sessions": [],
        "tasks": {task: facts},
    }
    write_json(folder / "run.json", record)
    task_rows(folder, task).append([GeneratedRow.from_dict(row) for row in rows])
    return folder


def score(rows: list[dict[str, Any]], task: str = "multifieldqa_en", planned: int = 2) -> Any:
    made = [GeneratedRow.from_dict(row) for row in rows]
    return score_rows(task, made, n_layers=4, n_planned=planned)


def test_the_best_reference_counts_times_100_with_two_decimals() -> None:
    # F1 of "a red dog" without the article: against "red fox" 1/2, against "dog" 2/3.
    made = score([made_row(0, "a red dog"), made_row(1, "cat")])
    assert made.score == 33.33
    assert made.row_scores == {"0": pytest.approx(2 / 3), "1": 0.0}


def test_rows_not_longer_than_4000_words_do_not_count() -> None:
    made = score([made_row(0, "dog"), made_row(1, "cat", length=4000)])
    assert (made.score, made.n_rows, made.n_short) == (100.0, 1, 1)
    assert made.complete


def test_the_offline_sample_counts_every_row() -> None:
    made = score([made_row(0, "dog", length=7)], task="sample_qa", planned=1)
    assert (made.score, made.n_rows, made.n_short) == (100.0, 1, 0)


def test_shares_medians_and_truncation_are_those_of_the_rows() -> None:
    made = score([made_row(0, "dog"), made_row(1, "dog"), made_row(2, "dog")], planned=3)
    # 3 of 8 sublayers in one prefill forward; 3 in 3 decode forwards of 8.
    assert made.skipped_share == {"prefill": 3 / 8, "decode": 3 / 24}
    assert (made.ttft, made.per_token) == (2.0, 0.5)
    assert made.truncated == pytest.approx(1 / 3)


def test_predictions_that_cannot_be_compared_are_counted() -> None:
    made = score([made_row(0, ""), made_row(1, "red fox")], task="gov_report")
    assert made.score == 50.0
    assert "1 of 2 predictions could not be scored" in made.unscored
    assert made.rouge_l == 50.0
    assert score([made_row(0, "dog")]).rouge_l is None


def test_code_says_what_compared_it() -> None:
    made = score([made_row(0, "dog"), made_row(1, "dog")], task="lcc")
    assert made.backend in ("difflib", "python-Levenshtein")


def test_no_row_scores_as_nothing() -> None:
    made = score([])
    assert math.isnan(made.score)
    assert made.as_dict()["score"] is None


def test_an_unfinished_run_says_so(tmp_path: Path) -> None:
    rows = [made_row(number, "dog") for number in range(12)]
    save_run(tmp_path, rows, planned=20, policy="EE", skip_full_layer_num=1)
    text = evaluate(tmp_path, "llama-EE-PREFILL")
    assert "12 of 20 rows" in text
    assert "no dense run" in text


def test_every_budget_stands_beside_dense_and_is_kept(tmp_path: Path) -> None:
    save_run(tmp_path, [made_row(0, "dog"), made_row(1, "dog")], policy="dense")
    for budget, second in ((10, "cat"), (2, "red")):
        rows = [made_row(0, "dog"), made_row(1, second)]
        save_run(tmp_path, rows, policy="EE", skip_full_layer_num=budget)
    table = evaluate(tmp_path, "llama-EE-PREFILL").splitlines()
    cells = [[cell.strip() for cell in line.split("|")[2:5]] for line in table[2:5]]
    assert cells == [
        ["dense", "100.00", "–"],
        ["llama-EE-PREFILL-SKIP-2", "83.33", "-16.67"],
        ["llama-EE-PREFILL-SKIP-10", "50.00", "-50.00"],
    ]
    kept = json.loads((tmp_path / "llama-EE-PREFILL-SKIP-2/result.json").read_text())
    assert kept["tasks"]["multifieldqa_en"]["score"] == 83.33


def test_a_dense_run_with_other_settings_is_no_baseline(tmp_path: Path) -> None:
    rows = [made_row(0, "dog"), made_row(1, "dog")]
    save_run(tmp_path, rows, policy="dense", seed=1)
    run = save_run(tmp_path, rows, policy="EE", skip_full_layer_num=2)
    assert dense_scores(tmp_path, score_run(run)) == {}
    save_run(tmp_path, rows, policy="dense", experiment="e2e")
    assert list(dense_scores(tmp_path, score_run(run))) == ["multifieldqa_en"]


def test_a_dense_run_on_another_device_of_the_same_kind_is_a_baseline(tmp_path: Path) -> None:
    rows = [made_row(0, "dog"), made_row(1, "dog")]
    run = save_run(tmp_path, rows, policy="EE", skip_full_layer_num=2, device="cuda:0")
    save_run(tmp_path, rows, policy="dense", device="cpu")
    assert dense_scores(tmp_path, score_run(run)) == {}
    save_run(tmp_path, rows, policy="dense", experiment="e2e", device="cuda:1")
    assert list(dense_scores(tmp_path, score_run(run))) == ["multifieldqa_en"]


def test_a_dense_run_of_another_prompt_or_other_data_is_no_baseline(tmp_path: Path) -> None:
    rows = [made_row(0, "dog"), made_row(1, "dog")]
    run = save_run(tmp_path, rows, policy="EE", skip_full_layer_num=2)
    dense = save_run(tmp_path, rows, policy="dense")
    assert dense_scores(tmp_path, score_run(run))
    path = dense / "run.json"
    text = path.read_text()
    path.write_text(text.replace("0" * 64, "1" * 64))
    assert dense_scores(tmp_path, score_run(run)) == {}
    for told, bases in (("a", 1), ("b", 0)):  # another chat template
        for folder, template in ((run, "a"), (dense, told)):
            record = json.loads((folder / "run.json").read_text())
            record["tasks"]["multifieldqa_en"] |= {"template_sha256": template}
            record["tasks"]["multifieldqa_en"] |= {"prompt_sha256": "0" * 64}
            write_json(folder / "run.json", record)
        assert len(dense_scores(tmp_path, score_run(run))) == bases
    path.write_text(text)
    assert dense_scores(tmp_path, score_run(run))
    changed = [rows[0], rows[1] | {"references": ["another"]}]
    save_run(tmp_path / "other", changed, policy="dense")
    assert dense_scores(tmp_path / "other", score_run(run)) == {}
    # Of rows that both have.
    save_run(tmp_path / "fewer", rows[:1], policy="dense")
    assert dense_scores(tmp_path / "fewer", score_run(run))


def test_rows_beyond_those_compared_do_not_count(tmp_path: Path) -> None:
    rows = [made_row(0, "dog"), made_row(1, "cat"), made_row(2, "cat")]
    run = save_run(tmp_path, rows, planned=3)
    few = score_run(run, limits={"multifieldqa_en": 1}).tasks["multifieldqa_en"]
    assert (few.score, few.n_rows, few.complete) == (100.0, 1, True)
    for limits in ({"multifieldqa_en": None}, {"trec": 1}, {"multifieldqa_en": 4}):
        assert score_run(run, limits=limits).tasks["multifieldqa_en"].n_rows == 3
    # Of what is not finished the first rows may be others.
    run = save_run(tmp_path / "unfinished", rows, planned=4)
    few = score_run(run, limits={"multifieldqa_en": 1}).tasks["multifieldqa_en"]
    assert (few.n_rows, few.complete) == (3, False)


def test_a_dense_run_of_other_weights_is_no_baseline(tmp_path: Path) -> None:
    rows = [made_row(0, "dog"), made_row(1, "dog")]
    run = save_run(tmp_path, rows, policy="EE", skip_full_layer_num=2)
    dense = save_run(tmp_path, rows, policy="dense")

    def made_with(folder: Path, model: str) -> None:
        path = folder / "run.json"
        write_json(path, json.loads(path.read_text()) | {"model": model})

    # Records that do not tell are taken at their settings.
    made_with(dense, "llama-4x32-before")
    assert dense_scores(tmp_path, score_run(run))
    made_with(run, "llama-4x32-rewritten")
    assert dense_scores(tmp_path, score_run(run)) == {}
    text = evaluate(tmp_path, "llama-EE-PREFILL")
    assert "llama-EE-PREFILL-SKIP-2: no dense run with the same settings and weights" in text
    made_with(dense, "llama-4x32-rewritten")
    assert dense_scores(tmp_path, score_run(run))


def test_the_dense_run_with_most_of_the_rows_is_the_baseline(tmp_path: Path) -> None:
    rows = [made_row(0, "dog"), made_row(1, "dog")]
    run = save_run(tmp_path, rows, policy="EE", skip_full_layer_num=2)
    # By name, the trials stand behind and before the whole one.
    for name, answers in (("a-trial", rows[:1]), ("llama-dense", rows), ("trial", rows[1:])):
        save_run(tmp_path, answers, policy="dense", name=name)
    (base,) = dense_scores(tmp_path, score_run(run)).values()
    assert [*base.row_scores] == ["0", "1"]


def test_a_dense_run_of_any_name_tells_that_it_is_at_chance(tmp_path: Path) -> None:
    rows = [made_row(0, "cat", task="needle_single"), made_row(1, "cat", task="needle_single")]
    save_run(tmp_path, rows, policy="dense", name="both")
    save_run(tmp_path, rows, policy="EE", skip_full_layer_num=2, name="both")
    text = evaluate(tmp_path, "both")
    assert text.count("(chance)") == 1
    assert "needle_single, both-SKIP-0: no better than guessing" in text


def test_an_unknown_run_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds no run"):
        runs_of(tmp_path, "llama-EE-PREFILL")
    save_run(tmp_path, [made_row(0, "dog")], policy="dense")
    with pytest.raises(RunError, match="llama-dense-PREFILL-SKIP-0"):
        runs_of(tmp_path, "llama-EE-PREFILL")
    with pytest.raises(RunError, match="cannot name a file"):
        runs_of(tmp_path, "../llama")


def test_a_run_is_found_by_its_name_and_by_its_folders(tmp_path: Path) -> None:
    rows = [made_row(0, "dog")]
    two, ten = (
        save_run(tmp_path, rows, policy="EE", skip_full_layer_num=budget) for budget in (2, 10)
    )
    name = "llama-EE-PREFILL"
    # What stands beside a run and is none is passed over.
    for other in (f"{name}-SKIP-2.bak", f"{name}-SKIP-old", f"{name}-SKIP-"):
        shutil.copytree(two, tmp_path / other)
    assert runs_of(tmp_path, name) == [two, ten]
    assert runs_of(tmp_path, two.name) == [two]
    assert "PREFILL-SKIP-2 " in evaluate(tmp_path, two.name)
    with pytest.raises(RunError, match=f"its runs are: {ten.name}, {two.name}\\."):
        runs_of(tmp_path, "llama")
    # A run whose own name looks like a folder's is another run.
    save_run(tmp_path, rows, policy="EE", skip_full_layer_num=1, name=two.name)
    assert runs_of(tmp_path, name) == [two, ten]


def test_the_runs_of_a_sweep_are_found_one_folder_deeper(tmp_path: Path) -> None:
    rows = [made_row(0, "dog"), made_row(1, "red")]
    save_run(tmp_path / "runs", [made_row(0, "dog"), made_row(1, "dog")], policy="dense")
    deep = save_run(tmp_path / "runs", rows, policy="EE", skip_full_layer_num=2)
    name = "llama-EE-PREFILL"
    assert runs_of(tmp_path, name) == [deep]
    assert "-16.67" in evaluate(tmp_path, name)  # beside the dense run of the same folder
    with pytest.raises(RunError, match=f"its runs are: .*{deep.name}"):
        runs_of(tmp_path, "llama")
    # Two sweeps may have a run of this name each; which one is meant cannot be known.
    save_run(tmp_path / "others", rows, policy="EE", skip_full_layer_num=2)
    with pytest.raises(RunError, match=r"in others and runs of .*; say which"):
        runs_of(tmp_path, name)
    own = save_run(tmp_path, rows, policy="EE", skip_full_layer_num=4)
    assert runs_of(tmp_path, name) == [own]


PACKAGES = [
    ("gov_report", "rouge", "rouge"),
    ("gov_report", "rouge_score", "rouge-score"),
    ("multifieldqa_zh", "jieba", "jieba"),
    ("lcc", "fuzzywuzzy", "fuzzywuzzy"),
]
EXPERIMENTS = "pip install 'adaskip[experiments]'"


@pytest.mark.parametrize(("task", "module", "package"), PACKAGES)
def test_a_missing_package_is_a_missing_package(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    task: str,
    module: str,
    package: str,
) -> None:
    folder = save_run(tmp_path, [made_row(0, "dog", task=task)], 1, policy="dense")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for name in [*sys.modules]:
        if name.partition(".")[0] == module:
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    for cached in CACHED:
        cached.cache_clear()
    assert eval_main(["--model", "llama-dense-PREFILL", "--results_dir", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    expected = f"The package {package} is not installed; install it with: pip install {package}, "
    assert said == f"error: {expected}or all that runs and scores need: {EXPERIMENTS}\n"
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_a_package_that_lacks_what_it_needs_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [*sys.modules]:
        if name.partition(".")[0] == "rouge":
            monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "six", None)
    with pytest.raises(AdaskipError, match="rouge needs the module six, which is not installed"):
        optional_module("rouge", "rouge")
