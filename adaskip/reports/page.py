"""The report as one HTML page that needs nothing else: no network, no script, no font."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from adaskip.reports.page_style import STYLE
from adaskip.reports.paper_tables import Column, Grid, quality_grid, speed_grid
from adaskip.reports.pictures import Picture
from adaskip.reports.recipe import machines_grid, period, profiles, prompts_grid, settings_grid

if TYPE_CHECKING:
    from adaskip.reports.comparison import Table
    from adaskip.reports.sweep_report import Report

# Nothing may be fetched, whatever a task or an error message holds.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
PAPER = "AdaSkip: Adaptive Sublayer Skipping, AAAI 2025, arXiv 2501.02336"


def as_page(report: Report, figure: Path) -> str:
    """The whole page.

    Args:
        report: what it shows.
        figure: the PNG of scores, if it was drawn.

    Raises:
        RunError: a figure is damaged.
    """
    sections = [_model(report, model) for model in report.plan.models]
    sections += [_figures(report, figure), _recipe(report), _notes(report)]
    links = [*report.plan.models, "figures", "recipe", "notes"]
    navigation = "".join(f'<a href="#{_id(name)}">{escape(name)}</a>' for name in links)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f"<title>{escape(report.plan.name)} – adaskip</title><style>{STYLE}</style></head><body>"
        f"{_header(report)}<nav>{navigation}</nav><main>{''.join(sections)}</main>"
        f"<footer>Method: {PAPER}. Written by adaskip.</footer></body></html>"
    )


def _header(report: Report) -> str:
    plan = report.plan
    cells = sum(len(line.scores) for table in report.tables for line in table.lines)
    asked = sum(len(cell.experiments) for cell in plan.cells)
    days = period(report.recipe)
    facts = {
        "models": ", ".join(plan.models),
        "experiments": ", ".join(plan.experiments),
        "cells with results": f"{cells} of {asked}",
        "failed": str(len(report.failures)),
        "run": " to ".join(dict.fromkeys(days)) if days else "not yet",
    }
    cards = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>"
        for name, value in facts.items()
    )
    return f"<header><p>adaskip report</p><h1>{escape(plan.name)}</h1><dl>{cards}</dl></header>"


def _model(report: Report, model: str) -> str:
    from adaskip.reports.sweep_report import CAPTION, SPEED_CAPTION

    parts = [
        f'<section id="{_id(model)}"><h2>{escape(model)}</h2><p>{escape(CAPTION)} '
        "Bold: the best policy at the same share of skipped sublayers.</p>"
    ]
    if model in report.tradeoffs:
        parts.append(_drawing(report.tradeoffs[model], model))
    for table in report.tables_of(model):
        parts.append(f"<h3>{escape(table.experiment)}</h3>{_tables(table)}")
    parts.append(f"<p>{escape(SPEED_CAPTION)}</p></section>")
    return "".join(parts)


def _tables(table: Table) -> str:
    if not table.lines:
        return "<p>No results yet.</p>"
    policies = [line.policy for line in table.lines]
    name = f"{table.experiment}, {table.model}"
    return as_table(quality_grid(table), f"Quality: {name}", policies) + as_table(
        speed_grid(table), f"Skipped and speed: {name}", policies
    )


def as_table(grid: Grid, caption: str, groups: Sequence[str] | None = None) -> str:
    """A table that scrolls within itself where the screen is narrow.

    Args:
        grid: its cells.
        caption: its title.
        groups: of each row the group it belongs to; a rule separates them.
    """
    head = "".join(f"<th{_class(c)}>{escape(c.title)}</th>" for c in grid.columns)
    spans = ""
    if any(column.group for column in grid.columns):
        grouped = [(name, len([*found])) for name, found in groupby(grid.columns, _group_of)]
        spans = "".join(
            f'<th colspan="{n}"{_named("edge", bool(name))}>{escape(name)}</th>'
            for name, n in grouped
        )
        spans = f'<tr class="groups">{spans}</tr>'
    rows = []
    for index, row in enumerate(grid.rows):
        first = groups is not None and index > 0 and groups[index] != groups[index - 1]
        cells = "".join(
            f"<{tag}{_class(column)}>{_bold(text, (index, place) in grid.best)}</{tag}>"
            for place, (column, text) in enumerate(zip(grid.columns, row, strict=True))
            for tag in ["td" if place else "th"]
        )
        rows.append(f"<tr{_named('first', first)}>{cells}</tr>")
    return (
        f'<figure class="scroll" tabindex="0" role="region" aria-label="{escape(caption)}"><table>'
        f"<caption>{escape(caption)}</caption><thead>{spans}<tr>{head}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table></figure>"
    )


def _figures(report: Report, figure: Path) -> str:
    pictures = list(report.pictures)
    if figure.is_file():
        pictures.insert(0, Picture(figure, "Scores (one standard error) and perplexity by task"))
    shown = "".join(
        f'<figure class="picture"><img alt="{escape(item.caption)}" src="{item.data_uri()}">'
        f"<figcaption>{escape(item.caption)}</figcaption></figure>"
        for item in pictures
    )
    return f'<section id="figures"><h2>Figures</h2>{shown or "<p>None yet.</p>"}</section>'


def _drawing(drawing: str, model: str) -> str:
    caption = f"Quality against speed of {model}; the number is the budget, dashed is dense."
    return (
        f'<figure class="scroll drawing" tabindex="0">{drawing}'
        f"<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _recipe(report: Report) -> str:
    used = ", ".join(profiles(report.recipe))
    profile = f"<p>Importance profiles: {escape(used)}.</p>" if used else ""
    return (
        f'<section id="recipe"><h2>Recipe</h2>{as_table(prompts_grid(report.recipe), "Prompts")}'
        f"{profile}{as_table(machines_grid(report.recipe), 'Versions and hardware')}"
        f"{as_table(settings_grid(report.recipe), 'Settings')}</section>"
    )


def _notes(report: Report) -> str:
    items = "".join(
        f"<li{_named('failed', note.startswith('FAILED'))}>{escape(note)}</li>"
        for note in report.notes()
    )
    listed = f"<ul>{items}</ul>" if items else "<p>Nothing to add.</p>"
    return f'<section id="notes"><h2>Notes</h2>{listed}</section>'


def _group_of(column: Column) -> str:
    return column.group


def _named(name: str, wanted: bool) -> str:
    return f' class="{name}"' if wanted else ""


def _class(column: Column) -> str:
    kinds = ["text"] * column.is_text + ["edge"] * (column.title == "score")
    return f' class="{" ".join(kinds)}"' if kinds else ""


def _bold(text: str, is_best: bool) -> str:
    return f"<b>{escape(text)}</b>" if is_best else escape(text)


def _id(name: str) -> str:
    return "".join(char if char.isalnum() else "-" for char in name.lower())
