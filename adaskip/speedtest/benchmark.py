"""A speed test: every case at every context length and batch size, by turns in one process."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaskip.errors import AdaskipError, RunError
from adaskip.learning import learn_importance
from adaskip.models.devices import resolve_device, resolve_dtype
from adaskip.models.loading import load_model, random_model
from adaskip.plan import Phase
from adaskip.profiling import memory
from adaskip.profiling.calibration import hardware, random_prompt
from adaskip.profiling.clock import ClockedRequests
from adaskip.profiling.interleaving import by_turns
from adaskip.profiling.timing import RequestTimes
from adaskip.runs.files import SCHEMA, environment, read_json, write_json, writing
from adaskip.speedtest.cases import BASELINES, DENSE, Case, CaseRun, make_cases, run_case
from adaskip.speedtest.config import DEFAULT_WEIGHTS, SpeedConfig
from adaskip.speedtest.roofline import Rates, measured_rates
from adaskip.speedtest.stats import Measured, Point, case_record, checked_kv, compiled_times

logger = logging.getLogger(__name__)
WARMUP_TOKENS = 256
# How lines are compared.
METHOD = "round by round"
OLD = ".old.json"


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
    seconds = 60 * config.minutes / len(points)
    for context, batch in points:
        record["points"].append(_point(model, cases, config, context, batch, seconds, rates))
        record["points"].sort(key=lambda p: (p["batch"], p["context"]))
        write_json(path, record)
    return path


def _open_record(config: SpeedConfig, path: Path, device: torch.device) -> dict[str, Any]:
    """The record on disk, if it may be continued, or a new one.

    A record that other code or another machine made is not continued but put aside, so that the
    same command measures in every checkout, whatever results came with it.
    """
    settings = config.settings() | {"hardware": hardware(device), "method": METHOD}
    settings["dtype"] = str(resolve_dtype(config.dtype, device)).removeprefix("torch.")
    new = {
        "schema": SCHEMA,
        "settings": settings,
        "environment": environment(device.type),
        "points": [],
    }
    if not path.exists():
        return new
    old = read_json(path)
    if config.resume and _origin(old) == _origin(new):
        other = [key for key, value in settings.items() if old["settings"].get(key) != value]
        if other:
            raise RunError(
                f"{path} was measured with another {other[0]} "
                f"({old['settings'].get(other[0])!r}, now {settings[other[0]]!r}); give a "
                "--name, or --no-resume to measure anew."
            )
        return old
    kept = path.with_suffix(OLD)
    with writing(kept):
        path.replace(kept)
    logger.info("Measuring anew; the record that was there is kept as %s", kept)
    return new


def _origin(record: Mapping[str, Any]) -> list[object]:
    """What made a record: hardware, method, versions and code."""
    settings, made_in = record["settings"], record["environment"]
    versions = [made_in.get(name) for name in ("torch", "transformers", "commit")]
    return [settings.get("hardware"), settings.get("method"), *versions]


def _model(config: SpeedConfig, device: torch.device) -> PreTrainedModel:
    kwargs: dict[str, Any] = {"dtype": config.dtype, "device": config.device}
    if config.weights is not None:
        own = config.weights == DEFAULT_WEIGHTS
        name = config.model_name if own else config.weights
        return load_model(name, allow_pickle=config.allow_pickle, **kwargs)
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
    clock = ClockedRequests(model, ids, config.new_tokens)
    clock.warm_up()
    kinds: dict[str, Callable[[], RequestTimes]] = {
        case.label: partial(_request, model, case, ids, config.new_tokens) for case in cases
    }
    rounds = by_turns(
        kinds | {"clocked": clock.request},
        rounds=config.rounds,
        baselines=[label for label in BASELINES if label in kinds],
        seconds=seconds - (time.perf_counter() - start),
        title=f"{context} tokens x {batch}",
    )
    for taken in rounds:
        for label, own in measured.items():
            own.add(taken[label])
    times = {phase: clock.times(phase, measured[DENSE].seconds(phase)) for phase in Phase}
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


def _request(model: PreTrainedModel, case: Case, ids: Tensor, n_steps: int) -> RequestTimes:
    return run_case(model, case, ids, n_steps).times


def _first(model: PreTrainedModel, case: Case, ids: Tensor, config: SpeedConfig) -> Measured:
    """The request that warms up: memory, keys and values, and what was skipped."""
    memory.reset_peak(model.device)
    run: CaseRun = run_case(model, case, ids, config.new_tokens, look=True)
    peak = memory.peak_bytes(model.device)
    formula = checked_kv(model, case, run, ids.shape[1], ids.shape[0], config.new_tokens)
    return Measured(run.plans, peak, run.times.kv_bytes, formula, run.times.tokens)
