"""Packs a gold document and distractors into a context of a chosen number of tokens."""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from adaskip.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# The gold document takes at most this share of the context, so that there is something to confuse
# it with.
GOLD_SHARE = 0.75
# A distractor cut to fewer words than this is left out instead.
MIN_DISTRACTOR_WORDS = 8


@dataclass(frozen=True)
class Piece:
    """One document in a context: its text can be cut, what stands before and after cannot."""

    text: str
    tail: str = ""


def count_tokens(tokenizer: PreTrainedTokenizerBase, text: str) -> int:
    """Tokens of `text`, without special tokens."""
    return len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def _render(pieces: Iterable[Piece], head: str) -> str:
    return "\n\n".join(
        head.format(number=number) + piece.text + piece.tail
        for number, piece in enumerate(pieces, start=1)
    )


def longest_fitting(text: str, fits: Callable[[str], bool]) -> str | None:
    """The longest beginning of `text` that fits, cut after a word; None if too little does."""
    ends = [match.end() for match in re.finditer(r"\S+", text)][::-1]
    longest = bisect_left(ends, True, key=lambda end: fits(text[:end]))
    return text[: ends[longest]] if len(ends) - longest >= MIN_DISTRACTOR_WORDS else None


class ContextBuilder:
    """Builds contexts of at most `tokens` tokens, and as close to it as a cut distractor allows.

    Args:
        tokenizer: counts the tokens.
        tokens: upper limit of a context, without special tokens.
        head: stands before each document; `{number}` counts them from 1.
        gold_last: the gold document comes last, not at a random place.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, tokens: int, *, head: str, gold_last: bool
    ) -> None:
        self.tokens = tokens
        self._tokenizer = tokenizer
        self._head = head
        self._gold_last = gold_last

    def count(self, text: str) -> int:
        """Tokens of `text`, without special tokens."""
        return count_tokens(self._tokenizer, text)

    def takes(self, gold: str) -> bool:
        """Whether the gold document leaves room for distractors."""
        return self.count(_render([Piece(gold)], self._head)) <= GOLD_SHARE * self.tokens

    def build(self, gold: str, distractors: Iterator[Piece], rng: random.Random) -> tuple[str, int]:
        """The context of one row, and the number of the gold document in it, from 1.

        Raises:
            DataError: the distractors run out before the context is full.
        """
        pieces = [Piece(gold)]
        total = self.count(_render(pieces, self._head))
        for piece in distractors:
            pieces.append(piece)
            total += self.count("\n\n" + _render([piece], self._head))
            if total > self.tokens:
                return self._cut(pieces, rng)
        raise DataError(
            f"All documents of this split together hold {total} tokens; choose a context of fewer"
            f" than the {self.tokens} tokens asked for."
        )

    def _cut(self, pieces: list[Piece], rng: random.Random) -> tuple[str, int]:
        """Put the pieces in random order and cut the last distractor to fit; drop it if need be."""
        gold, *others = pieces
        rng.shuffle(others)
        others.insert(len(others) if self._gold_last else rng.randint(0, len(others)), gold)
        last = others.index(pieces[-1])

        def arrange(text: str | None) -> list[Piece]:
            cut = [] if text is None else [Piece(text, pieces[-1].tail)]
            return others[:last] + cut + others[last + 1 :]

        def fits(text: str | None) -> bool:
            return self.count(_render(arrange(text), self._head)) <= self.tokens

        text = longest_fitting(pieces[-1].text, fits)
        if not fits(text):
            # Counted piece by piece, tokens can be fewer than in the whole: leave one piece out.
            return self._cut(pieces[:-1], rng)
        kept = arrange(text)
        return _render(kept, self._head), kept.index(gold) + 1
