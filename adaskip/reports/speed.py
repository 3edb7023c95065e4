"""Tables and figures of speed measurements, made from their JSON records."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np

from adaskip.plan import KINDS, Phase
from adaskip.policies import POLICIES
from adaskip.profiling.interleaving import Ratio
from adaskip.reports.figures import policy_colour, policy_marker
from adaskip.speedtest.cases import DENSE, EMPTY, STOCK
from adaskip.tables import MISSING, markdown_table, number

# How the marker of a policy is filled, by the number of its budget.
FILLS = ("full", "none", "left", "bottom", "right", "top")
# What policies and plans are measured beside.
_REFERENCES = (STOCK, DENSE, EMPTY, *(f"no {kind}" for kind in KINDS))
_APART = 0.03  # of a doubling of the context
FRACTION = "fraction of the ideal saving"
CAPTION = (
    "Every case once per round, the dense one three times, in random order, in one process; times"
    " are medians over rounds, quartiles in brackets. Speedup: against the dense line of the same"
    " round, the median over rounds; in parentheses the ideal one, at which nothing takes time but "
    "what still runs and what takes the rest's place. Fraction of the ideal saving: saving "
    "measured / ideal, its 95 % interval in brackets (of fewer than 6 rounds the lowest and the "
    "highest). `stock`: the model as transformers runs it, on its DynamicCache; `dense`: the same "
    "on a GrowingCache, which all lines below it use; `compiled` lines use a static cache and are "
    "compared with `dense compiled`. Skipped: attention + FFN sublayers at the last step."
)


def as_markdown(kind: str, title: str, record: Mapping[str, Any]) -> str:
    """The report of a measurement, with what it was measured on.

    Args:
        kind: of a measurement.
        title: its heading.
        record: the content of its JSON file.
    """
    parts = _speed(record) if kind == "speed" else _study(record, _TABLES[kind])
    return "\n\n".join([f"# {title}", *parts])


def _speed(record: Mapping[str, Any]) -> list[str]:
    """A speed test: all points as one table, with what the sublayers take below it."""
    settings, points = record["settings"], record["points"]
    weights = "random weights" if settings["weights"] is None else settings["weights"] + " weights"
    lines = [
        f"{settings['model_name']}, {weights}, {settings['dtype']}, {settings['hardware']}; "
        f"{_versions(record)}; {settings['new_tokens']} decode steps.",
        CAPTION,
    ]
    rates = next((point["rates"] for point in points if point.get("rates")), None)
    if rates:
        lines.append(
            f"Measured rates: {rates['bytes_per_second'] / 1e12:.2f} TB/s, "
            f"{rates['operations_per_second'] / 1e12:.0f} TFLOP/s. Roofline ratio: measured time "
            "/ the time its bytes and operations need at those rates."
        )
    header = ["case", "tokens", "batch", "skipped", "TTFT ms", "speedup", FRACTION]
    header += ["ms/token", "speedup", FRACTION, "peak GB", "KV MB"]
    header += ["prefill roofline ratio", "decode roofline ratio"] if rates else []
    rows = [_case(p, case, roofline=bool(rates)) for p in points for case in p["cases"]]
    return [*lines, markdown_table(header, rows), *_shares(points)]


def _versions(record: Mapping[str, Any]) -> str:
    made_in = record["environment"]
    return (
        f"torch {made_in['torch']}, transformers {made_in['transformers']}, "
        f"commit {made_in['commit']}"
    )


def _milliseconds(spread: Mapping[str, Any]) -> str:
    """Median and quartiles."""
    median, q1, q3 = (1000 * spread[key] for key in ("median", "q1", "q3"))
    return f"{median:.1f} [{q1:.1f}–{q3:.1f}]"


def _case(point: Mapping[str, Any], case: Mapping[str, Any], *, roofline: bool) -> list[str]:
    skipped = f"{case['skipped_attn']}+{case['skipped_ffn']}"
    cells = [case["label"], str(point["context"]), str(point["batch"]), skipped]
    for phase in Phase:
        own = case[str(phase)]
        fraction = own["saving_ratio"]
        cells += [
            _milliseconds(own),
            f"{own['speedup']['median']:.3f} ({own['ideal_speedup']:.3f})",
            MISSING if fraction is None else Ratio(**fraction).text(2),
        ]
    peak = case["peak_bytes"]
    cells += [MISSING if peak is None else number(peak / 1e9), number(case["kv_bytes"] / 1e6)]
    if roofline:
        cells += [number(case[str(phase)].get("roofline_ratio")) for phase in Phase]
    return cells


def _shares(points: Iterable[Mapping[str, Any]]) -> Iterable[str]:
    """Per point, how often it was measured, and what attention and FFN take of a dense forward."""
    for point in points:
        if "error" in point:
            yield _error(point)
            continue
        where = f"- {point['context']} tokens, batch {point['batch']}"
        where += f", {point['cases'][0]['prefill']['n']} rounds"
        parts = []
        for phase in Phase:
            times = point["sublayers"][str(phase)]
            each = [f"{kind} {1000 * sum(times[kind]) / len(times[kind]):.3f}" for kind in KINDS]
            shares = [f"{100 * sum(times[kind]) / times['total']:.1f}" for kind in KINDS]
            parts.append(f"{phase}: {', '.join(each)} ms each; shares {' + '.join(shares)} %")
        yield f"{where}: {'; '.join(parts)}"


def _study(record: Mapping[str, Any], table: Callable[[Mapping[str, Any]], str]) -> list[str]:
    """A study: its table, and below it what could not be measured."""
    failed = [point for point in record.get("points", ()) if "error" in point]
    return [_about_study(record), table(record), *map(_error, failed)]


def _error(point: Mapping[str, Any]) -> str:
    return f"- {point['context']} tokens, batch {point.get('batch', 1)}: {point['error']}"


def _about_study(record: Mapping[str, Any]) -> str:
    settings = record["settings"]
    weights = "its own" if settings["real"] else "random"
    return (
        f"{settings['model']}, {weights} weights, {settings['hardware']}; {_versions(record)}; "
        f"{settings['rounds']} rounds of requests with {settings['new_tokens']} decode steps. "
        "Ratios are medians over rounds with their 95 % interval (docs/SPEED.md)."
    )


def _compared(record: Mapping[str, Any], first: str, key: str | None, added: str | None) -> str:
    """Times by phase and their ratios to a baseline.

    Args:
        record: of a study.
        first: heading of the labels.
        key: what tells points apart besides the context.
        added: what a row says of a phase besides its times.
    """
    rows = []
    for point in record["points"]:
        for row in point["rows"]:
            cells = [row["label"], str(point["context"]), *([str(point[key])] if key else [])]
            for phase in Phase:
                own = row.get(str(phase))
                cells.append(_milliseconds(own) if own else MISSING)
                cells.append(Ratio(**own["ratio"]).text(3) if own else MISSING)
                cells += [number(own and own[added])] if added else []
            rows.append(cells)
    of_phase = ["ratio", *([added] if added else [])]
    header = [first, "tokens", *([key] if key else []), "prefill ms", *of_phase]
    return markdown_table([*header, "ms/token", *of_phase], rows)


def _budget(record: Mapping[str, Any]) -> str:
    """The ratios asked for, predicted and measured; the last column is in percentage points."""
    header = ["phase", "tokens", "select", "asked", "attn+ffn", "predicted", "measured", "off"]
    # Records of version 0.1.0 have all rows in one list.
    rows = [row for point in record.get("points", [record]) for row in point["rows"]]
    cells = [
        [
            row["phase"],
            str(row["context"]),
            row["select"],
            number(row["asked"]),
            f"{row['attn']}+{row['ffn']}",
            number(row["predicted"], 3),
            Ratio(**row["measured"]).text(3),
            number(row["off_points"], 1, signed=True),
        ]
        for row in rows
    ]
    return markdown_table(header, cells)


def _serving(record: Mapping[str, Any]) -> str:
    """What was served, how near it is to the plan, and its times beside dense's."""
    header = ["case", "attn+ffn", "file MB", "KV MiB at 4,096", "greedy tokens", "difference"]
    header += ["tokens", "prefill ms", "speedup", "ms/token", "speedup"]
    cells = []
    for point in record["points"]:
        for row in point["rows"]:
            line = [
                row["label"],
                f"{row['attentions']}+{row['ffns']}",
                number(row["bytes"] / 1e6, 1),
                number(row["kv_mebibytes"], 1),
                f"{row['greedy_equal']}/{row['greedy_tokens']}",
                f"{row['largest_difference']:.1e}",
                str(point["context"]),
            ]
            for phase in Phase:
                line += [
                    _milliseconds(row[str(phase)]),
                    Ratio(**row[str(phase)]["speedup"]).text(3),
                ]
            cells.append(line)
    settings = record["settings"]
    about = (
        f"{settings['engine']}, {settings['threads']} thread(s), weights in "
        f"{'f32' if settings['engine'] == 'vLLM' else settings['dtype']}. Greedy tokens: as many "
        "as the plan in this process gives, before the first one that differs; difference: the "
        "largest of the log-probabilities told meanwhile."
    )
    return f"{about}\n\n{markdown_table(header, cells)}"


def _compiled(record: Mapping[str, Any]) -> str:
    """Compiled decoding under plans beside the dense model's."""
    rates = next((point["rates"] for point in record["points"] if point.get("rates")), None)
    header = ["case", "tokens", "batch", "attn+ffn", "windows", "ms/token", "speedup", "ideal"]
    header += ["KV MB", "peak GB", *(["roofline ratio"] if rates else [])]
    cells = []
    for point in record["points"]:
        for row in point["rows"]:
            own, peak = row[str(Phase.DECODE)], row["peak_bytes"]
            line = [row["label"], str(point["context"]), str(point["batch"])]
            line += [f"{row['skipped_attn']}+{row['skipped_ffn']}", str(row["windows"])]
            line += [_milliseconds(own), Ratio(**own["speedup"]).text(3)]
            line += [number(row["ideal_speedup"], 3), number(row["kv_bytes"] / 1e6)]
            line += [number(None if peak is None else peak / 1e9)]
            cells.append([*line, *([number(row["roofline_ratio"])] if rates else [])])
    about = "Static cache, compiled decode steps; speedups are over `dense`."
    if rates:
        about += (
            f" Roofline ratio: measured time / the time that the step's bytes need at the measured "
            f"{rates['bytes_per_second'] / 1e12:.2f} TB/s."
        )
    return f"{about}\n\n{markdown_table(header, cells)}"


_TABLES: Mapping[str, Callable[[Mapping[str, Any]], str]] = {
    "overhead": partial(_compared, first="case", key=None, added="goal"),
    "budget": _budget,
    "compiled": _compiled,
    "serving": _serving,
    "waiting": partial(_compared, first="waiting", key="busy", added=None),
}


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
    """The cases of policies and plans."""
    cases = points[0]["cases"] if points else []
    return [
        case["label"]
        for case in cases
        if case["label"].removesuffix(" compiled") not in _REFERENCES
        and case["compiled"] == compiled
    ]


def _panel(
    panel: Any, points: Sequence[Mapping[str, Any]], labels: Sequence[str], phase: Phase
) -> None:
    contexts = [point["context"] for point in points]
    seen: Counter[str] = Counter()
    for index, label in enumerate(labels):
        # Side by side, so that bars do not hide each other.
        places = [context * 2 ** (_APART * (index - len(labels) / 2)) for context in contexts]
        first = label.split()[0]
        policy = first if first in POLICIES else label.removesuffix(" compiled")
        colour, fill = policy_colour(policy), FILLS[seen[policy] % len(FILLS)]
        seen[policy] += 1
        cases = [next(c for c in point["cases"] if c["label"] == label) for point in points]
        found = [Ratio(**case[phase]["speedup"]) for case in cases]
        panel.errorbar(
            places,
            [ratio.median for ratio in found],
            [[r.median - r.low for r in found], [r.high - r.median for r in found]],
            label=label,
            color=colour,
            marker=policy_marker(policy),
            fillstyle=fill,
            markersize=5,
            elinewidth=0.8,
            capsize=2,
        )
        # None where what takes the place of sublayers was not timed.
        ideal = np.array([case[phase]["ideal_speedup"] for case in cases], dtype=float)
        panel.plot(places, ideal, linestyle=":", marker="_", color=colour, linewidth=1)
    panel.axhline(1, color="black", linewidth=0.6)
    panel.set_xscale("log", base=2)
    panel.set_xticks(contexts, [str(context) for context in contexts])
    panel.set_xlabel("prompt tokens (dotted: ideal)")
    panel.spines[["top", "right"]].set_visible(False)
