"""How a model was called, and the refusal of calls in which skipping would be silently wrong."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from adaskip.batching import is_batched
from adaskip.blocks import BlockSpec
from adaskip.cache_name import CACHE, cache_in
from adaskip.errors import AdaskipError, UnsupportedCallError
from adaskip.plan import Phase, Scope, SkipPlan, Step, Sublayer
from adaskip.positions import positions
from adaskip.replacements import Window
from adaskip.summary import key_value_heads

if TYPE_CHECKING:
    from adaskip.generating import Turn
    from adaskip.policy import SkipPolicy

_FIXED = "Use a policy with a fixed plan (AdaSkip: online=False)."


def cache_of(call: dict[str, Any], config: PretrainedConfig) -> Cache | None:
    """The forward's cache, or None if it is to run without.

    Where the model would make its own, it is made here and added to `call`: the skipped-cache
    placeholders have to be in it before the forward begins. That of continuous batching is of many
    requests, each on pages that only its attention touches: none of this forward alone.

    Raises:
        UnsupportedCallError: it is not a transformers cache.
    """
    cache = cache_in(call)
    if isinstance(cache, Cache):
        return cache
    if is_batched(call):
        return None
    if cache is not None:
        raise UnsupportedCallError(
            f"{CACHE} is a {type(cache).__name__}; pass a transformers Cache, e.g. DynamicCache()."
        )
    if not _flag(call, config, "use_cache"):
        return None
    made: Cache = DynamicCache(config=config)
    call[CACHE] = made
    return made


def refuse_failed() -> None:
    """Refuses to go on behind a forward that failed midway.

    Raises:
        UnsupportedCallError: always.
    """
    raise UnsupportedCallError(
        "A forward on this cache failed midway and left tokens in some of its layers and not in "
        "others; begin with an empty cache (cache.reset())."
    )


def _flag(call: dict[str, Any], config: PretrainedConfig, name: str) -> bool:
    """A switch of the forward: as called, else as configured."""
    value = call.get(name)
    return bool(getattr(config, name, False) if value is None else value)


def refuse_missing_cache(policy: SkipPolicy, scope: Scope) -> None:
    """Without a cache there are no decode steps, so what depends on them would be lost.

    Raises:
        UnsupportedCallError: always.
    """
    raise UnsupportedCallError(
        f"use_cache=False with {type(policy).__name__} and scope {scope!r}: without a KV cache "
        "there are no decode steps to skip in. Use a cache, or scope 'prefill'."
    )


def refuse_moved(
    entered_in: torch.dtype, dtype: torch.dtype, entered_on: torch.device, device: torch.device
) -> None:
    """Refuses a model in another precision or place than its replacements were taken to.

    Raises:
        UnsupportedCallError: it was cast or moved inside the block.
    """
    if (entered_in, entered_on) != (dtype, device):
        raise UnsupportedCallError(
            f"The model is in {dtype} on {device}, but entered skipping() in {entered_in} on "
            f"{entered_on}; cast or move it before the block."
        )


def check_plan(policy: SkipPolicy, plan: object, n_layers: int, config: PretrainedConfig) -> None:
    """Refuses what a policy may not return: something else, or what does not fit the model."""
    if not isinstance(plan, SkipPlan):
        raise AdaskipError(
            f"{type(policy).__name__}.plan() returned a {type(plan).__name__}; return a SkipPlan."
        )
    check_fits(plan, n_layers, config)


def check_fits(plan: SkipPlan, n_layers: int, config: PretrainedConfig) -> None:
    """Refuses a plan of other layers, widths or heads than the model has, or of its own windows."""
    if not isinstance(plan, SkipPlan):
        raise AdaskipError(f"The plan is of type {type(plan).__name__}; give a SkipPlan.")
    plan.check(n_layers, config.hidden_size)
    for layer, window in plan.windows.items():
        check_window(layer, window, config)


def inputs_of(call: dict[str, Any]) -> Tensor:
    """The ids [batch, tokens] or embeddings [batch, tokens, hidden] of a forward.

    Raises:
        UnsupportedCallError: there are none.
    """
    ids, embeddings = call.get("input_ids"), call.get("inputs_embeds")
    found: Tensor | None = embeddings if ids is None else ids
    if found is None:
        raise UnsupportedCallError("The model was called with neither input_ids nor inputs_embeds.")
    return found


def check_window(layer: int, window: Window, config: PretrainedConfig) -> None:
    """Refuses a window that the model's own masks do not allow."""
    limit = positions(config)
    if limit is not None and window.size + window.sinks > limit:
        raise AdaskipError(
            f"The plan's Window of attn{layer} holds {window.size} + {window.sinks} tokens, more "
            f"than the model's {limit} positions; give a smaller one."
        )
    n_heads = key_value_heads(config)
    if window.of_heads not in (None, n_heads):
        raise AdaskipError(
            f"The plan's Window of attn{layer} is of heads {window.heads} of {window.of_heads}, "
            f"but the model has {n_heads} key-value heads; choose among those."
        )
    both_ways = getattr(config, "use_bidirectional_attention", False)
    if both_ways or getattr(config, "is_causal", True) is False:
        raise AdaskipError(
            f"The plan gives attention of layer {layer} a Window, which sees earlier tokens only, "
            "but the model's configuration lets it see later ones, too; use a plan without windows."
        )
    kinds = getattr(config, "layer_types", None)
    own = getattr(config, "sliding_window", None)
    if own is not None and (kinds is None or kinds[layer] != "full_attention"):
        raise AdaskipError(
            f"The plan gives attention of layer {layer} a Window, but the model gives it a sliding "
            f"window of {own} tokens already; choose layers with full attention."
        )


def refuse_unseen(
    call: dict[str, Any], turn: Turn | None, config: PretrainedConfig, *, brings_cache: bool
) -> None:
    """Refuses calls in which a window cannot know what a token sees.

    Args:
        call: the forward's arguments.
        turn: of the forward.
        config: of the model.
        brings_cache: whether the caller has given a cache.

    Raises:
        UnsupportedCallError: the mask is no [batch, tokens] one, tokens see later ones, there may
            be several sequences in one row, or tokens will be taken back.
    """
    if turn is not None and (turn.assisted or turn.drafts):
        raise UnsupportedCallError(
            "Assisted decoding takes tokens back, and what has left a window of attention is gone; "
            "generate without an assistant, or use a plan without windows."
        )
    if call.get("is_causal") is False:
        raise UnsupportedCallError(
            "is_causal=False lets tokens see later ones, but attention with a window sees earlier "
            "ones only; leave it out, or use a plan without windows."
        )
    if call.get("cu_seq_lens_q") is not None:
        raise UnsupportedCallError(
            "cu_seq_lens_q puts several sequences into one row, which attention with a window "
            "would mix up; pass each sequence in a row of its own."
        )
    mask = call.get("attention_mask")
    if turn is not None and turn.tells_padding:
        return
    if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
        raise UnsupportedCallError(
            "Attention with a window takes an attention_mask [batch, tokens] or none, not one that "
            "says for each token what it sees; or use generate()."
        )
    # With a cache, transformers takes positions for nothing else; flash attention may not.
    packs = not brings_cache or "flash" in str(config._attn_implementation)
    if mask is None and call.get("position_ids") is not None and packs:
        raise UnsupportedCallError(
            "position_ids without an attention_mask may put several sequences into one row, which "
            "attention with a window would mix up; pass the attention_mask, or no position_ids."
        )


def refuse_partial(plan: SkipPlan, block: BlockSpec, absent: Collection[Sublayer]) -> None:
    """Refuses what an exported model cannot replace; leaving out what is gone is no change."""
    if not block.partial:
        return
    wrong = [str(s) for s, replacement in plan.items() if s in absent and replacement is not None]
    if wrong:
        raise AdaskipError(
            f"The plan puts something in the place of {', '.join(wrong)}, but the model was "
            "exported without; take a smaller budget, or the model it was made from."
        )
    if plan.windows:
        raise AdaskipError(
            "The plan gives attention of an exported model a Window, which finds its cache by "
            "layers that are gone; use the model it was made from."
        )


def refuse_divided(plan: SkipPlan, model: PreTrainedModel) -> None:
    """Refuses windows of some heads where each process has heads of its own (tensor parallel)."""
    n_processes = getattr(model, "tp_size", None) or 1
    if n_processes > 1 and any(window.heads for window in plan.windows.values()):
        raise UnsupportedCallError(
            "The plan has windows of some key-value heads, but the model is split over "
            f"{n_processes} processes, each with heads of its own; use windows of all heads."
        )


def refuse_lost_outputs(call: dict[str, Any], config: PretrainedConfig, plan: SkipPlan) -> None:
    """Attention weights and router logits of what is skipped would be missing among the others."""
    if plan.layers("ffn") and _flag(call, config, "output_router_logits"):
        raise UnsupportedCallError(
            "output_router_logits=True, but experts that are skipped have no router logits to "
            "return; turn it off, or skip attention only."
        )
    if (plan.layers("attn") or plan.windows) and _flag(call, config, "output_attentions"):
        raise UnsupportedCallError(
            "output_attentions=True, but attention that is skipped or has a window has no weights "
            "to return; turn it off, or skip FFN sublayers only."
        )


def refuse_bare_model(model: PreTrainedModel, policy: SkipPolicy, scope: Scope) -> None:
    """A base model does not see the `generate()` of the model around it, which knows the phase."""
    if model.base_model is model and (scope == "decode" or policy.stepwise):
        raise UnsupportedCallError(
            f"{type(model).__name__} is a base model, which cannot tell the prefill of generate() "
            f"from its decode steps; with {type(policy).__name__} and scope {scope!r}, pass the "
            "causal language model that holds it."
        )


def refuse_checkpointing(decoder: Any) -> None:
    """Layers that are computed again in the backward pass would obey a later forward's switches."""
    if (
        decoder.training
        and torch.is_grad_enabled()
        and any(getattr(layer, "gradient_checkpointing", False) for layer in decoder.layers)
    ):
        raise UnsupportedCallError(
            "Gradient checkpointing inside skipping() is not supported, because layers are "
            "computed a second time in the backward pass; switch it off, or leave the block for "
            "training."
        )


def refuse_cut(policy: SkipPolicy, seen: int, past: int) -> None:
    """A plan that depends on the decode steps taken cannot take them back."""
    raise UnsupportedCallError(
        f"The cache was cut back from {seen} to {past} tokens, but what {type(policy).__name__} "
        f"skips depends on the decode steps taken, which cannot be taken back. {_FIXED}"
    )


def refuse_ambiguous(policy: SkipPolicy, scope: Scope, tokens: int) -> None:
    """Several tokens after decode steps are a new prompt or drafted tokens, and only one is right.

    Raises:
        UnsupportedCallError: always.
    """
    raise UnsupportedCallError(
        f"{tokens} tokens at once on a cache that has taken decode steps: with "
        f"{type(policy).__name__} and scope {scope!r} it matters whether they are a new prompt "
        "(call the model within session.prefill()) or drafted tokens (session.decode())."
    )


def refuse_assisted() -> None:
    """Refuses assisted decoding under a plan that is another one in prefill and decode steps.

    Raises:
        UnsupportedCallError: always. Drafted tokens are verified together, the first of them in
            the prefill forward, so a plan for decode steps would not apply to them.
    """
    raise UnsupportedCallError(
        "Assisted decoding under a plan that differs between prefill and decode steps is not "
        "supported: drafted tokens are verified several at a time. Use scope 'prefill', or scope "
        "'e2e' with a fixed plan (AdaSkip: online=False)."
    )


def refuse_changed_draft(step: Step, plan: SkipPlan, prefill_plan: SkipPlan) -> None:
    """`refuse_assisted`, for plans of which only their use shows that they differ."""
    if step.phase is Phase.DECODE and plan != prefill_plan:
        refuse_assisted()


def refuse_early_exit_draft(generation_config: GenerationConfig) -> None:
    """Drafting with the first layers of the same model would skip within those, too."""
    if generation_config.assistant_early_exit is not None:
        raise UnsupportedCallError(
            f"assistant_early_exit={generation_config.assistant_early_exit} drafts with the first "
            "layers of the model that is inside skipping(); draft with an assistant_model or with "
            "prompt_lookup_num_tokens."
        )
