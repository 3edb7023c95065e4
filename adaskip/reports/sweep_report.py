"""The report of a sweep: one markdown text, one page, one JSON file, and the figures."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from adaskip.plan import Phase
from adaskip.reports.comparison import Line, Table, collect
from adaskip.reports.paper_tables import quality_grid, speed_grid
from adaskip.reports.pictures import Picture, found_pictures
from adaskip.reports.recipe import (
    machines_grid,
    profiles,
    prompts_grid,
    read_recipe,
    settings_grid,
)
from adaskip.reports.tradeoff import draw_tradeoff
from adaskip.runs.evaluation import notes_on
from adaskip.runs.files import SCHEMA, Record, write_json, write_text
from adaskip.runs.sweepfile import Sweep as SweepPlan

CAPTION = (
    "Scores are LongBench's metric of the task × 100. Δ is the difference to the dense rows of the "
    "same sweep, with a 95 % paired bootstrap interval over rows (10,000 draws, seeded). "
    "Perplexity is that of the reference answers."
)
SPEED_CAPTION = (
    "Skipped: share of all sublayers over all forwards. Times are medians over rows; speedups are "
    "medians of the per-row ratio to dense, in brackets the bound by the count of skipped "
    "sublayers. Dense and skipping rows are made minutes apart, so a machine that changes its pace "
    "shows in them: `make speed` compares times within a round."
)


@dataclass(frozen=True)
class Report:
    """Everything a report shows.

    Attributes:
        failures: what stopped the cells that failed, by label.
        recipe: per run folder its record.
        pictures: figures of other commands.
        tradeoffs: per model its drawing of quality against speed.
    """

    plan: SweepPlan
    tables: tuple[Table, ...]
    failures: Mapping[str, str]
    recipe: Mapping[str, Record]
    pictures: tuple[Picture, ...]
    tradeoffs: Mapping[str, str]

    def tables_of(self, model: str) -> list[Table]:
        """One model's tables, in the order of its experiments."""
        return [table for table in self.tables if table.model == model]

    def notes(self) -> list[str]:
        """What must be said beside the tables."""
        notes: list[str] = []
        for table in self.tables:
            for line in table.lines:
                for score in line.scores.values():
                    notes += notes_on(line.label, score)
            notes += _session_notes(table)
        notes += [f"FAILED: {label}: {error}" for label, error in self.failures.items()]
        return list(dict.fromkeys(notes))


def read_report(plan: SweepPlan, failures: Mapping[str, str]) -> Report:
    """Scores every cell that has rows.

    Raises:
        RunError: a file is damaged.
    """
    tables = tuple(collect(plan))
    drawn = {
        model: draw_tradeoff([table for table in tables if table.model == model])
        for model in plan.models
    }
    return Report(
        plan,
        tables,
        failures,
        read_recipe(plan),
        tuple(found_pictures(plan.folder.parent, plan.models)),
        {model: text for model, text in drawn.items() if text},
    )


def write_report(plan: SweepPlan, failures: Mapping[str, str]) -> str:
    """Scores every cell that has rows, writes `report.md`, `.html`, `.json` and `.png`.

    Args:
        plan: the sweep.
        failures: what stopped the cells that failed, by label.

    Returns:
        The tables as text.

    Raises:
        RunError: a file is damaged or cannot be written.
    """
    from adaskip.reports.figure import draw
    from adaskip.reports.page import as_page

    report = read_report(plan, failures)
    figure = plan.folder / "report.png"
    draw(report.tables, figure)
    for model, drawing in report.tradeoffs.items():
        write_text(plan.folder / f"quality-{model}.svg", drawing + "\n")
    write_text(plan.folder / "report.md", as_markdown(report) + "\n")
    write_text(plan.folder / "report.html", as_page(report, figure) + "\n")
    write_json(plan.folder / "report.json", as_json(report))
    return tables_text(report)


def tables_text(report: Report) -> str:
    """All tables with what must be said beside them: what a sweep prints."""
    parts = [f"# {report.plan.name}", CAPTION + " " + SPEED_CAPTION]
    for table in report.tables:
        parts.append(f"## {table.experiment}: {table.model}")
        parts.append(quality_grid(table).markdown())
        if table.lines:
            parts.append(speed_grid(table).markdown())
    notes = report.notes()
    if notes:
        parts.append("\n".join(f"- {note}" for note in notes))
    return "\n\n".join(parts)


def as_markdown(report: Report) -> str:
    """The tables, the figures and the recipe."""
    parts = [tables_text(report), "## Figures"]
    drawn = [
        (f"quality-{model}.svg", f"Quality against speed of {model}") for model in report.tradeoffs
    ]
    if any(table.lines for table in report.tables):
        drawn.append(("report.png", "Scores and perplexity by task"))
    drawn += [(_beside(report.plan.folder, item.path), item.caption) for item in report.pictures]
    parts += [f"![{caption}]({path})" for path, caption in drawn] or ["None yet."]
    parts += ["## Recipe", prompts_grid(report.recipe).markdown()]
    used = profiles(report.recipe)
    if used:
        parts.append(f"Importance profiles: {', '.join(used)}.")
    parts += [settings_grid(report.recipe).markdown(), machines_grid(report.recipe).markdown()]
    return "\n\n".join(parts)


def _beside(folder: Path, path: Path) -> str:
    """The way from the report to a figure next to its folder."""
    return f"../{path.relative_to(folder.parent).as_posix()}"


def _session_notes(table: Table) -> list[str]:
    """Times compare within one process; says where they do not."""
    sessions = {name for line in table.lines for s in line.scores.values() for name in s.sessions}
    if len(sessions) < 2:
        return []
    return [
        f"{table.experiment}: rows come from {len(sessions)} processes; speedups compare times "
        "across them and are less certain."
    ]


def as_json(report: Report) -> dict[str, Any]:
    """Everything the tables show, with the score of every row, and where it comes from."""
    return {
        "schema": SCHEMA,
        "name": report.plan.name,
        "failures": dict(report.failures),
        "recipe": dict(report.recipe),
        "tables": [
            {
                "model": table.model,
                "experiment": table.experiment,
                "lines": [_line_json(table, line) for line in table.lines],
            }
            for table in report.tables
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
                "delta_interval": table.interval(line, task),
                "perplexity": line.perplexity.get(task),
            }
            for task, score in line.scores.items()
        },
    }
