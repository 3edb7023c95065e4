"""Haystacks: real text of a chosen number of tokens with sentences hidden at chosen depths."""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

from adaskip.errors import DataError
from adaskip.tasks.contexts import longest_fitting
from adaskip.tasks.documents import Document

_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")

Count = Callable[[str], int]


@dataclass(frozen=True)
class Needle:
    """A sentence to hide.

    Attributes:
        text: the sentence.
        depth: share of the haystack's tokens that stand before it, 0 to 1.
    """

    text: str
    depth: float


def hide(
    needles: Sequence[Needle],
    documents: Sequence[Document],
    rng: random.Random,
    tokens: int,
    count: Count,
) -> str:
    """A text of documents in random order, cut to fit, with needles between its sentences.

    Each needle stands at the end of a sentence, at the one nearest to its depth; needles of the
    same place follow each other in their order.

    Args:
        needles: what is hidden.
        documents: the haystack.
        rng: of the documents' order.
        tokens: upper limit of the text; it stays below by the words that cannot fill it.
        count: tokens of a text.

    Raises:
        DataError: the needles take more than half of the text, or there are too few documents.
    """
    room = tokens - sum(count(" " + needle.text) for needle in needles)
    if room < tokens / 2:
        raise DataError(
            f"What is hidden takes {tokens - room} of {tokens} tokens; choose more --sample_tokens."
        )
    kept: list[str] = []
    sizes: list[int] = []
    for sentence in _sentences(rng.sample(documents, len(documents))):
        kept.append(sentence)
        sizes.append(count(sentence))
        if sum(sizes) > room:
            break
    else:
        raise DataError(
            f"All documents of this split together hold {sum(sizes)} tokens; choose a context of"
            f" fewer than the {tokens} tokens asked for."
        )
    last, size = kept.pop(), sizes.pop()

    def text_with(end: str) -> str:
        ending = [end] if end else []
        return _with_needles(needles, [*kept, *ending], [*sizes, *([size] if end else [])])

    # Counted sentence by sentence, tokens can be fewer than in the whole.
    while count(text_with("")) > tokens:
        last, size = kept.pop(), sizes.pop()
    return text_with(longest_fitting(last, lambda end: count(text_with(end)) <= tokens) or "")


def _sentences(documents: Sequence[Document]) -> Iterator[str]:
    """The sentences, each with the white space that stands before it."""
    for document in documents:
        for number, sentence in enumerate(_SENTENCE_END.split(document.text)):
            yield (" " if number else "\n\n") + sentence


def _with_needles(needles: Sequence[Needle], sentences: Sequence[str], sizes: Sequence[int]) -> str:
    """The sentences of these sizes, in tokens, with the needles between them."""
    ends = [0, *accumulate(sizes)]
    behind: dict[int, list[str]] = {}
    for needle in needles:
        wanted = needle.depth * ends[-1]
        place = min(range(len(ends)), key=lambda index: abs(ends[index] - wanted))
        behind.setdefault(place, []).append(" " + needle.text)
    parts = [*behind.get(0, [])]
    for place, sentence in enumerate(sentences, start=1):
        parts += [sentence, *behind.get(place, [])]
    return "".join(parts).strip()
