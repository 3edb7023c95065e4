"""How a model was called, and the refusal of calls in which skipping would be silently wrong."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig
from transformers.cache_utils import Cache, DynamicCache

from adaskip.errors import UnsupportedCallError
from adaskip.plan import Scope, SkipPlan

if TYPE_CHECKING:
    from adaskip.policies.base import SkipPolicy

_FIXED = "Use a policy with a fixed plan (AdaSkip: online=False)."


def cache_of(call: dict[str, Any], config: PretrainedConfig) -> Cache | None:
    """The forward's cache, or None if it is to run without.

    Where the model would make its own, it is made here and added to `call`: stand-ins have to be
    in it before the forward begins.

    Raises:
        UnsupportedCallError: `past_key_values` is not a transformers cache.
    """
    cache = call.get("past_key_values")
    if cache is None and _flag(call, config, "use_cache"):
        cache = call["past_key_values"] = DynamicCache(config=config)
    if cache is not None and not isinstance(cache, Cache):
        raise UnsupportedCallError(
            f"past_key_values is a {type(cache).__name__}; pass a transformers Cache, e.g. "
            "DynamicCache()."
        )
    return cache


def _flag(call: dict[str, Any], config: PretrainedConfig, name: str) -> bool:
    """A switch of the forward: as called, else as configured."""
    value = call.get(name)
    return bool(getattr(config, name, False) if value is None else value)


def refuse_missing_cache(policy: SkipPolicy, scope: Scope) -> None:
    """Without a cache there are no decode steps, so what depends on them would be lost."""
    if scope == "decode" or policy.stepwise:
        raise UnsupportedCallError(
            f"use_cache=False with {type(policy).__name__} and scope {scope!r}: without a KV cache "
            "there are no decode steps to skip in. Use a cache, or scope 'prefill'."
        )


def refuse_lost_outputs(call: dict[str, Any], config: PretrainedConfig, plan: SkipPlan) -> None:
    """Attention weights of skipped attention do not exist and would shift the others."""
    if plan.layers("attn") and _flag(call, config, "output_attentions"):
        raise UnsupportedCallError(
            "output_attentions=True, but skipped attention has no weights to return; turn it off, "
            "or skip FFN sublayers only."
        )


def refuse_disorder(policy: SkipPolicy, seen: int, past: int, latest: bool) -> None:
    """A plan that depends on the decode steps taken needs them one after the other.

    Args:
        policy: the stepwise policy.
        seen: tokens the request's cache held after our last forward on it.
        past: tokens it holds now.
        latest: whether our last forward was on this cache.
    """
    name = type(policy).__name__
    if past < seen:
        raise UnsupportedCallError(
            f"The cache was cut back from {seen} to {past} tokens, but what {name} skips depends "
            f"on the decode steps taken, which cannot be taken back. {_FIXED}"
        )
    if not latest:
        raise UnsupportedCallError(
            f"Two requests take turns, but {name} follows the decode steps of one request at a "
            f"time. Finish one first. {_FIXED}"
        )


def refuse_assisted(*args: object, **kwargs: object) -> None:
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
