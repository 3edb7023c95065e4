"""A speed test: every case at every context length and batch size, by turns in one process."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from adaskip import memory
from adaskip.errors import AdaskipError, RunError
from adaskip.experiments.records import SCHEMA, environment, read_json, write_json
from adaskip.learning import learn_importance
from adaskip.models.loading import load_model, random_model, resolve_device, resolve_dtype
from adaskip.plan import Phase
from adaskip.speed.calibration import hardware, layer_types, random_prompt
from adaskip.speed.cases import Case, CaseRun, make_cases, run_case
from adaskip.speed.config import DEFAULT_WEIGHTS, MIN_ROUNDS, SpeedConfig
from adaskip.speed.roofline import Rates, measured_rates
from adaskip.speed.stats import Measured, Point, case_record, checked_kv, compiled_times
from adaskip.speed.sublayer_times import SublayerTimes, combined
from adaskip.speed.timing import SublayerClock, growing_cache, time_request

logger = logging.getLogger(__name__)
WARMUP_TOKENS = 256


def run_speed(config: SpeedConfig) -> Path:
    """Measures what is not measured yet; returns the path of the JSON record.

    Raises:
        AdaskipError: an option is wrong, or the model does not fit into memory.
        RunError: the record on disk is of other settings, or cannot be written.
    """
    config.check()
    device = resolve_device(config.device)
    name = config.name or f"{config.model_name}-{device.type}"
    path = Path(config.results_dir) / f"{name}.json"
    record = _open_record(config, path, device)
    done = {(point["context"], point["batch"]) for point in record["points"]}
    points = [(c, b) for b in config.batches for c in config.contexts if (c, b) not in done]
    if not points:
        return path
    if config.keep_memory and device.type == "cpu" and not memory.keep_freed_memory():
        logger.warning("Freed memory cannot be kept here: page faults are part of the times.")
    model = _model(config, device)
    importance = learn_importance(model, [random_prompt(model, WARMUP_TOKENS)], source="random ids")
    cases = make_cases(
        importance,
        config.policies,
        config.budgets,
        n_steps=config.new_tokens,
        compiled=config.compiled,
    )
    rates = measured_rates(device)
    record["rates"] = None if rates is None else asdict(rates)
    shares = sum(context * batch for context, batch in points)
    for context, batch in points:
        seconds = 60 * config.minutes * context * batch / shares
        record["points"].append(_point(model, cases, config, context, batch, seconds, rates))
        record["points"].sort(key=lambda p: (p["batch"], p["context"]))
        write_json(path, record)
    return path


def _open_record(config: SpeedConfig, path: Path, device: torch.device) -> dict[str, Any]:
    """The record on disk, if it may be continued, or a new one."""
    settings = config.settings() | {"hardware": hardware(device)}
    settings["dtype"] = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
    if config.resume and path.exists():
        record = read_json(path)
        other = [key for key, value in settings.items() if record["settings"].get(key) != value]
        if other:
            raise RunError(
                f"{path} was measured with another {other[0]} "
                f"({record['settings'].get(other[0])!r}, now {settings[other[0]]!r}); give a "
                "--name, or --no-resume to measure anew."
            )
        return record
    return {
        "schema": SCHEMA,
        "settings": settings,
        "environment": environment(device.type),
        "points": [],
    }


def _model(config: SpeedConfig, device: torch.device) -> PreTrainedModel:
    kwargs: dict[str, Any] = {"dtype": config.dtype, "device": config.device}
    if config.weights is not None:
        own = config.weights == DEFAULT_WEIGHTS
        return load_model(config.model_name if own else config.weights, **kwargs)
    with torch.device("meta"):
        shape = random_model(config.model_name, device="meta", n_layers=config.layers)
    needed = (
        sum(p.numel() for p in shape.parameters()) * resolve_dtype(config.dtype, device).itemsize
    )
    free = memory.available_bytes(device)
    if free is not None and needed > 0.9 * free:
        raise AdaskipError(
            f"The weights of {config.model_name} take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB "
            f"are free on {device}; measure fewer layers (--layers N) or use --dtype bfloat16."
        )
    return random_model(config.model_name, n_layers=config.layers, **kwargs)


def _point(
    model: PreTrainedModel,
    cases: Sequence[Case],
    config: SpeedConfig,
    context: int,
    batch: int,
    seconds: float,
    rates: Rates | None,
) -> dict[str, Any]:
    """`measure_point`, or a note that the device is too small for it."""
    try:
        return measure_point(model, cases, config, context, batch, seconds, rates)
    except torch.OutOfMemoryError:
        logger.warning("Out of memory at %d tokens, batch %d: left out", context, batch)
        torch.cuda.empty_cache()
        return {"context": context, "batch": batch, "error": "out of memory", "cases": []}


def measure_point(
    model: PreTrainedModel,
    cases: Sequence[Case],
    config: SpeedConfig,
    context: int,
    batch: int,
    seconds: float,
    rates: Rates | None,
) -> dict[str, Any]:
    """All cases at one context length and batch size: a round to warm up, then rounds that count.

    Raises:
        RunError: a case holds other keys and values than it must.
    """
    ids = random_prompt(model, context, batch)
    start = time.perf_counter()
    measured = {case.label: _first(model, case, ids, config) for case in cases}
    clock = SublayerClock(model)
    clocked: dict[Phase, tuple[list[float], list[Any]]] = {p: ([], []) for p in Phase}
    title = f"{context} tokens x {batch}"
    with tqdm(total=config.rounds, desc=title, unit="round") as bar:
        for number in range(config.rounds + 1):
            if number > MIN_ROUNDS and time.perf_counter() - start > seconds:
                break
            for case in cases if number else ():
                measured[case.label].add(run_case(model, case, ids, config.new_tokens).times)
            _clock(model, clock, ids, config.new_tokens, clocked if number else None)
            bar.update(1 if number else 0)
    times = _sublayers(model, measured["dense"], clocked, context, batch)
    decode = compiled_times(measured, times[Phase.DECODE]) if config.compiled else None
    point = Point(context, batch, config.new_tokens, rates)
    lines = [
        case_record(model, case, measured, times, decode, point) for case in cases if case.measured
    ]
    return {
        "context": context,
        "batch": batch,
        "sublayers": {str(phase): value.as_dict() for phase, value in times.items()},
        "cases": lines,
    }


def _first(model: PreTrainedModel, case: Case, ids: Tensor, config: SpeedConfig) -> Measured:
    """The request that warms up: memory, keys and values, and what was skipped."""
    memory.reset_peak(model.device)
    run: CaseRun = run_case(model, case, ids, config.new_tokens, look=True)
    peak = memory.peak_bytes(model.device)
    formula = checked_kv(model, case, run, ids.shape[1], ids.shape[0], config.new_tokens)
    return Measured(run.plans, peak, run.times.kv_bytes, formula, run.times.tokens)


def _clock(
    model: PreTrainedModel,
    clock: SublayerClock,
    ids: Tensor,
    n_steps: int,
    into: dict[Phase, tuple[list[float], list[Any]]] | None,
) -> None:
    """One dense request with timestamps."""
    with clock.running():
        times = time_request(model, ids, n_steps, make_cache=growing_cache)
    prefill, *steps = clock.read()
    if into is not None:
        into[Phase.PREFILL][0].append(times.ttft)
        into[Phase.PREFILL][1].append(prefill)
        into[Phase.DECODE][0].append(times.per_token)
        into[Phase.DECODE][1].extend(steps)


def _sublayers(
    model: PreTrainedModel,
    dense: Measured,
    clocked: dict[Phase, tuple[list[float], list[Any]]],
    context: int,
    batch: int,
) -> dict[Phase, SublayerTimes]:
    return {
        phase: combined(
            dense.seconds(phase),
            clocked[phase][1],
            clocked[phase][0],
            phase=phase,
            context=context,
            batch=batch,
            layer_types=layer_types(model),
        )
        for phase in Phase
    }
