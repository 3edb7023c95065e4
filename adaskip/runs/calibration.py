"""Calibration rows for searches and methods: warm-up prompts with their reference answers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import zip_longest

from adaskip.errors import DataError
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.perplexity import reference_ids
from adaskip.runs.runconfig import RunConfig
from adaskip.search.losses import Row


def calibration_rows(
    loaded: LoadedModel, config: RunConfig, tasks: Sequence[str], n_rows: int, max_tokens: int
) -> list[Row]:
    """Prompt and answer ids of warm-up rows, of the tasks by turns; no test row is among them.

    Args:
        loaded: the model, for its tokenizer and its template.
        config: where data lies, how long prompts may be.
        tasks: whose warm-up rows.
        n_rows: of all tasks together.
        max_tokens: of an answer, from its first.

    Raises:
        DataError: there are too few rows, or an answer is empty.
    """
    share = -(-n_rows // len(tasks))
    by_task = [loaded.warmup_rows(config, task, share) for task in tasks]
    rows = [row for turn in zip_longest(*by_task) for row in turn if row is not None][:n_rows]
    if len(rows) < n_rows:
        raise DataError(
            f"{', '.join(tasks)} have {len(rows)} warm-up rows together, {n_rows} were asked for; "
            "ask for fewer, or name more tasks."
        )
    made: list[Row] = []
    for row in rows:
        prompt = loaded.prompt(config, row)
        answer = reference_ids(loaded.tokenizer, prompt, row.reference, max_tokens)
        made.append((prompt.input_ids, answer))
    return made
