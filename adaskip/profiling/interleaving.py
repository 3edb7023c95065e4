"""Times several things by turns, and compares them round by round.

The speed of a machine drifts: its clock, its neighbours, the state of its memory. What is compared
is therefore measured within the same round, in an order that changes from round to round, and the
ratio is taken per round before anything is averaged.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, quantiles
from typing import TypeVar

from tqdm import tqdm

from adaskip.chance import SEED
from adaskip.profiling.intervals import median_interval

T = TypeVar("T")
MIN_ROUNDS = 3
# Every ratio of a round has the baseline in it, so that one is measured more than once.
BASELINE_REPEATS = 3


def by_turns(
    kinds: Mapping[str, Callable[[], T]],
    *,
    rounds: int,
    baselines: Sequence[str] = (),
    seconds: float | None = None,
    title: str = "",
    progress: bool = True,
) -> Iterator[dict[str, list[T]]]:
    """Runs every kind in every round, in a random order; warming up is the caller's.

    Args:
        kinds: what to run, by name.
        rounds: how many at most.
        baselines: kinds that run `BASELINE_REPEATS` times per round, spread over it at random.
        seconds: after which no further round begins, unless there are fewer than `MIN_ROUNDS`.
        title: of the progress bar.
        progress: whether to show it.

    Yields:
        Per round, what each kind returned, a list because of the baselines.
    """
    shuffler = random.Random(SEED)
    turns = [name for name in kinds for _ in range(BASELINE_REPEATS if name in baselines else 1)]
    start = time.perf_counter()
    with tqdm(total=rounds, desc=title, unit="round", disable=not progress) as bar:
        for number in range(rounds):
            late = seconds is not None and time.perf_counter() - start > seconds
            if late and number >= MIN_ROUNDS:
                break
            shuffler.shuffle(turns)
            taken: dict[str, list[T]] = {name: [] for name in kinds}
            for name in turns:
                taken[name].append(kinds[name]())
            yield taken
            bar.update()


def per_round(
    rounds: Iterable[Mapping[str, Sequence[T]]], kind: str, value: Callable[[T], float]
) -> list[float]:
    """A number of a kind in each round of `by_turns`, the median if it ran more than once."""
    return [median(map(value, taken[kind])) for taken in rounds]


@dataclass(frozen=True)
class Spread:
    """Median and quartiles over rounds, in the unit of the values; `n` is their number."""

    median: float
    q1: float
    q3: float
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Of one value or more."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0], 1)
        q1, middle, q3 = quantiles(values, n=4, method="inclusive")
        return cls(middle, q1, q3, len(values))


@dataclass(frozen=True)
class Ratio:
    """The median over rounds of a ratio, and its 95 % interval; see `median_interval`."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Ratio:
        """Of one value per round."""
        return cls(median(values), *median_interval(values))

    @classmethod
    def paired(cls, own: Sequence[float], base: Sequence[float]) -> Ratio:
        """Of `own / base`, round by round."""
        return cls.of([a / b for a, b in zip(own, base, strict=True)])

    def text(self, digits: int) -> str:
        """For a table: `1.203 [1.198–1.207]`."""
        return f"{self.median:.{digits}f} [{self.low:.{digits}f}–{self.high:.{digits}f}]"
