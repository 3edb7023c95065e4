"""What one run is: a frozen value from which the command line, the folder and `run.json` follow."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from dataclasses import field
from pathlib import PurePath
from typing import Annotated, Any

from pydantic import ConfigDict, Field, ValidationError
from pydantic.dataclasses import dataclass

from adaskip.configuration import read_config
from adaskip.errors import (
    AdaskipError,
    RunError,
    first_problem,
    refuse_below_one,
    unknown_name,
)
from adaskip.plan import Scope
from adaskip.policies import policy_class
from adaskip.policies.factory import BUDGETS, LEARNED, arguments, describe, takers, takes
from adaskip.policies.made_plan import PlanFile
from adaskip.runs.files import check_file_name
from adaskip.shipped import plan_label
from adaskip.tasks.retrieval import check_depth
from adaskip.tasks.spec import task_spec

DENSE = "dense"
DATA_DIR = "data_dir"
HORIZON = "horizon"  # the field of a policy that takes the answer length
GAINS = ("token", "norm", "none")
# How importance is learned, which matters to policies that use it.
WARMING_UP = ("warmup", "warmup_task", "warmup_tokens")
# What decides which rows a task with files has.
_OF_FILES = ("data_dir", "longbench_e", "min_length")
# Options that set a field of the policy, or say what it has learned.
POLICY_OPTIONS = ("importance", "gain", "online", "plan")
PLAN_FILE = "plan_file"  # the field of a policy that takes a plan that was made
# The field of a policy that an option sets, where it has another name.
_FIELDS = {"plan": PLAN_FILE}
_NOT_SETTINGS = (
    *("name", "tasks", "limit", "max_new_tokens", "data_dir", "results_dir", "resume"),
    *("allow_pickle", *POLICY_OPTIONS),
)


def option(default: Any, text: str) -> Any:
    """A field of `RunConfig` that is also a command-line option, with its help text.

    The text may name `{policies}`, `{tasks}` and the policies by what they count; a default may be
    a function.
    """
    made = {"default_factory" if callable(default) else "default": default}
    return field(**made, metadata={"help": text})


@dataclass(frozen=True, kw_only=True, config=ConfigDict(strict=True, extra="forbid"))
class RunConfig:
    """Everything that decides what a run computes and where it is kept.

    Attributes:
        experiment: which phases the plan applies to; one of `adaskip.plan.SCOPES`.
        model_name: a name from `configs/models.yaml`; fixed by the script that is called.

    The other fields are command-line options and described by their help texts.
    """

    experiment: Scope
    model_name: str
    policy: str = option(
        lambda: str(read_config("budgets.yaml")["default_policy"]),
        "what is skipped, one of: {policies}; dense skips nothing",
    )
    skip_full_layer_num: int | None = option(None, "budget in whole layers, of {by_layers}")
    skip_sub_layer_num: int | None = option(None, "budget in sublayers, of {by_sublayers}")
    name: str = option(
        "",
        "name of the run (default: MODEL-POLICY-EXPERIMENT, e.g. llama-EE-PREFILL)",
    )
    # A list in JSON and YAML.
    tasks: Annotated[tuple[str, ...], Field(strict=False)] = option(
        (), "tasks to run (default: those of the experiment), of: {tasks}"
    )
    limit: int | None = option(
        None, "rows per task, from the first (default: all; sample tasks: 20)"
    )
    model_path: str | None = option(
        None, "folder or hub id to load in place of the default weights"
    )
    data_dir: str = option("data", "folder with LongBench as jsonl files or data.zip")
    longbench_e: bool = option(True, "use LongBench-E where the task has it")
    min_length: int = option(
        4000, "LongBench rows must be longer than this, in words or characters"
    )
    sample_tokens: int = option(1000, "context length of rows that are made offline, in tokens")
    needle_depth: int | None = option(
        None, "where the needle is, in % of the context, of {by_depth} (default: spread over rows)"
    )
    max_length: int | None = option(None, "prompt limit in tokens (default: the model's)")
    max_new_tokens: int | None = option(None, "answer length in tokens (default: the task's)")
    batch_size: int = option(1, "rows generated together; the online extension decides per batch")
    dtype: str | None = option(None, "float32, bfloat16 or float16 (default: bfloat16 on CUDA)")
    device: str | None = option(None, "torch device (default: cuda where there is one, else cpu)")
    device_map: str | None = option(
        None, "auto: split the layers over all devices of the process (accelerate)"
    )
    tp_plan: str | None = option(
        None, "auto: split every layer over the processes torchrun started (tensor parallel)"
    )
    allow_pickle: bool = option(
        False, "also read weights from .bin files: pickles, of which torch reads tensors only"
    )
    importance: str | None = option(None, "importance profile to use in place of warming up")
    warmup: int = option(20, "warm-up prompts to learn importance from")
    warmup_task: str | None = option(
        None, "source of the warm-up prompts (default: fits the tasks)"
    )
    warmup_tokens: int | None = option(
        None, "context length of warm-up rows that are made offline (default: --sample_tokens)"
    )
    gain: str | None = option(
        None, f"compensation of a skipped sublayer: {', '.join(GAINS)} (default: the policy's)"
    )
    online: bool | None = option(
        None,
        "extend the plan while decoding (decode and e2e experiments; default: as the paper does)",
    )
    plan: str | None = option(
        None, "a plan's file, or shipped name, of {by_plan}; its budget is what it replaces"
    )
    seed: int = option(2025, "seed of sampling and of the offline sample")
    results_dir: str = option("results", "folder that holds the runs")
    resume: bool = option(True, "continue a run that exists; --no-resume refuses to")

    @property
    def budget(self) -> int:
        """The number after `-SKIP-`: layers or sublayers as the policy counts, 0 for dense."""
        return self.skip_full_layer_num or self.skip_sub_layer_num or 0

    @property
    def run_name(self) -> str:
        """The run's name, as given or by default."""
        model = PurePath(self.model_name).name  # of a folder or hub id, the last part
        return self.name or f"{model}-{self.label}-{self.experiment.upper()}"

    @property
    def label(self) -> str:
        """What tables call the policy: its name, or that of the plan's file."""
        return self.policy if self.plan is None else plan_label(self.plan)

    @property
    def folder_name(self) -> str:
        """The folder below `results_dir`: `<run name>-SKIP-<budget>`, `-SKIP-0` for dense."""
        return f"{self.run_name}-SKIP-{self.budget}"

    def settings(self) -> dict[str, Any]:
        """The fields two runs must share to be the same run.

        Tasks and limit only say how much of it; the answer length is compared per task, the policy
        by its own fields, the profile by its name; a dense run is the same in every experiment,
        and a device is as good as another one of its kind.
        """
        left_out = set(_NOT_SETTINGS)
        if self.policy == DENSE:
            left_out.add("experiment")
        kind = self.device and self.device.partition(":")[0]
        found = self.recorded() | {"device": kind}
        return {key: value for key, value in found.items() if key not in left_out}

    def data_settings(self, tasks: Iterable[str]) -> dict[str, str]:
        """Where the rows of tasks come from, for records that do not keep the rows themselves.

        Empty where no task has files. Records of earlier versions lack it (`Store.lately`).
        """
        has_files = any(not task_spec(task).offline for task in tasks)
        return {DATA_DIR: str(PurePath(self.data_dir))} if has_files else {}

    def offered(self) -> dict[str, Any]:
        """What is set of a policy's fields, if it has them; the others keep its own defaults.

        Settings that are not given are the paper's (`configs/budgets.yaml`).
        """
        paper: dict[str, Any] = read_config("budgets.yaml")["policy_settings"].get(self.policy, {})
        given: dict[str, Any] = {"gain": self.gain, "online": self.online}
        if self.plan is not None:
            given[PLAN_FILE] = PlanFile.read(self.plan)
        return paper | {k: None if v == "none" else v for k, v in given.items() if v is not None}

    def policy_settings(self) -> dict[str, Any]:
        """What the policy is made with, by its fields; empty for dense.

        Without what it learns, which is compared by the name of the profile, and without its
        `horizon`: the answer length, which is compared per task.

        Raises:
            AdaskipError: the policy cannot be made from settings.
        """
        if self.policy == DENSE:
            return {}
        made = arguments(self.policy, self.budget, self.offered() | {HORIZON: None})
        return describe({key: value for key, value in made.items() if key != HORIZON})

    def recorded(self) -> dict[str, Any]:
        """Every field that has a meaning for this policy, ready for JSON."""
        unused = [key for key in (*POLICY_OPTIONS, *WARMING_UP) if not _applies(key, self.policy)]
        return {key: value for key, value in self.as_dict().items() if key not in unused}

    def as_dict(self) -> dict[str, Any]:
        """Every field, ready for JSON."""
        return {
            key: list(value) if isinstance(value, tuple) else value
            for key, value in dataclasses.asdict(self).items()
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> RunConfig:
        """The inverse of `as_dict`.

        Raises:
            RunError: a setting is unknown, missing or of the wrong type.
            PlanError: it names a plan whose file cannot be read.
        """
        known = {item.name for item in dataclasses.fields(cls)}
        for key in content:
            if key not in known:
                raise RunError(str(unknown_name("setting", str(key), known)))
        path = content.get("plan")
        if isinstance(path, str) and content.get("skip_sub_layer_num") is None:
            content = content | {"skip_sub_layer_num": len(PlanFile.read(path).plan)}
        try:
            return cls(**content)
        except ValidationError as error:
            raise RunError(f"The setting {first_problem(error)}.") from error

    def check(self) -> None:
        """Refuses what no model and no data could make right.

        Raises:
            AdaskipError: the first thing that is wrong.
        """
        self._check_budget()
        # Not every command has the option.
        check_file_name("run name (the model's where no --name is given)", self.run_name)
        self.policy_settings()
        if self.gain is not None and self.gain not in GAINS:
            raise unknown_name("gain", self.gain, GAINS)
        for key in ("device_map", "tp_plan"):
            if getattr(self, key) not in (None, "auto"):
                raise unknown_name(f"--{key}", getattr(self, key), ["auto"])
        if self.device_map and self.tp_plan:
            raise AdaskipError("--device_map and --tp_plan both split the model: give one of them.")
        check_depth(self.needle_depth, self.tasks)
        counts = ("limit", "sample_tokens", "max_length", "max_new_tokens", "batch_size")
        refuse_below_one({key: getattr(self, key) for key in (*counts, "warmup", "warmup_tokens")})
        if self.max_length == 1:
            raise AdaskipError("--max_length is 1; a prompt keeps its two ends, so give 2 or more.")
        if not 0 <= self.seed < 2**63:
            raise AdaskipError(f"--seed is {self.seed}; give a number from 0 to 2**63 - 1.")

    def _check_budget(self) -> None:
        """Refuses a budget that is missing, another policy's, or too small for any model."""
        own = budget_flag(self.policy)
        if _applies("plan", self.policy) != (self.plan is not None):
            users = ", ".join(takers(PLAN_FILE))
            raise AdaskipError(
                f"--plan FILE belongs to policy {users}, and to no other; the policy is "
                f"{self.policy}, the plan {self.plan}."
            )
        for flag in BUDGETS.values():
            if getattr(self, flag) is not None and flag != own:
                meant = f"use --{own}" if own else "leave it out"
                raise AdaskipError(f"--{flag} does not belong to policy {self.policy}: {meant}.")
        if own is None:
            return
        if getattr(self, own) is None:
            raise AdaskipError(
                f"Policy {self.policy} needs its budget: --{own} N (or --policy {DENSE})."
            )
        policy_class(self.policy).check_budget(getattr(self, own))


def budget_flag(policy: str) -> str | None:
    """The option that carries this policy's budget; None for dense.

    Raises:
        AdaskipError: the policy is not registered.
    """
    if policy == DENSE:
        return None
    return BUDGETS[policy_class(policy).budget]


def refuse_unused(given: Iterable[str], policies: Sequence[str]) -> None:
    """Refuses an option that none of the policies has a use for.

    Args:
        given: names of options or settings that were given; others than a policy's are passed over.
        policies: those that are run.

    Raises:
        AdaskipError: there is one; the message says which policies take it.
    """
    for key in given:
        if key in POLICY_OPTIONS and not any(_applies(key, policy) for policy in policies):
            users = ", ".join(takers(_FIELDS.get(key, key))) or "none"
            raise AdaskipError(
                f"The option {key!r} does not apply to {', '.join(policies)}; policies that take "
                f"it: {users}."
            )


def unused_options(config: RunConfig, tasks: Sequence[str], warmup_task: str) -> list[str]:
    """What was set otherwise than by default and changes nothing of a run.

    Policies and tasks that are run with the same options need not have a use for all of them, so
    these are told, not refused.

    Args:
        config: the run, as it was asked for.
        tasks: those it has, given or by default.
        warmup_task: where its warm-up prompts would come from.

    Returns:
        A sentence for each reason.
    """
    learns = _applies("warmup", config.policy) and config.importance is None
    offline = {task_spec(task).offline for task in tasks}
    warms_up_offline = learns and task_spec(warmup_task).offline
    why: dict[str, tuple[str, ...]] = {}
    if not learns:
        source = config.policy if config.importance is None else "--importance"
        why[f"with {source} nothing is learned from prompts"] = WARMING_UP
    elif not warms_up_offline:
        why[f"the length of {warmup_task} cannot be chosen"] = ("warmup_tokens",)
    if False not in offline and (not learns or warms_up_offline):
        why["no task has LongBench's files"] = _OF_FILES
    if True not in offline and not warms_up_offline:
        why["no task is made offline"] = ("sample_tokens",)
    plain = {item.name: item.default for item in dataclasses.fields(config)}
    found = {
        reason: [f"--{key}" for key in keys if getattr(config, key) != plain[key]]
        for reason, keys in why.items()
    }
    return [
        f"{', '.join(keys)}: without effect; {reason}." for reason, keys in found.items() if keys
    ]


def _applies(key: str, policy: str) -> bool:
    """Whether a policy has a use for one of its options, or for how importance is learned."""
    return takes(policy, LEARNED if key in WARMING_UP else _FIELDS.get(key, key))
