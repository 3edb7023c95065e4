"""Quality against speed as an SVG drawing: one per model, a column per experiment, no library."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

from adaskip.reports.palette import ON_DARK, ON_LIGHT, policy_number
from adaskip.runs.runconfig import DENSE

if TYPE_CHECKING:
    from adaskip.reports.comparison import Line, Table

WIDTH, HEIGHT = 340, 250
LEFT, RIGHT, TOP, BOTTOM = 56, 16, 30, 56
LEGEND = 34
# Prefill decides the time to the first token, decoding that of the others.
SPEEDS = {
    "prefill": ("ttft", "speedup of the time to the first token"),
    "decode": ("per_token", "speedup of the time per token"),
    "e2e": ("per_token", "speedup of the time per token"),
}
# They serve those who tell no colours apart.
SHAPES = ("circle", "square", "diamond", "triangle", "circle", "square")
STYLE = (
    "svg.tradeoff{--ink:#1c2430;--faint:#c9d1dc;font:12px system-ui,sans-serif}"
    "svg.tradeoff text{fill:var(--ink)}"
    ".axis{stroke:var(--faint);fill:none}.base{stroke:var(--ink);stroke-dasharray:5 4;fill:none}"
    + "".join(f".p{i}{{fill:{c};stroke:{c}}}" for i, c in enumerate(ON_LIGHT))
    + ".trail{fill:none;stroke-width:1.5;opacity:.55}"
    "@media (prefers-color-scheme:dark){svg.tradeoff{--ink:#e4e9f0;--faint:#465063}"
    + "".join(f".p{i}{{fill:{c};stroke:{c}}}" for i, c in enumerate(ON_DARK))
    + "}"
)


@dataclass(frozen=True)
class Scale:
    """From a value to a place between two ends; logarithmic and upside down where asked."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The place of a value."""
        low, high, own = (
            (math.log(v) if self.log else v) for v in (self.low, self.high, max(value, 1e-9))
        )
        return self.start + (self.end - self.start) * (own - low) / (high - low)

    def ticks(self) -> list[float]:
        """A few round values within the range."""
        if self.log:
            powers = range(math.ceil(math.log10(self.low)), math.floor(math.log10(self.high)) + 1)
            if len(powers) > 1:
                return [10.0**power for power in powers]
        raw = (self.high - self.low) / 4
        unit = 10.0 ** math.floor(math.log10(raw))
        step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= raw)
        first = math.ceil(self.low / step)
        return [k * step for k in range(first, math.floor(self.high / step + 1e-9) + 1)]


def mean_score(line: Line, tasks: Sequence[str]) -> float | None:
    """Mean score over all tasks of a table; None unless the line has all of them."""
    if any(task not in line.scores for task in tasks):
        return None
    return statistics.fmean(line.scores[task].score for task in tasks)


def mean_perplexity(line: Line, tasks: Sequence[str]) -> float | None:
    """Geometric mean of the references' perplexity; None unless the line has all of them."""
    if any(task not in line.perplexity for task in tasks):
        return None
    return statistics.geometric_mean(line.perplexity[task] for task in tasks)


def draw_tradeoff(tables: Sequence[Table]) -> str | None:
    """The drawing of one model's tables, as the text of an SVG file; None if there is no point."""
    tables = [table for table in tables if table.dense and len(table.lines) > 1]
    if not tables:
        return None
    rows: list[tuple[str, Callable[[Line, Sequence[str]], float | None], bool]] = [
        ("mean score × 100", mean_score, False)
    ]
    if any(line.perplexity for table in tables for line in table.lines):
        rows.append(("perplexity (up is better)", mean_perplexity, True))
    policies = list(dict.fromkeys(line.policy for t in tables for line in t.lines))
    policies = [policy for policy in policies if policy != DENSE]
    parts = [_legend(policies)]
    for column, table in enumerate(tables):
        for row, (title, value, is_log) in enumerate(rows):
            inner = _panel(table, policies, title, value, is_log)
            place = f"translate({column * WIDTH},{LEGEND + row * HEIGHT})"
            parts.append(f'<g transform="{place}">{inner}</g>')
    width, height = len(tables) * WIDTH, LEGEND + len(rows) * HEIGHT
    name = f"Quality against speed of {tables[0].model}"
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="tradeoff" role="img" '
        f'viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'aria-label="{escape(name)}"><title>{escape(name)}</title><style>{STYLE}</style>'
        f"{''.join(parts)}</svg>"
    )


def _panel(
    table: Table,
    policies: Sequence[str],
    title: str,
    value: Callable[[Line, Sequence[str]], float | None],
    is_log: bool,
) -> str:
    what, axis = SPEEDS[table.experiment]
    found = [
        (line, 1.0 if line is table.dense else line.speedup(table.dense, what), value(line, tasks))
        for tasks in [table.tasks]
        for line in table.lines
    ]
    points = [(line, x, y) for line, x, y in found if x is not None and y is not None]
    if not points:
        return _text(WIDTH / 2, HEIGHT / 2, "nothing measured")
    xs, ys = [x for _, x, _ in points], [y for _, _, y in points]
    low, high = _room(ys, is_log)
    bottom, top = HEIGHT - BOTTOM, TOP
    across = Scale(*_room([*xs, 1.0]), LEFT, WIDTH - RIGHT)
    up = Scale(low, high, *((top, bottom) if is_log else (bottom, top)), log=is_log)
    parts = [_axes(across, up, f"{table.experiment}: {title}", axis)]
    for line, _, y in points:
        if line.policy == DENSE:
            parts.append(f'<path class="base" d="M{LEFT} {up(y):.1f}H{WIDTH - RIGHT}"/>')
            parts.append(_text(WIDTH - RIGHT, up(y) - 4, DENSE, "end"))
    for policy in policies:
        own = [(line, across(x), up(y)) for line, x, y in points if line.policy == policy]
        path = "L".join(f"{x:.1f} {y:.1f}" for _, x, y in own)
        if len(own) > 1:
            parts.append(f'<path class="trail p{policy_number(policy)}" d="M{path}"/>')
        for line, x, y in own:
            parts.append(_mark(policy, x, y, line.label))
            parts.append(_text(x + 8, y + 4, str(line.budget)))
    return "".join(parts)


def _room(values: Sequence[float], log: bool = False) -> tuple[float, float]:
    """The range of the values with some room around it."""
    low, high = min(values), max(values)
    if log:
        factor = max((high / low) ** 0.15, 1.2)
        return low / factor, high * factor
    margin = 0.12 * (high - low) or 0.1 * abs(high) or 1.0
    return (0.0 if 0 <= low < margin else low - margin), high + margin


def _axes(across: Scale, up: Scale, title: str, label: str) -> str:
    bottom = HEIGHT - BOTTOM
    parts = [_text(LEFT, TOP - 10, title)]
    for tick in up.ticks():
        parts.append(f'<path class="axis" d="M{LEFT} {up(tick):.1f}H{WIDTH - RIGHT}"/>')
        parts.append(_text(LEFT - 6, up(tick) + 4, f"{tick:,g}", "end"))
    for tick in across.ticks():
        parts.append(_text(across(tick), bottom + 16, f"{tick:g}", "middle"))
    parts.append(f'<path class="axis" d="M{across(1.0):.1f} {TOP}V{bottom}"/>')
    parts.append(_text((LEFT + WIDTH - RIGHT) / 2, HEIGHT - 22, label, "middle"))
    return "".join(parts)


def _legend(policies: Sequence[str]) -> str:
    parts = []
    for index, policy in enumerate(policies):
        x = LEFT + 70 * index
        parts.append(_mark(policy, x, 14, policy) + _text(x + 10, 18, policy))
    return "".join(parts)


def _mark(policy: str, x: float, y: float, label: str) -> str:
    """A marker of the policy's colour and shape, named by its tooltip."""
    number = policy_number(policy)
    shape = SHAPES[number % len(SHAPES)]
    outline = {
        "square": "M-4.5-4.5h9v9h-9z",
        "diamond": "M0-6 6 0 0 6-6 0z",
        "triangle": "M0-6 6 5H-6z",
        "circle": "M-5 0a5 5 0 1 0 10 0a5 5 0 1 0-10 0z",
    }[shape]
    place = f"translate({x:.1f},{y:.1f})"
    title = f"<title>{escape(label)}</title>"
    return f'<path class="p{number}" transform="{place}" d="{outline}">{title}</path>'


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'
