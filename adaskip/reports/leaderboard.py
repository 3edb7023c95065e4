"""A leaderboard's tables and figure: quality lost against time measured, dense at 1 and 0."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from adaskip.leaderboard.board import Board, LossRow, TimesRow
from adaskip.profiling.interleaving import Ratio
from adaskip.profiling.intervals import bootstrap, paired_interval
from adaskip.reports.figures import COLOURS, MARKERS, add_legend, as_png, canvas
from adaskip.runs.files import write_bytes, write_json, write_text
from adaskip.runs.runconfig import DENSE
from adaskip.tables import markdown_table, number

# What each method is compared with at equal time.
BASE = "ADA"
# A gap above this is a collapse: the references are e times less likely per token.
COLLAPSE = 1.0


@dataclass(frozen=True)
class Entry:
    """A method's plan at one context length.

    Attributes:
        method: its name.
        asked: the acceleration it was asked for, by predicted time.
        predicted: what was predicted of the plan.
        ttft: measured ratio of dense to its time to first token; None before times were taken.
        per_token: likewise of its time per token.
        kv_share: of the dense keys and values.
        gap: nats per reference token that it loses to dense.
        interval: of the gap, 95 %, paired bootstrap over rows.
        by_row: the gap of each row.
    """

    method: str
    asked: float
    predicted: float
    ttft: Ratio | None
    per_token: Ratio | None
    kv_share: float | None
    gap: float
    interval: tuple[float, float] | None
    by_row: Mapping[str, float]

    @property
    def speed(self) -> float:
        """The measured acceleration of prefill, or the predicted one."""
        return self.predicted if self.ttft is None else self.ttft.median


@dataclass(frozen=True)
class Table:
    """What is known at one context length.

    Attributes:
        context: prompt tokens.
        perplexity: of the references under the dense model.
        n_rows: references.
        entries: in the file's order.
        missing: points without a plan, and why.
        environment: in which times were taken.
    """

    context: int
    perplexity: float
    n_rows: int
    entries: tuple[Entry, ...]
    missing: Mapping[str, str]
    environment: Mapping[str, Any]


def collect(board: Board) -> Table | None:
    """What a board has; None before the dense losses are there."""
    losses = {row.id: row for row in board.losses.rows()}
    if DENSE not in losses:
        return None
    times = {row.id: row for row in board.times.rows()}
    dense = _by_token(losses[DENSE])
    made = {row.id: row for row in board.plans.rows()}
    entries = []
    for point in board.file.points(board.context):
        row = made.get(point.name)
        if row is None or row.error is not None or point.name not in losses:
            continue
        own = _by_token(losses[point.name])
        ratio = _ratios(times, point.name)
        entries.append(
            Entry(
                point.method,
                point.acceleration,
                float(row.about["predicted acceleration"]),
                *ratio,
                _share(times, point.name),
                _gap(losses[point.name], losses[DENSE]),
                paired_interval(own, dense),
                {name: own[name] - dense[name] for name in own},
            )
        )
    nll, tokens = _sums(losses[DENSE])
    missing = {row.id: row.error for row in made.values() if row.error is not None}
    about = board.times.record().get("environment", {})
    return Table(board.context, math.exp(nll / tokens), len(dense), tuple(entries), missing, about)


def write_report(boards: Sequence[Board]) -> str:
    """Writes `report.json`, `report.md` and `report.png` of what exists; returns the text."""
    tables = [table for table in map(collect, boards) if table is not None]
    folder = boards[0].folder
    text = "\n\n".join([_head(boards[0]), *map(_as_text, tables)])
    write_json(folder / "report.json", {"tables": [_as_json(table) for table in tables]})
    write_text(folder / "report.md", text + "\n")
    if tables:
        write_bytes(folder / "report.png", draw(tables))
    return f"{text}\n\nWritten: {folder}/report.md, report.json, report.png."


def at_speed(entries: Sequence[Entry], method: str, speed: float) -> dict[str, float] | None:
    """The gaps by row of a method at a measured acceleration, between its plans on both sides.

    Linear in the acceleration from plan to plan, the dense model being one; None beyond the
    fastest plan.
    """
    own = sorted((e for e in entries if e.method == method), key=lambda e: e.speed)
    if not own or own[-1].speed < speed:
        return None
    above = next(e for e in own if e.speed >= speed)
    below = [e for e in own if e.speed < speed]
    low = below[-1].by_row if below else dict.fromkeys(above.by_row, 0.0)
    start = below[-1].speed if below else 1.0
    share = (speed - start) / (above.speed - start) if above.speed > start else 1.0
    return {name: low[name] + share * (gap - low[name]) for name, gap in above.by_row.items()}


def _by_token(row: LossRow) -> dict[str, float]:
    return {name: nll / tokens for name, (nll, tokens) in row.rows.items()}


def _sums(row: LossRow) -> tuple[float, float]:
    values = row.rows.values()
    return math.fsum(nll for nll, _ in values), sum(tokens for _, tokens in values)


def _gap(own: LossRow, dense: LossRow) -> float:
    return _sums(own)[0] / _sums(own)[1] - _sums(dense)[0] / _sums(dense)[1]


def _ratios(times: Mapping[str, TimesRow], name: str) -> tuple[Ratio | None, Ratio | None]:
    if name not in times or DENSE not in times:
        return None, None
    own, dense = times[name], times[DENSE]
    return Ratio.paired(dense.ttft, own.ttft), Ratio.paired(dense.per_token, own.per_token)


def _share(times: Mapping[str, TimesRow], name: str) -> float | None:
    if name not in times or DENSE not in times:
        return None
    return times[name].kv_bytes / times[DENSE].kv_bytes


def _head(board: Board) -> str:
    file = board.file
    return (
        f"# Leaderboard: {file.model}\n\nPerplexity of references of {file.task} "
        f"({file.reference_tokens} tokens of each reference), against the "
        "measured time to first token, interleaved with the dense model. Calibration: "
        f"{file.calibration_rows} rows of other documents, {file.calibration_tokens} tokens. Gap: "
        "nats per token lost to dense, with a paired 95 % bootstrap interval over rows."
    )


def _as_text(table: Table) -> str:
    header = ["method", "asked", "predicted", "x TTFT", "x per token", "KV", "gap", "interval"]
    rows = []
    for e in table.entries:
        interval = "–" if e.interval is None else "{:.3f} to {:.3f}".format(*e.interval)
        rows.append(
            [
                e.method + (" (collapsed)" if e.gap > COLLAPSE else ""),
                number(e.asked),
                number(e.predicted, 3),
                "–" if e.ttft is None else e.ttft.text(3),
                "–" if e.per_token is None else e.per_token.text(3),
                number(e.kv_share),
                number(e.gap, 3, signed=True),
                interval,
            ]
        )
    parts = [
        f"## {table.context} tokens\n\nDense perplexity {table.perplexity:.2f} over "
        f"{table.n_rows} rows.{_where(table)}",
        markdown_table(header, rows),
        _equal_time(table),
    ]
    parts += [f"- {name}: {why}" for name, why in table.missing.items()]
    return "\n\n".join(parts)


def _where(table: Table) -> str:
    about = table.environment
    if not about:
        return " Times: predicted ones, none were measured yet."
    return f" Times: {about['device']}, {about['threads']} threads, torch {about['torch']}."


def _equal_time(table: Table) -> str:
    """Each method at the accelerations asked for, as measured, beside AdaSkip."""
    speeds = sorted({entry.asked for entry in table.entries})
    methods = list(dict.fromkeys(entry.method for entry in table.entries))
    rows = []
    for method in methods:
        cells = []
        for speed in speeds:
            own = at_speed(table.entries, method, speed)
            cells.append("–" if own is None else _compared(table, own, method, speed))
        rows.append([method, *cells])
    title = f"At equal measured time: gap, and its share of {BASE}'s gap"
    return f"{title}\n\n" + markdown_table(["method", *(f"x {s:g}" for s in speeds)], rows)


def _compared(table: Table, own: Mapping[str, float], method: str, speed: float) -> str:
    gap = sum(own.values()) / len(own)
    base = at_speed(table.entries, BASE, speed)
    if base is None or method == BASE:
        return f"{gap:.3f}"
    low, high = _share_interval(own, base)
    share = sum(own.values()) / sum(base.values())
    return f"{gap:.3f}, {share:.0%} [{low:.0%}–{high:.0%}]"


def _share_interval(own: Mapping[str, float], base: Mapping[str, float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of a ratio of sums over rows, drawn as pairs."""
    pairs = [(own[name], base[name]) for name in base]
    return bootstrap(pairs, lambda drawn: drawn[..., 0].sum(axis=1) / drawn[..., 1].sum(axis=1))


def draw(tables: Sequence[Table]) -> bytes:
    """One panel per context length: gap against measured acceleration, a line per method; PNG."""
    figure, panels = canvas(1, len(tables), width=4.2 * len(tables), height=4.4, sharey="row")
    methods = list(dict.fromkeys(e.method for table in tables for e in table.entries))
    for table, panel in zip(tables, panels[0], strict=True):
        for index, method in enumerate(methods):
            own = sorted((e for e in table.entries if e.method == method), key=lambda e: e.speed)
            if own:
                panel.plot(
                    [1.0, *(e.speed for e in own)],
                    [0.0, *(e.gap for e in own)],
                    color=COLOURS[index % len(COLOURS)],
                    marker=MARKERS[(index + index // len(COLOURS)) % len(MARKERS)],
                    linestyle="-" if method.startswith("SEARCH") else ":",
                    label=method,
                )
        panel.set_title(f"{table.context} tokens")
        panel.set_xlabel("time to first token, x faster than dense")
        panel.set_yscale("symlog", linthresh=0.1)
        panel.set_ylim(bottom=-0.05)
        panel.axhline(0, color="0.8", linewidth=0.8)
    panels[0][0].set_ylabel("nats per token lost to dense")
    add_legend(figure, panels)
    return as_png(figure)


def _as_json(table: Table) -> dict[str, Any]:
    def ratio(value: Ratio | None) -> list[float] | None:
        return None if value is None else [value.median, value.low, value.high]

    return {
        "context": table.context,
        "dense perplexity": table.perplexity,
        "rows": table.n_rows,
        "environment": dict(table.environment),
        "missing": dict(table.missing),
        "entries": [
            {
                "method": e.method,
                "asked": e.asked,
                "predicted": e.predicted,
                "ttft": ratio(e.ttft),
                "per_token": ratio(e.per_token),
                "kv_share": e.kv_share,
                "gap": e.gap,
                "interval": e.interval,
                "by_row": dict(e.by_row),
            }
            for e in table.entries
        ],
    }
