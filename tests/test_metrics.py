"""LongBench's metrics against the released scorer's figures, and what they leave unscored."""

from __future__ import annotations

import json
import math
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from conftest import GOLDEN

from adaskip.errors import AdaskipError
from adaskip.metrics import (
    METRICS,
    ScoreLog,
    corpus_score,
    rouge_l,
    score,
    score_each,
    similarity_backend,
)
from adaskip.tasks.spec import task_names, task_spec


def golden() -> dict[str, Any]:
    content: dict[str, Any] = json.loads((GOLDEN / "longbench-metrics.json").read_text("utf-8"))
    return content


@pytest.mark.parametrize("case", golden()["cases"], ids=lambda case: case["tag"])
def test_equals_the_released_scorer(case: dict[str, Any]) -> None:
    arguments = case["dataset"], case["prediction"], case["ground_truths"], case["all_classes"]
    if task_spec(case["dataset"]).metric == "code_sim" and similarity_backend() != "difflib":
        pytest.skip("recorded with difflib; python-Levenshtein is installed here")
    assert score_each(*arguments).per_reference == pytest.approx(case["per_ground_truth"], abs=1e-9)
    assert score(*arguments) == pytest.approx(case["score"], abs=1e-9)


def test_aggregate_is_the_mean_of_long_rows_in_percent() -> None:
    content = golden()
    scores: dict[str, list[float]] = defaultdict(list)
    lengths: dict[str, list[int]] = defaultdict(list)
    for case in content["cases"]:
        classes = content["scorer_e_all_classes"].get(case["dataset"])
        task = case["dataset"]
        scores[task].append(score(task, case["prediction"], case["ground_truths"], classes))
        lengths[task].append(case["length"])
    # qasper: 6/11 counts, the row of 3999 words does not. trec: 1/3 and three zeros.
    assert corpus_score(scores["qasper"], lengths["qasper"]) == 54.55
    assert corpus_score(scores["trec"], lengths["trec"]) == 8.33
    assert corpus_score(scores["passage_count"], lengths["passage_count"]) == 33.33


def test_corpus_score_drops_exactly_4000_and_is_nan_when_nothing_is_left() -> None:
    assert corpus_score([1.0, 0.0, 0.5], [4001, 4000, 5000]) == 75.0
    assert math.isnan(corpus_score([1.0], [4000]))
    assert corpus_score([1.0, 0.0, 0.0], [10, 10, 10], min_length=0) == 33.33


def test_of_a_retrieval_task_the_share_of_answers_that_occur_counts() -> None:
    answers = ["1234567", "7654321", "1111111", "2222222"]
    assert score("needle_values", "They are 7654321 and 1234567, 1234567.", answers) == 0.5
    assert score("needle_values", "none of them", answers) == 0.0
    # Capitals do not matter, and neither does what stands around an answer: RULER's rule.
    assert score("common_words", "1.Amber2.harbours", ["amber", "harbour"]) == 1.0
    assert score_each("common_words", "amber", ["amber", "harbour"]).per_reference == (1.0, 0.0)


def test_every_task_has_a_metric() -> None:
    assert {task_spec(name).metric for name in task_names()} == set(METRICS)


@pytest.mark.parametrize(
    ("prediction", "reference", "reason"),
    [
        ("", "A cat.", "empty text"),
        ("...", "A cat.", "only dots"),
        ("A cat.", ".", "empty reference"),
        (" ".join(f"a{i}" for i in range(1200)), "a cat", "too long for rouge's recursion"),
    ],
)
def test_what_rouge_cannot_compare_is_zero_and_counted(
    prediction: str, reference: str, reason: str
) -> None:
    log = ScoreLog()
    scored = score_each("gov_report", prediction, [reference])
    log.add(scored)
    log.add(score_each("gov_report", "A cat.", ["A cat."]))
    assert scored.score == 0
    assert log.message() == f"1 of 2 predictions could not be scored and count 0 (1 {reason})"


def test_a_prediction_that_one_reference_could_score_is_not_unscored() -> None:
    log = ScoreLog()
    log.add(score_each("dureader", "很好", ["", "很好"]))
    assert (log.unscored.total(), log.partly.total()) == (0, 1)
    assert "could not be compared with every reference" in str(log.message())


def test_a_scored_zero_is_no_failure() -> None:
    log = ScoreLog()
    for task, prediction in (("gov_report", "\n\n"), ("gov_report", "dog"), ("qasper", "")):
        log.add(score_each(task, prediction, ["cat"]))
    assert log.message() is None


def test_rouge_does_not_depend_on_how_deep_the_caller_is() -> None:
    words = " ".join(f"a{i}" for i in range(900))

    def deep(levels: int) -> float:
        return deep(levels - 1) if levels else score("gov_report", words, [words])

    assert score("gov_report", words, [words]) == pytest.approx(1, abs=1e-7)
    assert deep(sys.getrecursionlimit() // 3) == pytest.approx(1, abs=1e-7)


def test_official_rouge_and_rouge_score_differ() -> None:
    prediction = "The agency spent 3 million dollars. Staff left in 2019."
    reference = "In 2019 staff left the agency. The agency spent 3 million dollars."
    assert score("gov_report", prediction, [reference]) > rouge_l(prediction, reference) + 0.05


def test_rouge_l_equals_rouge_score_on_english() -> None:
    scorer = pytest.importorskip("rouge_score.rouge_scorer").RougeScorer(["rougeL"])
    for prediction, reference in (
        ("The quick-brown fox, 2 dogs", "A quick brown dog; 2 foxes"),
        ("", "text"),
        ("naïve CAFÉ 3.5", "naive cafe 3.5"),
    ):
        expected = scorer.score(reference, prediction)["rougeL"].fmeasure
        assert rouge_l(prediction, reference) == pytest.approx(expected, abs=1e-12)


def test_rouge_l_counts_chinese_characters() -> None:
    assert rouge_l("今天天气好", "今天天气好。") == 1
    # 4 of 5 characters in order on both sides; "AI3" is one token.
    assert rouge_l("今天很热", "今天不热") == pytest.approx(3 / 4)
    assert rouge_l("用AI3写", "用ai3读") == pytest.approx(2 / 3)


def test_classification_leaves_the_neighbour_of_a_dropped_class() -> None:
    # "a" is dropped, so "b" (in "ab" too) is never looked at and stays beside the right "ab".
    assert score("trec", "ab", ["ab"], ["a", "b", "ab"]) == 0.5
    assert score("trec", "ab", ["ab"], ["a", "ab", "b"]) == 1.0


def test_similarity_backend_is_the_one_in_use() -> None:
    expected = {"difflib": 0.25, "python-Levenshtein": 0.5}[similarity_backend()]
    assert score("lcc", "tide", ["diet"]) == expected


def test_bad_arguments_are_named() -> None:
    with pytest.raises(AdaskipError, match="Did you mean 'gov_report'"):
        score("gov_reprot", "", [""])
    with pytest.raises(AdaskipError, match="at least one reference"):
        score("qasper", "x", [])
    with pytest.raises(AdaskipError, match="at least one reference"):
        score("qasper", "x", "a text instead of a list")
    with pytest.raises(AdaskipError, match="all_classes"):
        score("trec", "x", ["y"])


def test_jieba_is_quiet_and_leaves_no_cache(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from adaskip.tasks import words

    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    words._segmenter.cache_clear()
    assert words.segment("我来到北京清华大学") == ["我", "来到", "北京", "清华大学"]
    assert capfd.readouterr() == ("", "")
    assert not list(tmp_path.iterdir())
