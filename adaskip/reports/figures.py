"""What all figures share: a colour and a marker per policy, the canvas, the legend, the PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaskip.errors import RunError

# Okabe and Ito's palette, told apart by colour-blind readers, then some of Paul Tol's.
COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000"),
    *("#882255", "#44AA99", "#999933", "#332288", "#DDCC77", "#661100", "#888888"),
)
# They serve those who tell no colours apart.
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "<", ">", "p", "h", "*", "d", "8", "H")
# The paper's policies come first: they keep their look whatever is added.
_PAPER = ("ADA", "EE", "SD", "US")
# Of a figure within a page: pixels and colours that no eye misses.
EMBEDDED_WIDTH = 1400
EMBEDDED_COLOURS = 64


def policy_colour(policy: str) -> str:
    """The colour of a policy or of the method in a plan's name, the same in every figure."""
    return _looks(COLOURS, policy)


def policy_marker(policy: str) -> str:
    """The marker of a policy or of the method in a plan's name, likewise."""
    return _looks(MARKERS, policy)


def canvas(
    n_rows: int, n_columns: int, *, width: float, height: float, **options: Any
) -> tuple[Any, Any]:
    """An empty matplotlib figure that needs no display, and its axes.

    Args:
        n_rows: rows of axes.
        n_columns: columns of axes.
        width: of the whole figure, in inches.
        height: likewise.
        **options: of matplotlib's `subplots`.

    Returns:
        The figure, and an array of axes `[n_rows, n_columns]`, open at the top and on the right.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(n_rows, n_columns, squeeze=False, **options)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def add_legend(figure: Any, axes: Any) -> None:
    """One legend below all axes, in which every label stands once, with all that is drawn of it."""
    found: dict[str, dict[type, Any]] = {}
    for axis in axes.flat:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            found.setdefault(label, {}).setdefault(type(handle), handle)
    handles = [tuple(own.values()) for own in found.values()]
    figure.legend(
        handles, found.keys(), loc="outside lower center", ncols=len(found), frameon=False
    )


def as_png(figure: Any, *, dpi: int = 200) -> bytes:
    """A matplotlib figure as the bytes of a PNG file."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=dpi)
    return buffer.getvalue()


def as_data_uri(path: Path) -> str:
    """A PNG file as an address that holds the picture itself, made small for a page.

    Raises:
        RunError: the file is damaged.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            small = image.convert("RGB")
            small.thumbnail((EMBEDDED_WIDTH, 10 * EMBEDDED_WIDTH))
    except OSError as error:
        raise RunError(f"The figure {path} cannot be read: {error}.") from error
    buffer = io.BytesIO()
    small.quantize(EMBEDDED_COLOURS).save(buffer, format="png", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _looks(looks: Sequence[str], policy: str) -> str:
    """The one of a name; the last is that of all names that nobody knows."""
    from adaskip.methods import method_names
    from adaskip.policies import POLICIES

    known = [*dict.fromkeys([*_PAPER, *POLICIES, *method_names()])]
    # A plan's file is called after its method, then its budget.
    found = next((name for name in (policy, *_beginnings(policy)) if name in known), None)
    return looks[-1 if found is None else known.index(found) % (len(looks) - 1)]


def _beginnings(name: str) -> list[str]:
    """A name without its last parts, the longest first."""
    parts = name.upper().split("-")
    return ["-".join(parts[:n]) for n in range(len(parts), 0, -1)]
