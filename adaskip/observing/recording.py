"""Records IO similarities prompt by prompt into resumable files, for the observations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from adaskip.configuration import read_config
from adaskip.entering import skipping
from adaskip.errors import DataError, no_numbers
from adaskip.learning import record_prompts
from adaskip.models.internlm import check_prompt_length
from adaskip.models.processes import team
from adaskip.observing.similarities import SPANS, from_rows, refuse_no_numbers
from adaskip.plan import EMPTY_PLAN, Phase
from adaskip.policies import FixedSkipping
from adaskip.recorders import TokenStatistics
from adaskip.runs.generation import StopRule, generate_greedy
from adaskip.runs.loaded import LoadedModel, hold, unchanged
from adaskip.runs.rows import Stored
from adaskip.runs.runconfig import DATA_DIR, RunConfig
from adaskip.runs.store import Share, Store, locked
from adaskip.tasks.spec import Row, task_spec


class Observed(Stored):
    """What was observed of one prompt.

    Attributes:
        id: the prompt's row.
        sums: by phase, a count of tokens and per part of a layer `[total, squares]` by layer.
        similarity: of every sublayer, the mean over the prompt's tokens.
    """

    id: str
    sums: dict[str, dict[str, Any]] | None = None
    similarity: list[float] | None = None


OpenModel = Callable[[RunConfig], LoadedModel]


def record_path(config: RunConfig, kind: str, task: str) -> Path:
    """What tells of a task's rows: their settings, and the environments they were measured in.

    Args:
        config: whose `results_dir` it is in.
        kind: of what was measured: "similarity", "requests" or "layers".
        task: one of its tasks.
    """
    return Path(config.results_dir) / kind / f"{config.name}-{task}.json"


def observe_tasks(config: RunConfig, open_model: OpenModel) -> dict[str, pd.DataFrame]:
    """Records all tasks of a configuration; per task what `observe_task` returns."""
    return {task: observe_task(config, task, open_model) for task in config.tasks}


def observe_task(config: RunConfig, task: str, open_model: OpenModel) -> pd.DataFrame:
    """Records the similarities of a task's prompts in prefill and in their first decode steps.

    Every prompt is followed by as many new tokens as METHOD says, also where the answer would have
    ended.

    Args:
        config: resolved; `results_dir` is where `similarity/` is kept.
        task: one of its tasks.
        open_model: loads the model; not called if nothing is missing.

    Returns:
        The sums of every prompt, as `similarities.from_rows` has them.

    Raises:
        AdaskipError: the data, the model or an earlier record does not fit.
    """
    new_tokens = int(read_config("observations.yaml")["new_tokens"])
    stop = StopRule(frozenset(), new_tokens)

    def observe(loaded: LoadedModel, row: Row) -> dict[str, Any]:
        ids = loaded.prompt(config, row).input_ids
        check_prompt_length(loaded.model, len(ids), new_tokens)
        recorders = {phase: TokenStatistics(*SPANS, phase=phase) for phase in Phase}
        policy = FixedSkipping(EMPTY_PLAN)
        with skipping(loaded.model, policy, recorders=[*recorders.values()]):
            generate_greedy(loaded.model, [ids], stop)
        sums = {phase: _sums(recorder) for phase, recorder in recorders.items()}
        told = [sums[phase].get(span, ()) for phase in Phase for span in SPANS]
        if not all(map(math.isfinite, chain.from_iterable(chain.from_iterable(told)))):
            raise no_numbers(loaded.model.dtype)
        return {"sums": sums}

    rows = _recorded(
        record_path(config, "similarity", task),
        (config, task, {**config.settings(), "new_tokens": new_tokens}),
        task_spec(task).wanted(config.limit),
        open_model,
        lambda loaded: loaded.rows(config, task),
        observe,
    )
    return from_rows(rows)


def observe_requests(
    config: RunConfig, task: str, open_model: OpenModel, n_prompts: int
) -> list[list[float]]:
    """The similarity of every sublayer in each of a task's warm-up prompts: [requests][2L].

    As the offline importance is learned: prefill only, the mean over a request's tokens.

    Raises:
        DataError: the task has fewer prompts.
        AdaskipError: the model or an earlier record does not fit.
    """

    def observe(loaded: LoadedModel, row: Row) -> dict[str, Any]:
        ids = torch.tensor([loaded.prompt(config, row).input_ids])
        check_prompt_length(loaded.model, ids.shape[1])
        means = record_prompts(loaded.model, [ids]).per_request()
        similarity = [round(x, 8) for x in means[0, :, 0].tolist()]
        if not all(map(math.isfinite, similarity)):
            raise no_numbers(loaded.model.dtype)
        return {"similarity": similarity}

    rows = _recorded(
        record_path(config, "requests", task),
        (config, task, config.settings()),
        n_prompts,
        open_model,
        lambda loaded: _warmup_rows(config, task, loaded, n_prompts),
        observe,
    )
    refuse_no_numbers((row["id"], row["similarity"]) for row in rows)
    return [row["similarity"] for row in rows[:n_prompts]]


def _recorded(
    record: Path,
    about: tuple[RunConfig, str, dict[str, Any]],
    limit: int | None,
    open_model: OpenModel,
    rows_of: Callable[[LoadedModel], Sequence[Row]],
    observe: Callable[[LoadedModel, Row], dict[str, Any]],
) -> list[dict[str, Any]]:
    """What was observed of each row; kept row by row, a later call goes on from there.

    Args:
        record: what says what they are about; the rows lie beside it.
        about: configuration, task and settings.
        limit: rows asked for; None is all there are.
        open_model: loads the model; not called if nothing is missing.
        rows_of: the rows, once the model is there.
        observe: what to keep of a row.
    """
    config, task, settings = about
    group = team()
    store = Store(
        record.with_suffix(".jsonl"),
        Observed,
        settings | config.data_settings([task]),
        {"model": config.name, "task": task},
        lately=[DATA_DIR],
    )
    with locked(record.parent):
        known = group.on_main(lambda: store.record().get("limit", 0))
        made = group.on_main(store.rows)
        # Rows count up to the limit of a call that came to its end, 0 if none did: those of an
        # interrupted one have holes, of what other processes had not made yet.
        whole = made and (known is None or (limit is not None and limit <= known))
        if not (whole and group.on_main(lambda: unchanged(store, config))):
            group.on_main(store.note)
            loaded, rows = opened(config, open_model, rows_of, store)
        if whole:
            return [row.as_dict() for row in made[:limit]]
        if not {row.id for row in rows} <= {row.id for row in made}:
            group.on_main(lambda: store.note_environment(str(loaded.model.device)))

        def work(share: Share[Observed]) -> None:
            missing = [row for row in rows if row.id not in share.done]
            mine = share.of(missing)
            done = len(rows) - len(missing)
            bar = tqdm(
                mine,
                desc=f"{config.name} {task}",
                unit="prompt",
                initial=done,
                total=done + len(mine),
                disable=not group.is_main,
            )
            for row in bar:
                share.append([Observed(id=row.id, **observe(loaded, row))])

        order = [row.id for row in rows]
        made = store.make(order, work)
        group.on_main(lambda: store.note(limit=limit))
    # An interrupted call that asked for more leaves more.
    return [row.as_dict() for row in made if row.id in order]


def opened(
    config: RunConfig,
    open_model: OpenModel,
    rows_of: Callable[[LoadedModel], Sequence[Row]],
    store: Store[Any],
) -> tuple[LoadedModel, Sequence[Row]]:
    """Model and rows, loaded by the main process before the others: what it leaves, they find.

    Raises:
        RunError: what the store has was made with another model or other rows.
    """
    group = team()
    with group.together(), group.main_ahead():
        loaded = open_model(config)
        rows = rows_of(loaded)
    hold(store, config, loaded, rows)
    return loaded, rows


def _warmup_rows(config: RunConfig, task: str, loaded: LoadedModel, n: int) -> list[Row]:
    """Prompts apart from the test rows where the task has a split for them."""
    rows = loaded.warmup_rows(config, task, n)
    if len(rows) < n:
        raise DataError(f"{task} has {len(rows)} rows, {n} are needed; use other tasks (--tasks).")
    return rows


def _sums(recorder: TokenStatistics) -> dict[str, Any]:
    """The tokens a recorder saw, and per part `[total, squares]` of each layer.

    One read from the device.
    """
    if recorder.count is None or recorder.total is None or recorder.squares is None:
        return {"count": 0}
    read = torch.cat([recorder.count[None], recorder.total, recorder.squares]).tolist()
    n = len(recorder.rows)
    sums: dict[str, Any] = {"count": round(read[0])}
    for (_, span), *pair in zip(recorder.rows, read[1 : n + 1], read[n + 1 :], strict=True):
        sums.setdefault(span, []).append(pair)
    return sums
