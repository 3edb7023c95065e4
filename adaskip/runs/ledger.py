"""`run.json`: what a run is, checked before it is continued, written before its first row."""

from __future__ import annotations

import datetime as dt
import hashlib
import uuid
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from adaskip.errors import AdaskipError, RunError
from adaskip.importance import Importance
from adaskip.models.processes import team
from adaskip.policies.factory import LEARNED, takes
from adaskip.runs.records import (
    SCHEMA,
    Record,
    differences,
    environment,
    read_json,
    read_rows,
    write_json,
)
from adaskip.runs.rows import check_row
from adaskip.runs.runconfig import RunConfig
from adaskip.tasks.prompts import prompt_template
from adaskip.tasks.spec import task_spec

RUN_FILE = "run.json"


@cache
def session_id() -> str:
    """This command; rows and records carry it, because times compare only within one session."""
    return team().on_first(lambda: uuid.uuid4().hex[:12])


def run_folder(config: RunConfig) -> Path:
    """Where a run is kept."""
    return Path(config.results_dir) / config.folder_name


def rows_path(config: RunConfig, task: str) -> Path:
    """The JSONL file of one task of a run."""
    return run_folder(config) / f"{task}.jsonl"


def rows_of(config: RunConfig, task: str) -> list[Record]:
    """The rows of one task that a run has so far.

    Raises:
        RunError: a line before the last is damaged, or no row of a run.
    """
    return read_rows(rows_path(config, task), check_row)


def answer_length(config: RunConfig, task: str) -> int:
    """Longest answer of a task in this run, in tokens."""
    return config.max_new_tokens or task_spec(task).max_new_tokens


def existing_record(config: RunConfig) -> Record:
    """The record of an earlier start of this run; empty if there is none.

    Raises:
        RunError: it was made with other settings, or may not be continued.
    """
    folder = run_folder(config)
    if not (folder / RUN_FILE).exists():
        if any(folder.glob("*.jsonl")):
            raise RunError(f"{folder} has rows but no {RUN_FILE}; move the folder away.")
        return {}
    record = read_record(folder)
    if not config.resume:
        raise RunError(f"{folder} exists already: leave out --no-resume, or give another --model.")
    old = RunConfig.from_dict(record["config"])
    what = differences(old.settings(), config.settings())
    if not what:  # another policy has other fields: its name says enough
        # Without the policy's own account, its options tell.
        made = record.get("policy") or old.policy_settings()
        what = differences(made, config.policy_settings())
    if what:
        raise RunError(
            f"{folder} was made with other settings ({what}). Nothing was changed; give this run "
            "another name (--model NAME) or move the folder away."
        )
    return record


def read_record(folder: Path) -> Record:
    """What `run.json` of a run's folder holds, its parts checked.

    Raises:
        RunError: it is damaged, or of another version.
    """
    path = folder / RUN_FILE
    record = read_json(path)
    try:
        RunConfig.from_dict(record["config"])
        good = isinstance(record.get("policy", {}), dict)
        good &= isinstance(record["n_layers"], int) and record["n_layers"] > 0
        good &= isinstance(record["importance"], str | None)
        good &= all(isinstance(item["id"], str) for item in record["sessions"])
        for task, facts in record["tasks"].items():
            task_spec(task)
            good &= isinstance(facts["rows"], int) and isinstance(facts["max_new_tokens"], int)
            good &= isinstance(facts["limit"], int | None) and isinstance(
                facts["prompt_sha256"], str
            )
    except (KeyError, TypeError, AttributeError, AdaskipError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise RunError(f"{path} is damaged ({reason}); move its folder away.") from error
    if not good:
        raise RunError(f"{path} is damaged (a value is of the wrong type); move its folder away.")
    return record


def is_finished(config: RunConfig) -> bool:
    """Whether a resolved configuration has nothing left to do; needs no model.

    Raises:
        RunError: the run exists with other settings, or its files are damaged.
    """
    record = existing_record(config)
    tasks = record.get("tasks", {})
    return (
        bool(record)
        and _same_profile(config, record)
        and all(
            task in tasks
            and tasks[task]["max_new_tokens"] == answer_length(config, task)
            and _covers(tasks[task]["limit"], config.limit)
            and len(rows_of(config, task)) >= tasks[task]["rows"]
            for task in config.tasks
        )
    )


def begin(
    config: RunConfig, *, n_layers: int, profile: str | None, n_rows: Mapping[str, int]
) -> Record:
    """Writes `run.json` for a start or a continuation.

    Args:
        config: resolved.
        n_layers: decoder layers of the model.
        profile: name of the importance profile, if the policy has one.
        n_rows: rows of each task.

    Returns:
        The record.

    Raises:
        RunError: the run was made with other settings or another profile, or cannot be written.
    """
    old = existing_record(config)
    if old and old["importance"] != profile:
        raise RunError(
            f"{run_folder(config)} was made with importance profile {old['importance']}, now it is "
            f"{profile}; give this run another name (--model NAME), or the same --importance."
        )
    tasks: dict[str, Record] = dict(old.get("tasks", {}))
    for task, count in n_rows.items():
        known, length = tasks.get(task), answer_length(config, task)
        if known is not None and known["max_new_tokens"] != length:
            raise RunError(
                f"{run_folder(config)} has {task} with answers of up to {known['max_new_tokens']} "
                f"tokens, now it is {length}; give this run another name (--model NAME)."
            )
        if known is None or not _covers(known["limit"], config.limit):
            known = {"limit": config.limit, "rows": count}
        digest = hashlib.sha256(prompt_template(task).encode()).hexdigest()
        tasks[task] = {**known, "max_new_tokens": length, "prompt_sha256": digest}
    record = {
        "schema": SCHEMA,
        "config": config.recorded() | {"tasks": list(tasks)},
        "policy": config.policy_settings(),
        "n_layers": n_layers,
        "importance": profile,
        "tasks": tasks,
        "sessions": _sessions(old, str(config.device)),
    }
    write_json(run_folder(config) / RUN_FILE, record)
    return record


def update(config: RunConfig, record: Record, task: str, facts: Mapping[str, Any]) -> None:
    """Adds what is known once a task is done."""
    record["tasks"][task].update(facts)
    write_json(run_folder(config) / RUN_FILE, record)


def _same_profile(config: RunConfig, record: Record) -> bool:
    """Whether a run is sure to use its recorded profile, which otherwise only its model tells."""
    if not takes(config.policy, LEARNED):
        return True
    if config.importance:
        return bool(Importance.load(Path(config.importance)).name == record["importance"])
    return record["config"].get("importance") is None


def _covers(recorded: int | None, asked: int | None) -> bool:
    """Whether a run over `recorded` rows (None: all) includes the `asked` ones."""
    return recorded is None or (asked is not None and asked <= recorded)


def _sessions(old: Record, device: str) -> list[Record]:
    started = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    earlier = [item for item in old.get("sessions", []) if item["id"] != session_id()]
    return [*earlier, {"id": session_id(), "started": started, **environment(device)}]
