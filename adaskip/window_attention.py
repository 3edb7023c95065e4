"""Attention over a window, in the place of a module's own attention function.

The attention module itself is left as it is: projections, norms of queries and keys and rotary
positions are its own. Only the function it looks up by its configuration is another one, which
computes blocks: a prompt costs what its windows hold, never the square of its length.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout, pad, scaled_dot_product_attention
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from adaskip.cache_name import CACHE
from adaskip.replacements import Window
from adaskip.window_cache import WindowCacheLayer, sinks_among
from adaskip.window_flash import flash_windows, takes_flash
from adaskip.window_heads import HeadSplit
from adaskip.window_track import BlockStep, DecodeStep, WindowStep

NAME = "adaskip_window"
# Blocks are computed together up to so many queries, which bounds the memory their keys take.
_TOGETHER = 16_384


class WindowedConfig:
    """An attention module's configuration with another attention function; else the same.

    Copies of it are the configuration itself: a copied module is as it was.

    Attributes:
        stock: the configuration.
        split: the heads that have the window; None for all of them.
    """

    _attn_implementation = NAME

    def __init__(self, config: Any, split: HeadSplit | None) -> None:
        self.stock, self.split = config, split

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("stock", "split"):
            raise AttributeError(name)
        return getattr(self.stock, name)

    def __copy__(self) -> Any:
        return self.stock

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return copy.deepcopy(self.stock, memo)

    def __reduce__(self) -> tuple[Any, ...]:
        return _itself, (self.stock,)


def _itself(config: Any) -> Any:
    return config


class _Stock:
    """An attention module as it is outside of `skipping()`, for its own attention function.

    Flash attention's asks the configuration which of several it is.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self.config = module.config.stock  # type: ignore[union-attr]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def switch(attention: nn.Module, window: Window | None) -> None:
    """Gives an attention module our attention function for a window; for None its own back."""
    config: Any = attention.config
    stock = config.stock if isinstance(config, WindowedConfig) else config
    if window is None:
        attention.config = stock
    else:
        AttentionInterface.register(NAME, window_attention_forward)
        attention.config = WindowedConfig(stock, HeadSplit.of(window))  # type: ignore[assignment]


def windowed(kwargs: dict[str, Any], step: WindowStep, layer: int) -> dict[str, Any]:
    """What an attention is given in the place of what its layer was given."""
    cache = kwargs.get(CACHE)
    held = None if cache is None else cache.layers[layer]
    # The step has the window's mask; the one that was given is for heads that see all tokens.
    return kwargs | {
        "attention_mask": None,
        "window_step": step,
        "window_cache": held,
        "rest_mask": kwargs.get("attention_mask"),
    }


def window_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    *,
    window_step: WindowStep,
    window_cache: WindowCacheLayer | None,
    rest_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a window, in all heads or in some.

    Args:
        module: the attention module.
        query: [batch, heads, tokens, head_dim].
        key: of the new tokens alone: [batch, key-value heads, tokens, head_dim].
        value: likewise.
        attention_mask: none; the step has it.
        window_step: which keys are seen.
        window_cache: those of earlier tokens; None if there is no cache.
        rest_mask: as the module's own attention function takes it, for heads without a window.
        scaling: of the inner products.
        dropout: probability.
        softcap: of the scores, where the family has one.
        **kwargs: what other attention functions take.

    Returns:
        [batch, tokens, heads, head_dim], and no weights.
    """
    settings = _Settings(scaling, dropout, softcap)
    config: Any = module.config
    split: HeadSplit | None = config.split
    if split is None:
        return _windowed(query, key, value, window_step, window_cache, settings), None
    queries, keys, values = (split.windowed(states) for states in (query, key, value))
    found = _windowed(queries, keys, values, window_step, window_cache, settings)
    # Those of all tokens, where there is a cache.
    held = None if window_cache is None else window_cache.take_rest()
    keys, values = held or (split.rest(key), split.rest(value))
    capped = {} if softcap is None else {"softcap": softcap}
    whole, *_ = _stock_function(module)(
        _Stock(module),
        split.rest(query),
        keys,
        values,
        rest_mask,
        scaling=scaling,
        dropout=dropout,
        **capped,
        **kwargs,
    )
    return split.joined(found, whole), None


def _stock_function(module: nn.Module) -> Callable[..., tuple[Tensor, Any]]:
    """The attention function of a module outside of `skipping()`, as its forward looks it up."""
    config: Any = module.config
    eager = sys.modules[type(module).__module__].eager_attention_forward
    found: Callable[..., tuple[Tensor, Any]] = ALL_ATTENTION_FUNCTIONS.get_interface(
        config.stock._attn_implementation, eager
    )
    return found


def _windowed(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: WindowStep,
    held: WindowCacheLayer | None,
    settings: _Settings,
) -> Tensor:
    """Attention of heads that all have a window: [batch, tokens, heads, head_dim]."""
    if isinstance(step, DecodeStep):
        return _decode(query, key, value, step, held, settings)
    plain = settings.softcap is None and not settings.dropout
    if plain and takes_flash(query, step):
        return _flash(query, key, value, step, held, settings.scaling)
    return _blocks(query, key, value, step, held, settings)


class _Settings:
    """Scaling, dropout and softcap of an attention."""

    def __init__(self, scaling: float | None, dropout: float, softcap: float | None) -> None:
        self.scaling, self.dropout, self.softcap = scaling, dropout, softcap

    def attend(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        """softmax(query key^T) value over the keys that are seen: [..., queries, head_dim]."""
        if self.softcap is None:
            return scaled_dot_product_attention(
                query,
                key,
                value,
                mask,
                dropout_p=self.dropout,
                scale=self.scaling,
                enable_gqa=query.shape[1] != key.shape[1],
            )
        scale = query.shape[-1] ** -0.5 if self.scaling is None else self.scaling
        scores = (query @ key.transpose(-1, -2)) * scale
        scores = torch.tanh(scores / self.softcap) * self.softcap
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)
        return dropout(weights, self.dropout, training=self.dropout > 0) @ value


def _decode(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: DecodeStep,
    held: WindowCacheLayer | None,
    settings: _Settings,
) -> Tensor:
    """One token per sequence, which sees what is held and itself."""
    batch, heads, _, width = query.shape
    if held is None:
        # It sees itself.
        keys, values, mask = key, value, None
    else:
        keys, values = held.put(key, value, step)
        mask = step.mask
    # The query heads of one key-value head are rows of one product: keys are read once. A CPU's
    # kernel shares out heads, not rows, so that cores would wait where one head has a window.
    apart = query.device.type == "cpu" and query.dtype == torch.float32 and settings.softcap is None
    together = query if apart else query.reshape(batch, key.shape[1], -1, width)
    return settings.attend(together, keys, values, mask).reshape(batch, 1, heads, -1)


def _flash(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: BlockStep,
    held: WindowCacheLayer | None,
    scaling: float | None,
) -> Tensor:
    """Several tokens per sequence, by a kernel that knows windows."""
    earlier = None if held is None else held.earlier(step)
    sinks = sinks_among(key, step), sinks_among(value, step)
    if held is not None:
        n_sinks = sinks[0].shape[2]
        key_held, value_held = held.put(key, value, step)
        sinks = key_held[:, :, :n_sinks], value_held[:, :, :n_sinks]
    if earlier is not None:
        key, value = torch.cat([earlier[0], key], dim=2), torch.cat([earlier[1], value], dim=2)
    return flash_windows(query, key, value, sinks, step, scaling)


def _blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    step: BlockStep,
    held: WindowCacheLayer | None,
    settings: _Settings,
) -> Tensor:
    """Several tokens per sequence, block by block: each sees its block, what is before, the sinks.

    The query heads of one key-value head are rows of one product.
    """
    batch, heads, tokens, width = query.shape
    kv_heads, block = key.shape[1], step.block
    n_blocks = -(-tokens // block)
    tail = n_blocks * block - tokens
    query = pad(query, (0, 0, 0, tail)).view(batch, kv_heads, -1, n_blocks, block, width)
    query = query.permute(0, 3, 1, 2, 4, 5)
    earlier = None if held is None else held.earlier(step)
    key_sinks, value_sinks = sinks_among(key, step), sinks_among(value, step)
    if held is not None:
        n_sinks = key_sinks.shape[2]
        key_sinks, value_sinks = (x[:, :, :n_sinks] for x in held.put(key, value, step))
    if earlier is not None:
        key, value = torch.cat([earlier[0], key], dim=2), torch.cat([earlier[1], value], dim=2)
    keys = _Bands(key, key_sinks, tokens, tail, step)
    values = _Bands(value, value_sinks, tokens, tail, step)
    n_together = max(1, _TOGETHER // (batch * block))
    found = []
    for at in range(0, n_blocks, n_together):
        part = slice(at, at + n_together)
        some = query[:, part].flatten(3, 4)
        mask = step.mask[:, part, None].expand(batch, -1, heads // kv_heads, -1, -1)
        out = settings.attend(
            some.flatten(0, 1),
            keys.blocks(part).flatten(0, 1),
            values.blocks(part).flatten(0, 1),
            mask.flatten(2, 3).flatten(0, 1)[:, None],
        )
        found.append(out.view(batch, -1, kv_heads, heads // kv_heads, block, out.shape[-1]))
    whole = found[0] if len(found) == 1 else torch.cat(found, dim=1)
    # [batch, blocks, kv heads, group, block, width] -> [batch, tokens, heads, width]
    whole = whole.permute(0, 1, 4, 2, 3, 5).reshape(batch, n_blocks * block, heads, -1)
    return whole[:, :tokens]


class _Bands:
    """The keys (or values) each block of queries may see.

    Args:
        states: of the earlier tokens that are seen and of the new ones: [batch, heads, n, width].
        sinks: after the new tokens: [batch, heads, sinks, width].
        tokens: new ones.
        tail: tokens that the last block lacks.
        step: of this forward.
    """

    def __init__(
        self, states: Tensor, sinks: Tensor, tokens: int, tail: int, step: BlockStep
    ) -> None:
        self._sinks = sinks[:, None]
        n_held = states.shape[2] - tokens
        padded = pad(states, (0, 0, step.before - n_held, tail))
        # [batch, heads, blocks, width, before + block], a view.
        self._bands = padded.unfold(2, step.before + step.block, step.block)

    def blocks(self, part: slice) -> Tensor:
        """Of some blocks, the sinks first: [batch, blocks, heads, keys, width]."""
        bands = self._bands[:, :, part].permute(0, 2, 1, 4, 3)
        sinks = self._sinks.expand(-1, bands.shape[1], -1, -1, -1)
        return torch.cat([sinks, bands], dim=3)
