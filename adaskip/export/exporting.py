"""`export_checkpoint`: a model under a plan as a checkpoint of its own, checked at once."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaskip.entering import as_policy
from adaskip.errors import AdaskipError
from adaskip.export import comparing, refusing
from adaskip.export.formats import KINDS
from adaskip.export.metadata import about, source_name
from adaskip.export.refusing import Format
from adaskip.export.report import REPORT, Check, ExportReport, Written
from adaskip.export.surviving import Surviving, surviving
from adaskip.importance import Importance
from adaskip.plan import SkipPlan
from adaskip.policies.factory import LEARNED
from adaskip.policy import FixedSkipping, SkipPolicy
from adaskip.supported import check_model
from adaskip.whole_files import give_usual_mode


def export_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    plan: SkipPlan | SkipPolicy,
    folder: str | os.PathLike[str],
    *,
    format: Format = "hf",
    dtype: torch.dtype | str | None = None,
    tokenizer_gguf: str | os.PathLike[str] | None = None,
) -> ExportReport:
    """Writes a model under a plan as an ordinary checkpoint in which skipped sublayers are absent.

    The survivors are chunked into layers again and gains are folded into weights. The checkpoint
    is written beside the folder, loaded back, compared with the plan in this process on two texts,
    and only then put in place: it appears whole or not at all. In an empty folder that is there
    already its files appear one after the other, `export.json` last.

    Args:
        model: a causal language model of a supported family, outside of `skipping()`.
        tokenizer: written with it; None writes none, and random ids take the place of texts.
        plan: what is left out; or a policy that leaves out the same at every step.
        folder: where to; new or empty.
        format: "hf" for transformers and, where it can, vLLM; "gguf" for llama.cpp.
        dtype: of the weights: float32, float16 or bfloat16, for "gguf" also "q8_0"; by default the
            model's.
        tokenizer_gguf: for "gguf", a file whose tokenizer is copied in place of `tokenizer`; its
            tokens must be the same.

    Returns:
        What was written, and how near it is to the plan; also in `export.json`.

    Raises:
        PlanError: the plan is another one in prefill and decode, of another model, or holds what
            a checkpoint cannot.
        UnsupportedModelError: the family, a window, or the form of the weights.
        ExportError: what the checkpoint computes is not what the plan does.
        AdaskipError: the folder is not empty or cannot be written, or there is no such format,
            precision or tokenizer.
    """
    check_model(model)
    name = refusing.given_dtype(dtype, format) or refusing.model_dtype(model)
    target = Path(folder).expanduser()
    refusing.check_folder(target)
    refusing.check_model(model, format)
    n_layers = model.config.num_hidden_layers
    policy = as_policy(plan)
    policy.check_model(model)
    wanted = refusing.plan_of(policy, n_layers)
    wanted.check(n_layers, model.config.hidden_size)
    left = surviving(wanted, n_layers)
    kind = KINDS[format](model, tokenizer, left, name, tokenizer_gguf)
    texts = comparing.texts_of(model, tokenizer)
    tolerance = comparing.tolerance(name, refusing.model_dtype(model))
    # From here on, for a folder that cannot be written is refused before anything is computed.
    with _appearing(target) as work:
        expected = comparing.samples(model, wanted, texts)
        written = kind.write(work, about(model, _told(policy, wanted)))
        checks = tuple(
            comparing.accepted(comparing.compared(engine, expected, found, tolerance))
            for engine, found in kind.run(work, expected)
        )
        report = _report(model, left, written, checks, str(target), format, name)
        report.save(work)
    return report


def _told(policy: SkipPolicy, plan: SkipPlan) -> SkipPlan:
    """A plan that says where it is from: one of a policy, of the policy and its profile."""
    if isinstance(policy, FixedSkipping) or plan.fingerprint or plan.about:
        return plan
    profile = getattr(policy, LEARNED, None)
    learned = profile if isinstance(profile, Importance) else None
    about = {"policy": repr(policy)} | ({} if learned is None else {"profile": learned.name})
    return SkipPlan(plan, fingerprint="" if learned is None else learned.fingerprint, about=about)


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A folder that becomes the target at the end, or is gone after a failure; its parents stay.

    A target that is there stays: it may be a link, a mount or the current folder. The folder is in
    it then, and its files move up.

    Raises:
        AdaskipError: it cannot be written, or something else has come into the target meanwhile.
    """
    place = target.resolve()
    beside = not place.exists()
    parent = place.parent if beside else place
    try:
        parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(dir=parent, prefix=f".{place.name}."))
        try:
            yield work
            for path in (work, *work.rglob("*")):
                give_usual_mode(path)
            if beside:
                work.rename(place)
                return
            if any(other != work for other in place.iterdir()):
                raise AdaskipError(f"{target} is no longer empty; give another folder.")
            # The report comes last: a folder that has it is whole.
            for file in sorted(work.iterdir(), key=lambda file: file.name == REPORT):
                file.rename(place / file.name)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise AdaskipError(
            f"Cannot write {target} ({error}): make room there, or give another folder."
        ) from error


def _report(
    model: PreTrainedModel,
    left: Surviving,
    written: Written,
    checks: tuple[Check, ...],
    folder: str,
    file_format: str,
    dtype: str,
) -> ExportReport:
    config: Any = model.config
    decoder: Any = model.base_model
    # Keys and values of 16 bits.
    kv_bytes = 2 * 2 * config.num_key_value_heads * decoder.layers[0].self_attn.head_dim
    attentions = left.count("attn")
    return ExportReport(
        folder=folder,
        format=file_format,
        architecture=written.architecture,
        dtype=dtype,
        source=source_name(model),
        n_layers=len(left.layers),
        attentions=attentions,
        ffns=left.count("ffn"),
        linears=sum(part.linear is not None for _, part in left.parts()),
        parameters=written.parameters,
        dense_parameters=model.num_parameters(),
        bytes=written.bytes,
        kv_bytes_per_token=kv_bytes * attentions,
        dense_kv_bytes_per_token=kv_bytes * config.num_hidden_layers,
        engines=written.engines,
        checks=checks,
    )
