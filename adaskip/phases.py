"""Which request and phase a forward belongs to, from Python ints alone.

The KV cache itself is never asked for the phase: a skipped layer 0 would lie, and a static cache
would cost a device read.
"""

from __future__ import annotations

from dataclasses import dataclass
from weakref import WeakKeyDictionary

from transformers.cache_utils import Cache

from adaskip.plan import EMPTY_PLAN, Phase, SkipPlan, Step


@dataclass(slots=True)
class Request:
    """What is remembered of a request while its cache lives.

    Attributes:
        number: counted from 0 over the life of the tracker.
        index: forwards so far.
        tokens: tokens per sequence its cache has seen.
        decoded: decode steps taken so far.
        prefill_plan: what its prefill skipped.
    """

    number: int
    index: int = 0
    tokens: int = 0
    decoded: int = 0
    prefill_plan: SkipPlan = EMPTY_PLAN


class PhaseTracker:
    """Tells the `Step` of each forward; several requests may take turns, each with its cache."""

    def __init__(self) -> None:
        # Weak keys: a request must not keep its KV memory alive.
        self._requests: WeakKeyDictionary[Cache, Request] = WeakKeyDictionary()
        self._count = 0
        self.request: Request | None = None

    def seen(self, cache: Cache) -> int | None:
        """Tokens this cache has seen in our forwards; None for a cache we have not met."""
        request = self._requests.get(cache)
        return None if request is None else request.tokens

    def is_latest(self, cache: Cache) -> bool:
        """Whether the request of this cache is the one of the last forward."""
        return self.request is not None and self._requests.get(cache) is self.request

    def look(self, cache: Cache | None, past: int, tokens: int) -> tuple[Request, Step]:
        """Says which request and step a forward would be, without counting it.

        Args:
            cache: the forward's cache; None means no cache, where each forward is a request.
            past: tokens the cache holds before the forward.
            tokens: new tokens per sequence.
        """
        request = None if cache is None else self._requests.get(cache)
        if request is None or past == 0:
            request = Request(self._count)
        # A multi-token forward after the first decode step verifies drafted tokens: decoding too.
        decoding = request.decoded > 0 or (past > 0 and tokens == 1)
        phase = Phase.DECODE if decoding else Phase.PREFILL
        return request, Step(phase, request.number, request.index, tokens, request.decoded)

    def advance(self, cache: Cache | None, request: Request, step: Step, past: int) -> None:
        """Counts the forward that `look` described."""
        if request.number == self._count:
            self._count += 1
        if cache is not None:
            self._requests[cache] = request
        request.index += 1
        request.decoded += step.phase is Phase.DECODE
        request.tokens = past + step.tokens
        self.request = request
