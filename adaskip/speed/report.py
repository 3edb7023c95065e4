"""The table and the figure of a speed test, made from its JSON record."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adaskip.experiments.records import read_json, write_bytes, write_text
from adaskip.plan import KINDS, Phase
from adaskip.report.tables import MISSING, markdown_table, number
from adaskip.speed.interleaving import Ratio

COLOURS = {"EE": "#0072B2", "SD": "#CC79A7", "US": "#E69F00", "ADA": "#009E73"}
MARKERS = ("o", "s", "^", "D", "v")
CAPTION = (
    "Every case once per round, in random order, in one process; times are medians over rounds, "
    "quartiles in brackets. Speedup: against the dense line of the same round, the median over "
    "rounds; in parentheses the ideal one, at which skipped sublayers cost nothing. Kept: measured "
    "saving / ideal saving, its 95 % interval in brackets. `stock`: the model as transformers runs "
    "it, on its DynamicCache; `dense`: the same on a GrowingCache, which all lines below it use; "
    "`compiled` lines use a static cache and are compared with `dense compiled`. Skipped: "
    "attention + FFN sublayers at the last step."
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
    """Per point, what attention and FFN take of a dense forward."""
    for point in points:
        if "error" in point:
            yield f"- {point['context']} tokens, batch {point['batch']}: {point['error']}"
            continue
        parts = []
        for phase in Phase:
            times = point["sublayers"][str(phase)]
            each = [f"{kind} {1000 * sum(times[kind]) / len(times[kind]):.3f}" for kind in KINDS]
            shares = [f"{100 * sum(times[kind]) / times['total']:.1f}" for kind in KINDS]
            parts.append(f"{phase}: {', '.join(each)} ms each; shares {' + '.join(shares)} %")
        yield f"- {point['context']} tokens, batch {point['batch']}: {'; '.join(parts)}"


def draw(record: Mapping[str, Any]) -> bytes | None:
    """The speedup against context length as PNG: a panel per phase, dashed the ideal.

    For the smallest batch size; None if nothing was skipped.
    """
    points = [point for point in record["points"] if point["cases"]]
    batch = min((point["batch"] for point in points), default=1)
    points = [point for point in points if point["batch"] == batch]
    labels = [
        case["label"]
        for case in (points[0]["cases"] if points else ())
        if case["label"].split()[0] in COLOURS and not case["compiled"]
    ]
    if not labels:
        return None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, 2, sharey=True)
    for panel, phase in zip(panels, Phase, strict=True):
        _panel(panel, points, labels, str(phase))
    panels[0].set_ylabel("speedup over dense")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    settings = record["settings"]
    figure.suptitle(f"{settings['model_name']}, batch {batch}, {settings['hardware']}", fontsize=9)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _panel(panel: Any, points: list[Mapping[str, Any]], labels: list[str], phase: str) -> None:
    contexts = [point["context"] for point in points]
    seen: dict[str, int] = {}
    for label in labels:
        policy = label.split()[0]
        marker = MARKERS[seen.setdefault(policy, 0) % len(MARKERS)]
        seen[policy] += 1
        cases = [next(c for c in point["cases"] if c["label"] == label) for point in points]
        style = {"color": COLOURS[policy], "marker": marker, "markersize": 4}
        panel.plot(contexts, [c[phase]["speedup"]["median"] for c in cases], label=label, **style)
        ideal = [c[phase]["ideal_speedup"] for c in cases]
        panel.plot(contexts, ideal, linestyle=":", color=COLOURS[policy], linewidth=1)
    panel.axhline(1, color="black", linewidth=0.6)
    panel.set_xscale("log", base=2)
    panel.set_xticks(contexts, [str(context) for context in contexts])
    panel.set_xlabel("prompt tokens (dotted: ideal)")
    panel.set_title(phase)
    panel.spines[["top", "right"]].set_visible(False)
