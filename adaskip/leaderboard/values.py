"""What a leaderboard found, as values: `report.json`, from which all that is shown is made."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import isnan
from pathlib import Path
from typing import Any, Literal

from pydantic import TypeAdapter, ValidationError

from adaskip.errors import RunError
from adaskip.leaderboard.settings import Point
from adaskip.profiling.interleaving import Ratio
from adaskip.runs.files import SCHEMA, read_json, write_json

Interval = tuple[float, float]
Verdict = Literal["better", "worse", ""]

REPORT_FILE = "report.json"

# What each method is compared with at equal measured time.
BASE = "ADA"
# Fewer rounds do not tell how far off the median of a plan's times may be.
MIN_ROUNDS = 5
# A gap above this is a collapse: a reference is e times less likely per token.
COLLAPSE = 1.0


def verdict(interval: Interval | None, *, higher_is_better: bool) -> Verdict:
    """Says better or worse if a difference's interval excludes zero; otherwise nothing."""
    if interval is None or any(map(isnan, interval)) or interval[0] <= 0 <= interval[1]:
        return ""
    return "better" if (interval[0] > 0) == higher_is_better else "worse"


@dataclass(frozen=True)
class Beside:
    """A plan's gap beside that of another method at the same measured time.

    Attributes:
        gap: of the other method there, on the line between its plans on both sides.
        difference: nats per token that the plan loses more; below zero it loses less.
        interval: of the difference, 95 %, bootstrap over rows and rounds of times together.
        share: the plan's gap by the other's; None where that loses nothing.
        share_interval: likewise.
        few: whether some of the plans have fewer than `MIN_ROUNDS` rounds of times.
    """

    gap: float
    difference: float
    interval: Interval | None
    share: float | None
    share_interval: Interval | None
    few: bool

    @property
    def verdict(self) -> Verdict:
        """Whether the plan is better or worse, beyond the interval; else empty."""
        return "" if self.few else verdict(self.interval, higher_is_better=False)


@dataclass(frozen=True)
class Score:
    """A task's score under a plan, 0 to 100.

    Attributes:
        delta: to the dense model; None of dense itself.
        interval: of the delta, or of the dense score; 95 %, bootstrap over rows.
    """

    score: float
    delta: float | None
    interval: Interval | None

    @property
    def verdict(self) -> Verdict:
        """Whether it differs from dense beyond the interval."""
        return "" if self.delta is None else verdict(self.interval, higher_is_better=True)


@dataclass(frozen=True)
class TaskFacts:
    """What is known of a task from the dense model.

    Attributes:
        n_rows: of the test split.
        dense: its score.
        chance: what guessing scores; None where that is not known.
        at_chance: whether guessing would be as good: the task then says nothing.
    """

    n_rows: int
    dense: Score
    chance: float | None
    at_chance: bool


@dataclass(frozen=True)
class Entry:
    """A method's plan at one context length.

    Attributes:
        method: its name.
        asked: the acceleration it was asked for, by predicted time.
        variant: how its calibration differs from the others'; empty if it does not.
        calibration: the rows it was made from.
        predicted: the acceleration that was predicted of the plan.
        seconds: to the first token: what dense takes in the table by the plan's measured ratio;
            None before times were taken.
        by_round: ratio of dense to its time to first token in each round, by sitting; empty before
            times were taken.
        ttft: the median of these.
        per_token: likewise of its time per token.
        kv_share: of the dense keys and values.
        gap: nats per reference token that it loses to dense.
        interval: of the gap, 95 %, paired bootstrap over rows.
        by_row: the gap of each row.
        collapsed: rows whose gap is above `COLLAPSE`.
        front: whether no other plan is as fast and loses as little.
        beside: other methods at the same measured time; those that reach it.
        scores: by task.
    """

    method: str
    asked: float
    variant: str
    calibration: str
    predicted: float
    seconds: float | None
    by_round: Mapping[int, tuple[float, ...]]
    ttft: Ratio | None
    per_token: Ratio | None
    kv_share: float | None
    gap: float
    interval: Interval | None
    by_row: Mapping[str, float]
    collapsed: int
    front: bool
    beside: Mapping[str, Beside]
    scores: Mapping[str, Score]

    @property
    def speed(self) -> float:
        """The measured acceleration of prefill, or the predicted one."""
        return self.predicted if self.ttft is None else self.ttft.median


@dataclass(frozen=True)
class Reference:
    """A reference under the dense model.

    Attributes:
        nll: in nats, summed over its tokens.
        tokens: that count.
        characters: that they are; None in files that do not tell.
        prompt_characters: of its prompt; likewise.
    """

    nll: float
    tokens: int
    characters: int | None
    prompt_characters: int | None


@dataclass(frozen=True)
class Table:
    """What is known of one model at one context length.

    Attributes:
        model: its name.
        context: prompt tokens.
        headline: the acceleration at which README tells of it.
        perplexity: of the references under the dense model.
        rounds: of each sitting in which times were taken, each with dense requests of its own; that
            of most plans first.
        seconds: its time to first token, median of the sitting of most plans, as other sittings may
            have been slower; None before times were taken.
        per_token: its time per token, likewise.
        references: by row.
        entries: in the file's order.
        calibrations: one of them again, made from other rows.
        tasks: that are scored.
        missing: points without a plan, or without the times that others have, and why.
        environment: in which times were taken.
    """

    model: str
    context: int
    headline: float
    perplexity: float
    rounds: tuple[int, ...]
    seconds: float | None
    per_token: float | None
    references: Mapping[str, Reference]
    entries: tuple[Entry, ...]
    calibrations: tuple[Entry, ...]
    tasks: Mapping[str, TaskFacts]
    missing: Mapping[str, str]
    environment: Mapping[str, Any]

    @property
    def methods(self) -> tuple[str, ...]:
        """Those of the entries, in the file's order."""
        return tuple(dict.fromkeys(entry.method for entry in self.entries))

    @property
    def hardware(self) -> str:
        """Where times were taken; empty before they were."""
        about = self.environment
        named = f"{about.get('device')}, {about.get('threads')} threads, torch {about.get('torch')}"
        return named if about else ""

    @property
    def search(self) -> str | None:
        """The searched plan that others are compared with: the first of the file."""
        return first_search(self.methods)


@dataclass(frozen=True)
class Report:
    """All that a leaderboard shows.

    Attributes:
        task: whose references are scored.
        reference_tokens: of each reference.
        phase: whose time plans were asked for.
        tables: by model and context length.
        config: the name of the file that says what is compared.
    """

    task: str
    reference_tokens: int
    phase: str
    tables: tuple[Table, ...]
    config: str = ""

    @property
    def models(self) -> tuple[str, ...]:
        """Those of the tables, in the file's order."""
        return tuple(dict.fromkeys(table.model for table in self.tables))

    @property
    def methods(self) -> tuple[str, ...]:
        """Those of the tables, likewise."""
        return tuple(dict.fromkeys(method for table in self.tables for method in table.methods))

    def save(self, path: Path) -> None:
        """Writes `report.json`.

        Raises:
            RunError: it cannot be written.
        """
        write_json(path, {"schema": SCHEMA, **asdict(self)})


def read_report(path: Path) -> Report:
    """Reads `report.json`.

    Raises:
        RunError: it is missing, damaged, or of another version.
    """
    content = read_json(path)
    content.pop("schema")
    try:
        return TypeAdapter(Report).validate_python(content)
    except ValidationError as error:
        raise RunError(
            f"{path} is damaged or of another version; make it anew with --parts report."
        ) from error


def is_rival(method: str) -> bool:
    """Whether a method is another than the search, learned from as many rows as the search is."""
    return not method.startswith("SEARCH") and Point(method, 1.0).fit_rows is None


def first_search(methods: Sequence[str]) -> str | None:
    """The first searched plan among some methods."""
    return next((method for method in methods if method.startswith("SEARCH")), None)
