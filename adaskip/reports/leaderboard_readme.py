"""README's table of a leaderboard, between two marks."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from adaskip.errors import AdaskipError
from adaskip.leaderboard.comparing import at_speed, beside
from adaskip.leaderboard.values import BASE, Report, Table, is_rival
from adaskip.profiling.intervals import paired_interval
from adaskip.reports.leaderboard_tables import NAMES, bracketed, percent_of
from adaskip.tables import MISSING, markdown_table

BEGIN, END = "<!-- leaderboard -->", "<!-- /leaderboard -->"


def readme_table(report: Report) -> str:
    """README's table: at one measured acceleration per model and context length."""
    header = ["model", "tokens", "speed", "dense perplexity", NAMES[BASE], "best of the field"]
    header += ["`search_plan`", f"of {NAMES[BASE]}'s gap"]
    return markdown_table(header, [row for t in report.tables for row in _readme_rows(t)])


def _readme_rows(table: Table) -> list[list[str]]:
    speed, search = table.headline, table.search
    gaps = {name: at_speed(table.entries, name, speed) for name in table.methods}
    reached = {name: gap for name, gap in gaps.items() if gap is not None}
    field = {name: gap for name, gap in reached.items() if name != BASE and is_rival(name)}
    best = min(field, key=lambda name: fmean(field[name].values()), default=None)
    if not reached or not any(entry.ttft for entry in table.entries):
        return []
    own, base = reached.get(search or ""), reached.get(BASE)
    share = beside(own, base) if own and base else None
    return [
        [
            table.model,
            f"{table.context:,}",
            f"{speed:g} x",
            f"{table.perplexity:.2f}",
            _cell(base),
            MISSING if best is None else f"{best} {_cell(field[best])}",
            _cell(own),
            MISSING if share is None else percent_of(share.share, share.share_interval),
        ]
    ]


def _cell(gaps: Mapping[str, float] | None) -> str:
    if gaps is None:
        return MISSING
    interval = paired_interval(gaps, dict.fromkeys(gaps, 0.0))
    return f"{fmean(gaps.values()):.3f} {bracketed(interval)}"


def check_marks(readme: str) -> None:
    """Raises an `AdaskipError` if a text has no place for the table."""
    if END not in readme.partition(BEGIN)[2]:
        raise AdaskipError(f"The file has no place for the table: put {BEGIN} and {END} into it.")


def with_table(readme: str, report: Report) -> str:
    """README's text with the table between its marks made of a report.

    Raises:
        AdaskipError: it has no marks.
    """
    check_marks(readme)
    head, _, rest = readme.partition(BEGIN)
    tail = rest.partition(END)[2]
    return f"{head}{BEGIN}\n\n{readme_table(report)}\n\n{END}{tail}"
