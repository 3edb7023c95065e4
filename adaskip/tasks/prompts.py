"""From a row to the token ids a model is given, and from its answer to the text that is scored."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from functools import cache
from string import Formatter
from typing import TYPE_CHECKING, Any

from adaskip.errors import AdaskipError, DataError
from adaskip.packaged_files import packaged_file
from adaskip.tasks.spec import Row, TaskSpec, task_spec

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LM_EVAL = "lm-eval==0.4.13"

# What lm-eval's templates lost of the official ones (TRAPS 13): trailing white space...
LOST_ENDINGS = {
    "passage_count": " ",
    "passage_retrieval_en": " ",
    "lcc": "\n",
    "repobench-p": "\n",
}
# ...and the empty line between the context and the question.
LOST_EMPTY_LINE = frozenset({"triviaqa", "samsum"})


@dataclass(frozen=True)
class Prompt:
    """A request, ready for the model.

    Attributes:
        text: the final text: filled, truncated, wrapped.
        input_ids: its token ids, special tokens included.
        tokens_before: tokens of the filled prompt before truncation and wrapping.
        tokens_after: `len(input_ids)`, what the model reads; the chat template is part of it.
        truncated: whether the middle was cut out.
    """

    text: str
    input_ids: list[int]
    tokens_before: int
    tokens_after: int
    truncated: bool


def _read_yaml(text: str) -> Any:
    """Parse YAML safely, reading every application tag (`!function ...`) as None."""
    import yaml

    class TolerantLoader(yaml.SafeLoader):
        """SafeLoader that builds nothing from a tag it does not know."""

    TolerantLoader.add_multi_constructor("!", lambda loader, suffix, node: None)
    return yaml.load(text, TolerantLoader)  # noqa: S506 - a SafeLoader that ignores tags


@cache
def prompt_template(task: str) -> str:
    """The prompt template of `task`, with `{context}` and `{input}` as its fields.

    LongBench's are read from the installed lm-eval package and brought back to the official
    wording; the offline sample's are in `configs/tasks.yaml`.

    Raises:
        AdaskipError: unknown task.
        DataError: lm-eval is missing, or its template is not the official one by its sha256.
    """
    spec = task_spec(task)
    if spec.prompt is not None:
        return spec.prompt
    path = packaged_file(LM_EVAL, f"lm_eval/tasks/longbench/{task}.yaml")
    try:
        template = str(_read_yaml(path.read_text(encoding="utf-8"))["doc_to_text"])
    except Exception as error:  # any way a damaged YAML file can fail
        raise DataError(f"{path} holds no prompt ({error}); reinstall {LM_EVAL}.") from error
    template = template.replace("{{context}}", "{context}").replace("{{question}}", "{input}")
    if task in LOST_EMPTY_LINE:
        template = template.replace("{context}\n{input}", "{context}\n\n{input}")
    template += LOST_ENDINGS.get(task, "")
    digest = hashlib.sha256(template.encode("utf-8")).hexdigest()
    if digest != spec.prompt_sha256:
        raise DataError(
            f"The prompt of {task!r} in {path} is not LongBench's official one (sha256 {digest},"
            f" expected {spec.prompt_sha256}); install the version it was checked with:"
            f" pip install --no-deps {LM_EVAL}"
        )
    return template


def check_prompt(task: str) -> None:
    """Refuses a prompt of the file's own that no row could be filled into, or that loses its text.

    Raises:
        AdaskipError: its braces are others than those of its fields, or `{context}` is not there.
    """
    template = task_spec(task).prompt
    if template is None:  # LongBench's, known by their hash
        return
    try:
        named = {name for _, name, _, _ in Formatter().parse(template) if name is not None}
    except ValueError:
        named = set()
    if not {"context"} <= named <= {"context", "input"}:
        raise AdaskipError(
            f"The prompt of the task {task!r} in configs/tasks.yaml must have {{context}} in it, "
            "may have {input}, and needs its other braces doubled: {{ and }}."
        )


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of `text` with the tokenizer's own special tokens, BOS once even if spelled out."""
    # verbose=False: a text longer than the model's window is expected here and not worth a warning.
    ids: list[int] = list(tokenizer(text, truncation=False, verbose=False)["input_ids"])
    bos = tokenizer.bos_token_id
    if bos is not None and ids[:2] == [bos, bos]:
        return ids[1:]
    return ids


def _without_middle(tokenizer: PreTrainedTokenizerBase, ids: list[int], max_length: int) -> str:
    """The first and last `max_length // 2` tokens as text, special tokens skipped (METHOD)."""
    half = max_length // 2
    ends = (ids[:half], ids[len(ids) - half :])
    return "".join(str(tokenizer.decode(end, skip_special_tokens=True)) for end in ends)


def build_prompt(
    row: Row,
    spec: TaskSpec,
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_length: int,
    template: str | None,
) -> Prompt:
    """Fill the task's prompt with a row, cut its middle out if it is too long, wrap it.

    The chat template is added after truncation, so the result can be longer than `max_length` by
    the template's tokens, as in LongBench; decoding and tokenizing again can also move the count by
    a few tokens.

    Args:
        row: the request.
        spec: its task; `spec.chat` decides whether the prompt is wrapped.
        tokenizer: the model's.
        max_length: prompt limit, in tokens.
        template: the model's chat template with `{prompt}`, or None for none.

    Raises:
        AdaskipError: `max_length` below 2, or a template without `{prompt}`.
        DataError: see `prompt_template`.
    """
    if max_length < 2:
        raise AdaskipError(f"The prompt limit must be at least 2 tokens, not {max_length}.")
    if template is not None and "{prompt}" not in template:
        raise AdaskipError(f"The chat template {template!r} has no {{prompt}} in it; add it.")
    filled = prompt_template(spec.name).format(context=row.context, input=row.input)
    ids = _encode(tokenizer, filled)
    tokens_before = len(ids)
    truncated = tokens_before > max_length
    text = _without_middle(tokenizer, ids, max_length) if truncated else filled
    if spec.chat and template is not None:
        text = template.replace("{prompt}", text)
    if text != filled:
        ids = _encode(tokenizer, text)
    return Prompt(text, ids, tokens_before, len(ids), truncated)


def stop_token_ids(spec: TaskSpec, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Token ids that end an answer of this task besides the model's own end-of-sequence tokens.

    For samsum, the last token of an encoded newline; `spec.min_new_tokens` says how many tokens
    must come before any stop.
    """
    if not spec.stop_at_newline:
        return ()
    return (int(tokenizer.encode("\n", add_special_tokens=False)[-1]),)


def postprocess(prediction: str, answer_end: str | None) -> str:
    """The answer within a decoded continuation: cut at the model's end mark (InternLM's `<eoa>`).

    The first-line rule of `TaskSpec.first_line_only` belongs to scoring, so that a stored
    prediction is complete.

    Args:
        prediction: decoded new tokens; special tokens skipped or not.
        answer_end: the model's `ModelSpec.answer_end`, or None.
    """
    return prediction.partition(answer_end)[0] if answer_end else prediction
