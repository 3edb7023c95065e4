"""The figure of a sweep: scores per policy and experiment."""

from __future__ import annotations

import io
import math
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adaskip.reports.palette import policy_colour
from adaskip.runs.files import write_bytes
from adaskip.runs.runconfig import DENSE
from adaskip.tasks.spec import task_spec

if TYPE_CHECKING:
    from adaskip.reports.comparison import Line, Table

# Of a policy's budgets, the first one plain.
HATCHES = ("", "//", "..", "xx", "\\\\", "++", "oo")
METRICS = {
    "qa_f1": "F1",
    "qa_f1_zh": "F1",
    "rouge": "ROUGE-L",
    "rouge_zh": "ROUGE-L",
    "classification": "accuracy",
}

# What a bar shows: height and error of one line and task.
Value = Callable[["Line", str], tuple[float, float] | None]


def draw(tables: Sequence[Table], path: Path) -> None:
    """Draws one column per table: scores with one standard error, below them perplexities.

    Raises:
        RunError: the file cannot be written.
    """
    tables = [table for table in tables if table.lines]
    if not tables:
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    values = [scores]
    if any(line.perplexity for table in tables for line in table.lines):
        values.append(perplexities)
    widths = [len(table.tasks) + 0.3 for table in tables]
    figure = Figure(figsize=(2.6 * sum(widths), 0.8 + 2.8 * len(values)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(values), len(tables), squeeze=False, width_ratios=widths)
    styles = _styles(tables)
    for row, value in zip(panels, values, strict=True):
        for table, panel in zip(tables, row, strict=True):
            _panel(panel, table, styles, value)
    for table, panel in zip(tables, panels[0], strict=True):
        panel.set_title(f"{table.experiment} ({table.model})")
        panel.set_ylim(bottom=0)
    panels[0][0].set_ylabel("score (LongBench metric × 100)")
    for panel in panels[1] if len(values) > 1 else ():
        panel.set_yscale("log")
        panel.set_ylim(bottom=1)
    panels[-1][0].set_ylabel("perplexity of references" if len(values) > 1 else "score (× 100)")
    _legend(figure, panels)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200)
    write_bytes(path, buffer.getvalue())


def scores(line: Line, task: str) -> tuple[float, float] | None:
    """Mean score x100 of a task's rows and its standard error; None if there is none."""
    if task not in line.scores:
        return None
    values = [100 * value for value in line.scores[task].row_scores.values()]
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else 0.0
    return line.scores[task].score, error


def perplexities(line: Line, task: str) -> tuple[float, float] | None:
    """Perplexity of a task's references, without an error; None if it was not measured."""
    return (line.perplexity[task], 0.0) if task in line.perplexity else None


def _legend(figure: Any, panels: Any) -> None:
    found: dict[str, Any] = {}
    for panel in panels.flat:
        for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
            found.setdefault(label, handle)
    figure.legend(
        found.values(), found.keys(), loc="outside lower center", ncols=len(found), frameon=False
    )


def _styles(tables: Sequence[Table]) -> dict[str, tuple[str, str]]:
    """Colour by policy and hatch by budget, the same in every panel."""
    budgets: dict[str, dict[str, None]] = {}
    for line in (line for table in tables for line in table.lines if line.policy != DENSE):
        budgets.setdefault(line.policy, {})[line.label] = None
    return {
        label: (policy_colour(policy), HATCHES[index % len(HATCHES)])
        for policy, labels in budgets.items()
        for index, label in enumerate(labels)
    }


def _panel(panel: Any, table: Table, styles: dict[str, tuple[str, str]], value: Value) -> None:
    lines = [line for line in table.lines if line.policy != DENSE]
    width = 0.8 / max(len(lines), 1)
    for index, line in enumerate(lines):
        colour, hatch = styles[line.label]
        found = [(place, value(line, task)) for place, task in enumerate(table.tasks)]
        shown = [(place, pair) for place, pair in found if pair is not None]
        panel.bar(
            [place - 0.4 + (index + 0.5) * width for place, _ in shown],
            [mean for _, (mean, _) in shown],
            width,
            yerr=[error for _, (_, error) in shown],
            color=colour,
            hatch=hatch,
            edgecolor="black",
            linewidth=0.6,
            error_kw={"elinewidth": 0.8, "capsize": 2},
            label=line.label,
        )
    for place, task in enumerate(table.tasks):
        base = value(table.dense, task) if table.dense else None
        if base is not None:
            panel.hlines(
                base[0], place - 0.45, place + 0.45, color="black", linestyle="--", label=DENSE
            )
    panel.set_xticks(range(len(table.tasks)), [_task_label(task) for task in table.tasks])
    panel.set_xlim(-0.5, len(table.tasks) - 0.5)
    panel.spines[["top", "right"]].set_visible(False)


def _task_label(task: str) -> str:
    spec = task_spec(task)
    return f"{task.removeprefix('sample_')}\n({METRICS.get(spec.metric, spec.metric)})"
