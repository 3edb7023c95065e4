"""The table and the figure of a speed test, made from its JSON record."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaskip.plan import KINDS, Phase
from adaskip.policies import POLICIES
from adaskip.profiling.interleaving import Ratio
from adaskip.reports.palette import policy_colour
from adaskip.runs.files import read_json, write_bytes, write_text
from adaskip.tables import MISSING, markdown_table, number

MARKERS = ("o", "s", "^", "D", "v")
_APART = 0.03  # of a doubling of the context
CAPTION = (
    "Every case once per round, in random order, in one process; times are medians over rounds, "
    "quartiles in brackets. Speedup: against the dense line of the same round, the median over "
    "rounds; in parentheses the ideal one, at which skipped sublayers cost nothing. Kept: measured "
    "saving / ideal saving, its 95 % interval in brackets (of fewer than 6 rounds the lowest and "
    "the highest). `stock`: the model as transformers runs it, on its DynamicCache; `dense`: the "
    "same on a GrowingCache, which all lines below it use; `compiled` lines use a static cache and "
    "are compared with `dense compiled`. Skipped: attention + FFN sublayers at the last step."
)


def write_speed_report(path: Path) -> str:
    """Writes the table and the figure beside a record; returns the table.

    Raises:
        RunError: the record is damaged, or a file cannot be written.
    """
    record = read_json(path)
    text = as_markdown(record, path.stem)
    write_text(path.with_suffix(".md"), text + "\n")
    figure = draw(record)
    if figure is not None:
        write_bytes(path.with_suffix(".png"), figure)
    return text


def as_markdown(record: Mapping[str, Any], title: str) -> str:
    """All points as one table, with what it was measured on."""
    settings, environment = record["settings"], record["environment"]
    lines = [
        f"# {title}",
        f"{settings['model_name']}, "
        f"{'random weights' if settings['weights'] is None else settings['weights'] + ' weights'}, "
        f"{settings['dtype']}, {settings['hardware']}; torch {environment['torch']}, transformers "
        f"{environment['transformers']}; {settings['new_tokens']} decode steps; commit "
        f"{environment['commit']}.",
        CAPTION,
    ]
    rates = record.get("rates")
    if rates:
        lines.append(
            f"Measured rates: {rates['bytes_per_second'] / 1e12:.2f} TB/s, "
            f"{rates['operations_per_second'] / 1e12:.0f} TFLOP/s. Floor: measured time / the time "
            "its bytes and operations need at those rates."
        )
    header = ["case", "tokens", "batch", "skipped", "TTFT ms", "speedup", "kept"]
    header += ["ms/token", "speedup", "kept", "peak GB", "KV MB"]
    header += ["floor prefill", "floor decode"] if rates else []
    rows = [
        _row(point, case, with_floor=bool(rates))
        for point in record["points"]
        for case in point["cases"]
    ]
    lines.append(markdown_table(header, rows))
    lines += list(_shares(record["points"]))
    return "\n\n".join(lines)


def _row(point: Mapping[str, Any], case: Mapping[str, Any], *, with_floor: bool) -> list[str]:
    cells = [
        case["label"],
        str(point["context"]),
        str(point["batch"]),
        f"{case['skipped_attn']}+{case['skipped_ffn']}",
    ]
    for phase in Phase:
        own = case[str(phase)]
        median, q1, q3 = (1000 * own[key] for key in ("median", "q1", "q3"))
        cells += [
            f"{median:.1f} [{q1:.1f}–{q3:.1f}]",
            f"{own['speedup']['median']:.3f} ({own['ideal_speedup']:.3f})",
            MISSING if own["saving_ratio"] is None else Ratio(**own["saving_ratio"]).text(2),
        ]
    peak = case["peak_bytes"]
    cells += [MISSING if peak is None else number(peak / 1e9), number(case["kv_bytes"] / 1e6)]
    if with_floor:
        cells += [number(case[str(phase)]["floor_ratio"]) for phase in Phase]
    return cells


def _shares(points: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """Per point, how often it was measured, and what attention and FFN take of a dense forward."""
    for point in points:
        where = f"- {point['context']} tokens, batch {point['batch']}"
        if "error" in point:
            yield f"{where}: {point['error']}"
            continue
        where += f", {point['cases'][0]['prefill']['n']} rounds"
        parts = []
        for phase in Phase:
            times = point["sublayers"][str(phase)]
            each = [f"{kind} {1000 * sum(times[kind]) / len(times[kind]):.3f}" for kind in KINDS]
            shares = [f"{100 * sum(times[kind]) / times['total']:.1f}" for kind in KINDS]
            parts.append(f"{phase}: {', '.join(each)} ms each; shares {' + '.join(shares)} %")
        yield f"{where}: {'; '.join(parts)}"


def draw(record: Mapping[str, Any]) -> bytes | None:
    """The speedup against context length as PNG: a panel per phase, dotted the ideal.

    For the smallest batch size; None if nothing was skipped.
    """
    points = [point for point in record["points"] if point["cases"]]
    batch = min((point["batch"] for point in points), default=1)
    points = [point for point in points if point["batch"] == batch]
    shown = [(str(phase), phase, _labels(points, compiled=False)) for phase in Phase]
    shown.append(("decode, compiled", Phase.DECODE, _labels(points, compiled=True)))
    shown = [(title, phase, labels) for title, phase, labels in shown if labels]
    if not shown:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1 + 4 * len(shown), 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(shown), sharey=True)
    for panel, (title, phase, labels) in zip(panels, shown, strict=True):
        panel.set_title(title)
        _panel(panel, points, labels, phase)
    panels[0].set_ylabel("speedup over dense (bars: interval)")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    settings = record["settings"]
    figure.suptitle(f"{settings['model_name']}, batch {batch}, {settings['hardware']}", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _labels(points: Sequence[Mapping[str, Any]], *, compiled: bool) -> list[str]:
    """The cases that skip something."""
    cases = points[0]["cases"] if points else []
    return [
        case["label"]
        for case in cases
        if case["label"].split()[0] in POLICIES and case["compiled"] == compiled
    ]


def _panel(
    panel: Any, points: Sequence[Mapping[str, Any]], labels: Sequence[str], phase: Phase
) -> None:
    contexts = [point["context"] for point in points]
    seen: Counter[str] = Counter()
    for index, label in enumerate(labels):
        # Side by side, so that bars do not hide each other.
        places = [context * 2 ** (_APART * (index - len(labels) / 2)) for context in contexts]
        policy = label.split()[0]
        colour, marker = policy_colour(policy), MARKERS[seen[policy] % len(MARKERS)]
        seen[policy] += 1
        cases = [next(c for c in point["cases"] if c["label"] == label) for point in points]
        found = [Ratio(**case[phase]["speedup"]) for case in cases]
        panel.errorbar(
            places,
            [ratio.median for ratio in found],
            [[r.median - r.low for r in found], [r.high - r.median for r in found]],
            label=label,
            color=colour,
            marker=marker,
            markersize=4,
            elinewidth=0.8,
            capsize=2,
        )
        ideal = [case[phase]["ideal_speedup"] for case in cases]
        panel.plot(places, ideal, linestyle=":", marker="_", color=colour, linewidth=1)
    panel.axhline(1, color="black", linewidth=0.6)
    panel.set_xscale("log", base=2)
    panel.set_xticks(contexts, [str(context) for context in contexts])
    panel.set_xlabel("prompt tokens (dotted: ideal)")
    panel.spines[["top", "right"]].set_visible(False)
