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
from transformers.cache_utils import Cache, DynamicCache

from adaskip import kvcache
from adaskip.blocks import block_spec, execution_device
from adaskip.errors import UnsupportedCallError, UnsupportedModelError, unknown_name
from adaskip.phases import PhaseTracker
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
        cache = self._cache_of(call)
        inputs = call["input_ids"] if call.get("input_ids") is not None else call["inputs_embeds"]
        tokens = inputs.shape[1]
        past = 0 if cache is None else self._past_length(cache, tokens)
        step = self._tracker.advance(cache, past, tokens)
        plan = self._plan(step)
        if cache is None:
            self._check_without_cache()
        self._check_outputs(call, plan)
        if plan != self.plan:
            self._set_switches(plan)
        self._open_holes(cache, step, plan, past)
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
        recording, self._recording = self._recording, None
        for switch in self._switches:
            switch.recording = None
        stats = recording.finish()
        if stats is not None:
            for recorder in self._watching:
                recorder.observe(self.step, stats)

    def _cache_of(self, call: dict[str, Any]) -> Cache | None:
        """The forward's cache; made here where the model would make its own too late for us."""
        cache = call.get("past_key_values")
        use_cache = call.get("use_cache")
        if use_cache is None:
            use_cache = getattr(self._decoder.config, "use_cache", False)
        if cache is None and use_cache:
            cache = call["past_key_values"] = DynamicCache(config=self._decoder.config)
        if cache is not None and not isinstance(cache, Cache):
            raise UnsupportedCallError(
                f"past_key_values is a {type(cache).__name__}; pass a transformers Cache, e.g. "
                "DynamicCache()."
            )
        return cache

    def _past_length(self, cache: Cache, tokens: int) -> int:
        """Tokens in the cache; reads the device only where a static cache may begin anew."""
        past = kvcache.past_length(cache)
        seen = self._tracker.seen(cache)
        if past is None:
            past = seen if seen is not None and tokens == 1 else kvcache.read_past_length(cache)
        if seen is not None and past > 0 and self._policy.stepwise:
            self._check_in_order(cache, seen, past)
        return past

    def _check_in_order(self, cache: Cache, seen: int, past: int) -> None:
        """A plan that depends on the decode steps taken needs them one after the other."""
        name = type(self._policy).__name__
        if past < seen:
            raise UnsupportedCallError(
                f"The cache was cut back from {seen} to {past} tokens, but what {name} skips "
                "depends on the decode steps taken, which cannot be taken back. Use a policy with "
                "a fixed plan (AdaSkip: online=False)."
            )
        if not self._tracker.is_latest(cache):
            raise UnsupportedCallError(
                f"Two requests take turns, but {name} follows the decode steps of one request at "
                "a time. Finish one first, or use a policy with a fixed plan (AdaSkip: "
                "online=False)."
            )

    def _plan(self, step: Step) -> SkipPlan:
        """What the scope leaves of the policy's plan."""
        request = self._tracker.request
        assert request is not None  # noqa: S101 - set by advance()
        if self._scope == "prefill" and step.phase is Phase.DECODE:
            # Skipped attention has no KV to go back to, so what prefill skipped stays skipped.
            return request.prefill_plan
        plan = self._policy.plan(step)
        if step.phase is Phase.PREFILL:
            if self._scope == "decode":
                return EMPTY_PLAN
            request.prefill_plan |= plan
        return plan

    def _check_without_cache(self) -> None:
        """Without a cache there are no decode steps, so what depends on them would be lost."""
        if self._scope == "decode" or self._policy.stepwise:
            raise UnsupportedCallError(
                f"use_cache=False with {type(self._policy).__name__} and scope {self._scope!r}: "
                "without a KV cache there are no decode steps to skip in. Use a cache, or scope "
                "'prefill'."
            )

    def _check_outputs(self, call: dict[str, Any], plan: SkipPlan) -> None:
        """Attention weights of skipped attention do not exist and would shift the others."""
        wanted = call.get("output_attentions")
        if wanted is None:
            wanted = getattr(self._decoder.config, "output_attentions", False)
        if wanted and plan.layers("attn"):
            raise UnsupportedCallError(
                "output_attentions=True, but skipped attention has no weights to return; turn it "
                "off, or skip FFN sublayers only."
            )

    def _set_switches(self, plan: SkipPlan) -> None:
        """Switches every layer to the plan, and copies its gains to the devices."""
        values = [1.0] * (2 * len(self._layers))
        for sublayer, gain in plan.gains.items():
            values[sublayer.position] = 1.0 if gain is None else gain
        host = torch.tensor(values)
        for gains in self._gains.values():
            gains.copy_(host)
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
        for recorder in self._all_recorders(step):
            wanted = recorder.watch(step)
            if wanted:
                self._watching.append(recorder)
                spans |= wanted
        self._recording = None
        if spans:
            real = real_tokens(call.get("attention_mask"), past, step.tokens)
            self._recording = StepRecording(spans, step.tokens, real)
            for switch in self._switches:
                switch.recording = self._recording

    def _all_recorders(self, step: Step) -> Iterator[Recorder]:
        yield from self._recorders
        if self._scope != "prefill" and (self._scope == "e2e" or step.phase is Phase.DECODE):
            yield self._policy


def _no_cache() -> None:
    """The reference to no cache."""


# Base models inside a `skipping()` now; a second one would wrap the first one's forwards.
_ACTIVE: WeakSet[nn.Module] = WeakSet()


@contextmanager
def skipping(
    model: PreTrainedModel,
    policy: SkipPolicy,
    *,
    scope: Scope = "e2e",
    recorders: Sequence[Recorder] = (),
) -> Iterator[Session]:
    """Lets `model` skip what `policy` says, until the block is left.

    Args:
        model: a causal language model of a supported family (`adaskip.blocks.BLOCKS`).
        policy: decides what is skipped.
        scope: where its plan applies. "prefill": in prefill, and what prefill skipped stays
            skipped while that request decodes. "decode": in decode steps only. "e2e": in both.
        recorders: also given the statistics they watch.

    Yields:
        The session, whose `step` and `plan` tell of the latest forward.

    Raises:
        UnsupportedModelError: the architecture is not supported.
        UnsupportedCallError: the model is inside a `skipping()` already; or, from a forward, it is
            called in a way in which skipping would be silently wrong.
        CacheHoleError: from a forward, if attention is to run that the request skipped before.
        AdaskipError: unknown scope, or a budget that does not fit the model.
    """
    if scope not in SCOPES:
        raise unknown_name("scope", str(scope), SCOPES)
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a transformers PreTrainedModel; pass the model itself."
        )
    block = block_spec(model.config.model_type)
    decoder: Any = model.base_model
    if decoder in _ACTIVE:
        raise UnsupportedCallError(
            "The model is inside skipping() already; leave that block first, or use one policy."
        )
    policy.check_model(model)
    policy.scope = scope
    policy.bind(len(decoder.layers))
    session = Session(model, policy, scope, recorders)
    with ExitStack() as undo:
        for index, (layer, switches) in enumerate(session.layers()):
            forward = layer_forward(layer, index, block, switches)
            # accelerate keeps the layer's own forward under this name and calls it from its hook.
            wrapped = hasattr(layer, "_hf_hook") and "_old_forward" in vars(layer)
            _replace(undo, layer, "_old_forward" if wrapped else "forward", forward)
        if scope == "decode" or policy.stepwise:
            _replace(undo, model, "_get_candidate_generator", _refuse_assisted)
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
    if name in vars(module):
        undo.callback(setattr, module, name, vars(module)[name])
    else:
        undo.callback(delattr, module, name)
    setattr(module, name, value)


def _refuse_assisted(*args: object, **kwargs: object) -> None:
    """Stands in for the start of assisted decoding.

    Raises:
        UnsupportedCallError: always. Drafted tokens are verified together, the first of them in
            the prefill forward, so a plan for decode steps would not apply to them.
    """
    raise UnsupportedCallError(
        "Assisted decoding under a plan that differs between prefill and decode steps is not "
        "supported: drafted tokens are verified several at a time. Use scope 'prefill', or scope "
        "'e2e' with a fixed plan (AdaSkip: online=False)."
    )
