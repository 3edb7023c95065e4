"""The report of a sweep: one JSON file, and the text, the page and the figures made from it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from pandas import DataFrame

from adaskip.reports import sweep_tables
from adaskip.reports.comparison import Report, collect, read_report
from adaskip.reports.pages import page_environment
from adaskip.reports.sweep_figures import draw_quality, draw_scores
from adaskip.reports.sweep_tables import as_markdown
from adaskip.runs.files import write_bytes, write_text
from adaskip.runs.sweepfile import Sweep

SCORES_CAPTION = (
    "Scores are the task's metric × 100. Δ is the difference to the dense rows of the "
    "same sweep, with a 95 % paired bootstrap interval over rows (10,000 draws, seeded). "
    "Perplexity is that of the reference answers, in parentheses of how many rows and of how many "
    "tokens in all: few tokens tell little."
)
WORK_CAPTION = (
    "Skipped: share of all sublayers over all forwards. Times are medians over rows; rows of "
    "different lines are made minutes apart, so their times say how long a sweep takes, not how "
    "much faster a policy is. `make speed` times policies and dense within a round, beside the "
    "ideal by measured times: docs/SPEED.md, results/speed."
)
# Folders beside a sweep's own, whose figures its report shows.
_OTHERS = ("observations", "speed")


@dataclass(frozen=True)
class Picture:
    """A PNG file and what to write beneath it."""

    path: Path
    caption: str


def write_report(plan: Sweep, failures: Mapping[str, str]) -> str:
    """Scores every cell that has rows, writes `report.json` and all that is made from it.

    Args:
        plan: the sweep.
        failures: what stopped the cells that failed, by label.

    Returns:
        The tables as text.

    Raises:
        RunError: a file is damaged or cannot be written.
    """
    collect(plan, failures).save(plan.folder / "report.json")
    return render(plan.folder)


def render(folder: Path) -> str:
    """Writes `report.md`, `report.html` and the figures of a folder with a `report.json`.

    Returns:
        The tables as text.

    Raises:
        RunError: a file is missing, damaged or cannot be written.
    """
    report = read_report(folder / "report.json")
    pictures = [*_draw(report, folder), *_found(report, folder.parent)]
    write_text(folder / "report.md", text_of(report, pictures, folder) + "\n")
    write_text(folder / "report.html", page_of(report, pictures) + "\n")
    return tables_text(report)


def tables_text(report: Report) -> str:
    """All tables with what must be said beside them: what a sweep prints."""
    parts = [f"# {report.name}", SCORES_CAPTION + " " + WORK_CAPTION]
    for table in report.tables:
        parts.append(f"## {table.experiment}: {table.model}")
        parts.append(as_markdown(sweep_tables.quality(table)))
        if table.lines:
            parts.append(as_markdown(sweep_tables.work(table)))
    failed = [f"FAILED: {label}: {error}" for label, error in report.failures.items()]
    notes = [f"- {note}" for note in (*report.notes, *failed)]
    return "\n\n".join([*parts, "\n".join(notes)] if notes else parts)


def text_of(report: Report, pictures: Iterable[Picture], folder: Path) -> str:
    """The tables, the figures and the recipe, as markdown to lie in `folder`."""
    shown = [
        f"![{one.caption}]({Path(os.path.relpath(one.path, folder)).as_posix()})"
        for one in pictures
    ]
    parts = [tables_text(report), "## Figures", *(shown or ["None yet."]), "## Recipe"]
    parts.append(as_markdown(sweep_tables.prompts(report.recipe)))
    used = sweep_tables.profiles(report.recipe)
    if used:
        parts.append(f"Importance profiles: {', '.join(used)}.")
    parts.append(as_markdown(sweep_tables.settings(report.recipe)))
    parts.append(as_markdown(sweep_tables.machines(report.recipe)))
    return "\n\n".join(parts)


def page_of(report: Report, pictures: Iterable[Picture]) -> str:
    """The same as one HTML page that needs nothing else: no network, no script, no font.

    Raises:
        RunError: a figure is damaged.
    """
    environment = page_environment()
    environment.filters["header_groups"] = _header_groups
    return environment.get_template("page.html.jinja").render(
        report=report,
        models=list(dict.fromkeys(table.model for table in report.tables)),
        facts=_facts(report),
        pictures=list(pictures),
        tables=sweep_tables,
        scores_caption=SCORES_CAPTION,
        work_caption=WORK_CAPTION,
    )


def _facts(report: Report) -> dict[str, str]:
    """What stands at the head of the page."""
    lines = [line for table in report.tables for line in table.lines]
    return {
        "models": ", ".join(dict.fromkeys(table.model for table in report.tables)),
        "experiments": ", ".join(dict.fromkeys(table.experiment for table in report.tables)),
        "cells with results": f"{sum(len(line.tasks) for line in lines)} of {report.n_cells}",
        "failed": str(len(report.failures)),
        "run": " to ".join(sweep_tables.days(report.recipe)) or "not yet",
    }


def _draw(report: Report, folder: Path) -> list[Picture]:
    """Draws the sweep's own figures into its folder."""
    drawn: list[Picture] = []

    def keep(name: str, picture: bytes | None, caption: str) -> None:
        if picture is not None:
            write_bytes(folder / name, picture)
            drawn.append(Picture(folder / name, caption))

    for model, tables in groupby(report.tables, lambda table: table.model):
        caption = f"Quality of {model} against the share of skipped sublayers, by budget"
        keep(f"quality-{model}.png", draw_quality([*tables]), caption)
    scores = draw_scores(report.tables)
    keep("report.png", scores, "Scores (one standard error) and perplexity by task")
    return drawn


def _found(report: Report, results: Path) -> list[Picture]:
    """The observation and speed figures of the report's models, in order of name."""
    models = {table.model for table in report.tables}
    return [
        Picture(path, f"{_heading(path.with_suffix('.md'))} ({path.stem})")
        for folder in _OTHERS
        for path in sorted((results / folder).glob("*.png"))
        if any(model in path.stem for model in models)
    ]


def _heading(text: Path) -> str:
    """The heading of a markdown file; without one its name."""
    if text.is_file():
        for line in text.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("#"):
                return line.lstrip("# ").strip()
    return text.stem.replace("-", " ").replace("_", " ")


def _header_groups(frame: DataFrame) -> Sequence[tuple[str, int]]:
    """The names above a frame's columns and how many columns each spans; empty without any."""
    if frame.columns.nlevels == 1:
        return []
    names = frame.columns.get_level_values(0)
    return [(name, len([*columns])) for name, columns in groupby(names)]
