"""Several models on the same axes: absolute times, losses per character."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean

from adaskip.leaderboard.values import BASE, Report, Table
from adaskip.runs.runconfig import DENSE


@dataclass(frozen=True)
class Axis:
    """A model's plan on axes that models share.

    Attributes:
        model: its name.
        plan: method and acceleration, or "dense".
        method: the method alone.
        seconds: to the first token.
        nats: per character of the references that all models have.
        prompt: characters of a prompt, mean.
    """

    model: str
    plan: str
    method: str
    seconds: float
    nats: float
    prompt: float | None


def same_axes(report: Report) -> dict[int, list[Axis]]:
    """By context length: dense, AdaSkip and the searched plan of each model; of two or more."""
    found: dict[int, list[Axis]] = {}
    tables = sorted(report.tables, key=lambda table: table.context)
    for context, group in groupby(tables, key=lambda table: table.context):
        timed = [
            table
            for table in group
            if table.seconds is not None
            and all(row.characters for row in table.references.values())
        ]
        common = set.intersection(*(set(table.references) for table in timed)) if timed else set()
        if len(timed) > 1 and common:
            found[context] = [axis for table in timed for axis in _axes(table, sorted(common))]
    return found


def _axes(table: Table, rows: Sequence[str]) -> list[Axis]:
    references = [table.references[name] for name in rows]
    characters = sum(row.characters or 0 for row in references)
    lengths = [row.prompt_characters for row in references if row.prompt_characters is not None]
    prompt = fmean(lengths) if lengths else None

    def axis(plan: str, method: str, seconds: float | None, gaps: Mapping[str, float]) -> Axis:
        nll = sum(row.nll + gaps.get(name, 0.0) * row.tokens for name, row in pairs)
        return Axis(table.model, plan, method, seconds or 0.0, nll / characters, prompt)

    pairs = list(zip(rows, references, strict=True))
    shown = (e for e in table.entries if e.method in (BASE, table.search))
    return [axis(DENSE, DENSE, table.seconds, {})] + [
        axis(f"{e.method} {e.asked:g}", e.method, e.seconds, e.by_row)
        for e in shown
        if e.seconds is not None
    ]
