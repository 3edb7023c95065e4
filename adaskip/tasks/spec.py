"""What the tasks are: a `TaskSpec` per entry of `configs/tasks.yaml`, and the one row format."""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import cache
from typing import Annotated, Any, Literal

import pydantic
from pydantic import ConfigDict, Field, NonNegativeInt, PositiveInt, ValidationError

from adaskip.configuration import read_config
from adaskip.errors import AdaskipError, first_problem, unknown_name

Language = Literal["en", "zh"]
# Where the rows come from: LongBench's files, `tasks/sample.py` or `tasks/retrieval.py`.
Kind = Literal["longbench", "sample", "retrieval"]
Share = Annotated[float, Field(ge=0, le=1)]
KINDS: tuple[Kind, ...] = ("longbench", "sample", "retrieval")
# Of a task that is made offline, where nobody says how many.
OFFLINE_ROWS = 20
# The metric of which every reference is asked for: RULER's.
RECALL = "recall"


@dataclass(frozen=True)
class Row:
    """One request of a task, in the one format every source is brought to.

    Attributes:
        id: unique within its task, the same at every load.
        task: a name of `task_names()`.
        input: the question, or what stands in its place; empty for most summaries.
        context: the long text.
        answers: the references; which of them count is `TaskSpec.asks_all`.
        length: words (Chinese: characters) as LongBench counts them, not tokens.
        language: `"en"` or `"zh"`.
        all_classes: every class name of a classification task, else None.
    """

    id: str
    task: str
    input: str
    context: str
    answers: tuple[str, ...]
    length: int
    language: str
    all_classes: tuple[str, ...] | None = None

    @property
    def reference(self) -> str:
        """The answer whose likelihood is measured: all of them where all are asked for."""
        return ", ".join(self.answers) if task_spec(self.task).asks_all else self.answers[0]


@pydantic.dataclasses.dataclass(frozen=True, config=ConfigDict(strict=True))
class TaskSpec:
    """The facts of one task (METHOD, "Experiments").

    Attributes:
        name: the task's name in LongBench, or of ours.
        metric: a name of `adaskip.metrics.METRICS`.
        max_new_tokens: answer length, in tokens.
        language: language of the rows.
        long_bench_e: LongBench-E has rows of this task.
        chat: the prompt is wrapped in the model's chat template.
        first_line_only: only the first line of a prediction is scored.
        stop_at_newline: a newline token ends the answer, like an end-of-sequence token.
        min_new_tokens: tokens to generate before the answer may end.
        kind: where its rows come from.
        takes_depth: its rows hide one needle that is asked for, at a depth that can be chosen.
        chance: mean score of answers that know what is asked and draw from what the context offers;
            None where nobody knows.
        n_answers: that a row asks for, of which a share is found, where chance draws several.
        prompt_sha256: hash of the official prompt template; None for our own tasks.
        prompt: the prompt template itself; None for LongBench, whose prompts are not kept here.
    """

    name: str
    metric: str
    max_new_tokens: PositiveInt
    language: Language = "en"
    long_bench_e: bool = False
    chat: bool = True
    first_line_only: bool = False
    stop_at_newline: bool = False
    min_new_tokens: NonNegativeInt = 0
    kind: Kind = "longbench"
    takes_depth: bool = False
    chance: Share | None = None
    n_answers: PositiveInt = 1
    prompt_sha256: str | None = None
    prompt: str | None = None

    @property
    def offline(self) -> bool:
        """Whether its rows are made from packaged documents; they have a chosen length."""
        return self.kind != "longbench"

    def wanted(self, limit: int | None) -> int | None:
        """Rows that a `--limit` asks for: those of a file are all of them without one, None."""
        return OFFLINE_ROWS if limit is None and self.offline else limit

    @property
    def asks_all(self) -> bool:
        """Whether every reference must be found; otherwise the best over them counts."""
        return self.metric == RECALL


def _spec(name: str, kind: Kind, facts: dict[str, Any]) -> TaskSpec:
    """The facts of a task as the file has them.

    Raises:
        AdaskipError: one of them is unknown or of another type or range, or one that a task must
            have is missing.
    """
    known = [item.name for item in fields(TaskSpec) if item.name not in ("name", "kind")]
    for key in facts:
        if key not in known:
            raise unknown_name(f"fact of the task {name!r} in configs/tasks.yaml:", key, known)
    for key in ("metric", "max_new_tokens"):
        if key not in facts:
            raise AdaskipError(f"The task {name!r} in configs/tasks.yaml has no {key!r}; add it.")
    try:
        return TaskSpec(name=name, kind=kind, **facts)
    except ValidationError as error:
        what = f"Of the task {name!r} in configs/tasks.yaml, {first_problem(error)}."
        raise AdaskipError(what) from error


@cache
def _specs() -> dict[str, TaskSpec]:
    config = read_config("tasks.yaml")
    return {
        name: _spec(name, kind, facts) for kind in KINDS for name, facts in config[kind].items()
    }


def task_names(kind: Kind | None = None) -> tuple[str, ...]:
    """The names of all tasks, or of those of one kind."""
    return tuple(name for name, spec in _specs().items() if kind in (None, spec.kind))


def task_spec(name: str) -> TaskSpec:
    """The facts of the task `name`.

    Raises:
        AdaskipError: there is no such task; the message suggests the nearest one.
    """
    try:
        return _specs()[name]
    except KeyError:
        raise unknown_name("task", name, _specs()) from None
