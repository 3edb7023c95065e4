"""Lists of words of a chosen number of tokens in which some words stand more often than others."""

from __future__ import annotations

import random
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from adaskip.errors import DataError


def word_list(
    weights: Mapping[str, int],
    wanted: Sequence[str],
    rng: random.Random,
    tokens: int,
    count: Callable[[str], int],
    render: Callable[[Sequence[str]], str],
) -> str:
    """As long a list as fits, in which words stand as often as they weigh.

    It is a chain of shuffled rounds, in each of which every word stands as often as its weight
    says, and the last of which is cut.

    Args:
        weights: of each word.
        wanted: the words that weigh most.
        rng: shuffles the rounds.
        tokens: upper limit of the text.
        count: tokens of a text.
        render: makes the text of a list.

    Raises:
        DataError: so short a list does not tell which words are wanted.
    """
    a_round = [word for word, weight in weights.items() for _ in range(weight)]
    words: list[str] = []
    for _ in range(tokens // count(render(a_round))):
        words += rng.sample(a_round, len(a_round))
    while count(render(words)) <= tokens:
        words += rng.sample(a_round, len(a_round))
    longest = bisect_right(range(len(words)), tokens, key=lambda n: count(render(words[: n + 1])))
    found = Counter(words[:longest])
    least = min(found[word] for word in wanted)
    if least <= max(found[word] for word in weights if word not in wanted):
        raise DataError(
            f"A list of {tokens} tokens has {longest} words, too few to tell which are the most "
            "frequent; choose more --sample_tokens."
        )
    return render(words[:longest])
