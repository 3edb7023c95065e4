"""The paper's first table: skipping the layers of highest or of lowest IO similarity."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from operator import add
from pathlib import Path
from typing import Any

from tqdm import tqdm

from adaskip.configuration import read_config
from adaskip.metrics import score
from adaskip.models.processes import team
from adaskip.observing.analysis import task_label
from adaskip.observing.recording import OpenBench, opened
from adaskip.observing.similarities import Similarities
from adaskip.plan import Phase, whole_layers
from adaskip.policies import FixedSkipping
from adaskip.reports.observation_figures import Curve, Panel
from adaskip.runs.generation import generate_greedy
from adaskip.runs.loaded import LoadedModel as Bench
from adaskip.runs.perplexity import Loss, shared_perplexity
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.store import Store, locked
from adaskip.session import skipping
from adaskip.tables import MISSING, markdown_table, number
from adaskip.tasks.prompts import postprocess
from adaskip.tasks.spec import Row, task_spec

DENSE, HIGHEST, LOWEST = "nothing", "highest similarity", "lowest similarity"


@dataclass(frozen=True)
class Choice:
    """A set of whole layers to skip: the first or last `n` by similarity."""

    side: str
    layers: tuple[int, ...]


class Measured(Loss):
    """Perplexity of a task's references, and its score if asked for, under one choice.

    Attributes:
        rows: of the task.
        score: x100.
    """

    rows: int
    score: float | None = None


def layer_similarity(seen: Sequence[Similarities]) -> list[float]:
    """IO similarity of every whole layer in prefill, over the tokens of all tasks."""
    columns = zip(*(each.layers("layer", Phase.PREFILL) for each in seen), strict=True)
    return [reduce(add, moments).mean for moments in columns]


def choices(similarity: Sequence[float], counts: Sequence[int]) -> list[Choice]:
    """Nothing, then for each count the layers of highest and of lowest similarity."""
    order = sorted(range(len(similarity)), key=lambda layer: -similarity[layer])
    made = [Choice(DENSE, ())]
    for n in counts:
        if n < len(order):
            made.append(Choice(HIGHEST, tuple(order[:n])))
            made.append(Choice(LOWEST, tuple(order[: -n - 1 : -1])))
    return made


def measure(
    config: RunConfig,
    task: str,
    made: Sequence[Choice],
    open_bench: OpenBench,
    *,
    scores: bool = False,
) -> list[dict[str, float]]:
    """Perplexity of a task's references, and if asked for its score, under each choice.

    Saved after every choice, in `results_dir/layers/`; a later call goes on from there.

    Raises:
        AdaskipError: the data, the model or an earlier record does not fit.
    """
    max_tokens = int(read_config("observations.yaml")["reference_tokens"])
    path = Path(config.results_dir) / "layers" / f"{config.name}-{task}.json"
    settings = {**config.settings(), "limit": config.limit, "reference_tokens": max_tokens}
    group = team()
    store = Store(path, Measured, settings, {"model": config.name, "task": task}, key="sums")
    with locked(path.parent):
        kept = {row.id: row.as_dict() for row in group.on_main(store.rows)}
        found: list[dict[str, Any]] = []
        for choice in tqdm(
            made, desc=f"{config.name} {task}", unit="set", disable=not group.is_main
        ):
            key = " ".join(map(str, sorted(choice.layers))) or "none"
            done = kept.setdefault(key, {"id": key})
            found.append(done)
            policy = FixedSkipping(whole_layers(choice.layers))
            if "nll" not in done:
                bench, rows = opened(config, open_bench, lambda bench: bench.rows(config, task))
                items = [(bench.prompt(config, row), row.answers[0]) for row in rows]
                result = shared_perplexity(
                    bench.model, bench.tokenizer, policy, items, max_tokens=max_tokens
                )
                done |= {"nll": result.nll, "tokens": result.tokens, "rows": len(rows)}
                group.on_main(partial(store.append, [Measured.from_dict(done)]))
            if scores and "score" not in done:
                bench, rows = opened(config, open_bench, lambda bench: bench.rows(config, task))
                done["score"] = _score(config, bench, rows, policy)
                group.on_main(partial(store.append, [Measured.from_dict(done)]))
    return [{key: value for key, value in each.items() if key != "id"} for each in found]


def _score(config: RunConfig, bench: Bench, rows: Sequence[Row], policy: FixedSkipping) -> float:
    """The task's score x100, generated under the policy."""

    def generate(own: Sequence[Row]) -> list[float]:
        values = []
        with skipping(bench.model, policy):
            for row in own:
                stop = bench.stop_rule(config, row.task)
                made = generate_greedy(bench.model, [bench.prompt(config, row).input_ids], stop)
                text = str(bench.tokenizer.decode(list(made.tokens[0]), skip_special_tokens=True))
                answer = postprocess(text, task_spec(row.task), bench.spec.answer_end)
                values.append(score(row.task, answer, row.answers, row.all_classes))
        return values

    values = team().spread(rows, generate)
    return round(100 * math.fsum(values) / len(values), 2)


def perplexity_of(measured: Mapping[str, float]) -> float:
    """The perplexity in one measurement."""
    return math.exp(min(measured["nll"] / measured["tokens"], 700.0))


def table(made: Sequence[Choice], measured: Mapping[str, Sequence[dict[str, float]]]) -> str:
    """One line per choice: perplexity per task, its ratio to the dense one's, scores if any."""
    header = ["skipped", "layers"]
    for task in measured:
        header += [f"{task} perplexity", "x dense"]
        header += [f"{task} score"] if "score" in measured[task][0] else []
    lines = []
    for index, choice in enumerate(made):
        layers = ", ".join(map(str, sorted(choice.layers))) or MISSING
        line = [f"{len(choice.layers)} of {choice.side}" if choice.layers else DENSE, layers]
        for found in measured.values():
            value = perplexity_of(found[index])
            line += [_short(value), _short(value / perplexity_of(found[0]))]
            line += [number(found[index]["score"])] if "score" in found[0] else []
        lines.append(line)
    return markdown_table(header, lines)


def _short(value: float) -> str:
    return f"{value:.2f}" if value < 1000 else f"{value:.3g}"


def panels(
    model: str, made: Sequence[Choice], measured: Mapping[str, Sequence[dict[str, float]]]
) -> list[Panel]:
    """One panel per task: perplexity against the number of layers skipped."""
    drawn = []
    for task, found in measured.items():
        curves = []
        for style, side in enumerate((HIGHEST, LOWEST)):
            points = [
                (len(choice.layers), perplexity_of(each))
                for choice, each in zip(made, found, strict=True)
                if choice.side in (DENSE, side)
            ]
            x, y = zip(*points, strict=True)
            curves.append(Curve(f"layers of {side} skipped", x, y, style, dashed=style == 1))
        title, label = f"{model}: {task_label('ob0', task)}", "perplexity of references (log)"
        ticks = {float(n): str(n) for n in sorted({len(choice.layers) for choice in made})}
        drawn.append(Panel(title, "whole layers skipped", label, tuple(curves), ticks, log=True))
    return drawn


def as_json(
    made: Sequence[Choice], measured: Mapping[str, Sequence[dict[str, float]]]
) -> dict[str, Any]:
    """What was skipped and what came of it."""
    return {
        "choices": [{"side": c.side, "layers": sorted(c.layers)} for c in made],
        "tasks": {
            task: [each | {"perplexity": perplexity_of(each)} for each in found]
            for task, found in measured.items()
        },
    }
