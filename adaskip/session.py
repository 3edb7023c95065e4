"""What happens at each forward of a model that skips."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from adaskip import calls, kvcache, supported
from adaskip.batching import Batching, is_batched, refuse_plan
from adaskip.blocks import BlockSpec, execution_device
from adaskip.cache_name import cache_in
from adaskip.errors import UnsupportedCallError
from adaskip.generating import OpenCalls, Turn, Turns, listen
from adaskip.padding import real_before, real_in_call, seen_in_call, tells_before
from adaskip.patching import Patch, patch_forward
from adaskip.plan import EMPTY_PLAN, Phase, Scope, SkipPlan, Step
from adaskip.policy import SkipPolicy
from adaskip.recorders import Recorder
from adaskip.requests import Request, Requests, is_ambiguous
from adaskip.scoped import ScopedPolicy
from adaskip.summary import RequestCount, Summary, Tally
from adaskip.switchboard import Switchboard
from adaskip.turnstile import Turnstile
from adaskip.watching import Watchers

logger = logging.getLogger(__name__)

# A forward of many requests has no step of its own.
_ANY_STEP = Step(Phase.PREFILL, request=0, index=0, tokens=1)


class Session:
    """One model under one policy, from entering `skipping()` to leaving it.

    Forwards from several threads are computed one after the other. Each KV cache is a request of
    its own, so any number of them may take turns.

    Attributes:
        step: the latest forward; None before the first.
        plan: what the latest forward skipped.
        policy: the policy as it is used here: the one that was given, or a copy of it if that is
            in use in another block.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: SkipPolicy,
        scope: Scope,
        recorders: Sequence[Recorder],
        block: BlockSpec,
        board: Switchboard,
    ) -> None:
        self.step: Step | None = None
        self.plan: SkipPlan = EMPTY_PLAN
        self.policy = policy
        self._scoped = ScopedPolicy(policy, scope)
        self._watchers = Watchers(recorders, policy, scope)
        self._turnstile = Turnstile(partial(self._leave, failed=True))
        self._turns = Turns(OpenCalls(), self._turnstile.free)
        self._batching = Batching(self._check_batching, lambda: bool(self._watchers.of(_ANY_STEP)))
        self._model = model
        self._decoder: Any = model.base_model
        # Fingerprints of plans that are this model's, or anybody's.
        self._known = {""}
        if type(policy).check_model is SkipPolicy.check_model:
            # Looked at when the block was entered.
            self._known.add((policy.constant_plan or EMPTY_PLAN).fingerprint)
        self._board = board
        self._n_layers = len(board.layers)
        self._block = block
        self._absent = supported.absent_sublayers(board.layers, block)
        # Which cache layer a layer's attention has, and where it lies.
        self._cache_indices = supported.cache_indices(board.layers, block)
        self._cache_devices = [board.devices[layer] for layer in self._cache_indices]
        config: Any = self._decoder.config
        attending = [*self._cache_indices]
        self._tally = Tally(config, self._n_layers, model.dtype.itemsize, attending)
        self._requests = _told(policy, self._tally)
        self._rows = self._past = 0
        # The request of the forward that is computed now, and what was known of it before.
        self._counted: tuple[Request, dict[str, Any], Cache | None] | None = None
        self._signature = list(inspect.signature(type(self._decoder).forward).parameters)[1:]

    def close(self) -> None:
        """Ends the session: what caches of it do later concerns no other one."""
        self._turnstile.free()
        self._requests.close()

    def refuse_unfinished(self) -> None:
        """Refuses to leave the block while a `generate()` of it goes on.

        Raises:
            UnsupportedCallError: one does, in another thread; the rest of it is dense.
        """
        if self._turns.calls.n_open or self._batching.n_open:
            raise UnsupportedCallError(
                "A generate() went on in another thread when the block was left, so that the rest "
                "of its answer is dense; join the thread inside the block."
            )

    def summary(self) -> Summary:
        """What was skipped and replaced so far, by phase, and the KV memory held against dense."""
        return self._tally.summary()

    def prefill(self) -> AbstractContextManager[None]:
        """Says that the forwards within are prefill; for loops that call the model by hand.

        `generate()` says so by itself. Elsewhere one token on a non-empty cache counts as a decode
        step: wrap a prompt, or a chunk of one, of a single token in this, and every prompt on a
        cache that holds an earlier answer.
        """
        return self._turns.within(Turn(Phase.PREFILL))

    def decode(self) -> AbstractContextManager[None]:
        """Says that the forwards within are decode steps, drafted tokens to verify included."""
        return self._turns.within(Turn(Phase.DECODE))

    def patched_model(self, model: PreTrainedModel) -> Iterator[Patch]:
        """Lets each forward set the switches, and `generate()` say what it does, patch by patch."""
        self._board.obey(obeyed=False)
        yield self._patched_decoder()
        if model.can_generate():
            yield from listen(model, self._turns, self._check_assisted)
            yield from self._batching.patches(model)

    def _patched_decoder(self) -> Patch:
        begin, end = _untraced()

        def forward(*args: Any, **kwargs: Any) -> Any:
            call = kwargs | dict(zip(self._signature, args, strict=False))
            if torch.compiler.is_compiling():
                # No graph could be broken inside a try block: the end of the turn cleans up.
                cache = begin(self, call)
                output = patch.original(**call)
                end(self, cache)
                return output
            self._turnstile.enter(compiled=False)
            failed = True
            try:
                cache = self._before(call)
                output = patch.original(**call)
                self._advance(cache)
                # What the forward computed counts, whatever becomes of its statistics.
                failed = False
                self._tell()
            finally:
                self._leave(failed=failed)
            return output

        patch = patch_forward(self._decoder, forward)
        return patch

    def _begin_compiled(self, call: dict[str, Any]) -> Cache | None:
        self._turnstile.enter(compiled=True)
        try:
            return self._before(call)
        except BaseException:
            self._leave(failed=True)
            raise

    def _end_compiled(self, cache: Cache | None) -> None:
        self._advance(cache)
        try:
            self._tell()
        finally:
            self._leave()

    def _leave(self, *, failed: bool = False) -> None:
        """Lets go of what the forward needed, and lets other threads in."""
        self._board.obey(obeyed=False)
        try:
            if self._board.recording is not None:
                self._board.record_to(None)
            self._board.windows.end(failed=failed)
            if failed and self._counted is not None:
                request, held, cache = self._counted
                vars(request).update(held)
                if cache is not None:
                    # Looked at again before it is used, should a broken device refuse to tell.
                    request.torn = True
                    request.torn = self._is_torn(cache, self._past)
        finally:
            self._counted = None
            self._turnstile.leave()

    def _before(self, call: dict[str, Any]) -> Cache | None:
        """Works out step and plan of the coming forward and sets the layers' switches."""
        config = self._decoder.config
        calls.refuse_checkpointing(self._decoder)
        brings_cache = cache_in(call) is not None
        cache = calls.cache_of(call, config)
        inputs = calls.inputs_of(call)
        tokens = inputs.shape[1]
        turn = self._turns.of(tokens, cached=cache is not None)
        said = None if turn is None else turn.phase
        past = 0 if cache is None else self._past_length(cache, tokens, turn)
        if past == 0:
            device = execution_device(self._board.layers[0])
            calls.refuse_moved(self._board.dtype, self._model.dtype, self._board.devices[0], device)
        if cache is not None:
            self._refuse_torn(cache, past)
        request, step = self._requests.look(cache, past, tokens, said)
        # Everything that can refuse the call comes before anything that remembers it.
        if cache is None:
            # A generate() will come to decode steps, also where this is its prefill.
            decodes = said is Phase.DECODE or (turn is not None and turn.tells_padding)
            if self._scoped.steps_matter or (decodes and self._scoped.phase_matters(step)):
                calls.refuse_missing_cache(self.policy, self._scoped.scope)
        else:
            kvcache.refuse_short(cache, self._n_layers)
            kvcache.refuse_torn(cache, past)
            self._check_order(request, step, past, said)
        plan = self._scoped.plan(step, request.prefill_plan)
        if cache is None and is_batched(call):
            self._check_batching(step)
        changed = plan != self._board.plan
        if changed:
            calls.check_plan(self.policy, plan, self._n_layers, config)
            calls.refuse_partial(plan, self._block, self._absent)
            calls.refuse_divided(plan, self._model)
            if plan.fingerprint not in self._known:
                plan.check_model(self._model)
                self._known.add(plan.fingerprint)
        calls.refuse_lost_outputs(call, config, plan)
        if turn is not None and turn.drafts and self.policy.stepwise:
            calls.refuse_assisted()
        if turn is not None and turn.assisted:
            calls.refuse_changed_draft(step, plan, request.prefill_plan)
        if plan.windows:
            calls.refuse_unseen(call, turn, config, brings_cache=brings_cache)
            if cache is not None:
                kvcache.refuse_full(cache, past, tokens)
        if step.index == 0 and request.memory is not None:
            # A later turn: its cache holds what the turn before it left.
            self._tally.resume(step.request, request.memory[1])
        if past == 0 or request.prepared != plan:
            earlier = real_before(call, turn, past) if plan.windows and past else None
            self._prepare(cache, request, plan, earlier, past)
        if changed or self._board.is_outdated:
            self._board.set(plan)
        self._counted, self._past = (request, dict(vars(request)), cache), past
        self._requests.advance(cache, request, step, past)
        if step.phase is Phase.PREFILL:
            request.prefill_plan |= plan
        self.step, self.plan, self._rows = step, plan, inputs.shape[0]
        if changed and logger.isEnabledFor(logging.DEBUG):
            logger.debug(
                "request %d, %s, forward %d: %s",
                *(step.request, step.phase, step.index),
                ", ".join(map(str, plan)) or "nothing skipped",
            )
        if plan.windows:
            real = seen_in_call(call, turn, step, past)
            told = (turn is not None and turn.tells_padding) or tells_before(call, past)
            # Another prompt on a cache may tell otherwise what of the answer before it is padding.
            # A single token is taken for a decode step unless somebody says that it is a prompt.
            prompted = step.phase is Phase.PREFILL or tokens > 1
            retold = told and past > 0 and prompted
            self._board.windows.begin(
                cache,
                request,
                plan,
                real,
                tokens,
                decoding=said is Phase.DECODE and real is None,
                history=real_before(call, turn, past) if retold else None,
                retold=retold,
            )
        real_tokens = partial(real_in_call, call, turn, step, past)
        recording = self._watchers.recording(step, real_tokens)
        if recording is not None:
            self._board.record_to(recording)
        self._board.obey(obeyed=True)
        return cache

    def _prepare(
        self,
        cache: Cache | None,
        request: Request,
        plan: SkipPlan,
        earlier: Tensor | None,
        past: int,
    ) -> None:
        """Puts into the cache what stands in for attention that is skipped or has a window."""
        capacity = None if cache is None else kvcache.capacity(cache)
        windows = self._board.windows.tracked(request, plan, earlier, past, capacity)
        if cache is not None:
            indices = self._cache_indices
            skipped = [indices[layer] for layer in plan.layers("attn") if layer in indices]
            kvcache.prepare(cache, skipped, past, self._cache_devices, windows)
        request.prepared = plan

    def _is_torn(self, cache: Cache, past: int) -> bool:
        return kvcache.is_torn(cache, past, self._cache_indices.values())

    def _refuse_torn(self, cache: Cache, past: int) -> None:
        """Refuses a cache that a failed forward has left something in, until that is gone."""
        request = self._requests.known(cache)
        if request is not None and request.torn:
            if self._is_torn(cache, past):
                calls.refuse_failed()
            request.torn = False

    def _advance(self, cache: Cache | None) -> None:
        """Moves the skipped-cache placeholders on."""
        assert self.step is not None  # noqa: S101 - set by _before of this same forward
        if cache is not None and (self.plan.layers("attn") or self.plan.windows):
            kvcache.advance(cache, self.step.tokens)

    def _tell(self) -> None:
        """Counts the forward, and hands out its statistics."""
        assert self.step is not None and self._counted is not None  # noqa: S101, PT018 - likewise
        cached = self._counted[2] is not None
        self._tally.note(self.step, self.plan, self._rows, self._past, cached=cached)
        turn = self._turns.current
        if turn is not None and turn.assisted:
            turn.phase = Phase.DECODE
        if self._board.recording is not None:
            self._watchers.tell(self.step, self._board.recording)
        request, number = self._counted[0], self.step.request
        request.memory = self.policy.memory(number), self._tally.memory(number)

    def _past_length(self, cache: Cache, tokens: int, turn: Turn | None) -> int:
        """Tokens in the cache; reads a device only where a static cache may have fewer by now."""
        past = kvcache.past_length(cache)
        if past is not None:
            return past
        request = self._requests.of(cache)
        said = None if turn is None else turn.phase
        unspoken = said is None and (self._scoped.steps_matter or self._scoped.scope == "prefill")
        # Drafted tokens are taken back from static caches, too, from transformers 5.24 on.
        drafted = turn is not None and turn.assisted
        may_lack = unspoken or drafted or said is Phase.PREFILL
        free = all(device.type == "cpu" for device in self._cache_devices[:1])
        if free or request is None or tokens > 1 or may_lack:
            return kvcache.read_past_length(cache)
        return request.tokens

    def _check_order(self, request: Request, step: Step, past: int, said: Phase | None) -> None:
        """Refuses forwards whose phase nobody can know, and steps that were taken back."""
        if (
            said is None
            and is_ambiguous(request, past, step.tokens)
            and self._scoped.phase_matters(step)
        ):
            calls.refuse_ambiguous(self.policy, self._scoped.scope, step.tokens)
        if step.phase is Phase.DECODE and past < request.tokens and self.policy.stepwise:
            calls.refuse_cut(self.policy, request.tokens, past)

    def _check_batching(self, step: Step = _ANY_STEP) -> None:
        """Refuses what forwards of many requests cannot have, by the plan of one of them."""
        refuse_plan(
            differs=self._scoped.phase_matters(step), windows=self.policy.plan(step).windows
        )

    def _check_assisted(self, generation_config: Any) -> None:
        calls.refuse_early_exit_draft(generation_config)
        if self._scoped.steps_matter:
            calls.refuse_assisted()


def _told(policy: SkipPolicy, tally: Tally) -> Requests:
    """Requests that tell both of copied and forgotten caches; they outlive the session."""

    def branched(request: int, memory: tuple[object, RequestCount | None] | None) -> None:
        own, counted = memory or (None, None)
        policy.resume(request, own)
        tally.resume(request, counted)

    def forgotten(request: int) -> None:
        policy.forget(request)
        tally.forget(request)

    return Requests(branched, forgotten)


@cache
def _untraced() -> tuple[Any, Any]:
    """What `torch.compile` leaves alone around a forward: traced, its numbers would be constants.

    The same two functions for all sessions, because a graph is bound to the ones it calls.
    """
    untraced: Any = torch.compiler.disable
    return untraced(Session._begin_compiled), untraced(Session._end_compiled)
