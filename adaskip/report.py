"""The tables of a sweep: one per model and experiment, as markdown, JSON and figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from adaskip.comparison import Line, Table, collect, ideal_speedup
from adaskip.evaluation import notes_on
from adaskip.ledger import RUN_FILE, run_folder
from adaskip.plan import Phase
from adaskip.plans import SweepPlan
from adaskip.records import SCHEMA, read_json, write_json, write_text
from adaskip.runconfig import DENSE
from adaskip.tables import MISSING, markdown_table, number, percent, perplexity

CAPTION = (
    "Scores are LongBench's metric of the task x100; `Δ` is the difference to the dense row of the "
    "same run; perplexity is that of the reference answers. Skipped: share of all sublayers over "
    "all forwards. Times are medians over rows; speedups are medians of the per-row ratio to "
    "dense, in brackets the bound by the count of skipped sublayers."
)


def write_report(plan: SweepPlan, failures: Mapping[str, str]) -> str:
    """Scores every cell that has rows, writes `report.md`, `.json` and `.png`.

    Args:
        plan: the sweep.
        failures: what stopped the cells that failed, by label.

    Returns:
        The text of `report.md`.

    Raises:
        RunError: a file is damaged or cannot be written.
    """
    from adaskip.figure import draw

    tables = collect(plan)
    text = as_markdown(plan, tables, failures)
    write_text(plan.folder / "report.md", text + "\n")
    write_json(plan.folder / "report.json", as_json(plan, tables, failures))
    draw(tables, plan.folder / "report.png")
    return text


def as_markdown(plan: SweepPlan, tables: Sequence[Table], failures: Mapping[str, str]) -> str:
    """All tables with what must be said beside them."""
    parts = [f"# {plan.name}", CAPTION]
    notes: list[str] = []
    for table in tables:
        parts += [f"## {table.experiment}: {table.model}", _table_text(table)]
        for line in table.lines:
            for score in line.scores.values():
                notes += notes_on(line.label, score)
        notes += _session_notes(table)
    notes += [f"FAILED: {label}: {error}" for label, error in failures.items()]
    if notes:
        parts.append("\n".join(f"- {note}" for note in dict.fromkeys(notes)))
    return "\n\n".join(parts)


def _table_text(table: Table) -> str:
    header = ["policy", "skips"]
    for task in table.tasks:
        header += [task, "Δ"] + ["rougeL"] * _with_rouge_l(table, task)
        header += ["perplexity"] * _with_perplexity(table, task)
    header += ["rows", "skipped % prefill", "decode", "TTFT s", "speedup", "ms/token", "speedup"]
    rows = [_cells(table, line) for line in table.lines]
    return markdown_table(header, rows) if rows else "No results yet."


def _cells(table: Table, line: Line) -> list[str]:
    skips = "nothing" if line.policy == DENSE else f"{line.budget} {line.unit}"
    cells = [line.policy, skips]
    for task in table.tasks:
        score = line.scores.get(task)
        cells.append(number(score.score if score else None))
        cells.append(number(table.delta(line, task), signed=True))
        if _with_rouge_l(table, task):
            cells.append(number(score.rouge_l if score else None))
        if _with_perplexity(table, task):
            cells.append(perplexity(line.perplexity.get(task)))
    step = line.median("per_token")
    return [
        *cells,
        str(sum(score.n_rows for score in line.scores.values())),
        percent(line.share(Phase.PREFILL)),
        percent(line.share(Phase.DECODE)),
        number(line.median("ttft")),
        _speedup(line.speedup(table.dense, "ttft"), line.share(Phase.PREFILL)),
        number(None if step is None else 1000 * step, 1),
        _speedup(line.speedup(table.dense, "per_token"), line.share(Phase.DECODE)),
    ]


def _speedup(measured: float | None, share: float | None) -> str:
    if measured is None or share is None:
        return MISSING
    return f"{measured:.2f} ({ideal_speedup(share):.2f})"


def _with_rouge_l(table: Table, task: str) -> bool:
    return any(line.scores[task].rouge_l is not None for line in table.lines if task in line.scores)


def _with_perplexity(table: Table, task: str) -> bool:
    return any(task in line.perplexity for line in table.lines)


def _session_notes(table: Table) -> list[str]:
    """Times compare within one process; says where they do not."""
    sessions = {name for line in table.lines for s in line.scores.values() for name in s.sessions}
    if len(sessions) < 2:
        return []
    return [
        f"{table.experiment}: rows come from {len(sessions)} processes; speedups compare times "
        "across them and are less certain."
    ]


def as_json(
    plan: SweepPlan, tables: Sequence[Table], failures: Mapping[str, str]
) -> dict[str, Any]:
    """Everything the tables show, with the score of every row, and where it comes from."""
    return {
        "schema": SCHEMA,
        "name": plan.name,
        "failures": dict(failures),
        "recipe": _recipe(plan),
        "tables": [
            {
                "model": table.model,
                "experiment": table.experiment,
                "lines": [_line_json(table, line) for line in table.lines],
            }
            for table in tables
        ],
    }


def _line_json(table: Table, line: Line) -> dict[str, Any]:
    return {
        "policy": line.policy,
        "budget": line.budget,
        "unit": line.unit,
        "skipped_share": {str(phase): line.share(phase) for phase in Phase},
        "ttft": line.median("ttft"),
        "per_token": line.median("per_token"),
        "ttft_speedup": line.speedup(table.dense, "ttft"),
        "per_token_speedup": line.speedup(table.dense, "per_token"),
        "tasks": {
            task: {
                **score.as_dict(),
                "delta": table.delta(line, task),
                "perplexity": line.perplexity.get(task),
            }
            for task, score in line.scores.items()
        },
    }


def _recipe(plan: SweepPlan) -> dict[str, Any]:
    """Per run: settings, prompt hashes, profile and the machine, from its `run.json`."""
    recipe = {}
    for folder in dict.fromkeys(run_folder(cell.config) for cell in plan.cells):
        if (folder / RUN_FILE).is_file():
            record = read_json(folder / RUN_FILE)
            recipe[folder.name] = {key: value for key, value in record.items() if key != "schema"}
    return recipe
