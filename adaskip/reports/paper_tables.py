"""What a sweep's report shows, as tables of text: markdown and page set the same cells."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from adaskip.plan import Phase
from adaskip.reports.comparison import Line, Table, ideal_speedup
from adaskip.runs.runconfig import DENSE
from adaskip.runs.scoring import TaskScore
from adaskip.tables import MISSING, markdown_table, number, percent, perplexity


@dataclass(frozen=True)
class Column:
    """A column: its own title, that of the group it belongs to, and whether it holds text."""

    title: str
    group: str = ""
    is_text: bool = False


@dataclass(frozen=True)
class Grid:
    """A table of text.

    Attributes:
        columns: from left to right.
        rows: the cells of each row.
        best: (row, column) of the cells the paper would set in bold.
    """

    columns: tuple[Column, ...]
    rows: tuple[tuple[str, ...], ...]
    best: frozenset[tuple[int, int]] = frozenset()

    def markdown(self) -> str:
        """The table as markdown that also lines up as plain text."""
        if not self.rows:
            return "No results yet."
        header = [
            column.group if column.title == "score" else column.title for column in self.columns
        ]
        return markdown_table(header, self.rows)


# What a column of a task shows: of a table, a line and the task.
_Cell = Callable[[Table, Line, str], str]
_POLICY = (Column("policy", is_text=True), Column("skips", is_text=True))


def quality_grid(table: Table) -> Grid:
    """Rows policy x budget, columns tasks, as in the paper: score, delta to dense, perplexity."""
    shown: list[tuple[Column, _Cell, str]] = []
    for task in table.tasks:
        shown.append((Column("score", task), _score, task))
        shown.append((Column("Δ [95 %]", task), _delta, task))
        if any(line.scores[task].rouge_l is not None for line in _with(table, task)):
            shown.append((Column("rougeL", task), _rouge_l, task))
        if any(task in line.perplexity for line in table.lines):
            shown.append((Column("perplexity", task), _perplexity, task))
    rows = [
        (*_names(line), *(cell(table, line, task) for _, cell, task in shown))
        for line in table.lines
    ]
    best = {
        (row, 2 + column)
        for column, (_, cell, task) in enumerate(shown)
        if cell is _score
        for row, line in enumerate(table.lines)
        if line.label in table.best(task)
    }
    return Grid((*_POLICY, *(column for column, _, _ in shown)), tuple(rows), frozenset(best))


def speed_grid(table: Table) -> Grid:
    """What each line skipped and how fast it was; in brackets the bound by the skipped count."""
    columns = (
        *_POLICY,
        Column("rows"),
        Column("truncated %"),
        Column("skipped % prefill"),
        Column("skipped % decode"),
        Column("TTFT s"),
        Column("speedup (bound)"),
        Column("ms/token"),
        Column("speedup (bound)"),
    )
    return Grid(columns, tuple(_speed_row(table, line) for line in table.lines))


def _speed_row(table: Table, line: Line) -> tuple[str, ...]:
    step = line.median("per_token")
    prefill, decode = line.share(Phase.PREFILL), line.share(Phase.DECODE)
    return (
        *_names(line),
        str(sum(score.n_rows for score in line.scores.values())),
        percent(line.truncated),
        percent(prefill),
        percent(decode),
        number(line.median("ttft")),
        _speedup(line.speedup(table.dense, "ttft"), prefill),
        number(None if step is None else 1000 * step, 1),
        _speedup(line.speedup(table.dense, "per_token"), decode),
    )


def _names(line: Line) -> tuple[str, str]:
    return line.policy, "nothing" if line.policy == DENSE else f"{line.budget} {line.unit}"


def _with(table: Table, task: str) -> list[Line]:
    return [line for line in table.lines if task in line.scores]


def _score_of(line: Line, task: str) -> TaskScore | None:
    return line.scores.get(task)


def _score(table: Table, line: Line, task: str) -> str:
    score = _score_of(line, task)
    return number(score.score if score else None)


def _delta(table: Table, line: Line, task: str) -> str:
    delta, interval = table.delta(line, task), table.interval(line, task)
    text = number(delta, signed=True)
    if interval is None:
        return text
    low, high = (number(end, 1, signed=True) for end in interval)
    return f"{text} [{low}, {high}]"


def _rouge_l(table: Table, line: Line, task: str) -> str:
    score = _score_of(line, task)
    return number(score.rouge_l if score else None)


def _perplexity(table: Table, line: Line, task: str) -> str:
    return perplexity(line.perplexity.get(task))


def _speedup(measured: float | None, share: float | None) -> str:
    if measured is None or share is None:
        return MISSING
    return f"{measured:.2f} ({ideal_speedup(share):.2f})"
