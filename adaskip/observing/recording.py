"""Records IO similarities prompt by prompt into resumable files, for the observations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tqdm import tqdm

from adaskip.configuration import read_config
from adaskip.errors import DataError, RunError
from adaskip.learning import record_prompts
from adaskip.models.internlm import check_prompt_length
from adaskip.models.processes import team
from adaskip.observing.similarities import SPANS, from_rows
from adaskip.plan import EMPTY_PLAN, Phase
from adaskip.policies import FixedSkipping
from adaskip.recorders import TokenStatistics
from adaskip.runs.bench import SAMPLE_ROWS, Bench
from adaskip.runs.generation import StopRule, generate_greedy
from adaskip.runs.parts import Share, locked, make_rows
from adaskip.runs.records import (
    SCHEMA,
    Record,
    append_rows,
    differences,
    read_json,
    read_rows,
    write_json,
)
from adaskip.runs.runconfig import RunConfig
from adaskip.session import skipping
from adaskip.tasks.sample import sample_rows
from adaskip.tasks.spec import Row, task_spec

OpenBench = Callable[[RunConfig], Bench]


def observe_tasks(config: RunConfig, open_bench: OpenBench) -> dict[str, pd.DataFrame]:
    """Records all tasks of a configuration; per task what `observe_task` returns."""
    return {task: observe_task(config, task, open_bench) for task in config.tasks}


def observe_task(config: RunConfig, task: str, open_bench: OpenBench) -> pd.DataFrame:
    """Records the similarities of a task's prompts in prefill and in their first decode steps.

    Every prompt is followed by as many new tokens as METHOD says, also where the answer would have
    ended.

    Args:
        config: resolved; `results_dir` is where `similarity/` is kept.
        task: one of its tasks.
        open_bench: loads the model; not called if nothing is missing.

    Returns:
        The sums of every prompt, as `similarities.from_rows` has them.

    Raises:
        AdaskipError: the data, the model or an earlier record does not fit.
    """
    new_tokens = int(read_config("observations.yaml")["new_tokens"])
    stop = StopRule(frozenset(), new_tokens)

    def observe(bench: Bench, row: Row) -> Record:
        ids = bench.prompt(config, row).input_ids
        check_prompt_length(bench.model, len(ids), new_tokens)
        recorders = {phase: TokenStatistics(*SPANS, phase=phase) for phase in Phase}
        policy = FixedSkipping(EMPTY_PLAN)
        with skipping(bench.model, policy, recorders=[*recorders.values()]):
            generate_greedy(bench.model, [ids], stop)
        return {"sums": {phase: _sums(recorder) for phase, recorder in recorders.items()}}

    rows = _recorded(
        Path(config.results_dir) / "similarity" / f"{config.name}-{task}.jsonl",
        (config, task, {**config.settings(), "new_tokens": new_tokens}),
        config.limit or (SAMPLE_ROWS if task_spec(task).offline else None),
        open_bench,
        lambda bench: bench.rows(config, task),
        observe,
    )
    return from_rows(rows)


def observe_requests(
    config: RunConfig, task: str, open_bench: OpenBench, n_prompts: int
) -> list[list[float]]:
    """The similarity of every sublayer in each of a task's warm-up prompts: [requests][2L].

    As the offline importance is learned: prefill only, the mean over a request's tokens.

    Raises:
        DataError: the task has fewer prompts.
        AdaskipError: the model or an earlier record does not fit.
    """

    def observe(bench: Bench, row: Row) -> Record:
        ids = torch.tensor([bench.prompt(config, row).input_ids])
        check_prompt_length(bench.model, ids.shape[1])
        means = record_prompts(bench.model, [ids]).per_request()
        return {"similarity": [round(x, 8) for x in means[0, :, 0].tolist()]}

    rows = _recorded(
        Path(config.results_dir) / "requests" / f"{config.name}-{task}.jsonl",
        (config, task, config.settings()),
        n_prompts,
        open_bench,
        lambda bench: _warmup_rows(config, task, bench, n_prompts),
        observe,
    )
    return [row["similarity"] for row in rows[:n_prompts]]


def _recorded(
    path: Path,
    about: tuple[RunConfig, str, dict[str, Any]],
    limit: int | None,
    open_bench: OpenBench,
    rows_of: Callable[[Bench], Sequence[Row]],
    observe: Callable[[Bench, Row], Record],
) -> list[Record]:
    """What was observed of each row; kept row by row, a later call goes on from there.

    Args:
        path: the JSONL file; beside it, `.json` says what it is about.
        about: configuration, task and settings, as `begun` takes them.
        limit: rows asked for; None is all there are.
        open_bench: loads the model; not called if nothing is missing.
        rows_of: the rows, once the model is there.
        observe: what to keep of a row.
    """
    group, header_path = team(), path.with_suffix(".json")
    config, task, _ = about
    with locked(path.parent):
        header = group.on_first(lambda: begun(header_path, *about))
        made = group.on_first(lambda: read_rows(path))
        if _finished(header, len(made), limit):
            return made
        group.on_first(lambda: write_json(header_path, header))
        bench, rows = opened(config, open_bench, rows_of)

        def work(share: Share) -> None:
            missing = [row for row in rows if row.id not in share.done]
            mine = missing[share.rank :: share.world]
            done = len(rows) - len(missing)
            bar = tqdm(
                mine,
                desc=f"{config.name} {task}",
                unit="prompt",
                initial=done,
                total=done + len(mine),
                disable=not group.is_first,
            )
            for row in bar:
                if share.target is not None:
                    append_rows(share.target, [{"id": row.id} | observe(bench, row)])

        made = make_rows(path, [row.id for row in rows], work)
        group.on_first(lambda: write_json(header_path, header | {"limit": limit}))
    return made


def opened(
    config: RunConfig, open_bench: OpenBench, rows_of: Callable[[Bench], Sequence[Row]]
) -> tuple[Bench, Sequence[Row]]:
    """Model and rows, loaded by the main process before the others: what it leaves, they find."""
    group = team()
    with group.together(), group.first_ahead():
        bench = open_bench(config)
        return bench, rows_of(bench)


def begun(path: Path, config: RunConfig, task: str, settings: dict[str, Any]) -> Record:
    """The record to go on with: the one at `path`, or an empty one.

    Raises:
        RunError: it was made with other settings.
    """
    # As JSON has them, to be compared with what was read.
    new = {key: list(v) if isinstance(v, tuple) else v for key, v in settings.items()}
    if not path.exists():
        return {
            "schema": SCHEMA,
            "model": config.name,
            "task": task,
            "settings": new,
            "sums": {},
        }
    record = read_json(path)
    what = differences(record["settings"], new)
    if what:
        raise RunError(
            f"{path} was made with other settings ({what}); choose another --results_dir, or move "
            "the file away."
        )
    return record


def _finished(header: Record, n_rows: int, limit: int | None) -> bool:
    """Whether a record covers the rows asked for; its own limit is 0 if it was never completed."""
    known = header.get("limit", 0)
    return n_rows > 0 and (known is None or (limit is not None and n_rows >= limit))


def _warmup_rows(config: RunConfig, task: str, bench: Bench, n: int) -> list[Row]:
    """Prompts apart from the test rows where the task has a split for them."""
    if task_spec(task).offline:
        size = {"n": n, "tokens": config.sample_tokens, "seed": config.seed}
        return sample_rows(task, bench.tokenizer, split="warmup", **size)
    rows = bench.rows(config, task)[:n]
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
