"""Figures of the observations: panels of curves that also read in a grey print."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from adaskip.reports.figures import COLOURS
from adaskip.runs.files import write_bytes

# Dark and light colours in turns, so that neighbours differ in grey, too.
_PALETTE = tuple(COLOURS[index] for index in (0, 1, 2, 5, 3, 4))
_MARKERS = ("o", "s", "^", "D", "v", "P")
# Curves that lie on one another show as nested markers.
_SIZES = (7, 5, 3)
_LINES = ("-", "-.", ":")
# Points that lie so far below all others that they take this share of the axis are cut off and
# written down in words.
_GAP = 0.5
# And outliers are at most one in so many values.
_FEW = 4
# Longer names of ticks are written aslant.
_LONG_NAME = 10
_DPI = 160
_MARKED = "layer with full attention (the others slide)"


@dataclass(frozen=True)
class Curve:
    """One line of a panel.

    Attributes:
        x, y: its points; `low` and `high`: an interval around each, None for none.
        style: number of its colour and marker.
        dashed: dashed with hollow markers, to tell two curves of one style apart.
        band: the interval is a shaded band in place of whiskers.
        joined: the points are joined by a line.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: int
    dashed: bool = False
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    band: bool = False
    joined: bool = True


@dataclass(frozen=True)
class Panel:
    """One coordinate system.

    Attributes:
        ticks: places on the x axis and their names; None for numbers.
        log: whether the y axis is logarithmic.
        bounds: ends of the y axis; None for as the curves need it, outliers cut off.
        marks: layers on the x axis whose attention does not slide, while that of others does.
    """

    title: str
    x_label: str
    y_label: str
    curves: tuple[Curve, ...]
    ticks: Mapping[float, str] | None = None
    log: bool = False
    bounds: tuple[float, float] | None = None
    marks: tuple[float, ...] = ()


def draw(
    grid: Sequence[Sequence[Panel]], path: Path, *, width: float = 6.0, height: float = 3.2
) -> None:
    """Draws rows of panels with one legend below, as PNG.

    Args:
        grid: the panels; rows may be shorter than the first.
        path: the file.
        width: of a panel, in inches.
        height: of a panel, in inches.

    Raises:
        RunError: the file cannot be written.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    n_columns = len(grid[0])
    size = (width * n_columns, height * len(grid) + 0.4)
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(grid), n_columns, squeeze=False)
    handles: dict[str, Any] = {}
    for row, row_axes in zip(grid, axes, strict=True):
        for axis in row_axes[len(row) :]:
            axis.remove()
        for panel, axis in zip(row, row_axes, strict=False):
            _draw_panel(axis, panel)
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
                handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=_legend_columns([*handles], size[0]),
        fontsize=9,
        frameon=False,
    )
    write_bytes(path, _small_png(figure))


def _small_png(figure: Any) -> bytes:
    """A PNG of 64 colours: a third of the bytes, and no difference to the eye."""
    from PIL import Image

    drawn, small = io.BytesIO(), io.BytesIO()
    figure.savefig(drawn, format="png", dpi=_DPI)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(64).save(small, format="png", optimize=True, dpi=(_DPI, _DPI))
    return small.getvalue()


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """Columns of a legend that fit into `width` inches at 9 points."""
    longest = 0.6 + 0.075 * max(map(len, labels))
    return max(1, min(len(labels), int(width // longest)))


def _draw_panel(axis: Any, panel: Panel) -> None:
    for curve in panel.curves:
        _draw_curve(axis, curve)
    for index, x in enumerate(panel.marks):
        label = _MARKED if index == 0 else None
        axis.axvline(x, color="0.45", linewidth=1, linestyle="--", zorder=0, label=label)
    axis.set_title(panel.title, fontsize=10)
    axis.set_xlabel(panel.x_label)
    axis.set_ylabel(panel.y_label)
    if panel.ticks is None:
        # Layers and counts: no ticks between them.
        axis.xaxis.get_major_locator().set_params(integer=True)
    else:
        names = [*panel.ticks.values()]
        axis.set_xticks([*panel.ticks], names)
        if max(map(len, names)) > _LONG_NAME:
            axis.set_xticks(
                [*panel.ticks], names, rotation=25, ha="right", rotation_mode="anchor", fontsize=8
            )
    if panel.log:
        axis.set_yscale("log")
    elif panel.bounds is not None:
        axis.set_ylim(*panel.bounds)
    else:
        _cut_below(axis, panel)
    axis.grid(alpha=0.3, linewidth=0.6)
    axis.spines[["top", "right"]].set_visible(False)


def _cut_below(axis: Any, panel: Panel) -> None:
    """Ends the y axis above outliers that would flatten all else, and says where they are."""
    values = sorted(y for curve in panel.curves for y in curve.y)
    if len(values) < 2 or values[0] == values[-1]:
        return
    gap, above = max((b - a, b) for a, b in pairwise(values))
    if gap < _GAP * (values[-1] - values[0]):
        return
    # What most of the curves are is no outlier.
    if _FEW * sum(y < above for y in values) > len(values):
        return
    shown = [y for y in values if y >= above]
    lows = [low for c in panel.curves for low in c.low or () if low >= above - gap / 4]
    bottom = min([*shown, *lows])
    axis.set_ylim(bottom=bottom - 0.08 * (shown[-1] - bottom))
    hidden: dict[float, list[float]] = {}
    for curve in panel.curves:
        for x, y in zip(curve.x, curve.y, strict=True):
            if y < above:
                hidden.setdefault(x, []).append(y)
    words = []
    for x, ys in sorted(hidden.items()):
        ends = dict.fromkeys((f"{min(ys):.2f}", f"{max(ys):.2f}"))
        words.append(f"layer {x:g}: {' to '.join(ends)}")
    text = f"below the axis: {', '.join(words)}"
    axis.text(0.5, 0.04, text, ha="center", transform=axis.transAxes, fontsize=8)


def _line(curve: Curve) -> str:
    if not curve.joined:
        return "none"
    return "--" if curve.dashed else _LINES[curve.style % len(_LINES)]


def _draw_curve(axis: Any, curve: Curve) -> None:
    colour = _PALETTE[curve.style % len(_PALETTE)]
    look: dict[str, Any] = {
        "color": colour,
        "marker": _MARKERS[curve.style % len(_MARKERS)],
        "linestyle": _line(curve),
        "markerfacecolor": "white" if curve.dashed else colour,
        "markersize": _SIZES[curve.style % len(_SIZES)] - (2 if curve.dashed else 0),
        "linewidth": 1.3,
        "label": curve.label,
    }
    if curve.low is None or curve.high is None:
        axis.plot(curve.x, curve.y, **look)
    elif curve.band:
        axis.plot(curve.x, curve.y, **look)
        shade = {"hatch": "////", "facecolor": "none"} if curve.dashed else {"facecolor": colour}
        alpha = 0.7 if curve.dashed else 0.3
        axis.fill_between(
            curve.x, curve.low, curve.high, alpha=alpha, edgecolor=colour, linewidth=0, **shade
        )
    else:
        whiskers = [
            [y - low for y, low in zip(curve.y, curve.low, strict=True)],
            [high - y for y, high in zip(curve.y, curve.high, strict=True)],
        ]
        axis.errorbar(curve.x, curve.y, yerr=whiskers, capsize=3, elinewidth=1, **look)
