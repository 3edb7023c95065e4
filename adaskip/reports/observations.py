"""The observations as they are shown: their numbers as tables and panels, and their files."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from adaskip.observing.analysis import Numbers, stand_in
from adaskip.observing.layer_skipping import DENSE, HIGHEST, LOWEST
from adaskip.observing.recording import record_path
from adaskip.plan import KINDS, Phase
from adaskip.recorders import Span
from adaskip.reports.observation_figures import Curve, Panel, draw
from adaskip.runs.environment import joined
from adaskip.runs.files import SCHEMA, read_json, write_json, write_text
from adaskip.runs.runconfig import RunConfig
from adaskip.tables import MISSING, markdown_table, number

TITLES = {
    "ob0": "Skipping the layers of highest and of lowest IO similarity",
    "ob1": "Observation 1: the IO similarity of whole layers",
    "ob2": "Observation 2: the IO similarity of attention and of FFN sublayers",
    "ob3": "Observation 3: the IO similarity in prefill and in decode",
    "stability": "How stable the chosen sublayers are",
}
# What the others are computed from is similarities alone.
_RECORDS = {"ob0": ("similarity", "layers"), "stability": ("requests",)}
_NAMES: Mapping[Span, str] = {"attn": "attention", "ffn": "FFN", "layer": "layer"}
_SIMILARITY = "IO similarity (cosine)"


def write_observation(
    observation: str, command: str, configs: Sequence[RunConfig], found: Mapping[str, Numbers]
) -> str:
    """Writes the JSON, the figure and the tables of all models together.

    Args:
        observation: a key of `TITLES`.
        command: what was called, to be written down.
        configs: one per model.
        found: per model what its measurement returned, in the same order.

    Returns:
        The tables, and where they are.

    Raises:
        RunError: a file cannot be written.
    """
    stem = Path(configs[0].results_dir) / f"{observation}-{'-'.join(found)}"
    content = {
        "schema": SCHEMA,
        "observation": TITLES[observation],
        "command": command,
        "settings": {config.run_name: config.settings() for config in configs},
        "environment": joined(_environments(observation, configs)),
        "models": found,
    }
    write_json(stem.with_name(f"{stem.name}.json"), content)
    text = "\n\n".join(
        f"**{model}**{_stand_ins(observation, config.tasks)}\n\n{TABLES[observation](numbers)}"
        for config, (model, numbers) in zip(configs, found.items(), strict=True)
    )
    page = f"# {TITLES[observation]}\n\n{text}\n\nMade by `{command}`.\n"
    write_text(stem.with_name(f"{stem.name}.md"), page)
    columns = [PANELS[observation](model, numbers) for model, numbers in found.items()]
    rows, width = _grid(columns, wide=observation in ("ob0", "stability"))
    draw(rows, stem.with_name(f"{stem.name}.png"), width=width)
    return f"{text}\n\nWritten: {stem}.json, .md and .png."


def _environments(observation: str, configs: Sequence[RunConfig]) -> Iterator[dict[str, Any]]:
    """Where each task's numbers were measured; those of earlier versions do not tell."""
    kinds = _RECORDS.get(observation, ("similarity",))
    for config, kind in product(configs, kinds):
        for task in config.tasks:
            yield read_json(record_path(config, kind, task)).get("environment", {})


def _stand_ins(observation: str, tasks: Iterable[str]) -> str:
    """Says which offline tasks stand in for LongBench's."""
    pairs = [(task, stand_in(observation, task)) for task in tasks]
    said = [f"{task} stands in for {other}" for task, other in pairs if other is not None]
    return f" (offline sample: {', '.join(said)})" if said else ""


def _grid(columns: Sequence[list[Panel]], *, wide: bool) -> tuple[list[list[Panel]], float]:
    """Rows of panels, and the width of one; several models have a column each."""
    if len(columns) > 1:
        return [list(row) for row in zip(*columns, strict=True)], 4.6
    [only] = columns
    if wide:
        return [only[start : start + 2] for start in range(0, len(only), 2)], 4.6
    return [[panel] for panel in only], 7.0


def _similarity_tables(numbers: Numbers) -> str:
    """The summaries as two tables and a list."""
    named = [
        (f"{task}, {name}", values)
        for task, found in numbers["tasks"].items()
        for name, values in found["summary"].items()
    ] + [*numbers["between_tasks"].items()]
    made = []
    for first, key in (("IO similarity", "mean"), ("agreement", "pearson")):
        found = {name: v for name, v in named if isinstance(v, dict) and key in v}
        if found:
            header = [column.replace("_", " ") for column in next(iter(found.values()))]
            lines = [[name, *map(_cell, values.values())] for name, values in found.items()]
            made.append(markdown_table([first, *header], lines))
    counts = [f"- {name}: {value}" for name, value in named if not isinstance(value, dict)]
    return "\n\n".join([*made, "\n".join(counts)]).rstrip()


def _cell(value: float | None) -> str:
    return str(value) if isinstance(value, int) else number(value, 4)


def _layers_panels(model: str, numbers: Numbers) -> list[Panel]:
    curves = [
        _similarity(_label("ob1", task), found["similarity"]["all"]["layer"], style)
        for style, (task, found) in enumerate(numbers["tasks"].items())
    ]
    return [_by_depth(f"{model}: whole layers", curves, numbers)]


def _kinds_panels(model: str, numbers: Numbers) -> list[Panel]:
    curves = [
        _similarity(
            f"{_NAMES[kind]}, {_label('ob2', task)}",
            found["similarity"]["all"][kind],
            2 * (index // 2) + style,
            dashed=index % 2 == 1,
        )
        for style, kind in enumerate(KINDS)
        for index, (task, found) in enumerate(numbers["tasks"].items())
    ]
    return [_by_depth(f"{model}: attention and FFN sublayers", curves, numbers)]


def _phases_panels(model: str, numbers: Numbers) -> list[Panel]:
    drawn = []
    for kind in KINDS:
        for task, found in numbers["tasks"].items():
            curves = []
            for style, phase in enumerate(Phase):
                columns = found["similarity"][phase][kind]
                pairs = [*zip(columns["mean"], columns["std"], strict=True)]
                interval = {"low": [m - s for m, s in pairs], "high": [m + s for m, s in pairs]}
                label = f"{phase} (band: ± 1 standard deviation over tokens)"
                look = {"dashed": phase is Phase.DECODE, "band": True, **interval}
                curves.append(_similarity(label, columns, style, **look))
            title = f"{model}: {_NAMES[kind]}, {_label('ob3', task)}"
            drawn.append(_by_depth(title, curves, numbers))
    return drawn


def _by_depth(title: str, curves: Sequence[Curve], numbers: Numbers) -> Panel:
    """A panel of similarities; the layers of full attention stand out where others slide."""
    marks = tuple(numbers.get("full_attention", ()))
    return Panel(title, "layer index", _SIMILARITY, tuple(curves), marks=marks)


def _label(observation: str, task: str) -> str:
    """How figures call a task."""
    other = stand_in(observation, task)
    return task if other is None else f"{task} (stand-in for {other})"


def _similarity(label: str, columns: Numbers, style: int, **look: Any) -> Curve:
    return Curve(label, range(len(columns["mean"])), columns["mean"], style, **look)


def _skipping_table(numbers: Numbers) -> str:
    """One line per choice: perplexity per task, its ratio to the dense one's, scores if any."""
    tasks = numbers["tasks"]
    header = ["skipped", "layers"]
    for task, found in tasks.items():
        header += [f"{task} perplexity", "x dense"]
        header += [f"{task} score"] if "score" in found[0] else []
    lines = []
    for index, choice in enumerate(numbers["choices"]):
        layers, side = choice["layers"], choice["side"]
        line = [f"{len(layers)} of {side}" if layers else side]
        line.append(", ".join(map(str, layers)) or MISSING)
        for found in tasks.values():
            value = found[index]["perplexity"]
            line += [_short(value), _short(value / found[0]["perplexity"])]
            line += [number(found[index]["score"])] if "score" in found[0] else []
        lines.append(line)
    return markdown_table(header, lines)


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def _skipping_panels(model: str, numbers: Numbers) -> list[Panel]:
    """One panel per task: perplexity against the number of layers skipped."""
    drawn = []
    choices = numbers["choices"]
    ticks = {float(n): str(n) for n in sorted({len(choice["layers"]) for choice in choices})}
    for task, found in numbers["tasks"].items():
        curves = []
        for style, side in enumerate((HIGHEST, LOWEST)):
            points = [
                (len(choice["layers"]), each["perplexity"])
                for choice, each in zip(choices, found, strict=True)
                if choice["side"] in (DENSE, side)
            ]
            x, y = zip(*points, strict=True)
            curves.append(Curve(f"layers of {side} skipped", x, y, style, dashed=style == 1))
        title = f"{model}: {_label('ob0', task)}"
        label = "perplexity of references (log)"
        drawn.append(Panel(title, "whole layers skipped", label, tuple(curves), ticks, log=True))
    return drawn


def _stability_table(numbers: Numbers) -> str:
    """One line per number of prompts and task, then one per pair of tasks."""
    lines = [
        [f"{task}, {n} prompts", *(_interval(by_prompts[n]) for by_prompts in found.values())]
        for task, found in numbers["by_prompts"].items()
        for n in next(iter(found.values()))
    ]
    between = numbers["between_tasks"]
    for pair in next(iter(between.values())):
        lines.append([pair, *(_interval(found[pair]) for found in between.values())])
    header = ["share of the same sublayers", *(f"{budget} chosen" for budget in between)]
    return markdown_table(header, lines)


def _interval(found: Mapping[str, float]) -> str:
    return f"{found['mean']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def _stability_panels(model: str, numbers: Numbers) -> list[Panel]:
    """One panel per warm-up task, and one of the overlap between tasks."""
    drawn = []
    for task, budgets in numbers["by_prompts"].items():
        title = f"{model}: against all {numbers['prompts'][task]} prompts, {task}"
        counts = [*next(iter(budgets.values()))]
        drawn.append(_shares(title, "warm-up prompts", budgets, counts, joined=True))
    between = numbers["between_tasks"]
    title = f"{model}: between warm-up tasks, {max(numbers['prompts'].values())} prompts each"
    pairs = [" / ".join(map(_tick, pair.split(" / "))) for pair in next(iter(between.values()))]
    drawn.append(_shares(title, "pair of tasks", between, pairs, joined=False))
    # One scale for all, which no whisker leaves.
    lows = [low for panel in drawn for curve in panel.curves for low in curve.low or ()]
    bottom = min(0.48, *(low - 0.02 for low in lows))
    return [dataclasses.replace(panel, bounds=(bottom, 1.02)) for panel in drawn]


def _tick(task: str) -> str:
    """The beginning of a task's name."""
    name = task.removeprefix("sample_")
    return name if len(name) <= 5 else f"{name[:5]}."


def _shares(
    title: str, x_label: str, budgets: Numbers, ticks: Sequence[str], *, joined: bool
) -> Panel:
    """A panel of shares with their intervals, a curve per budget."""
    curves = []
    for style, (budget, found) in enumerate(budgets.items()):
        # Side by side, so that whiskers do not hide one another.
        x = [index + 0.12 * (style - 1) for index in range(len(found))]
        mean, low, high = (
            [each[key] for each in found.values()] for key in ("mean", "low", "high")
        )
        # The mean of shares near 1 can lie below its own lower quantile: whiskers cannot be
        # negative.
        low, high = [*map(min, low, mean)], [*map(max, high, mean)]
        label = f"{budget} sublayers chosen"
        curves.append(Curve(label, x, mean, style, low=low, high=high, joined=joined))
    names = {float(index): name for index, name in enumerate(ticks)}
    return Panel(title, x_label, "share of the same sublayers", tuple(curves), names)


TABLES: Mapping[str, Callable[[Numbers], str]] = {
    "ob0": _skipping_table,
    **dict.fromkeys(("ob1", "ob2", "ob3"), _similarity_tables),
    "stability": _stability_table,
}
PANELS: Mapping[str, Callable[[str, Numbers], list[Panel]]] = {
    "ob0": _skipping_panels,
    "ob1": _layers_panels,
    "ob2": _kinds_panels,
    "ob3": _phases_panels,
    "stability": _stability_panels,
}
