"""The KV cache of a request in which some attention is skipped.

transformers reads the cached length, and with it positions and masks, from the first cache layer.
A skipped attention never writes to its layer, so that layer's length would be wrong: a stand-in
takes its place, holds no tensors of its own, and remembers how many tokens have passed.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from adaskip.errors import CacheHoleError, UnsupportedCallError


class SkippedCacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """Takes the place of the cache layer of a skipped attention sublayer.

    The layer it replaces is kept: empty where the whole request is skipped, with the prompt's keys
    and values where only decoding is. Lengths and mask sizes are the replaced layer's own formulas
    evaluated on the number of tokens that have passed.
    """

    # Set as properties or in __init__ here, where the base class has plain attributes.
    is_croppable = True
    supports_early_init = False

    def __init__(self, owner: Cache, index: int, length: int, device: torch.device) -> None:
        # The base __init__ would assign keys and values, which are the replaced layer's here.
        self.replaced: Any = owner.layers[index]
        self.length = length
        self.index = index
        self._owner = weakref.ref(owner)
        self.is_compileable = self.replaced.is_compileable
        self.is_sliding = getattr(self.replaced, "is_sliding", False)
        self.position: Tensor | None = None
        if self.is_compileable:
            # A Python int would be baked into a compiled graph, which then recompiles every step.
            self.position = torch.tensor(length, device=device)
            torch._dynamo.mark_static_address(self.position)

    def __getattr__(self, name: str) -> Any:
        # Facts that formulas of the replaced layer read: sliding_window, max_cache_len, ...
        if name.startswith("__") or name == "replaced":
            raise AttributeError(name)
        return getattr(self.replaced, name)

    @property
    def keys(self) -> Tensor | None:  # type: ignore[override]
        """Keys of the prompt where only decoding is skipped, else None."""
        return self.replaced.keys  # type: ignore[no-any-return]

    @property
    def values(self) -> Tensor | None:  # type: ignore[override]
        """Values of the prompt where only decoding is skipped, else None."""
        return self.replaced.values  # type: ignore[no-any-return]

    @property
    def is_initialized(self) -> bool:  # type: ignore[override]
        """True: there is nothing to be allocated."""
        return True

    @property
    def cumulative_length(self) -> Any:  # type: ignore[override]
        """Tokens that have passed, as the sliding layers of transformers name it."""
        return self.length if self.position is None else self.position

    @property
    def cumulative_length_int(self) -> int:
        """Tokens that have passed, as static sliding layers of transformers name it."""
        return self.length

    @property
    def max_batch_size(self) -> int:
        """Batch size of the layers that run, which transformers before 5.17 compares."""
        owner = self._owner()
        layers = () if owner is None else owner.layers
        sizes = (getattr(x, "max_batch_size", None) for x in layers if type(x) is not type(self))
        return next((size for size in sizes if size is not None), 0)

    def get_seq_length(self) -> int:
        """Tokens that have passed; on the device for a static cache, as transformers has it."""
        return self.length if self.position is None else self.position  # type: ignore[return-value]

    def get_mask_sizes(self, query_length: Any) -> tuple[int, int]:
        """`(kv_length, kv_offset)` of the replaced layer, had it seen the tokens."""
        sizes: tuple[int, int] = type(self.replaced).get_mask_sizes(self, query_length)
        return sizes

    def get_max_length(self) -> int:
        """The replaced layer's capacity in tokens, -1 for none."""
        return self.replaced.get_max_length()  # type: ignore[no-any-return]

    def get_max_cache_shape(self) -> int:
        """`get_max_length` under its name in older releases of transformers."""
        return self.replaced.get_max_cache_shape()  # type: ignore[no-any-return]

    def lazy_initialization(self, *states: Tensor) -> None:
        """Nothing to allocate."""

    def update(self, *states: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Refuses: the keys and values of earlier tokens do not exist.

        Raises:
            CacheHoleError: always.
        """
        raise hole(self.index)

    def reset(self) -> None:
        """Gives the cache its own layer back: a reset cache begins a new request."""
        self.length = 0
        self.replaced.reset()
        owner = self._owner()
        if owner is not None and owner.layers[self.index] is self:
            owner.layers[self.index] = self.replaced

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets tokens: a negative number is how many, a positive one (once) what remains."""
        if tokens_to_remove < 0:
            self.length = max(self.length + tokens_to_remove, 0)
        elif tokens_to_remove > 0:
            self.length = min(self.length, tokens_to_remove)
        kept = 0 if self.keys is None else self.keys.shape[-2]
        if kept > self.length:
            self.replaced.crop(self.length - kept)

    # What the replaced layer still holds is never read again in this request, so moving it about
    # for beam search, batch changes or offloading would be work for a skipped sublayer.
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Nothing to reorder."""

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Nothing to repeat."""

    def batch_select_indices(self, indices: Tensor) -> None:
        """Nothing to select from."""

    def activate_past_recording(self) -> None:
        """Nothing to record."""

    def offload(self) -> None:
        """Nothing to move."""

    def prefetch(self) -> None:
        """Nothing to move."""


def hole(layer: int) -> CacheHoleError:
    """The error for attention that is to run again in a request that skipped it."""
    return CacheHoleError(
        f"Attention of layer {layer} was skipped earlier in this request, so its KV cache lacks "
        "those tokens and it cannot run again. Skip it for the rest of the request, or start a new "
        "request with an empty cache."
    )


def past_length(cache: Cache) -> int | None:
    """Tokens the cache has seen, or None where only the device knows (a static cache in use)."""
    if not cache.layers:
        return 0
    first: Any = cache.layers[0]
    if isinstance(first, SkippedCacheLayer):
        return first.length
    if not hasattr(first, "is_initialized") or not hasattr(first, "get_seq_length"):
        raise UnsupportedCallError(
            f"A cache of {type(first).__name__} is not supported: it does not count tokens. Use "
            "transformers' DynamicCache or StaticCache."
        )
    if not first.is_initialized:
        return 0
    return None if first.is_compileable else int(first.get_seq_length())


def read_past_length(cache: Cache) -> int:
    """`past_length` with one read from the device; for the rare moments that cannot do without."""
    return int(cache.get_seq_length())


def stand_ins(cache: Cache) -> list[SkippedCacheLayer]:
    """The stand-ins now in the cache, by depth."""
    return [layer for layer in cache.layers if isinstance(layer, SkippedCacheLayer)]


def open_holes(cache: Cache, layers: Iterable[int], length: int, devices: Any) -> None:
    """Puts stand-ins in for the given attention layers, and checks that no other one is missing.

    Args:
        cache: the request's cache.
        layers: the layers whose attention is skipped from now on.
        length: tokens the cache has seen.
        devices: sequence of the device of each layer.

    Raises:
        CacheHoleError: attention that was skipped earlier in this request is not in `layers`.
    """
    wanted = set(layers)
    if length == 0:
        for stand_in in stand_ins(cache):
            cache.layers[stand_in.index] = stand_in.replaced
    for index, layer in enumerate(cache.layers):
        if isinstance(layer, SkippedCacheLayer) and index not in wanted:
            raise hole(index)
    for index in sorted(wanted):
        while len(cache.layers) <= index:
            new_layer: Any = cache.layer_class_to_replicate
            cache.layers.append(new_layer())
        if not isinstance(cache.layers[index], SkippedCacheLayer):
            cache.layers[index] = SkippedCacheLayer(cache, index, length, devices[index])


def advance(layers: list[SkippedCacheLayer], tokens: int) -> None:
    """Notes in every stand-in that `tokens` more tokens per sequence have passed."""
    positions = []
    for layer in layers:
        layer.length += tokens
        if layer.position is not None:
            positions.append(layer.position)
    if positions:
        torch._foreach_add_(positions, tokens)
