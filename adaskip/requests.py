"""Which request and phase a forward belongs to, from Python ints alone.

The KV cache itself is never asked for the phase: a skipped layer 0 would lie, and a static cache
would cost a device read. Whoever knows the phase says it: `generate()` through
`adaskip.generating`, a hand-written loop through `Session.prefill()` and `Session.decode()`. Where
nobody says it, it is guessed: one token on a non-empty cache is a decode step, and so is everything
after the first decode step, until the cache is cut back into the prompt; all else is prefill.
METHOD, "Phases" has the whole rule.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any
from uuid import UUID, uuid4

import torch
from transformers.cache_utils import Cache

from adaskip.kvcache import was_used_outside
from adaskip.plan import EMPTY_PLAN, Phase, SkipPlan, Step
from adaskip.replacements import Window
from adaskip.window_track import WindowTrack

# Where a cache keeps its request: a copied or stored cache takes it along.
_ATTRIBUTE = "_adaskip_request"


@dataclass
class Request:
    """What is remembered of a request; kept on its cache, and copied with it.

    Attributes:
        number: counted from 0 over the life of the session.
        session: the session whose numbers these are.
        owner: the cache it was made for; another one that holds it is a copy.
        index: forwards so far.
        tokens: tokens per sequence its cache has seen.
        prompt: tokens per sequence its cache had seen at the end of prefill.
        decoded: decode steps taken so far.
        prefill_plan: what its prefill skipped.
        prepared: the plan whose skipped-cache placeholders its cache has; None if it has not been
            looked through.
        windows: what its windows of attention hold, by shape and device.
        memory: what the policy and the summary know of it, for copies of its cache.
        torn: whether a forward that failed has left tokens in some layers of its cache.
    """

    number: int
    session: UUID
    owner: weakref.ref[Cache] | None = None
    index: int = 0
    tokens: int = 0
    prompt: int = 0
    decoded: int = 0
    prefill_plan: SkipPlan = EMPTY_PLAN
    prepared: SkipPlan | None = field(default=None, repr=False)
    windows: dict[tuple[Window, torch.device], WindowTrack] = field(
        default_factory=dict, repr=False
    )
    memory: Any = field(default=None, repr=False)
    torn: bool = field(default=False, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        # Weak references cannot be stored; without one, a loaded cache counts as a copy.
        return vars(self) | {"owner": None}


class Requests:
    """Tells the `Step` of each forward; any number of requests may take turns.

    Args:
        branched: called with the number of a new request and the memory of the one it continues,
            when a copied or stored cache is met.
        forgotten: called with the number of a request whose cache is gone or has begun another.
    """

    def __init__(
        self, branched: Callable[[int, Any], None], forgotten: Callable[[int], None]
    ) -> None:
        self._session = uuid4()
        self._branched = branched
        self._forgotten = forgotten
        self._count = 0
        self._is_open = True

    def of(self, cache: Cache) -> Request | None:
        """The request of this cache; None if no forward of any session has seen what it holds.

        A copy of a cache continues what it is a copy of, as a request of its own.
        """
        found = self.known(cache)
        if found is None or (found.prepared and was_used_outside(cache)):
            return None
        if found.session == self._session and _owner(found) is cache:
            return found
        request = replace(
            found, number=self._count, session=self._session, owner=weakref.ref(cache)
        )
        self._count += 1
        self._branched(request.number, found.memory)
        self._watch(request)
        setattr(cache, _ATTRIBUTE, request)
        return request

    @staticmethod
    def known(cache: Cache) -> Request | None:
        """What a cache has of a request, its own or that of the cache it is a copy of."""
        found: Request | None = getattr(cache, _ATTRIBUTE, None)
        return found

    def look(
        self, cache: Cache | None, past: int, tokens: int, said: Phase | None = None
    ) -> tuple[Request, Step]:
        """Says which request and step a forward would be, without counting it.

        Args:
            cache: the forward's cache; None means no cache, where each forward is a request.
            past: tokens the cache holds before the forward.
            tokens: new tokens per sequence.
            said: the phase, from whoever knows it.
        """
        request = None if cache is None or past == 0 else self.of(cache)
        if request is None:
            request = self._new(cache)
        phase = _phase(request, past, tokens, said)
        if phase is Phase.PREFILL and request.decoded:
            # Another prompt on the cache of an earlier answer, which holds what it held.
            request = replace(self._new(cache), windows=request.windows, memory=request.memory)
        return request, Step(phase, request.number, request.index, tokens, request.decoded)

    def advance(self, cache: Cache | None, request: Request, step: Step, past: int) -> None:
        """Counts the forward that `look` described."""
        if request.number == self._count:
            self._count += 1
            # Not before: one that is refused leaves its number to the next.
            self._watch(request)
        if cache is not None:
            setattr(cache, _ATTRIBUTE, request)
        request.index += 1
        request.tokens = past + step.tokens
        if step.phase is Phase.DECODE:
            request.decoded += 1
        else:
            request.prompt = request.tokens

    def _new(self, cache: Cache | None) -> Request:
        owner = None if cache is None else weakref.ref(cache)
        return Request(self._count, self._session, owner)

    def _watch(self, request: Request) -> None:
        weakref.finalize(request, self._forget, request.number).atexit = False

    def _forget(self, number: int) -> None:
        if self._is_open:
            self._forgotten(number)

    def close(self) -> None:
        """Lets caches that outlive the session forget nothing of the next one's requests."""
        self._is_open = False


def is_ambiguous(request: Request, past: int, tokens: int) -> bool:
    """Whether a forward nobody spoke for may be a new prompt or drafted tokens alike."""
    return tokens > 1 and request.decoded > 0 and past >= request.prompt


def _owner(request: Request) -> Cache | None:
    return None if request.owner is None else request.owner()


def _phase(request: Request, past: int, tokens: int, said: Phase | None) -> Phase:
    if past == 0:
        return Phase.PREFILL
    if said is not None:
        return said
    decoding = tokens == 1 or (request.decoded > 0 and past >= request.prompt)
    return Phase.DECODE if decoding else Phase.PREFILL
