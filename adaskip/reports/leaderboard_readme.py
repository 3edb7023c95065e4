"""README's table of a leaderboard, between two marks."""

from __future__ import annotations

from statistics import fmean

from adaskip.errors import AdaskipError
from adaskip.leaderboard.comparing import at_speed
from adaskip.leaderboard.draws import Draws
from adaskip.leaderboard.values import BASE, Report, Table, is_rival
from adaskip.reports.leaderboard_tables import NAMES, bracketed, percent_of
from adaskip.tables import MISSING, markdown_table

BEGIN, END = "<!-- leaderboard -->", "<!-- /leaderboard -->"


def readme_table(report: Report) -> str:
    """README's table: at one measured acceleration per model and context length."""
    header = ["model", "tokens", "speed", "dense perplexity", NAMES[BASE], "best of the field"]
    header += ["`search_plan`", f"of {NAMES[BASE]}'s gap"]
    return markdown_table(header, [row for t in report.tables for row in _readme_rows(t)])


def _readme_rows(table: Table) -> list[list[str]]:
    speed, search, draws = table.headline, table.search or "", Draws(table.entries)
    gaps = {name: at_speed(table.entries, name, speed) for name in table.methods}
    reached = {name: fmean(gap.values()) for name, gap in gaps.items() if gap is not None}
    field = {name: gap for name, gap in reached.items() if name != BASE and is_rival(name)}
    best = min(field, key=lambda name: field[name], default=None)
    if not reached or not any(entry.ttft for entry in table.entries):
        return []

    def cell(method: str) -> str:
        if method not in reached:
            return MISSING
        return f"{reached[method]:.3f} {bracketed(draws.interval_at(method, speed))}"

    found = draws.at_equal_speed(search, BASE, speed)
    return [
        [
            table.model,
            f"{table.context:,}",
            f"{speed:g} x",
            f"{table.perplexity:.2f}",
            cell(BASE),
            MISSING if best is None else f"{best} {cell(best)}",
            cell(search),
            MISSING if found is None else percent_of(found.share, found.share_interval),
        ]
    ]


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
