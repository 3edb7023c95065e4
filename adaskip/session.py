"""`skipping()`: the only place that patches a model."""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from adaskip import calls, entering, kvcache
from adaskip.blocks import execution_device
from adaskip.errors import UnsupportedCallError, unknown_name
from adaskip.phases import PhaseTracker, Request
from adaskip.plan import EMPTY_PLAN, SCOPES, Phase, Scope, SkipPlan, Step, Sublayer
from adaskip.recorders import Recorder, Span, StepRecording, real_tokens
from adaskip.sublayers import Switches, layer_forward

if TYPE_CHECKING:
    from adaskip.policies.base import SkipPolicy


class Session:
    """One model under one policy, from entering `skipping()` to leaving it.

    Attributes:
        step: the latest forward; None before the first.
        plan: what the latest forward skipped.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        policy: SkipPolicy,
        scope: Scope,
        recorders: Sequence[Recorder],
    ) -> None:
        self.step: Step | None = None
        self.plan: SkipPlan = EMPTY_PLAN
        self._policy = policy
        self._scope = scope
        self._recorders = recorders
        self._tracker = PhaseTracker()
        self._decoder: Any = model.base_model
        layers: Any = self._decoder.layers
        self._layers: list[nn.Module] = list(layers)
        self._devices = [execution_device(layer) for layer in self._layers]
        self._switches = [Switches() for _ in self._layers]
        self._gains = {
            device: torch.ones(2 * len(self._layers), device=device)
            for device in set(self._devices)
        }
        self._signature = list(inspect.signature(type(self._decoder).forward).parameters)[1:]
        # Weak: the session must not keep a finished request's KV memory alive.
        self._cache: Callable[[], Cache | None] = _no_cache
        self._prepared: tuple[int, SkipPlan] | None = None
        self._recording: StepRecording | None = None
        self._watching: list[Recorder] = []

    def layers(self) -> Iterator[tuple[nn.Module, Switches]]:
        """Each decoder layer with its switches."""
        return zip(self._layers, self._switches, strict=True)

    def before_forward(
        self, decoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Works out step and plan of the coming forward and sets the layers' switches."""
        call = kwargs | dict(zip(self._signature, args, strict=False))
        cache = calls.cache_of(call, self._decoder.config)
        inputs = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
        tokens = inputs.shape[1]
        past = 0 if cache is None else self._past_length(cache, tokens)
        request, step = self._tracker.look(cache, past, tokens)
        plan = self._plan(request, step)
        if plan != self.plan:
            plan.check(len(self._layers))
        # Everything that can refuse the call comes before anything that remembers it.
        if cache is None:
            calls.refuse_missing_cache(self._policy, self._scope)
        calls.refuse_lost_outputs(call, self._decoder.config, plan)
        self._open_holes(cache, step, plan, past)
        self._tracker.advance(cache, request, step, past)
        if step.phase is Phase.PREFILL:
            request.prefill_plan |= plan
        if plan != self.plan:
            self._set_switches(plan)
        self._cache = _no_cache if cache is None else weakref.ref(cache)
        self.step, self.plan = step, plan
        self._start_recording(step, call, past)
        return (), call

    def after_forward(self, decoder: nn.Module, args: Any, output: Any) -> None:
        """Moves the stand-ins on, and hands out the statistics."""
        assert self.step is not None  # noqa: S101 - set by before_forward of this same forward
        cache = self._cache()
        if cache is not None and self.plan.layers("attn"):
            kvcache.advance(kvcache.stand_ins(cache), self.step.tokens)
        if self._recording is None:
            return
        stats = self._recording.finish()
        self._record_to(None)
        if stats is not None:
            for recorder in self._watching:
                recorder.observe(self.step, stats)

    def _past_length(self, cache: Cache, tokens: int) -> int:
        """Tokens in the cache; reads the device only where a static cache may begin anew."""
        past = kvcache.past_length(cache)
        seen = self._tracker.seen(cache)
        if past is None:
            past = seen if seen is not None and tokens == 1 else kvcache.read_past_length(cache)
        if seen is not None and past > 0 and self._policy.stepwise:
            calls.refuse_disorder(self._policy, seen, past, self._tracker.is_latest(cache))
        return past

    def _plan(self, request: Request, step: Step) -> SkipPlan:
        """What the scope leaves of the policy's plan."""
        if self._scope == "prefill" and step.phase is Phase.DECODE:
            # Skipped attention has no KV to go back to, so what prefill skipped stays skipped.
            return request.prefill_plan
        plan = self._policy.plan(step)
        outside = self._scope == "decode" and step.phase is Phase.PREFILL
        return EMPTY_PLAN if outside else plan

    def _set_switches(self, plan: SkipPlan) -> None:
        """Switches every layer to the plan, and copies its gains, if any, to the devices."""
        learned = {s.position: gain for s, gain in plan.gains.items() if gain is not None}
        if learned:
            host = torch.tensor([learned.get(p, 1.0) for p in range(2 * len(self._layers))])
            for device, gains in self._gains.items():
                # From pinned memory, a copy does not wait for the device.
                source = host.pin_memory() if device.type == "cuda" else host
                gains.copy_(source, non_blocking=True)
        for index, switch in enumerate(self._switches):
            attn, ffn = Sublayer(index, "attn"), Sublayer(index, "ffn")
            gains = self._gains[self._devices[index]]
            switch.run_attn, switch.run_ffn = attn not in plan, ffn not in plan
            switch.attn_gain = None if plan.gains.get(attn) is None else gains[attn.position]
            switch.ffn_gain = None if plan.gains.get(ffn) is None else gains[ffn.position]

    def _open_holes(self, cache: Cache | None, step: Step, plan: SkipPlan, past: int) -> None:
        """Readies the cache for skipped attention, once per request and plan."""
        if cache is not None and (past == 0 or self._prepared != (step.request, plan)):
            kvcache.open_holes(cache, plan.layers("attn"), past, self._devices)
            self._prepared = (step.request, plan)

    def _start_recording(self, step: Step, call: dict[str, Any], past: int) -> None:
        """Gives the layers a place for statistics, if anybody wants any of this step."""
        self._watching = []
        spans: frozenset[Span] = frozenset()
        in_scope = self._scope == "e2e" or self._scope == step.phase == Phase.DECODE
        for recorder in (*self._recorders, *((self._policy,) if in_scope else ())):
            wanted = recorder.watch(step)
            if wanted:
                self._watching.append(recorder)
                spans |= wanted
        if spans:
            real = real_tokens(call.get("attention_mask"), past, step.tokens)
            self._record_to(StepRecording(spans, step.tokens, real))
        elif self._recording is not None:
            # Left behind by a forward that failed.
            self._record_to(None)

    def _record_to(self, recording: StepRecording | None) -> None:
        """Tells every layer where its statistics go."""
        self._recording = recording
        for switch in self._switches:
            switch.recording = recording


def _no_cache() -> None:
    """The reference to no cache."""


# Base models inside a `skipping()` now; a second one would wrap the first one's forwards.
_ACTIVE: WeakSet[nn.Module] = WeakSet()


@contextmanager
def skipping(
    model: PreTrainedModel,
    policy: SkipPolicy | SkipPlan,
    *,
    scope: Scope = "e2e",
    recorders: Sequence[Recorder] = (),
    verify: bool = False,
) -> Iterator[Session]:
    """Lets `model` skip what `policy` says, until the block is left.

    Args:
        model: a causal language model of a supported family (`adaskip.blocks.BLOCKS`).
        policy: decides what is skipped; a plan skips the same at every step.
        scope: where its plan applies. "prefill": in prefill, and what prefill skipped stays
            skipped while that request decodes. "decode": in decode steps only. "e2e": in both.
        recorders: also given the statistics they watch.
        verify: compare a forward of a few tokens, nothing skipped, with the unpatched model's.

    Yields:
        The session, whose `step` and `plan` tell of the latest forward.

    Raises:
        UnsupportedModelError: the architecture is not supported, the model is wrapped, another
            tool has patched its layers, or with nothing skipped it computes something else.
        UnsupportedCallError: the model is inside a `skipping()` already; or, from a forward, it is
            called in a way in which skipping would be silently wrong.
        CacheHoleError: from a forward, if attention is to run that the request skipped before.
        AdaskipError: unknown scope, no policy, or a budget that does not fit the model.
    """
    if scope not in SCOPES:
        raise unknown_name("scope", str(scope), SCOPES)
    block = entering.check_model(model)
    policy = entering.as_policy(policy)
    decoder: Any = model.base_model
    if decoder in _ACTIVE:
        raise UnsupportedCallError(
            "The model is inside skipping() already; leave that block first, or use one policy."
        )
    entering.check_layers(decoder.layers, model.config.model_type, block)
    policy.check_model(model)
    policy.scope = scope
    policy.bind(len(decoder.layers))
    session = Session(model, policy, scope, recorders)
    expected = entering.probe(model) if verify else None
    with ExitStack() as undo:
        for index, (layer, switches) in enumerate(session.layers()):
            forward = layer_forward(layer, index, block, switches)
            # accelerate keeps the layer's own forward under this name and calls it from its hook.
            wrapped = hasattr(layer, "_hf_hook") and "_old_forward" in vars(layer)
            _replace(undo, layer, "_old_forward" if wrapped else "forward", forward)
        if expected is not None:
            entering.refuse_difference(expected, entering.probe(model))
        if scope == "decode" or policy.stepwise:
            _replace(undo, model, "_get_candidate_generator", calls.refuse_assisted)
        # Traced by torch.compile, the hooks' Python numbers would mean a new graph at every step.
        untraced: Any = torch.compiler.disable
        for hook in (
            decoder.register_forward_pre_hook(untraced(session.before_forward), with_kwargs=True),
            decoder.register_forward_hook(untraced(session.after_forward)),
        ):
            undo.callback(hook.remove)
        _ACTIVE.add(decoder)
        undo.callback(_ACTIVE.discard, decoder)
        yield session


def _replace(undo: ExitStack, module: nn.Module, name: str, value: object) -> None:
    """Sets an attribute on this one instance, and notes how to take it back."""
    own = vars(module)
    undo.callback(*((setattr, module, name, own[name]) if name in own else (delattr, module, name)))
    setattr(module, name, value)
