"""Records IO similarities prompt by prompt into resumable JSON files, for the observations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from adaskip.configuration import read_config
from adaskip.errors import DataError, RunError
from adaskip.experiments.bench import SAMPLE_ROWS, Bench
from adaskip.experiments.generation import StopRule, generate_greedy
from adaskip.experiments.records import SCHEMA, Record, lock, read_json, write_json
from adaskip.experiments.runconfig import RunConfig
from adaskip.learning import record_prompts
from adaskip.models.internlm import check_prompt_length
from adaskip.observing.similarities import SPANS, Similarities
from adaskip.plan import EMPTY_PLAN, Phase
from adaskip.policies import FixedSkipping
from adaskip.recorders import TokenStatistics
from adaskip.session import skipping
from adaskip.tasks.sample import sample_rows
from adaskip.tasks.spec import Row, task_spec

OpenBench = Callable[[RunConfig], Bench]


def observe_task(config: RunConfig, task: str, open_bench: OpenBench) -> Similarities:
    """Records the similarities of a task's prompts in prefill and in their first decode steps.

    Every prompt is followed by as many new tokens as METHOD says, also where the answer would have
    ended. The sums are saved after every prompt; a later call goes on from there.

    Args:
        config: resolved; `results_dir` is where `similarity/` is kept.
        task: one of its tasks.
        open_bench: loads the model; not called if nothing is missing.

    Raises:
        AdaskipError: the data, the model or an earlier record does not fit.
    """
    new_tokens = int(read_config("observations.yaml")["new_tokens"])
    path = Path(config.results_dir) / "similarity" / f"{config.name}-{task}.json"
    settings = {**config.settings(), "new_tokens": new_tokens}
    with lock(path.parent):
        record = begun(path, config, task, settings)
        if not _finished(record, _row_limit(config, task)):
            bench = open_bench(config)
            rows = bench.rows(config, task)
            stop = StopRule(frozenset(), new_tokens)
            for row in _pending(rows, record, f"{config.name} {task}"):
                ids = bench.prompt(config, row).input_ids
                check_prompt_length(bench.model, len(ids), new_tokens)
                recorders = {phase: TokenStatistics(*SPANS, phase=phase) for phase in Phase}
                policy = FixedSkipping(EMPTY_PLAN)
                with skipping(bench.model, policy, recorders=[*recorders.values()]):
                    generate_greedy(bench.model, [ids], stop)
                for phase, recorder in recorders.items():
                    _add(record["sums"].setdefault(phase, {}), recorder)
                record["ids"].append(row.id)
                write_json(path, record)
            _finish(path, record, _row_limit(config, task))
    return Similarities.from_sums(config.name, task, record["ids"], record["sums"])


def observe_requests(
    config: RunConfig, task: str, open_bench: OpenBench, n_prompts: int
) -> list[list[float]]:
    """The similarity of every sublayer in each of a task's warm-up prompts: [requests][2L].

    As the offline importance is learned: prefill only, the mean over a request's tokens. Saved
    after every prompt and gone on with, as in `observe_task`.

    Raises:
        DataError: the task has fewer prompts.
        AdaskipError: the model or an earlier record does not fit.
    """
    path = Path(config.results_dir) / "requests" / f"{config.name}-{task}.json"
    with lock(path.parent):
        record = begun(path, config, task, config.settings())
        if not _finished(record, n_prompts):
            bench = open_bench(config)
            rows = _warmup_rows(config, task, bench, n_prompts)
            for row in _pending(rows, record, f"{config.name} {task} warm-up"):
                ids = torch.tensor([bench.prompt(config, row).input_ids])
                check_prompt_length(bench.model, ids.shape[1])
                means = record_prompts(bench.model, [ids]).per_request()
                record["sums"][row.id] = [round(x, 8) for x in means[0, :, 0].tolist()]
                record["ids"].append(row.id)
                write_json(path, record)
            _finish(path, record, n_prompts)
    return [record["sums"][row_id] for row_id in record["ids"][:n_prompts]]


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
            "limit": 0,
            "ids": [],
            "sums": {},
        }
    record = read_json(path)
    old = record["settings"]
    changed = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    if changed:
        what = ", ".join(f"{key}: {old.get(key)!r} then, {new.get(key)!r} now" for key in changed)
        raise RunError(
            f"{path} was made with other settings ({what}); choose another --results_dir, or move "
            "the file away."
        )
    return record


def _row_limit(config: RunConfig, task: str) -> int | None:
    """Rows asked for; None is all there are."""
    return config.limit or (SAMPLE_ROWS if task_spec(task).offline else None)


def _finished(record: Record, limit: int | None) -> bool:
    """Whether a record covers the rows asked for; `limit` 0 in it: never completed."""
    known = record["limit"]
    return known is None or (limit is not None and len(record["ids"]) >= limit)


def _finish(path: Path, record: Record, limit: int | None) -> None:
    record["limit"] = limit
    write_json(path, record)


def _pending(rows: Sequence[Row], record: Record, title: str) -> Any:
    """The rows not yet recorded, under a progress bar that counts the others as done."""
    done = set(record["ids"])
    if done - {row.id for row in rows}:
        raise RunError(
            f"The record of {title} holds rows that are not among those asked for: give the data "
            "it was made with, or another --results_dir."
        )
    with tqdm(total=len(rows), initial=len(done), desc=title, unit="prompt") as bar:
        for row in rows:
            if row.id not in done:
                yield row
                bar.update()


def _warmup_rows(config: RunConfig, task: str, bench: Bench, n: int) -> list[Row]:
    """Prompts apart from the test rows where the task has a split for them."""
    if task_spec(task).offline:
        return sample_rows(
            task,
            bench.tokenizer,
            split="warmup",
            n=n,
            tokens=config.sample_tokens,
            seed=config.seed,
        )
    rows = bench.rows(config, task)[:n]
    if len(rows) < n:
        raise DataError(f"{task} has {len(rows)} rows, {n} are needed; use other tasks (--tasks).")
    return rows


def _add(sums: dict[str, Any], recorder: TokenStatistics) -> None:
    """Adds what a recorder saw, with one read from the device, to `{part: [[total, squares]]}`."""
    if recorder.count is None or recorder.total is None or recorder.squares is None:
        return
    read = torch.cat([recorder.count[None], recorder.total, recorder.squares]).tolist()
    n = len(recorder.rows)
    sums["count"] = sums.get("count", 0) + round(read[0])
    for (layer, span), total, squares in zip(
        recorder.rows, read[1 : n + 1], read[n + 1 :], strict=True
    ):
        column = sums.setdefault(span, [])
        if layer == len(column):
            column.append([0.0, 0.0])
        column[layer] = [column[layer][0] + total, column[layer][1] + squares]
