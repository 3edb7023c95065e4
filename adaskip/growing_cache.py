"""A KV cache that does not copy itself at every decode step.

transformers' DynamicCache concatenates: each step allocates the keys and values of the whole
context anew, in every layer, and copies them. At 4,096 tokens that is half of SmolLM2's decode time
on a CPU. Here the tensors have room for tokens to come, which are written in place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

from adaskip.errors import AdaskipError

DEFAULT_ROOM = 256


class GrowingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """A DynamicLayer whose `keys` and `values` are views of larger tensors.

    Args:
        room: tokens to allocate beyond those that are there, whenever space runs out.
    """

    def __init__(self, room: int = DEFAULT_ROOM) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._room = room
        self._buffers: tuple[Tensor, Tensor] | None = None
        self._views: tuple[Tensor, Tensor] | None = None

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Appends `[batch, heads, tokens, head_dim]` and returns all keys and values so far."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        past = self.get_seq_length()
        total = past + key_states.shape[-2]
        buffers = self._buffers
        # Beam search, cropping and batch changes put other tensors in the place of our views.
        current = self._views is not None and self.keys is self._views[0]
        if buffers is None or not current or buffers[0].shape[-2] < total:
            buffers = (
                self._moved(self.keys, key_states, past),
                self._moved(self.values, value_states, past),
            )
            self._buffers = buffers
        for buffer, states in zip(buffers, (key_states, value_states), strict=True):
            buffer[..., past:total, :] = states
        self._views = (buffers[0][..., :total, :], buffers[1][..., :total, :])
        self.keys, self.values = self._views
        return self._views

    def _moved(self, old: Tensor | None, states: Tensor, past: int) -> Tensor:
        """A tensor with room for the new states, holding the old ones."""
        *outer, tokens, width = states.shape
        # Also under inference mode, so that the cache can go on outside of it.
        with torch.inference_mode(False):
            buffer = states.new_empty((*outer, past + tokens + self._room, width))
        if old is not None and past:
            buffer[..., :past, :] = old
        return buffer

    def reset(self) -> None:
        """Forgets everything, the room included."""
        self._buffers = self._views = None
        super().reset()
        # Older releases zero the tensors in place of dropping them.
        self.keys = self.values = None
        self.is_initialized = False


class GrowingCache(DynamicCache):
    """DynamicCache without a copy of the whole context per step; the same numbers.

    Pass it to `generate()` or to the model as `past_key_values`, which transformers calls `cache`
    from 5.24 on. Sliding-window layers stay as transformers has them.

    Args:
        config: the model's configuration.
        room: tokens to allocate beyond those that are there, whenever space runs out; with the
            answer's length, an answer is generated without any copy.

    Raises:
        AdaskipError: `room` is not positive.
    """

    def __init__(self, config: PretrainedConfig, room: int = DEFAULT_ROOM) -> None:
        if room < 1:
            raise AdaskipError(f"A cache with room for {room} more tokens cannot grow; give 1 up.")
        super().__init__(config=config)
        self.layers = [
            GrowingLayer(room) if type(layer) is DynamicLayer else layer for layer in self.layers
        ]


def kv_tensors(cache: Any) -> list[Tensor]:
    """The keys and values a cache holds now, as they are used (room not included)."""
    return [
        tensor
        for layer in _parts(cache)
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if isinstance(tensor, torch.Tensor) and tensor.numel()
    ]


def _parts(cache: Any) -> list[Any]:
    """The layers of a cache, and what they have for heads apart."""
    parts = [part for layer in cache.layers for part in (layer, getattr(layer, "rest", None))]
    return [part for part in parts if part is not None]
