"""`run.json`: what a run is, checked before it is continued, written before its first row."""

from __future__ import annotations

import datetime as dt
import hashlib
import json
import uuid
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import PositiveInt

from adaskip.errors import RunError
from adaskip.fingerprint import fingerprint_name, same_model
from adaskip.importance import Importance
from adaskip.models.processes import team
from adaskip.models.spec import model_names, model_spec, weights_stamp
from adaskip.policies.factory import LEARNED, takes
from adaskip.runs.environment import environment
from adaskip.runs.files import SCHEMA, Record, differences, read_json, write_json
from adaskip.runs.rows import GeneratedRow, Stored
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.store import Store
from adaskip.tasks.longbench import has_files
from adaskip.tasks.prompts import prompt_template
from adaskip.tasks.spec import Row, task_spec

RUN_FILE = "run.json"


class TaskFacts(Stored):
    """What a run's record says of one task.

    Attributes:
        rows: how many the run was asked for.
        limit: the `--limit` it was asked with; None is all rows.
        max_new_tokens: the longest answer.
        prompt_sha256: of the prompt template.
        prompt_limit: the longest prompt, in tokens; None for models that no file of ours names, and
            in records that do not tell.
        template_sha256: of the model's chat template, if the task is asked in it, and of what ends
            its answers; None likewise.
        data_dir: where its files were; None without any, and in records that do not tell.
        in_order: whether the finished rows stand in the data's order, of those that were generated
            in batches; earlier versions left them in that of the batches.
    """

    rows: int
    limit: int | None
    max_new_tokens: int
    prompt_sha256: str
    prompt_limit: int | None = None
    template_sha256: str | None = None
    data_dir: str | None = None
    in_order: bool = False


class Command(Stored):
    """One command that worked on a run; its rows carry the id."""

    id: str


class RunRecord(Stored):
    """What `run.json` holds.

    Attributes:
        config: the fields of its `RunConfig`.
        policy: what its policy was made with; None in files that do not tell.
        model: its fingerprint; empty in files that do not tell.
        weights: the stamp of their files; empty where they are in no folder of the user's, and in
            files that do not tell.
        importance: the name of its importance profile.
        sessions: the commands that worked on it, as files have always called them.
    """

    config: dict[str, Any]
    policy: dict[str, Any] | None = None
    n_layers: PositiveInt
    model: str = ""
    weights: str = ""
    importance: str | None
    tasks: dict[str, TaskFacts]
    sessions: list[Command]

    @property
    def run_config(self) -> RunConfig:
        """The configuration that was recorded."""
        return RunConfig.from_dict(self.config)


@cache
def command_id() -> str:
    """Names this command; rows and records carry it, because times compare only within one."""
    return team().on_main(lambda: uuid.uuid4().hex[:12])


def run_folder(config: RunConfig) -> Path:
    """The folder that holds a run: its record, and its rows by task."""
    return Path(config.results_dir) / config.folder_name


def task_rows(folder: Path, task: str) -> Store[GeneratedRow]:
    """The rows of one task in a run's folder."""
    return Store(folder / f"{task}.jsonl", GeneratedRow)


def answer_length(config: RunConfig, task: str) -> int:
    """Longest answer of a task in this run, in tokens."""
    return config.max_new_tokens or task_spec(task).max_new_tokens


def existing_record(config: RunConfig) -> RunRecord | None:
    """The record of an earlier start of this run, if there is one.

    Raises:
        RunError: it was made with other settings, or may not be continued.
    """
    folder = run_folder(config)
    if not (folder / RUN_FILE).exists():
        if any(folder.glob("*.jsonl")):
            raise RunError(f"{folder} has rows but no {RUN_FILE}; move the folder away.")
        return None
    record = read_record(folder)
    if not config.resume:
        raise RunError(f"{folder} exists already: leave out --no-resume, or give another --name.")
    if what := _otherwise(record, config):
        raise RunError(
            f"{folder} was made with other settings ({what}). Nothing was changed; give this run "
            "another name (--name NAME) or move the folder away."
        )
    return record


def _otherwise(record: RunRecord, config: RunConfig) -> str:
    """How a run was made otherwise than a configuration asks; empty if it was not."""
    old = record.run_config
    what = differences(old.settings(), config.settings())
    if what:  # another policy has other fields: its name says enough
        return what
    # Without the policy's own account, its options tell.
    return differences(record.policy or old.policy_settings(), config.policy_settings())


def made_otherwise(config: RunConfig, task: str) -> str:
    """How the rows of a task in a run's folder were made otherwise than is asked for now.

    Args:
        config: resolved; its run has a record.
        task: whose rows.

    Raises:
        RunError: the record is damaged.
        ProfileError: the profile is damaged.
    """
    record = read_record(run_folder(config))
    facts = record.tasks.get(task)
    what = _otherwise(record, config)
    if what or facts is None:
        return what
    wanted = task_spec(task).wanted(config.limit)
    if config.batch_size > 1 and not facts.in_order and wanted is not None and wanted < facts.rows:
        return (
            f"the first {wanted} of its {facts.rows} rows are the shortest, as versions before "
            "this one kept those of a batch"
        )
    made, asked = _asked_then_and_now(config, task, facts)
    if (profile := _given_profile(config)) is not None:
        asked["importance"], made["importance"] = profile, record.importance
    return differences(made, asked)


def read_record(folder: Path) -> RunRecord:
    """What `run.json` of a run's folder holds.

    Raises:
        RunError: it is damaged, or of another version.
    """
    path = folder / RUN_FILE
    try:
        record = RunRecord.from_dict(read_json(path))
        RunConfig.from_dict(record.config)
        for task in record.tasks:
            task_spec(task)
    except RunError as error:
        if str(path) in str(error):
            raise
        raise RunError(f"{path} is damaged ({error}); move its folder away.") from error
    except ValueError as error:
        raise RunError(f"{path} is damaged ({error}); move its folder away.") from error
    return record


def is_finished(config: RunConfig) -> bool:
    """Whether a resolved configuration has nothing left to do; needs no model.

    If its weights were written anew, only the model tells whether they are others.

    Raises:
        RunError: the run exists with other settings, or its files are damaged.
    """
    record = existing_record(config)
    if record is None or not _same_profile(config, record) or rewritten(config, record.weights):
        return False
    return all(
        (facts := record.tasks.get(task)) is not None
        and not differences(*_asked_then_and_now(config, task, facts))
        and covers(task, facts.limit, config.limit)
        and not _is_elsewhere(config, task, facts.data_dir or record.config.get("data_dir"))
        and len(task_rows(run_folder(config), task).rows()) >= facts.rows
        for task in config.tasks
    )


def begin(
    config: RunConfig,
    *,
    n_layers: int,
    profile: str | None,
    n_rows: Mapping[str, int],
    model: str,
    attention: str | None = None,
) -> None:
    """Writes `run.json` for a start or a continuation.

    Args:
        config: resolved.
        n_layers: decoder layers of the model.
        profile: name of the importance profile, if the policy has one.
        n_rows: rows of each task.
        model: its fingerprint.
        attention: the implementation that the model uses.

    Raises:
        RunError: the run was made with other settings, another profile or other weights, or cannot
            be written.
    """
    folder, old = run_folder(config), existing_record(config)
    if old and old.model and not same_model(old.model, model):
        raise RunError(
            f"{folder} was made with model {fingerprint_name(old.model)}, {config.model_name} is "
            f"now {fingerprint_name(model)}; give this run another name (--name NAME)."
        )
    if old and old.importance != profile:
        raise RunError(
            f"{folder} was made with importance profile {old.importance}, now it is "
            f"{profile}; give this run another name (--name NAME), or the same --importance."
        )
    tasks: dict[str, Record] = {} if old is None else old.as_dict()["tasks"]
    for task, count in n_rows.items():
        known, length = tasks.get(task), answer_length(config, task)
        if known is not None and known["max_new_tokens"] != length:
            raise RunError(
                f"{folder} has {task} with answers of up to {known['max_new_tokens']} "
                f"tokens, now it is {length}; give this run another name (--name NAME)."
            )
        digest = _prompt_digest(task)
        if known is not None and known["prompt_sha256"] != digest:
            raise RunError(
                f"{folder} has {task} with another prompt than configs/tasks.yaml has now; give "
                "this run another name (--name NAME)."
            )
        around = _around(config, task)
        for key, value in around.items():
            if known is not None and known.get(key, value) != value:
                raise RunError(
                    f"{folder} has {task} with another {key} ({known[key]}) than "
                    f"{config.model_name} has in configs/models.yaml now ({value}); give this run "
                    "another name (--name NAME)."
                )
        if known is None or not covers(task, known["limit"], config.limit):
            known = {"limit": config.limit, "rows": count}
        tasks[task] = {**known, "max_new_tokens": length, "prompt_sha256": digest, **around}
        tasks[task] |= {} if task_spec(task).offline else {"data_dir": config.data_dir}
    record = {
        "schema": SCHEMA,
        "config": config.recorded() | {"tasks": list(tasks)},
        "policy": config.policy_settings(),
        "n_layers": n_layers,
        "model": model,
        "weights": stamp(config),
        "importance": profile,
        "tasks": tasks,
        "sessions": _commands(old, environment(str(config.device), attention)),
    }
    write_json(folder / RUN_FILE, record)


def refuse_other_rows(config: RunConfig, task: str, rows: Iterable[Row]) -> None:
    """Refuses to continue answers to other rows than those that are asked for now.

    Raises:
        RunError: a row of the run has the id of one of these, and other references or another
            length.
    """
    now = {row.id: (list(row.answers), row.length) for row in rows}
    for old in task_rows(run_folder(config), task).unmerged():
        if now.get(old.id, old.source) != old.source:
            where = "now" if task_spec(task).offline else f"in {config.data_dir} now"
            raise RunError(
                f"{run_folder(config)} has an answer to row {old.id} of {task}, which has other "
                f"references or another length {where}; give this run another name (--name NAME), "
                "or the data it was made with (--data_dir)."
            )


def update(folder: Path, task: str, facts: Mapping[str, Any]) -> None:
    """Adds what is known once a task is done."""
    record = read_json(folder / RUN_FILE)
    record["tasks"][task].update(facts)
    write_json(folder / RUN_FILE, record)


def _around(config: RunConfig, task: str) -> Record:
    """What stands around a task's prompt; empty for models that `configs/models.yaml` lacks."""
    if config.model_name not in model_names():
        return {}
    model = model_spec(config.model_name)
    told = json.dumps([model.template if task_spec(task).chat else None, model.answer_end])
    return {
        "prompt_limit": config.max_length or model.prompt_limit,
        "template_sha256": hashlib.sha256(told.encode()).hexdigest(),
    }


def _asked_then_and_now(config: RunConfig, task: str, facts: TaskFacts) -> tuple[Record, Record]:
    """What the model was asked in a task, and would be now, of what the record tells."""
    made = {"max_new_tokens": facts.max_new_tokens, "prompt": facts.prompt_sha256}
    asked = {"max_new_tokens": answer_length(config, task), "prompt": _prompt_digest(task)}
    for key, value in _around(config, task).items():
        if (then := getattr(facts, key)) is not None:
            made[key], asked[key] = then, value
    return made, asked


def _prompt_digest(task: str) -> str:
    return hashlib.sha256(prompt_template(task).encode()).hexdigest()


def stamp(config: RunConfig) -> str:
    """What a record keeps of the files of a resolved configuration's weights; may be empty."""
    return weights_stamp(config.model_path or config.model_name)


def rewritten(config: RunConfig, recorded: str) -> bool:
    """Whether the weights have other files now than those of a recorded stamp, if both tell."""
    now = stamp(config)
    return bool(now and recorded) and now != recorded


def _given_profile(config: RunConfig) -> str | None:
    """The name of the importance profile a run is given; None if it has no use for one, or learns.

    Raises:
        ProfileError: the profile is damaged.
    """
    if not (takes(config.policy, LEARNED) and config.importance):
        return None
    return Importance.load(Path(config.importance)).name


def _same_profile(config: RunConfig, record: RunRecord) -> bool:
    """Whether a run is sure to use its recorded profile, which otherwise only its model tells."""
    if not takes(config.policy, LEARNED):
        return True
    if (given := _given_profile(config)) is not None:
        return given == record.importance
    return record.config.get("importance") is None


def _is_elsewhere(config: RunConfig, task: str, made_from: str | None) -> bool:
    """Whether a task's rows may be others now: they were made from files of another folder."""
    if task_spec(task).offline or made_from is None:
        return False
    moved = Path(made_from).resolve() != Path(config.data_dir).resolve()
    return moved and has_files(task, config.data_dir, long_bench_e=config.longbench_e)


def covers(task: str, recorded: int | None, asked: int | None) -> bool:
    """Whether a run over `recorded` rows includes the `asked` ones."""
    recorded, asked = task_spec(task).wanted(recorded), task_spec(task).wanted(asked)
    return recorded is None or (asked is not None and asked <= recorded)


def _commands(old: RunRecord | None, made_in: Record) -> list[Record]:
    """Those of the record so far, and this one with where it runs."""
    started = dt.datetime.now(dt.UTC).isoformat(timespec="seconds")
    earlier = [] if old is None else [c.as_dict() for c in old.sessions if c.id != command_id()]
    return [*earlier, {"id": command_id(), "started": started, **made_in}]
