"""What the installed transformers calls the KV cache of a forward."""

from __future__ import annotations

from typing import Any

from transformers.modeling_outputs import BaseModelOutputWithPast

# Until transformers 5.23; later releases take this name, too, and warn.
_OLD = "past_key_values"
CACHE = "cache" if hasattr(BaseModelOutputWithPast, "cache") else _OLD


def cache_in(arguments: dict[str, Any]) -> Any:
    """The cache among a forward's arguments, which has the new name afterwards; None without."""
    if CACHE != _OLD and _OLD in arguments:
        old = arguments.pop(_OLD)
        if arguments.get(CACHE) is None:
            arguments[CACHE] = old
    return arguments.get(CACHE)
