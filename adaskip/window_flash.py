"""Windows by flash attention's own kernel on a CUDA device: no copies of keys, no mask.

The kernel knows the last tokens, not the first ones. What a query sees of the sinks that have left
its window is computed beside it and joined by the logarithms of both sums of exponentials, which is
the softmax over all of them.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

from adaskip.window_track import BlockStep

_kernel = torch.ops.aten._flash_attention_forward
_DTYPES = (torch.float16, torch.bfloat16)
# The widest heads that the kernel takes.
_MAX_WIDTH = 256


def takes_flash(query: Tensor, step: BlockStep) -> bool:
    """Whether the kernel takes these queries: `[batch, heads, tokens, head_dim]`.

    It has no mask, so no row may have padding, and its sums have no gradient.
    """
    return (
        query.is_cuda
        and _has_kernel(query.device)
        and query.dtype in _DTYPES
        and query.shape[-1] <= _MAX_WIDTH
        and query.shape[-1] % 8 == 0
        and step.past is not None
        and not (torch.is_grad_enabled() and query.requires_grad)
    )


# A compiler is not to trace it: it warns of functions that are cached, and breaks graphs here.
@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_kernel(device: torch.device) -> bool:
    """Whether this torch was built with the kernel, and the device is one that it was made for."""
    return _found(device)


@cache
def _found(device: torch.device) -> bool:
    # ROCm's devices call themselves CUDA ones, too; NVIDIA's have it from Ampere on.
    built = torch.version.hip is None and torch.backends.cuda.is_flash_attention_available()
    return built and torch.cuda.get_device_capability(device) >= (8, 0)


def flash_windows(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: tuple[Tensor, Tensor],
    step: BlockStep,
    scaling: float | None,
) -> Tensor:
    """Attention over windows and sinks.

    Args:
        query: [batch, heads, tokens, head_dim].
        key: of the earlier tokens that are seen and of the new ones, in order:
            [batch, key-value heads, earlier + tokens, head_dim].
        value: likewise.
        sinks: keys and values: [batch, key-value heads, sinks, head_dim] each.
        step: of this forward, with no padding.
        scaling: of the inner products.

    Returns:
        [batch, tokens, heads, head_dim].
    """
    query, key, value = (states.transpose(1, 2) for states in (query, key, value))
    window, tokens, n_keys = step.window, query.shape[1], key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    found, logs, *_ = _kernel(
        query,
        key,
        value,
        None,
        None,
        tokens,
        n_keys,
        0.0,
        True,
        False,
        scale=scale,
        window_size_left=window.size - 1,
        window_size_right=0,
    )
    # A sink that is still in a query's window was seen there.
    first = max(window.size - (step.past or 0), 0)
    if window.sinks and first < tokens:
        _join_sinks(query, found, logs, sinks, step, scale, first)
    result: Tensor = found
    return result


def _join_sinks(
    query: Tensor,
    found: Tensor,
    logs: Tensor,
    sinks: tuple[Tensor, Tensor],
    step: BlockStep,
    scale: float,
    first: int,
) -> None:
    """Adds to `found`, from the query `first` on, what the sinks outside of its window give it.

    Args:
        query: [batch, tokens, heads, head_dim].
        found: over the windows; likewise.
        logs: logarithms of its sums of exponentials: [batch, heads, tokens], float32.
        sinks: keys and values: [batch, key-value heads, sinks, head_dim] each.
        step: of this forward.
        scale: of the inner products.
        first: before it no query has a sink outside of its window.
    """
    query, target, logs = query[:, first:], found[:, first:], logs[:, :, first:]
    batch, tokens, heads, width = query.shape
    keys, values = sinks
    kv_heads, n_sinks = keys.shape[1], keys.shape[2]
    grouped = query.reshape(batch, tokens, kv_heads, -1, width)
    scores = torch.einsum("btkgd,bksd->bkgts", grouped, keys).float() * scale
    at = torch.arange(tokens, device=query.device) + first + (step.past or 0)
    inside = at[:, None] - torch.arange(n_sinks, device=query.device) < step.window.size
    scores = scores.masked_fill(inside, -math.inf)
    # Token `size` is the first that has one sink outside, so no row is empty.
    own = torch.logaddexp(scores.logsumexp(-1), logs.view(batch, kv_heads, -1, tokens))
    shares = (scores - own[..., None]).exp().to(query.dtype)
    rest = (logs.view(batch, kv_heads, -1, tokens) - own).exp()
    rest = rest.reshape(batch, heads, tokens).transpose(1, 2)[..., None].to(query.dtype)
    added = torch.einsum("bkgts,bksd->btkgd", shares, values)
    target.mul_(rest).add_(added.reshape(batch, tokens, heads, width))
