"""Measures what the sublayers of a model take on this machine, once, and keeps it on disk."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import platform
import re
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel

from adaskip.blocks import execution_device
from adaskip.chance import SEED
from adaskip.configuration import cache_root
from adaskip.numbers import check_counts
from adaskip.plan import Phase
from adaskip.profiling.clock import ClockedRequests
from adaskip.profiling.interleaving import by_turns
from adaskip.profiling.timing import (
    MakeCache,
    RequestTimes,
    dynamic_cache,
    time_request,
)
from adaskip.sublayer_times import VERSION, SublayerTimes, check_place
from adaskip.supported import check_model, refuse_inside

logger = logging.getLogger(__name__)

REPEATS = 5
# What a model of the same weights may do more or less of.
_WORK = (
    *("num_attention_heads", "num_key_value_heads", "sliding_window", "layer_types"),
    "num_experts_per_tok",
)
STEPS = 16


def random_prompt(model: PreTrainedModel, tokens: int, batch: int = 1, seed: int = SEED) -> Tensor:
    """Random token ids where the model takes them: [batch, tokens]."""
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    ids = torch.randint(0, vocabulary, (batch, tokens), generator=generator)
    return ids.to(execution_device(model.get_input_embeddings()))


def measure_sublayers(
    model: PreTrainedModel,
    context: int,
    *,
    batch: int = 1,
    repeats: int = REPEATS,
    n_steps: int = STEPS,
    make_cache: MakeCache = dynamic_cache,
    progress: bool = False,
) -> dict[Phase, SublayerTimes]:
    """Measures both phases now: forwards with and without timestamps by turns, after a warm-up.

    As `measured_times`, with `repeats` requests of each kind and `n_steps` decode steps in each.

    Raises:
        AdaskipError: `context`, `batch`, `repeats` or `n_steps` is not positive.
        UnsupportedModelError: the model is not supported, or on several devices.
    """
    check_model(model)
    check_counts({"context": context, "batch": batch, "repeats": repeats, "n_steps": n_steps})
    # Its times would be kept as the model's own.
    refuse_inside(model.base_model)
    ids = random_prompt(model, context, batch)
    plain = partial(time_request, model, ids, n_steps, make_cache=make_cache)
    clock = ClockedRequests(model, ids, n_steps, make_cache)
    plain()
    clock.warm_up()
    kinds: dict[str, Callable[[], RequestTimes]] = {"plain": plain, "clocked": clock.request}
    rounds = by_turns(kinds, rounds=repeats, title="timing sublayers", progress=progress)
    taken = [request for each in rounds for request in each["plain"]]
    return {
        phase: clock.times(phase, [request.seconds(phase) for request in taken]) for phase in Phase
    }


def measured_times(
    model: PreTrainedModel,
    phase: Phase | str,
    context: int,
    *,
    batch: int = 1,
    make_cache: MakeCache = dynamic_cache,
    folder: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> SublayerTimes:
    """The times of a phase, from disk where they were measured before on the same hardware.

    Args:
        model: outside of `skipping(...)`.
        phase: "prefill" or "decode".
        context: prompt tokens.
        batch: sequences.
        make_cache: the cache the model will be used with.
        folder: where measured times are kept; by default in adaskip's cache folder.
        progress: whether to show a progress bar if they have to be measured.

    Raises:
        AdaskipError: unknown phase, or a number is not positive.
        UnsupportedModelError: the model is not supported, or on several devices.
    """
    check_place(phase, context, batch)
    check_model(model)
    target = cache_root() / "times" if folder is None else Path(folder)
    paths = _paths(model, target, context, batch, make_cache)
    with suppress(OSError, ValueError):  # AdaskipError and damaged JSON are ValueErrors
        return SublayerTimes.from_dict(json.loads(paths[Phase(phase)].read_text(encoding="utf-8")))
    logger.info("Timing the sublayers at %d tokens, batch %d; kept in %s", context, batch, target)
    times = measure_sublayers(model, context, batch=batch, make_cache=make_cache, progress=progress)
    with suppress(OSError):  # a cache that cannot be written is only slower
        target.mkdir(parents=True, exist_ok=True)
        for p, path in paths.items():
            path.write_text(json.dumps(times[p].as_dict()), encoding="utf-8")
    return times[Phase(phase)]


def _paths(
    model: PreTrainedModel, folder: Path, context: int, batch: int, make_cache: MakeCache
) -> dict[Phase, Path]:
    """Where the times of each phase are kept, by all that they depend on."""
    facts = [*identity(model), context, batch, make_cache.__name__, VERSION]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]
    name = f"{model.config.model_type}-%s-{context}x{batch}-{digest}.json"
    return {phase: folder / (name % phase) for phase in Phase}


def hardware(device: torch.device) -> str:
    """The device's name, with the number of threads for a CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def processor_name() -> str:
    """The model of the CPU."""
    name = platform.processor() or platform.machine() or "cpu"
    with suppress(OSError):
        found = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
        name = found[1].strip() if found else name
    return name


def identity(model: PreTrainedModel) -> list[str]:
    """What a time depends on besides context and batch.

    A model on one device, in one precision, is told by seven facts, and any other by more.
    """
    parameters = [f"{name}{tuple(p.shape)}" for name, p in model.named_parameters()]
    shape = hashlib.sha256("".join(parameters).encode()).hexdigest()
    attention = str(getattr(model.config, "_attn_implementation", ""))
    config = model.config.get_text_config(decoder=True)
    work = json.dumps([getattr(config, name, None) for name in _WORK])
    device = execution_device(model.get_input_embeddings())
    versions = [torch.__version__, transformers.__version__]
    plain = [hardware(device), shape, work, str(model.dtype), attention, *versions]
    return [*plain, *_placement(model)]


def _placement(model: PreTrainedModel) -> list[str]:
    """Where each weight lies and each layer computes, and in which form; nothing if all are alike.

    Quantized weights may have the names, shapes and device of the others.
    """
    decoder: Any = model.base_model
    devices = [str(execution_device(layer)) for layer in decoder.layers]
    forms = [f"{type(p.data).__name__} {p.dtype} {p.device}" for p in model.parameters()]
    quantized = getattr(model.config, "quantization_config", None)
    if quantized is None and {*devices} == {str(model.device)} and len({*forms}) == 1:
        return []
    return [*devices, hashlib.sha256("".join(forms).encode()).hexdigest(), str(quantized)]
