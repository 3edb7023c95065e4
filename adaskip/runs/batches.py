"""Batches of rows: planned, shared out over processes, generated, audited and kept at once."""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from adaskip.errors import RunError
from adaskip.models.internlm import check_prompt_length
from adaskip.models.processes import team
from adaskip.plan import Phase
from adaskip.policies import SkipPolicy
from adaskip.runs.audit import Audit
from adaskip.runs.bench import Bench
from adaskip.runs.generation import Generated, generate_greedy
from adaskip.runs.ledger import session_id
from adaskip.runs.records import Record, append_rows
from adaskip.runs.runconfig import RunConfig
from adaskip.session import skipping
from adaskip.tasks.prompts import Prompt, postprocess
from adaskip.tasks.spec import Row


def plan_batches(rows: Sequence[Row], size: int) -> list[list[Row]]:
    """The rows in the order they are generated and written, batch by batch."""
    planned = list(rows)
    if size > 1:
        # Neighbours in length need little padding; the id makes the order the same every time.
        planned.sort(key=lambda row: (len(row.context) + len(row.input), row.id))
    return [planned[start : start + size] for start in range(0, len(planned), size)]


def share_out(
    batches: Sequence[list[Row]], done: Collection[str], *, rank: int = 0, world: int = 1
) -> list[list[Row]]:
    """One process's part of the batches that are not done; whole batches, for the same numbers."""
    pending = [batch for batch in batches if any(row.id not in done for row in batch)]
    return pending[rank::world]


def run_batches(
    config: RunConfig,
    task: str,
    bench: Bench,
    policy: SkipPolicy | None,
    batches: Sequence[list[Row]],
    done: Collection[str],
    path: Path | None,
) -> None:
    """Generates batches and appends the rows of each that are not done; `path` None: nowhere."""
    group = team()
    with contextlib.ExitStack() as stack:
        bench.warm_up()
        n_new = sum(row.id not in done for batch in batches for row in batch)
        title = f"{config.folder_name} {task}"
        bar = stack.enter_context(
            tqdm(total=n_new, desc=title, unit="row", disable=not group.is_first)
        )
        session = None
        if policy is not None:
            session = stack.enter_context(skipping(bench.model, policy, scope=config.experiment))
        audit = stack.enter_context(Audit(bench.model, session))
        for batch in batches:
            # A batch begun before it was killed is made again as it was, for the same numbers.
            made = _run_batch(config, bench, policy, audit, batch)
            new = [item for item in made if item["id"] not in done]
            if path is not None:
                append_rows(path, new)
            bar.update(len(new))


def _run_batch(
    config: RunConfig, bench: Bench, policy: SkipPolicy | None, audit: Audit, batch: list[Row]
) -> list[Record]:
    """Generates one batch, checks what ran, and returns its records."""
    prompts = [bench.prompt(config, row) for row in batch]
    stop = bench.stop_rule(config, batch[0].task)
    for prompt in prompts:
        check_prompt_length(bench.model, prompt.tokens_after, stop.max_new_tokens)
    audit.start_request()
    made = generate_greedy(
        bench.model, [prompt.input_ids for prompt in prompts], stop, pad_id=bench.pad_id
    )
    extension = getattr(policy, "extension", None) if config.experiment != "prefill" else None
    skipped = {
        **audit.counts(),
        "online_extension": [str(sublayer) for sublayer in extension] if extension else [],
    }
    _check_scope(config, skipped)
    return [
        _row_record(bench, row, prompt, made, index, skipped)
        for index, (row, prompt) in enumerate(zip(batch, prompts, strict=True))
    ]


def _row_record(
    bench: Bench, row: Row, prompt: Prompt, made: Generated, index: int, skipped: dict[str, Any]
) -> Record:
    text = str(bench.tokenizer.decode(list(made.tokens[index]), skip_special_tokens=True))
    return {
        "id": row.id,
        "task": row.task,
        "prediction": postprocess(text, bench.spec.answer_end),
        "references": list(row.answers),
        "classes": list(row.all_classes) if row.all_classes else None,
        "length": row.length,
        "tokens_before": prompt.tokens_before,
        "tokens_after": prompt.tokens_after,
        "truncated": prompt.truncated,
        "generated_tokens": made.n_generated[index],
        "skipped": skipped,
        "seconds": {"ttft": made.ttft, "per_token": made.per_token, "total": made.total},
        "batch": len(made.tokens),
        "session": session_id(),
    }


def _check_scope(config: RunConfig, skipped: dict[str, Any]) -> None:
    """Refuses a row in which a phase of the experiment skipped nothing, or another one something.

    The audit shows that the plan was carried out; this, that there was one.
    """
    for phase in Phase:
        count = skipped[phase]
        if not count["forwards"]:
            continue
        wanted = config.budget > 0 and not (
            config.experiment == "decode" and phase is Phase.PREFILL
        )
        if bool(count["attn"] + count["ffn"]) != wanted:
            state = "nothing was" if wanted else "something was"
            raise RunError(
                f"{config.folder_name}: {state} skipped in {phase} in the {config.experiment} "
                "experiment. The row is not kept; this is a bug, please report it."
            )
