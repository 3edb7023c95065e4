"""IO similarities of layers and sublayers, averaged over tokens."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from math import isfinite
from typing import Any

import pandas as pd

from adaskip.errors import RunError
from adaskip.plan import Phase
from adaskip.recorders import Span

SPANS: tuple[Span, ...] = ("attn", "ffn", "layer")
_SUMS = ["count", "total", "squares"]


def from_rows(rows: Sequence[Mapping[str, Any]]) -> pd.DataFrame:
    """The sums that `recording` kept of a task's prompts, as one frame.

    Args:
        rows: `id`, and `sums`: per phase a `count` of tokens, and per part of a layer
            `[total, squares]` of their similarities for each layer.

    Returns:
        A row per prompt (`id`), `phase`, `span` and `layer`, with `count`, `total`, `squares`.

    Raises:
        RunError: a sum is no number, as earlier versions kept it of prompts that overflow.
    """
    cells = [
        (row["id"], phase, span, layer, sums["count"], *pair)
        for row in rows
        for phase, sums in row["sums"].items()
        for span in SPANS
        for layer, pair in enumerate(sums.get(span, ()))
    ]
    refuse_no_numbers((cell[0], cell[-2:]) for cell in cells)
    return pd.DataFrame(cells, columns=["id", "phase", "span", "layer", *_SUMS])


def refuse_no_numbers(kept: Iterable[tuple[str, Iterable[float]]]) -> None:
    """Refuses similarities that are no numbers, which a mean would pass over.

    Args:
        kept: prompts, and what a record has of each.

    Raises:
        RunError: there are some.
    """
    wrong = [name for name, values in kept if not all(map(isfinite, values))]
    if wrong:
        raise RunError(
            f"The record has similarities of prompt {wrong[0]} that are no numbers; move its file "
            "away and record in bfloat16 or float32."
        )


def layers(seen: pd.DataFrame, span: Span, phase: Phase | None = None) -> pd.DataFrame:
    """Similarity by depth, every token weighing the same.

    Args:
        seen: of `from_rows`, or several of them below each other.
        span: the part of a layer.
        phase: prefill or decode; None for all tokens together.

    Returns:
        Per layer the `count` of tokens, and `mean` and `std` of their similarities.
    """
    phases = [phase] if phase else [*Phase]
    wanted = seen[(seen["span"] == span) & seen["phase"].isin(phases)]
    sums = wanted.groupby("layer")[_SUMS].sum()
    mean = sums["total"] / sums["count"]
    variance = (sums["squares"] / sums["count"] - mean**2).clip(lower=0)
    return pd.DataFrame({"count": sums["count"], "mean": mean, "std": variance**0.5})


def means(seen: pd.DataFrame, spans: Sequence[Span], phase: Phase | None = None) -> pd.Series:
    """The mean similarity by `span` and `layer`; arguments as for `layers`."""
    return pd.concat({span: layers(seen, span, phase)["mean"] for span in spans}, names=["span"])
