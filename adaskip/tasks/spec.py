"""What the tasks are: a `TaskSpec` per entry of `configs/tasks.yaml`, and the one row format."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

from adaskip.configuration import read_config
from adaskip.errors import unknown_name

Language = Literal["en", "zh"]


@dataclass(frozen=True)
class Row:
    """One request of a task, in the one format every source is brought to.

    Attributes:
        id: unique within its task, the same at every load.
        task: a name of `task_names()`.
        input: the question, or what stands in its place; empty for most summaries.
        context: the long text.
        answers: the references; the best score over them counts.
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


@dataclass(frozen=True)
class TaskSpec:
    """The facts of one task (METHOD, "Experiments").

    Attributes:
        name: the task's name in LongBench, or `sample_...`.
        metric: a name of `adaskip.metrics.METRICS`.
        max_new_tokens: answer length, in tokens.
        language: language of the rows.
        long_bench_e: LongBench-E has rows of this task.
        chat: the prompt is wrapped in the model's chat template.
        first_line_only: only the first line of a prediction is scored.
        stop_at_newline: a newline token ends the answer, like an end-of-sequence token.
        min_new_tokens: tokens to generate before the answer may end.
        offline: built by `adaskip.tasks.sample` from packaged documents, not part of LongBench.
        prompt_sha256: hash of the official prompt template; None for the offline sample.
        prompt: the prompt template itself; None for LongBench, whose prompts are not kept here.
    """

    name: str
    metric: str
    max_new_tokens: int
    language: Language = "en"
    long_bench_e: bool = False
    chat: bool = True
    first_line_only: bool = False
    stop_at_newline: bool = False
    min_new_tokens: int = 0
    offline: bool = False
    prompt_sha256: str | None = None
    prompt: str | None = None


@cache
def _specs() -> dict[str, TaskSpec]:
    config = read_config("tasks.yaml")
    specs = {name: TaskSpec(name=name, **facts) for name, facts in config["longbench"].items()}
    for name, facts in config["sample"].items():
        specs[name] = TaskSpec(name=name, offline=True, **facts)
    return specs


def task_names(*, offline: bool | None = None) -> tuple[str, ...]:
    """The names of all tasks, of LongBench's (`offline=False`) or of the sample's (True)."""
    return tuple(
        name for name, spec in _specs().items() if offline is None or spec.offline == offline
    )


def task_spec(name: str) -> TaskSpec:
    """The facts of the task `name`.

    Raises:
        AdaskipError: there is no such task; the message suggests the nearest one.
    """
    try:
        return _specs()[name]
    except KeyError:
        raise unknown_name("task", name, _specs()) from None
