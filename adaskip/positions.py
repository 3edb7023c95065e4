"""How many tokens a model has positions for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import PretrainedConfig

# Kinds of rotary embedding that reach `factor` times as far as the model was trained, where its
# `max_position_embeddings` may be those before; those of "llama3" never are.
_STRETCHED = ("linear", "dynamic", "yarn", "longrope")


def positions(config: PretrainedConfig) -> int | None:
    """Tokens that a model has positions for, stretched ones included; None if it does not tell.

    A stretched model's `max_position_embeddings` may be those before (Vicuna: 4,096 of 16,384) or
    after, which a configuration does not always tell: the larger number counts then.
    """
    text = config.get_text_config(decoder=True)
    trained = getattr(text, "max_position_embeddings", None)
    return trained and reach(trained, getattr(text, "rope_parameters", None))


def reach(trained: int, rope: Mapping[str, Any] | None) -> int:
    """The positions of a rotary embedding, the least over the kinds of layers.

    Args:
        trained: `max_position_embeddings`.
        rope: its parameters, or those of each kind of layers by name.
    """
    rope = rope or {}
    by_kind = [kind for kind in rope.values() if isinstance(kind, Mapping)]
    return max(trained, min(_reach(trained, kind) for kind in by_kind or [rope]))


def _reach(trained: int, rope: Mapping[str, Any]) -> int:
    # `type`: what files of earlier versions call it.
    if rope.get("rope_type", rope.get("type")) not in _STRETCHED:
        return trained
    original = rope.get("original_max_position_embeddings") or trained
    return int(float(rope.get("factor") or 1.0) * original)
