"""Calibration rows for searches and methods: warm-up prompts and their answers, or texts."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from adaskip.errors import DataError
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.perplexity import reference_ids
from adaskip.runs.runconfig import RunConfig
from adaskip.search.rows import Row

logger = logging.getLogger(__name__)


def calibration_rows(
    loaded: LoadedModel, config: RunConfig, tasks: Sequence[str], n_rows: int, max_tokens: int
) -> list[Row]:
    """Prompt and answer ids of warm-up rows, of the tasks by turns.

    No test row of an offline task is among them; LongBench has no splits, so that of its tasks they
    are the first rows.

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


def text_rows(
    tokenizer: PreTrainedTokenizerBase, texts: Mapping[str, str], context: int, max_tokens: int
) -> list[Row]:
    """Each text's first tokens as a prompt, and how it goes on as the answer.

    Warns of shorter prompts than asked for.

    Args:
        tokenizer: the model's own.
        texts: by name.
        context: tokens of a prompt, where the text is long enough.
        max_tokens: of an answer; a shorter text ends with as many.

    Raises:
        DataError: a text has fewer tokens in front of the answer than in it, or than `context`.
    """
    made: list[Row] = []
    for name, text in texts.items():
        ids = tokenizer(text).input_ids
        least = max_tokens + min(context, max_tokens)
        if len(ids) < least:
            raise DataError(
                f"The text {name} has {len(ids)} tokens; with {max_tokens} of them as the answer, "
                f"{least} are needed: leave it out, or ask for a shorter answer."
            )
        ids = ids[: context + max_tokens]
        made.append((ids[:-max_tokens], ids[-max_tokens:]))
    if short := sorted(len(ids) for ids, _ in made if len(ids) < context):
        logger.warning(
            "The prompts of %d of %d texts are shorter than --context %d, down to %d tokens: what "
            "windows lose in longer ones is not seen; give longer texts, or a smaller --context.",
            *(len(short), len(made), context, short[0]),
        )
    return made


def read_texts(files: Sequence[Path]) -> dict[str, str]:
    """The texts of files, by name as it was given.

    Raises:
        DataError: a file cannot be read as text, or is named twice.
    """
    try:
        texts = {str(file): file.read_text(encoding="utf-8") for file in files}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"The texts cannot be read: {error}.") from error
    if len(texts) < len(files):
        raise DataError("A text is named twice; name each once.")
    return texts
