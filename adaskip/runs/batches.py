"""Batches of rows: made, shared out over processes, generated, audited and kept at once."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from tqdm import tqdm

from adaskip.entering import skipping
from adaskip.errors import RunError
from adaskip.models.internlm import check_prompt_length
from adaskip.models.processes import team
from adaskip.plan import Phase
from adaskip.policies import SkipPolicy, policy_class
from adaskip.runs.audit import Audit
from adaskip.runs.generation import Generated, generate_greedy
from adaskip.runs.ledger import command_id
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.rows import GeneratedRow, Seconds, Skips
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.store import Share
from adaskip.tasks.prompts import Prompt, postprocess
from adaskip.tasks.spec import Row


def make_batches(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """The rows in the order they are generated, batch by batch."""
    ordered = list(rows)
    if size > 1:
        # Neighbours in length need little padding; the id makes the order the same every time.
        ordered.sort(key=lambda row: (len(row.context) + len(row.input), row.id))
    return [ordered[start : start + size] for start in range(0, len(ordered), size)]


def pending_batches(
    batches: Sequence[list[Row]], share: Share[GeneratedRow]
) -> Sequence[list[Row]]:
    """One process's share of the batches that are not done; whole batches, for the same numbers."""
    return share.of([batch for batch in batches if any(row.id not in share.done for row in batch)])


def run_batches(
    config: RunConfig,
    loaded: LoadedModel,
    policy: SkipPolicy | None,
    batches: Sequence[list[Row]],
    share: Share[GeneratedRow],
) -> None:
    """Generates a share of the batches and appends the rows of each that are not done."""
    own = pending_batches(batches, share)
    with contextlib.ExitStack() as stack:
        loaded.warm_up()
        bar = stack.enter_context(
            tqdm(
                total=sum(row.id not in share.done for batch in own for row in batch),
                desc=f"{config.folder_name} {batches[0][0].task}",
                unit="row",
                disable=not team().is_main,
            )
        )
        session = None
        if policy is not None:
            session = stack.enter_context(skipping(loaded.model, policy, scope=config.experiment))
        audit = stack.enter_context(Audit(loaded.model, session))
        for batch in own:
            made = _run_batch(config, loaded, policy, audit, batch)
            new = [row for row in made if row.id not in share.done]
            share.append(new)
            bar.update(len(new))


def _run_batch(
    config: RunConfig,
    loaded: LoadedModel,
    policy: SkipPolicy | None,
    audit: Audit,
    batch: list[Row],
) -> list[GeneratedRow]:
    """Generates one batch, checks what ran, and returns its rows."""
    prompts = [loaded.prompt(config, row) for row in batch]
    stop = loaded.stop_rule(config, batch[0].task)
    for prompt in prompts:
        check_prompt_length(loaded.model, prompt.tokens_after, stop.max_new_tokens)
    audit.start_request()
    made = generate_greedy(
        loaded.model, [prompt.input_ids for prompt in prompts], stop, pad_id=loaded.pad_id
    )
    extension = getattr(policy, "extension", None) if config.experiment != "prefill" else None
    added = [str(sublayer) for sublayer in extension] if extension else []
    skipped = audit.counts(online_extension=added)
    _check_scope(config, skipped)
    return [
        _generated(loaded, row, prompt, made, index, skipped)
        for index, (row, prompt) in enumerate(zip(batch, prompts, strict=True))
    ]


def _generated(
    loaded: LoadedModel, row: Row, prompt: Prompt, made: Generated, index: int, skipped: Skips
) -> GeneratedRow:
    """What is kept of one answer of a batch."""
    text = str(loaded.tokenizer.decode(list(made.tokens[index]), skip_special_tokens=True))
    return GeneratedRow(
        id=row.id,
        task=row.task,
        prediction=postprocess(text, loaded.spec.answer_end),
        references=list(row.answers),
        classes=list(row.all_classes) if row.all_classes else None,
        length=row.length,
        tokens_before=prompt.tokens_before,
        tokens_after=prompt.tokens_after,
        truncated=prompt.truncated,
        generated_tokens=made.n_generated[index],
        skipped=skipped,
        seconds=Seconds(ttft=made.ttft, per_token=made.per_token, total=made.total),
        batch=len(made.tokens),
        session=command_id(),
    )


def _check_scope(config: RunConfig, skipped: Skips) -> None:
    """Refuses a row in which a phase of the experiment skipped nothing, or another one something.

    The audit shows that the plan was carried out; this, that there was one.
    """
    for phase in Phase:
        count = skipped.of(phase)
        if not count.forwards:
            continue
        wanted = config.budget > 0 and not (
            config.experiment == "decode" and phase is Phase.PREFILL
        )
        if bool(count.attn + count.ffn + count.windows) == wanted:
            continue
        if wanted and policy_class(config.policy).may_rest:
            continue
        state, remedy = "something was", "this is a bug, please report it"
        if wanted:
            state = "nothing was"
            remedy = "a policy of which that is to be expected says so by may_rest = True"
        raise RunError(
            f"{config.folder_name}: {state} skipped in {phase} in the {config.experiment} "
            f"experiment. The row is not kept; {remedy}."
        )
