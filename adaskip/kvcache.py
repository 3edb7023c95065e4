"""The KV cache of a request in which attention is skipped or sees a window: who stands where."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache

from adaskip.cache_name import CACHE
from adaskip.errors import CacheHoleError, UnsupportedCallError
from adaskip.skipped_cache import SkippedCacheLayer, hole_error
from adaskip.window_cache import TrackedWindow, WindowCacheLayer
from adaskip.window_track import WindowTrack


def past_length(cache: Cache) -> int | None:
    """Tokens the cache has seen, or None where only the device knows (a static cache in use).

    Raises:
        UnsupportedCallError: the cache does not count tokens.
    """
    if not cache.layers:
        return 0
    stand_in = _stand_in(cache)
    if stand_in is not None:
        return stand_in.length
    first: Any = cache.layers[0]
    if not hasattr(first, "is_initialized") or not hasattr(first, "get_seq_length"):
        raise UnsupportedCallError(
            f"A cache of {type(first).__name__} is not supported: it does not count tokens. Use "
            "transformers' DynamicCache or StaticCache."
        )
    if not first.is_initialized:
        return 0
    return None if first.is_compileable else int(first.get_seq_length())


def was_used_outside(cache: Cache) -> bool:
    """Whether a forward in which nothing stood in has put tokens into it, as after a reset."""
    stand_in = _stand_in(cache)
    return stand_in is not None and stand_in.stood_aside


def _stand_in(cache: Cache) -> SkippedCacheLayer | None:
    """The first layer that stands in for another one; a forward finds all of them alike."""
    for layer in cache.layers:
        if isinstance(layer, SkippedCacheLayer):
            return layer
    return None


def read_past_length(cache: Cache) -> int:
    """`past_length` with one read from the device; for the rare moments that cannot do without."""
    return int(cache.get_seq_length())


def capacity(cache: Cache) -> int | None:
    """Tokens that a cache has places for; None if it grows."""
    layers: list[Any] = cache.layers
    return max(layer.max_cache_len for layer in layers) if cache.is_compileable else None


def refuse_full(cache: Cache, past: int, tokens: int) -> None:
    """Refuses tokens that a cache has no places for, of windows that would not notice.

    A layer that runs in full fails by itself; one with a window holds that alone.

    Args:
        cache: of the forward.
        past: tokens it holds.
        tokens: new ones per sequence.

    Raises:
        UnsupportedCallError: they do not fit.
    """
    places = capacity(cache)
    if places is None or past + tokens <= places:
        return
    if not all(getattr(layer, "is_sliding", False) for layer in cache.layers):
        raise UnsupportedCallError(
            f"{CACHE} has places for {places} tokens and would hold {past + tokens}; make it with "
            "a larger max_cache_len."
        )


def refuse_short(cache: Cache, n_layers: int) -> None:
    """Refuses a cache that has fewer layers than the model and does not grow.

    Raises:
        UnsupportedCallError: it is too short.
    """
    if cache.layer_class_to_replicate is None and len(cache.layers) < n_layers:
        raise UnsupportedCallError(
            f"{CACHE} has {len(cache.layers)} layers, the model has {n_layers}; make the "
            "cache from this model's configuration, e.g. DynamicCache(config=model.config)."
        )


def refuse_torn(cache: Cache, past: int) -> None:
    """Refuses a cache whose layers hold different numbers of tokens.

    Layers are cut back, and computed, one after the other, so the first and the last one tell.

    Args:
        cache: of the forward.
        past: tokens it holds.

    Raises:
        UnsupportedCallError: one of the two holds more or fewer.
    """
    for layer in (*cache.layers[:1], *cache.layers[-1:]):
        held = _own_length(layer)
        if held not in (None, past):
            raise UnsupportedCallError(
                f"Some layers of the cache hold {past} tokens and others {held}, as after a crop "
                "that one of them refused or a forward that failed. Begin with an empty cache."
            )


def is_torn(cache: Cache, past: int, used: Iterable[int]) -> bool:
    """Whether a forward that failed has left something in some layers, which reads static ones.

    Args:
        cache: of the forward.
        past: tokens it held before.
        used: which of its layers the model has attention for; others stay empty.
    """
    layers: list[Any] = [cache.layers[index] for index in used if index < len(cache.layers)]
    for layer in layers:
        if isinstance(layer, SkippedCacheLayer):
            if isinstance(layer, WindowCacheLayer) and layer.is_touched:
                return True
        elif not getattr(layer, "is_initialized", False):
            if past:
                return True
        elif int(layer.get_seq_length()) != past:
            return True
    return False


def _own_length(layer: Any) -> int | None:
    """Tokens that a layer has seen; None if it does not know them without the device."""
    if isinstance(layer, SkippedCacheLayer):
        return layer.length
    if layer.is_compileable or not getattr(layer, "is_initialized", False):
        return None
    return int(layer.get_seq_length()) if hasattr(layer, "get_seq_length") else None


def prepare(
    cache: Cache,
    layers: Iterable[int],
    length: int,
    devices: Sequence[Any],
    windows: Mapping[int, TrackedWindow] = MappingProxyType({}),
) -> None:
    """Puts in what stands in for the given attention layers, and takes all else out.

    Args:
        cache: the request's cache.
        layers: the layers whose attention is skipped from now on.
        length: tokens the cache has seen.
        devices: the device of each layer.
        windows: of each layer whose attention has one from now on; without a history where the
            `length` tokens are in such a layer already.

    Raises:
        CacheHoleError: attention that was skipped earlier in this request is not in `layers`, or
            one that had a window is neither in `layers` nor has the same window.
    """
    wanted = set(layers)
    stand_ins = {i: x for i, x in enumerate(cache.layers) if isinstance(x, SkippedCacheLayer)}
    if length:
        _refuse_holes(stand_ins, wanted, windows)
    for index, stand_in in stand_ins.items():
        same = windows if isinstance(stand_in, WindowCacheLayer) else wanted
        if length == 0 or index not in same or stand_in.stood_aside:
            cache.layers[index] = stand_in.replaced
    while len(cache.layers) <= max([*wanted, *windows], default=-1):
        new_layer: Any = cache.layer_class_to_replicate
        cache.layers.append(new_layer())
    for index in sorted(wanted):
        replaced = cache.layers[index]
        if not isinstance(replaced, SkippedCacheLayer):
            former = stand_ins.get(index)
            placeholder = SkippedCacheLayer(replaced, index, length, devices[index], former)
            if isinstance(former, WindowCacheLayer):
                placeholder.kept = 0
            cache.layers[index] = placeholder
    leading: set[WindowTrack] = set()
    for index, window in sorted(windows.items()):
        layer = cache.layers[index]
        if not isinstance(layer, WindowCacheLayer):
            former = stand_ins.get(index)
            layer = _windowed(cache, index, length, devices[index], window, former)
            cache.layers[index] = layer
        layer.leads = window.track not in leading
        leading.add(window.track)
    _link(cache)


def _refuse_holes(
    stand_ins: Mapping[int, SkippedCacheLayer],
    skipped: set[int],
    windows: Mapping[int, TrackedWindow],
) -> None:
    """Refuses to run attention on keys and values that do not exist."""
    for index, stand_in in stand_ins.items():
        if isinstance(stand_in, WindowCacheLayer):
            window = windows.get(index)
            held = stand_in.track, stand_in.split
            same = window is not None and (window.track, window.split) == held
            if stand_in.lacks_tokens and not same and index not in skipped:
                raise CacheHoleError(
                    f"Attention of layer {index} had a window of {stand_in.track.window.size} "
                    "tokens earlier in this request, so its KV cache lacks those before. Keep the "
                    "window for the rest of the request, or start a new one with an empty cache."
                )
        elif stand_in.lacks_tokens and index not in skipped:
            raise hole_error(index)


def _windowed(
    cache: Cache,
    index: int,
    length: int,
    device: torch.device,
    window: TrackedWindow,
    former: SkippedCacheLayer | None,
) -> WindowCacheLayer:
    """The cache layer of a window, holding what it may still see of an ordinary one."""
    replaced: Any = cache.layers[index]
    track, history, split = window
    if length == 0:
        return WindowCacheLayer(replaced, index, length, device, track, split, former)
    if history is None:
        raise CacheHoleError(
            f"Attention of layer {index} gets its window later in this request than others of the "
            "same shape; give windows to all of them at once, or begin with an empty cache."
        )
    held = getattr(replaced, "keys", None)
    if not isinstance(held, Tensor) or held.ndim != 4 or held.shape[-2] < length:
        raise UnsupportedCallError(
            f"A window of attention cannot begin in the middle of a request on a cache layer of "
            f"{type(replaced).__name__}. Use transformers' DynamicCache or StaticCache, or windows "
            "from the prompt on (scope 'e2e' or 'prefill')."
        )
    if getattr(cache, "offloading", False) and device.type == "cuda":
        # What is being fetched has to be there.
        torch.cuda.current_stream(device).wait_stream(cache.prefetch_stream)
    states = [states[..., :length, :].to(device) for states in (replaced.keys, replaced.values)]
    if not replaced.is_compileable:
        # What has left the window is not needed any more.
        new_layer: Any = cache.layer_class_to_replicate or type(replaced)
        replaced = new_layer()
    layer = WindowCacheLayer(replaced, index, length, device, track, split, former)
    if split is not None:
        layer.rest.update(*map(split.rest, states))
        states = [*map(split.windowed, states)]
    layer.put(states[0], states[1], history)
    return layer


def _link(cache: Cache) -> None:
    """Tells every placeholder which layer is fetched in its place."""
    stays = getattr(cache, "only_non_sliding", False)
    following: Any = None
    # Twice around: behind the last layer comes the first.
    for layer in reversed([*cache.layers, *cache.layers]):
        if isinstance(layer, SkippedCacheLayer):
            layer.following = following
            if getattr(layer, "rest", None) is not None:
                following = layer
        elif not (stays and getattr(layer, "is_sliding", False)):
            following = layer


def advance(cache: Cache, tokens: int) -> None:
    """Notes in everything that stands in that `tokens` more tokens per sequence have passed."""
    positions = []
    for layer in cache.layers:
        if isinstance(layer, SkippedCacheLayer):
            layer.length += tokens
            if isinstance(layer, WindowCacheLayer):
                layer.is_touched = False
            if layer.position is not None:
                positions.append(layer.position)
    if positions:
        torch._foreach_add_(positions, tokens)
