"""Where the rows and warm-up prompts of a run come from, and whether they are there."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TypeVar

from adaskip.errors import DataError
from adaskip.models.spec import model_source
from adaskip.policies.factory import LEARNED, takes
from adaskip.runs.runconfig import RunConfig
from adaskip.tasks.longbench import load_rows
from adaskip.tasks.prompts import prompt_template
from adaskip.tasks.spec import Row, task_spec

T = TypeVar("T")


def check_data(config: RunConfig) -> None:
    """Refuses what is missing of the files of a run, before a model is loaded for it.

    Raises:
        DataError: a file, or the package that has the prompts.
        AdaskipError: there is no such model.
    """
    model_source(config.model_path or config.model_name)
    for task in config.tasks:
        prompt_template(task)
        if not task_spec(task).offline:
            from_files(config, task, 1)
    warmup = source_of_warm_up(config)
    learns = takes(config.policy, LEARNED) and config.importance is None
    if learns and not task_spec(warmup).offline:
        told_as_warm_up(config, lambda: (prompt_template(warmup), from_files(config, warmup, 1)))


def from_files(config: RunConfig, task: str, n: int | None) -> list[Row]:
    """The first `n` rows of a task that has files, as a run takes them."""
    return load_rows(
        task,
        data_dir=config.data_dir,
        min_length=config.min_length,
        limit=n,
        long_bench_e=config.longbench_e,
    )


def told_as_warm_up(config: RunConfig, load: Callable[[], T]) -> T:
    """Says of rows that nobody has named what they are for.

    Raises:
        DataError: whatever was wrong with them.
    """
    try:
        return load()
    except DataError as error:
        source = source_of_warm_up(config)
        raise DataError(
            f"The warm-up prompts of {config.policy} are to be those of {source}, but: "
            f"{error} Others are --warmup_task's; --importance FILE needs none."
        ) from error


def warmup_task(tasks: Iterable[str]) -> str:
    """Where warm-up prompts come from: LongBench's qasper; the offline sample for our own tasks."""
    offline = all(task_spec(task).offline for task in tasks)
    return "sample_qa" if offline else "qasper"


def tokens_of_warm_up(config: RunConfig) -> int:
    """How long the contexts of warm-up rows are that are made offline."""
    return config.warmup_tokens or config.sample_tokens


def source_of_warm_up(config: RunConfig) -> str:
    """The task that warm-up prompts are of, as given or by default."""
    return config.warmup_task or warmup_task(config.tasks)
