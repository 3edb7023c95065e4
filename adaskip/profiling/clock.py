"""Times of every sublayer within dense forwards.

Sublayers are told apart by timestamps at their borders, which add up to the forward by
construction; timing them one by one would not.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaskip.blocks import block_spec, bound_parts, execution_device
from adaskip.plan import Phase, Sublayer, all_sublayers
from adaskip.profiling.timing import (
    MakeCache,
    RequestTimes,
    growing_cache,
    synchronize,
    time_request,
)
from adaskip.sublayer_times import SublayerTimes, combined
from adaskip.supported import refuse_several_devices


def sublayer_types(model: PreTrainedModel) -> dict[Sublayer, str]:
    """What sublayers of one kind differ by: what an attention sees, and the class that computes.

    Some layers of a mixture of experts may have a dense FFN.
    """
    decoder: Any = model.base_model
    block = block_spec(model.config.model_type)
    kinds = getattr(model.config.get_text_config(decoder=True), "layer_types", None)
    types = {}
    for sublayer in all_sublayers(len(decoder.layers)):
        # Layers of an exported model may lack it.
        body = getattr(decoder.layers[sublayer.layer], getattr(block, sublayer.kind).body, None)
        seen = kinds[sublayer.layer] if kinds and sublayer.kind == "attn" else ""
        types[sublayer] = f"{type(body).__name__} {seen}"
    return types


class SublayerClock:
    """Timestamps at the borders of all sublayers, forward after forward.

    On CUDA the timestamps are events in the stream, read when the measurement is over.

    Raises:
        UnsupportedModelError: the model is on several devices.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        decoder: Any = model.base_model
        refuse_several_devices(decoder.layers)
        self._decoder = decoder
        self._block = block_spec(model.config.model_type)
        self._device = execution_device(decoder.layers[0])
        self._marks: list[Any] = []

    @contextmanager
    def running(self) -> Iterator[SublayerClock]:
        """Installs the timestamps, outside of `skipping(...)`, and takes them away."""
        with ExitStack() as undo:
            for layer in self._decoder.layers:
                body, pre, _ = bound_parts(layer, self._block.ffn)
                for module in (layer, body if pre is None else pre):
                    undo.callback(module.register_forward_pre_hook(self._mark).remove)
            undo.callback(self._decoder.norm.register_forward_pre_hook(self._mark).remove)
            yield self

    def _mark(self, *hook_arguments: object) -> None:
        if self._device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
            # By itself it goes into a stream of the current device, which may be another.
            event.record(torch.cuda.current_stream(self._device))
            self._marks.append(event)
        else:
            self._marks.append(time.perf_counter())

    def read(self) -> list[dict[Sublayer, float]]:
        """Seconds of every sublayer in each forward since the last `read`."""
        synchronize(self._device)
        marks, self._marks = self._marks, []
        sublayers = all_sublayers(len(self._decoder.layers))
        forwards = []
        for start in range(0, len(marks), len(sublayers) + 1):
            borders = marks[start : start + len(sublayers) + 1]
            spans = [_seconds(a, b) for a, b in pairwise(borders)]
            forwards.append(dict(zip(sublayers, spans, strict=True)))
        return forwards


def _seconds(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return float(end - start)
    return float(start.elapsed_time(end)) / 1000


class ClockedRequests:
    """Dense requests with timestamps, one at a time, and what they told of the sublayers.

    Attributes:
        requests: the requests so far.
        forwards: seconds of every sublayer in a forward of a phase, request by request: means over
            its steps, as its time per token is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        input_ids: Tensor,
        n_steps: int,
        make_cache: MakeCache = growing_cache,
    ) -> None:
        self.requests: list[RequestTimes] = []
        self.forwards: dict[Phase, list[dict[Sublayer, float]]] = {phase: [] for phase in Phase}
        self._clock = SublayerClock(model)
        self._model = model
        self._batch, self._context = input_ids.shape
        self._time = partial(time_request, model, input_ids, n_steps, make_cache=make_cache)

    def warm_up(self) -> None:
        """A request that does not count."""
        with self._clock.running():
            self._time()
        self._clock.read()

    def request(self) -> RequestTimes:
        """A request that counts."""
        with self._clock.running():
            times = self._time()
        prefill, *steps = self._clock.read()
        self.requests.append(times)
        self.forwards[Phase.PREFILL].append(prefill)
        mean = {s: statistics.fmean(step[s] for step in steps) for s in prefill} if steps else {}
        self.forwards[Phase.DECODE].append(mean)
        return times

    def times(self, phase: Phase, totals: Sequence[float]) -> SublayerTimes:
        """What the sublayers take of a forward.

        Args:
            phase: of the forward.
            totals: seconds of forwards without timestamps, measured by turns with these.
        """
        return combined(
            totals,
            self.forwards[phase],
            [request.seconds(phase) for request in self.requests],
            phase=phase,
            context=self._context,
            batch=self._batch,
            types=sublayer_types(self._model),
        )
