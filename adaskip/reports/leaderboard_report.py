"""The report of a leaderboard: one JSON file, and the text, page and figures made from it."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePath
from typing import Any

from adaskip.leaderboard.axes import same_axes
from adaskip.leaderboard.board import Board
from adaskip.leaderboard.collecting import collect
from adaskip.leaderboard.settings import LeaderboardFile
from adaskip.leaderboard.values import BASE, REPORT_FILE, Report, Table, read_report
from adaskip.reports import leaderboard_tables as tables
from adaskip.reports.leaderboard_figures import draw_axes, draw_front
from adaskip.reports.pages import page_environment
from adaskip.runs.files import write_bytes, write_text

PAGE, TEXT, TEMPLATE, SCRIPT = (
    "index.html",
    "report.md",
    "leaderboard.html.jinja",
    "leaderboard.js",
)
# What tables say of where times were taken.
_FACTS = ("device", "threads", "torch", "transformers", "python", "adaskip", "commit")


@dataclass(frozen=True)
class Picture:
    """A figure and what to write beneath it."""

    path: Path
    caption: str


def write_report(
    file: LeaderboardFile, boards: Iterable[Board], folder: Path, *, config: str
) -> str:
    """Writes `report.json` of what exists, and all that is made from it; returns the text.

    Args:
        file: what is compared.
        boards: of the file.
        folder: gets the report.
        config: the name of the file.

    Raises:
        RunError: a file is damaged or cannot be written.
    """
    replace(collect(file, boards), config=config).save(folder / REPORT_FILE)
    return render(folder)


def render(folder: Path) -> str:
    """Writes text, page and figures of a folder with a `report.json`; returns the text.

    Raises:
        RunError: a file is missing, damaged or cannot be written.
    """
    report = read_report(folder / REPORT_FILE)
    text = tables.as_text(report)
    pictures = _draw(report, folder)
    shown = [f"![{one.caption}]({one.path.name})" for one in pictures]
    write_text(folder / TEXT, "\n\n".join([text, *shown]) + "\n")
    write_text(folder / PAGE, page_of(report, pictures) + "\n")
    return f"{text}\n\nWritten: {folder}/{PAGE}, {TEXT}, {REPORT_FILE} and figures."


def page_of(report: Report, pictures: Iterable[Picture]) -> str:
    """One HTML page that needs nothing else; its script, which sorts and filters, is in it."""
    environment = page_environment()
    script = environment.get_template(SCRIPT).render()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template(TEMPLATE).render(
        report=report,
        script=script,
        script_hash=f"sha256-{digest}",
        pictures=list(pictures),
        tables=tables,
        base=BASE,
        contexts=sorted({table.context for table in report.tables}),
        tasks=list(dict.fromkeys(task for table in report.tables for task in table.tasks)),
        axes=same_axes(report),
        machines=_machines(report.tables),
        facts=_facts(report),
    )


def _facts(report: Report) -> dict[str, str]:
    """What stands at the head of the page."""
    n_plans = sum(len(table.entries) for table in report.tables)
    contexts = sorted({table.context for table in report.tables})
    return {
        "models": ", ".join(report.models) or "none yet",
        "tokens of a prompt": ", ".join(f"{context:,}" for context in contexts) or "–",
        "plans": str(n_plans),
        "references": report.task,
    }


def _machines(of: Iterable[Table]) -> dict[str, Mapping[str, Any]]:
    """Versions and hardware behind the times, by model and context length."""
    return {
        f"{table.model}, {table.context:,} tokens": {
            name: table.environment[name] for name in _FACTS if table.environment.get(name)
        }
        for table in of
        if table.environment
    }


def _draw(report: Report, folder: Path) -> list[Picture]:
    """Draws all figures into the folder; those of earlier reports are removed."""
    for path in folder.glob("pareto-*.png"):
        path.unlink()
    drawn = []

    def keep(name: str, picture: bytes, caption: str) -> None:
        write_bytes(folder / name, picture)
        drawn.append(Picture(folder / name, caption))

    for table in report.tables:
        if table.entries:
            name = f"pareto-{PurePath(table.model).name}-{table.context}.png"
            caption = f"{table.model}, {table.context:,} tokens: quality lost against time "
            caption += (
                f"{tables.kind_of(table)}; hollow: beaten by another plan of the method or dense"
            )
            keep(name, draw_front(table, report.methods), caption)
    for context, axes in same_axes(report).items():
        caption = f"Models on the same axes, {context:,} tokens; seconds of each are of its own "
        caption += "sitting, and days differ in speed"
        keep(f"pareto-models-{context}.png", draw_axes(axes, report.methods), caption)
    return drawn
