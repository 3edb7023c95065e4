"""The figures of a sweep: scores and perplexities by task, and quality against what is skipped."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from adaskip.reports.comparison import Line, Table
from adaskip.reports.figures import add_legend, as_png, canvas, policy_colour, policy_marker
from adaskip.runs.runconfig import DENSE
from adaskip.tasks.spec import RECALL, task_spec

# Of a policy's budgets, the first one plain.
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
METRICS = {
    "qa_f1": "F1",
    "qa_f1_zh": "F1",
    "rouge": "ROUGE-L",
    "rouge_zh": "ROUGE-L",
    "classification": "accuracy",
    RECALL: "share found",
}

# What a bar shows: height and error of one line and task.
Value = Callable[[Line, str], tuple[float, float] | None]
# What a point shows of one line, over all tasks of its table.
Mean = Callable[[Line, Sequence[str]], float | None]


def draw_scores(tables: Sequence[Table]) -> bytes | None:
    """One column per table: scores with one standard error, below them perplexities; as PNG.

    None if there is no line.
    """
    tables = [table for table in tables if table.lines]
    if not tables:
        return None
    values = [score_and_error, perplexity_of] if _has_perplexity(tables) else [score_and_error]
    widths = [len(table.tasks) + 0.3 for table in tables]
    width, height = 2.6 * sum(widths), 0.8 + 2.8 * len(values)
    figure, panels = canvas(
        len(values), len(tables), width=width, height=height, width_ratios=widths
    )
    styles = bar_styles(tables)
    for row, value in zip(panels, values, strict=True):
        for table, panel in zip(tables, row, strict=True):
            _bars(panel, table, styles, value)
    for table, panel in zip(tables, panels[0], strict=True):
        panel.set_title(f"{table.experiment} ({table.model})")
        panel.set_ylim(bottom=0)
    panels[0][0].set_ylabel("score (metric of the task × 100)")
    for panel in panels[1] if len(values) > 1 else ():
        panel.set_yscale("log")
        panel.set_ylim(bottom=1)
    panels[-1][0].set_ylabel("perplexity of references" if len(values) > 1 else "score (× 100)")
    add_legend(figure, panels)
    return as_png(figure)


def draw_quality(tables: Sequence[Table]) -> bytes | None:
    """One column per table: mean score, below it perplexity, against the skipped share; as PNG.

    Scores of tasks at which dense is at chance compare nothing, and are left out of the mean. None
    if nothing is compared with dense.
    """
    tables = [table for table in tables if table.dense and len(table.lines) > 1]
    if not tables:
        return None
    rows: list[tuple[str, Mean]] = [("mean score (× 100)", mean_score)]
    if _has_perplexity(tables):
        rows.append(("perplexity (up is better)", mean_perplexity))
    width, height = 3.4 * len(tables), 0.6 + 2.6 * len(rows)
    figure, panels = canvas(len(rows), len(tables), width=width, height=height, sharey="row")
    for row, (title, value) in zip(panels, rows, strict=True):
        row[0].set_ylabel(title)
        for table, panel in zip(tables, row, strict=True):
            _points(panel, table, value)
    for table, panel in zip(tables, panels[0], strict=True):
        panel.set_title(f"{table.experiment} ({table.model})")
    panels[0][0].set_ylim(bottom=0)
    if len(rows) > 1:
        panels[1][0].set_yscale("log")
        panels[1][0].invert_yaxis()
    add_legend(figure, panels)
    return as_png(figure)


def score_and_error(line: Line, task: str) -> tuple[float, float] | None:
    """Mean score x100 of a task's rows and its standard error; None if there is none."""
    if task not in line.tasks:
        return None
    values = [100 * value for value in line.tasks[task].row_scores.values()]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return line.tasks[task].score, error


def perplexity_of(line: Line, task: str) -> tuple[float, float] | None:
    """Perplexity of a task's references, without an error; None if it was not measured."""
    value = line.tasks[task].perplexity if task in line.tasks else None
    return None if value is None else (value, 0.0)


def mean_score(line: Line, tasks: Sequence[str]) -> float | None:
    """Mean score over tasks; None without any, or unless the line has all of them."""
    if not tasks or any(task not in line.tasks for task in tasks):
        return None
    return statistics.fmean(line.tasks[task].score for task in tasks)


def mean_perplexity(line: Line, tasks: Sequence[str]) -> float | None:
    """Geometric mean of the references' perplexity; None unless the line has all of them."""
    found = [perplexity_of(line, task) for task in tasks]
    known = [pair[0] for pair in found if pair is not None]
    return statistics.geometric_mean(known) if known and len(known) == len(found) else None


def bar_styles(tables: Sequence[Table]) -> dict[str, tuple[str, str]]:
    """Colour by policy and hatch by budget, the same in every panel; markers tell policies, too."""
    budgets: dict[str, dict[str, None]] = {}
    for line in (line for table in tables for line in table.lines if line.policy != DENSE):
        budgets.setdefault(line.policy, {})[line.label] = None
    return {
        label: (policy_colour(policy), HATCHES[index % len(HATCHES)])
        for policy, labels in budgets.items()
        for index, label in enumerate(labels)
    }


def _has_perplexity(tables: Sequence[Table]) -> bool:
    lines = [line for table in tables for line in table.lines]
    return any(score.perplexity is not None for line in lines for score in line.tasks.values())


def _bars(panel: Any, table: Table, styles: dict[str, tuple[str, str]], value: Value) -> None:
    lines = [line for line in table.lines if line.policy != DENSE]
    width = 0.8 / max(len(lines), 1)
    for index, line in enumerate(lines):
        colour, hatch = styles[line.label]
        found = [(place, value(line, task)) for place, task in enumerate(table.tasks)]
        shown = [(place, pair) for place, pair in found if pair is not None]
        places = [place - 0.4 + (index + 0.5) * width for place, _ in shown]
        heights = [mean for _, (mean, _) in shown]
        panel.bar(
            places,
            heights,
            width,
            color=colour,
            hatch=hatch,
            edgecolor="black",
            linewidth=0.6,
            label=line.label,
        )
        panel.errorbar(
            places,
            heights,
            [error for _, (_, error) in shown],
            fmt=policy_marker(line.policy),
            color="black",
            markerfacecolor="white",
            markersize=6,
            elinewidth=0.8,
            capsize=2,
            label=line.label,
        )
    for place, task in enumerate(table.tasks):
        base = value(table.dense, task) if table.dense else None
        if base is not None:
            panel.hlines(
                base[0], place - 0.45, place + 0.45, color="black", linestyle="--", label=DENSE
            )
    labels = [_task_label(task) for task in table.tasks]
    if value is score_and_error:
        telling = _telling(table)
        labels = [
            label if task in telling else f"{label}\n(chance)"
            for label, task in zip(labels, table.tasks, strict=True)
        ]
    panel.set_xticks(range(len(table.tasks)), labels)
    panel.set_xlim(-0.5, len(table.tasks) - 0.5)


def _points(panel: Any, table: Table, value: Mean) -> None:
    phase = "prefill" if table.experiment == "prefill" else "decode"
    tasks = _telling(table) if value is mean_score else table.tasks
    found = [(line, line.skipped_share[phase], value(line, tasks)) for line in table.lines]
    points = [(line, 100 * x, y) for line, x, y in found if x is not None and y is not None]
    for policy in dict.fromkeys(line.policy for line, _, _ in points):
        own = [(line, x, y) for line, x, y in points if line.policy == policy]
        if policy == DENSE:
            panel.axhline(own[0][2], color="black", linestyle="--", linewidth=1, label=DENSE)
            continue
        look = {"color": policy_colour(policy), "marker": policy_marker(policy), "label": policy}
        xs, ys = [x for _, x, _ in own], [y for _, _, y in own]
        panel.plot(xs, ys, linewidth=1, clip_on=False, **look)
        for line, x, y in own:
            budget, place = str(line.budget), {"textcoords": "offset points", "va": "center"}
            panel.annotate(budget, (x, y), (6, 0), fontsize=8, **place)
    panel.set_xlabel(f"skipped sublayers in {phase} (%)")
    panel.set_xlim(0, 1.25 * max((x for _, x, _ in points), default=0) or 1)


def _telling(table: Table) -> list[str]:
    """The tasks whose scores compare something: at which dense is not at chance."""
    known = {} if table.dense is None else table.dense.tasks
    return [task for task in table.tasks if not (task in known and known[task].at_chance)]


def _task_label(task: str) -> str:
    spec = task_spec(task)
    return f"{task.removeprefix('sample_')}\n({METRICS.get(spec.metric, spec.metric)})"
