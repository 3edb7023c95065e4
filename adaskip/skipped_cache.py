"""The cache layer of a skipped attention.

transformers reads the cached length, and with it positions and masks, from the first cache layer.
A skipped attention never writes to its layer, so that layer's length would be wrong: a
skipped-cache placeholder takes its place, holds no tensors of its own, and remembers how many
tokens have passed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from adaskip.errors import CacheHoleError


class SkippedCacheLayer(CacheLayerMixin):  # type: ignore[no-untyped-call]
    """The skipped-cache placeholder: takes the place of the cache layer of a skipped attention.

    The layer it replaces is kept: empty where the whole request is skipped, with the prompt's keys
    and values where only decoding is. Lengths and mask sizes are the replaced layer's own formulas
    evaluated on the number of tokens that have passed. As long as none has passed unseen, it does
    what the replaced layer does, so a cache that was reset may be used anywhere.

    Args:
        replaced: the layer it stands for.
        index: of the decoder layer.
        length: tokens that have passed.
        device: of the decoder layer.
        former: what stood there in the cache's last request, whose tensors it goes on with: a
            recorded CUDA graph reads and writes where they are.

    Attributes:
        replaced: the layer it stands for.
        length: tokens that have passed.
        kept: tokens of them that the replaced layer has seen.
        stood_aside: whether the replaced layer has taken tokens meanwhile, as outside of the block.
        following: the next layer that holds keys and values, which is fetched when an offloaded
            cache would fetch this one.
    """

    # Set as properties or in __init__ here, where the base class has plain attributes.
    is_croppable = True
    supports_early_init = False
    stood_aside = False

    def __init__(
        self,
        replaced: Any,
        index: int,
        length: int,
        device: torch.device,
        former: SkippedCacheLayer | None = None,
    ) -> None:
        # The base __init__ would assign keys and values, which are the replaced layer's here.
        self.replaced: Any = replaced
        self.length = length
        self.kept = length
        self.following: Any = None
        self._index = index
        # Whether what the replaced layer holds still belongs to the rows of the batch.
        self._in_order = True
        self.is_compileable = replaced.is_compileable
        self.is_sliding = getattr(replaced, "is_sliding", False)
        self.position: Tensor | None = None if former is None else former.position
        if self.position is not None:
            self.position.fill_(length)
        elif self.is_compileable:
            # A Python int would be baked into a compiled graph, which then recompiles every step.
            with torch.inference_mode(False):
                self.position = torch.tensor(length, device=device)
            torch._dynamo.mark_static_address(self.position)

    def __getattr__(self, name: str) -> Any:
        # Facts that formulas of the replaced layer read: sliding_window, max_cache_len, ...
        if name.startswith("__") or name == "replaced":
            raise AttributeError(name)
        return getattr(self.replaced, name)

    @property
    def lacks_tokens(self) -> bool:
        """Whether keys and values of earlier tokens are missing."""
        return self.length > self.kept or not self._in_order

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
        """True: the placeholder has no tensors to be allocated."""
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
        return getattr(self.following, "max_batch_size", 0)

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
        """Allocates nothing: the placeholder has no tensors."""

    def update(self, *states: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Appends to the replaced layer, if it has seen every token so far.

        Raises:
            CacheHoleError: the keys and values of earlier tokens do not exist.
        """
        if self.lacks_tokens:
            raise hole_error(self._index)
        updated: tuple[Tensor, Tensor] = self.replaced.update(*states, **kwargs)
        self.advance(states[0].shape[-2])
        self.kept = self.length
        self.stood_aside = True
        return updated

    def advance(self, tokens: int) -> None:
        """Notes that `tokens` more tokens per sequence have passed."""
        self.length += tokens
        if self.position is not None:
            self.position.add_(tokens)

    def reset(self) -> None:
        """Empties it for a new request."""
        self.replaced.reset()
        self.length = self.kept = 0
        self._in_order = True
        self.stood_aside = False
        if self.position is not None:
            self.position.zero_()

    def crop(self, tokens_to_remove: int) -> None:
        """Forgets tokens: a negative number is how many, a positive one (once) what remains."""
        if tokens_to_remove < 0:
            self.length = max(self.length + tokens_to_remove, 0)
        elif tokens_to_remove > 0:
            self.length = min(self.length, tokens_to_remove)
        if self.position is not None:
            self.position.fill_(self.length)
        if self.kept > self.length:
            self.replaced.crop(self.length - self.kept)
            self.kept = self.length

    # What the replaced layer still holds can be read again only if the cache is cut back to it, so
    # moving it about would be work for a skipped sublayer: it is given up.
    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Gives up what is kept, or reorders it where it is still in use."""
        self._move("reorder_cache", beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Gives up what is kept, or repeats it where it is still in use."""
        self._move("batch_repeat_interleave", repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Gives up what is kept, or selects from it where it is still in use."""
        self._move("batch_select_indices", indices)

    def _move(self, name: str, argument: Any) -> None:
        if not self.lacks_tokens:
            getattr(self.replaced, name)(argument)
        elif self.kept:
            self._in_order = False

    def activate_past_recording(self) -> None:
        """Records nothing: the placeholder has no past of its own."""

    def offload(self) -> None:
        """Moves nothing to another device."""

    def prefetch(self) -> None:
        """Fetches the next layer that holds something: it is the one needed next."""
        if self.following is not None:
            self.following.prefetch()


def hole_error(layer: int) -> CacheHoleError:
    """The error for attention that is to run again in a request that skipped it."""
    return CacheHoleError(
        f"Attention of layer {layer} was skipped earlier in this request, so its KV cache lacks "
        "those tokens and it cannot run again. Skip it for the rest of the request (a second "
        "prompt on the same cache included), or start a new request with an empty cache."
    )
