"""What the retrieval tasks hide and ask for: numbers, words and names, each of one split alone."""

from __future__ import annotations

import random
import re
import string
from collections.abc import Callable
from functools import cache

from adaskip.tasks.documents import Split, documents, split_of

# The packaged documents that haystacks are made of, and whose words keys are.
SOURCE = "narrativeqa"
_WORD = re.compile(r"\b[a-z]{5,9}\b")


@cache
def vocabulary(split: Split) -> tuple[str, ...]:
    """The lower-case words of 5 to 9 letters in a split's documents that are of the split, too.

    The other split's documents may hold them; its keys and its lists do not.
    """
    words = {word for document in documents(SOURCE, split) for word in _WORD.findall(document.text)}
    return tuple(sorted(word for word in words if split_of(word) == split))


class Values:
    """Draws values of one split, none of them twice and none a part of another.

    Args:
        split: whose values.
        rng: draws them.
    """

    def __init__(self, split: Split, rng: random.Random) -> None:
        self._split = split
        self._rng = rng
        self._drawn: list[str] = []

    def number(self, digits: int) -> str:
        """A number of so many digits."""
        return self._draw(lambda: str(self._rng.randrange(10 ** (digits - 1), 10**digits)))

    def name(self, letters: int) -> str:
        """Random capital letters."""
        return self._draw(lambda: "".join(self._rng.choices(string.ascii_uppercase, k=letters)))

    def word(self) -> str:
        """A word of the split's documents."""
        return self._draw(lambda: self._rng.choice(vocabulary(self._split)))

    def key(self) -> str:
        """Two words, joined by a hyphen."""
        return self._draw(lambda: "-".join(self._rng.choices(vocabulary(self._split), k=2)))

    def coded(self, letters: int) -> str:
        """Random small letters, as in a code."""
        return self._draw(lambda: "".join(self._rng.choices(string.ascii_lowercase, k=letters)))

    def _draw(self, propose: Callable[[], str]) -> str:
        while True:
            value = propose()
            alike = any(value in other or other in value for other in self._drawn)
            if not alike and split_of(value) == self._split:
                self._drawn.append(value)
                return value
