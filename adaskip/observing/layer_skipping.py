"""The paper's first table: skipping the layers of highest or of lowest IO similarity."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pandas as pd
from tqdm import tqdm

from adaskip.configuration import read_config
from adaskip.entering import skipping
from adaskip.metrics import score
from adaskip.models.processes import team
from adaskip.observing.recording import OpenModel, observe_tasks, opened, record_path
from adaskip.observing.similarities import layers
from adaskip.plan import Phase, whole_layers
from adaskip.policies import FixedSkipping
from adaskip.runs.generation import generate_greedy
from adaskip.runs.loaded import LoadedModel, unchanged
from adaskip.runs.perplexity import Loss, perplexity_of, shared_perplexity
from adaskip.runs.runconfig import DATA_DIR, RunConfig
from adaskip.runs.store import Store, locked
from adaskip.tasks.prompts import postprocess
from adaskip.tasks.spec import Row

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


def skip_layers(config: RunConfig, open_model: OpenModel, *, scores: bool) -> dict[str, Any]:
    """Skips the layers of highest and of lowest similarity of one model.

    Args:
        config: resolved.
        open_model: loads the model; not called if everything is measured.
        scores: also generate answers and score them.

    Returns:
        `choices`: what was skipped. `tasks`: per task what came of each choice. `similarity`: of
        every whole layer.

    Raises:
        AdaskipError: the data, the model or an earlier record does not fit.
    """
    facts = read_config("observations.yaml")
    similarity = layer_similarity(observe_tasks(config, open_model))
    made = choices(similarity, facts["skipped_layers"])
    few = dataclasses.replace(config, limit=config.limit or facts["perplexity_rows"])
    found = {task: measure(few, task, made, open_model, scores=scores) for task in config.tasks}
    return {
        "choices": [{"side": c.side, "layers": sorted(c.layers)} for c in made],
        "tasks": {
            task: [
                each | {"perplexity": perplexity_of(each["nll"], each["tokens"])}
                for each in measured
            ]
            for task, measured in found.items()
        },
        "similarity": [round(value, 7) for value in similarity],
    }


def layer_similarity(seen: Mapping[str, pd.DataFrame]) -> list[float]:
    """IO similarity of every whole layer in prefill, over the tokens of all tasks."""
    means: list[float] = layers(pd.concat(seen), "layer", Phase.PREFILL)["mean"].tolist()
    return means


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
    open_model: OpenModel,
    *,
    scores: bool = False,
) -> list[dict[str, float]]:
    """Perplexity of a task's references, and if asked for its score, under each choice.

    Saved after every choice, in `results_dir/layers/`; a later call goes on from there.

    Raises:
        AdaskipError: the data, the model or an earlier record does not fit.
    """
    max_tokens = int(read_config("observations.yaml")["reference_tokens"])
    path = record_path(config, "layers", task)
    settings = {**config.settings(), "limit": config.limit, "reference_tokens": max_tokens}
    settings |= config.data_settings([task])
    about = {"model": config.name, "task": task}
    group = team()
    store = Store(path, Measured, settings, about, key="sums", lately=[DATA_DIR])

    @cache
    def ready() -> tuple[LoadedModel, Sequence[Row]]:
        return opened(config, open_model, lambda loaded: loaded.rows(config, task), store)

    @cache
    def measuring() -> tuple[LoadedModel, Sequence[Row]]:
        loaded, rows = ready()
        group.on_main(lambda: store.note_environment(str(loaded.model.device)))
        return loaded, rows

    with locked(path.parent):
        kept = {row.id: row.as_dict() for row in group.on_main(store.rows)}
        if kept and not group.on_main(lambda: unchanged(store, config)):
            ready()
        found: list[dict[str, Any]] = []
        for choice in tqdm(
            made, desc=f"{config.name} {task}", unit="set", disable=not group.is_main
        ):
            key = " ".join(map(str, sorted(choice.layers))) or "none"
            done = kept.setdefault(key, {"id": key})
            found.append(done)
            policy = FixedSkipping(whole_layers(choice.layers))
            if "nll" not in done:
                loaded, rows = measuring()
                items = [(loaded.prompt(config, row), row.reference) for row in rows]
                result = shared_perplexity(
                    loaded.model, loaded.tokenizer, policy, items, max_tokens=max_tokens
                )
                done |= {"nll": result.nll, "tokens": result.tokens, "rows": len(rows)}
                group.on_main(partial(store.append, [Measured.from_dict(done)]))
            if scores and "score" not in done:
                loaded, rows = measuring()
                done["score"] = _score(config, loaded, rows, policy)
                group.on_main(partial(store.append, [Measured.from_dict(done)]))
    # Scores that an earlier call was asked for may be those of a few choices.
    told = {"nll", "tokens", "rows"} | ({"score"} if scores else set())
    return [{key: value for key, value in each.items() if key in told} for each in found]


def _score(
    config: RunConfig, loaded: LoadedModel, rows: Sequence[Row], policy: FixedSkipping
) -> float:
    """The task's score x100, generated under the policy."""

    def generate(own: Sequence[Row]) -> list[float]:
        values = []
        with skipping(loaded.model, policy):
            for row in own:
                stop = loaded.stop_rule(config, row.task)
                made = generate_greedy(loaded.model, [loaded.prompt(config, row).input_ids], stop)
                text = str(loaded.tokenizer.decode(list(made.tokens[0]), skip_special_tokens=True))
                answer = postprocess(text, loaded.spec.answer_end)
                values.append(score(row.task, answer, row.answers, row.all_classes))
        return values

    values = team().spread(rows, generate)
    return round(100 * math.fsum(values) / len(values), 2)
