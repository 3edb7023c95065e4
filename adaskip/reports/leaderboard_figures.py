"""Figures of a leaderboard: quality lost against time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from adaskip.leaderboard.axes import Axis
from adaskip.leaderboard.comparing import unbeaten
from adaskip.leaderboard.values import Table
from adaskip.reports.figures import COLOURS, MARKERS, as_png, canvas
from adaskip.runs.runconfig import DENSE

# Points of a line from one plan to the next.
_STEPS = 40


def draw_front(table: Table, methods: Sequence[str]) -> bytes:
    """Gap against acceleration, a line per method, dense at 1 and 0; PNG.

    What no other plan beats is joined by a broad line.

    Args:
        table: of a model and context length.
        methods: of all tables: one has the same look in every figure.
    """
    figure, panels = canvas(1, 1, width=9, height=5)
    panel = panels[0][0]
    front = sorted([(1.0, 0.0), *((e.speed, e.gap) for e in table.entries if e.front)])
    panel.plot(*_bent(front), color="0.85", linewidth=7, label="not beaten")
    for method in table.methods:
        look = _look(methods.index(method))
        own = [e for e in table.entries if e.method == method]
        # Dense is at 1 and 0, and beats what is no faster.
        line = [e for e in unbeaten(own) if e.speed > 1]
        _line(panel, [(1.0, 0.0), *((e.speed, e.gap) for e in line)], look, method)
        for beaten in (e for e in own if e not in line):
            panel.plot(beaten.speed, beaten.gap, **look, fillstyle="none")
    panel.set_xlabel("time to first token, times as fast as dense" + _how(table))
    panel.set_ylabel("nats per token lost to dense")
    panel.set_yscale("symlog", linthresh=0.1)
    panel.set_ylim(bottom=min(-0.05, *(gap for _, gap in front)))
    panel.axhline(0, color="0.8", linewidth=0.8)
    _legend(figure, panel)
    return as_png(figure)


def draw_axes(axes: Sequence[Axis], methods: Sequence[str]) -> bytes:
    """Nats per character against seconds to the first token, a colour per model; PNG.

    Args:
        axes: of a context length.
        methods: of all tables, as for `draw_front`.
    """
    figure, panels = canvas(1, 1, width=9, height=5)
    panel = panels[0][0]
    models = [*dict.fromkeys(axis.model for axis in axes)]
    for model in models:
        own = [axis for axis in axes if axis.model == model]
        for method in dict.fromkeys(axis.method for axis in own if axis.method != DENSE):
            at = sorted((a.seconds, a.nats) for a in own if a.method in (DENSE, method))
            panel.plot(
                *zip(*at, strict=True),
                color=COLOURS[models.index(model)],
                marker=_look(methods.index(method))["marker"],
                linestyle="-" if method.startswith("SEARCH") else ":",
                label=f"{model}, {method}",
            )
        dense = next(a for a in own if a.method == DENSE)
        panel.annotate(
            f"{model} dense",
            (dense.seconds, dense.nats),
            textcoords="offset points",
            xytext=(6, -12),
        )
    panel.set_xlabel("seconds to first token")
    panel.set_ylabel("nats per character of the references")
    _legend(figure, panel)
    return as_png(figure)


def _line(
    panel: Any, at: Sequence[tuple[float, float]], look: Mapping[str, Any], method: str
) -> None:
    searched = method.startswith("SEARCH")
    panel.plot(
        *_bent(at),
        **look,
        markevery=_STEPS,
        linestyle="-" if searched else ":",
        linewidth=2 if searched else 1.3,
        label=method,
    )


def _look(number: int) -> dict[str, Any]:
    """The colour and marker of a method, by its place among those of all figures."""
    marker = MARKERS[(number + number // len(COLOURS)) % len(MARKERS)]
    return {"color": COLOURS[number % len(COLOURS)], "marker": marker}


def _bent(at: Sequence[tuple[float, float]]) -> tuple[np.ndarray, np.ndarray]:
    """Points of the lines between plans, which are straight in nats: bent on the axis of gaps.

    What is read off between two plans is then what the table says of that speed.
    """
    speeds, gaps = np.array(at).T
    where = np.linspace(0, len(at) - 1, _STEPS * (len(at) - 1) + 1)
    plans = np.arange(len(at))
    return np.interp(where, plans, speeds), np.interp(where, plans, gaps)


def _how(table: Table) -> str:
    return "" if any(entry.ttft for entry in table.entries) else " (predicted)"


def _legend(figure: Any, panel: Any) -> None:
    figure.legend(*panel.get_legend_handles_labels(), loc="outside right upper", frameon=False)
