"""What one command measures: its options, the model it opens, the points it measures one by one."""

from __future__ import annotations

import gc
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import PreTrainedModel

from adaskip.errors import AdaskipError, refuse_below_one, unknown_name
from adaskip.models.devices import resolve_device, resolve_dtype
from adaskip.models.internlm import position_limit
from adaskip.models.loading import build_config, load_model, model_names, model_spec, random_model
from adaskip.plan import Phase
from adaskip.policies.made_plan import PlanFile
from adaskip.profiling import memory
from adaskip.profiling.interleaving import Ratio, Spread, per_round
from adaskip.runs.files import check_file_name
from adaskip.speedtest.record import ERROR, Key, Point, SpeedRecord, key_id

logger = logging.getLogger(__name__)
DEFAULT_WEIGHTS = "default"
Row = dict[str, Any]
# Of prefill, and per decode step where there are any.
Seconds = tuple[float, ...]


def option(default: Any, text: str) -> Any:
    """A field that is an option of the command line, by its own name, with its help text."""
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class Measurement(ABC):
    """Something about speed that a command measures on one model, point by point.

    The fields with a help text are the command's options.

    Attributes:
        kind: which report its record becomes; see `adaskip.reports.speed`.
        title: what is measured, in a few words.
        free: the fields in which two runs that share a record may differ.
    """

    kind: ClassVar[str]
    title: ClassVar[str]
    free: ClassVar[frozenset[str]] = frozenset({"contexts", "name", "results_dir", "resume"})

    contexts: tuple[int, ...] = option((1024,), "prompt lengths in tokens")
    new_tokens: int = option(16, "decode steps per request")
    rounds: int = option(9, "requests of each kind that count")
    layers: int | None = option(
        None, "decoder layers, where the whole model is too large (random weights only)"
    )
    device: str | None = option(None, "torch device (default: cuda where there is one, else cpu)")
    name: str = option("", "name of the record (default: by model and device)")
    results_dir: str = option("results/speed", "folder of the records")
    resume: bool = option(True, "continue a record that exists")

    @property
    @abstractmethod
    def source(self) -> tuple[str, str | None]:
        """A model of `configs/models.yaml`, and its weights as `--weights` of a speed test."""

    @abstractmethod
    def points(self, missing: Sequence[Key]) -> Iterator[Point]:
        """Measures the points with these keys, one after the other."""

    def keys(self) -> list[Key]:
        """What tells the points apart that it is to measure."""
        return [{"context": context} for context in self.contexts]

    def check(self) -> None:
        """Refuses what cannot be measured.

        Raises:
            AdaskipError: the first such option.
        """
        if self.name:
            check_file_name("name (--name)", self.name)
        refuse_below_one({"contexts": min(self.contexts), "new_tokens": self.new_tokens})
        refuse_below_one({"rounds": self.rounds, "layers": self.layers})
        model, weights = self.source
        if model not in model_names():
            raise unknown_name("model", model, model_names())
        if weights is not None and "/" not in weights and not Path(weights).is_dir():
            known = (DEFAULT_WEIGHTS, *model_names())
            if weights not in known:
                raise unknown_name("weights", weights, known)
        if self.layers is not None and weights is not None:
            raise AdaskipError(
                f"--layers {self.layers} cuts random weights only; leave out --layers, or measure "
                "random weights."
            )
        if weights in (None, DEFAULT_WEIGHTS):
            self._check_positions(model)

    def _check_positions(self, model: str) -> None:
        """Refuses requests that the model would refuse, once it is made and has taken its time."""
        limit = position_limit(build_config(model_spec(model).shape))
        if limit is not None and max(self.contexts) + self.new_tokens > limit:
            raise AdaskipError(
                f"{model} is exact only up to {limit} tokens: {max(self.contexts)} of a prompt "
                f"(--contexts) and {self.new_tokens} new ones (--new_tokens) are more."
            )

    def path(self, device: torch.device) -> Path:
        """Where its record is."""
        prefix = "" if self.kind == "speed" else f"{self.kind}-"
        name = self.name or f"{prefix}{self.source[0]}-{device.type}"
        return Path(self.results_dir) / f"{name}.json"

    def settings(self, device: torch.device) -> dict[str, Any]:
        """What all points of one record have in common; plans by name, not where they lie."""
        own = {key: value for key, value in asdict(self).items() if key not in self.free}
        if "plans" in own:
            own["plans"] = tuple(PlanFile.read(path).name for path in own["plans"])
        return own

    def open(
        self, *, dtype: str | None = None, allow_pickle: bool = False, keep_memory: bool = True
    ) -> PreTrainedModel:
        """The model it times, in a process that keeps freed memory if it computes on the CPU.

        Raises:
            AdaskipError: the model cannot be had, or does not fit into memory.
        """
        device = resolve_device(self.device)
        if keep_memory and device.type == "cpu" and not memory.keep_freed_memory():
            logger.warning("Freed memory cannot be kept here: page faults are part of the times.")
        name, weights = self.source
        if weights is not None:
            own = name if weights == DEFAULT_WEIGHTS else weights
            return load_model(own, dtype=dtype, device=device, allow_pickle=allow_pickle)
        _refuse_too_large(name, self.layers, device, resolve_dtype(dtype, device))
        return random_model(name, dtype=dtype, device=device, n_layers=self.layers)


def _refuse_too_large(
    name: str, n_layers: int | None, device: torch.device, dtype: torch.dtype
) -> None:
    with torch.device("meta"):
        shape = random_model(name, device="meta", n_layers=n_layers)
    needed = sum(p.numel() for p in shape.parameters()) * dtype.itemsize
    free = memory.available_bytes(device)
    if free is not None and needed > 0.9 * free:
        raise AdaskipError(
            f"The weights of {name} take {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free on "
            f"{device}; measure fewer layers (--layers N), or in bfloat16."
        )


@dataclass(frozen=True, kw_only=True)
class Study(Measurement):
    """A measurement beside the speed tests, of what they rest on; its report is one table."""

    model: str = option("smollm2", "the model, by its name in configs/models.yaml")
    real: bool = option(False, "real weights in place of random ones of its shape")

    @property
    def source(self) -> tuple[str, str | None]:
        """The model, and whether it has its own weights."""
        return self.model, DEFAULT_WEIGHTS if self.real else None


def if_it_fits(key: Key, measured: Callable[[], Point], *, lines: str = "rows") -> Point:
    """A point, or one without lines that says that memory did not suffice.

    Args:
        key: of the point.
        measured: measures it.
        lines: what a point calls its lines.
    """
    try:
        return measured()
    except torch.OutOfMemoryError:
        logger.warning("Out of memory at %s: left out", key_id(key))
    # After the block: the error's traceback holds the frames, and they all that did not fit.
    gc.collect()
    torch.cuda.empty_cache()
    return {ERROR: "out of memory", lines: []}


def comparison(rounds: Sequence[Mapping[str, Sequence[Seconds]]], label: str, baseline: str) -> Row:
    """A row of a study: times of each phase, and their ratios to a baseline's, round by round."""
    row: Row = {"label": label}
    for index, phase in enumerate(list(Phase)[: len(rounds[0][label][0])]):
        own, base = (per_round(rounds, kind, itemgetter(index)) for kind in (label, baseline))
        row[str(phase)] = asdict(Spread.of(own)) | {"ratio": asdict(Ratio.paired(own, base))}
    return row


def measure(measurement: Measurement) -> SpeedRecord:
    """Measures what is not measured yet; the record is written after every point.

    Raises:
        AdaskipError: an option is wrong, or the model does not fit into memory.
        RunError: the record on disk is of other settings, or cannot be written.
    """
    measurement.check()
    device = resolve_device(measurement.device)
    settings = measurement.settings(device)
    path = measurement.path(device)
    record = SpeedRecord.open(path, settings, device, resume=measurement.resume)
    if missing := record.missing(measurement.keys()):
        for key, point in zip(missing, measurement.points(missing), strict=True):
            record.add(key, point)
    return record
