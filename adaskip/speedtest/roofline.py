"""The roofline: what a forward takes at least on a CUDA device, by its operations and its bytes.

The device's rates are measured, not taken from a data sheet; operations are counted by torch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel

from adaskip.blocks import block_spec, bound_parts
from adaskip.plan import SkipPlan, Sublayer, all_sublayers
from adaskip.replacements import Linear, Window
from adaskip.summary import kept_tokens, numbers_per_token

Shape = Sequence[int]
_COPY_BYTES = 2 << 30
_MATRIX = 8192
# Operations at once, or a launch and a wait would count as a part of each.
_AT_ONCE = 10


@dataclass(frozen=True)
class Rates:
    """Measured rates of a device.

    Attributes:
        bytes_per_second: read and written by a large copy.
        operations_per_second: of a large bf16 matrix product, two per multiply-add.
    """

    bytes_per_second: float
    operations_per_second: float

    def seconds(self, operations: float, n_bytes: float) -> float:
        """What a forward of so many operations and bytes takes at least: the slower of the two."""
        return max(operations / self.operations_per_second, n_bytes / self.bytes_per_second)


def measured_rates(device: torch.device, *, repeats: int = 20) -> Rates | None:
    """Measures a CUDA device; None for any other, whose caches let it read faster."""
    if device.type != "cuda":
        return None
    source = torch.empty(_COPY_BYTES, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # The partial is gone after the call, so that deleting frees both.
    copy = _best_seconds(partial(target.copy_, source), device, repeats)
    del source, target
    a = torch.randn(_MATRIX, _MATRIX, dtype=torch.bfloat16, device=device)
    b = torch.randn_like(a)
    product = _best_seconds(partial(torch.matmul, a, b), device, repeats)
    return Rates(2 * _COPY_BYTES / copy, 2 * _MATRIX**3 / product)


def _best_seconds(action: Callable[[], object], device: torch.device, repeats: int) -> float:
    for _ in range(3):
        action()
    best = float("inf")
    for _ in range(repeats):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(_AT_ONCE):
            action()
        torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - start) / _AT_ONCE)
    return best


def _attention(query: Shape, key: Shape, value: Shape, *_: object, **__: object) -> int:
    """Operations of causal attention; a query that is as long as the keys sees half of them.

    Shapes are [batch, heads, tokens, width]; keys may have fewer heads than queries.
    """
    n, n_keys = query[-2], key[-2]
    full: int = 2 * math.prod(query[:-1]) * n_keys * (key[-1] + value[-1])
    return full * (n + 1) // (2 * n) if n == n_keys else full


def _windows(query: Shape, key: Shape, *_: object, **settings: Any) -> int:
    """Operations of flash attention over windows; shapes are [batch, tokens, heads, width]."""
    batch, n, heads, width = query
    size = settings["window_size_left"] + 1
    n_before = key[1] - n
    seen: int = sum(min(n_before + t + 1, size) for t in range(n))
    return 4 * int(batch) * heads * width * seen


def operation_counter() -> FlopCounterMode:
    """Counts the operations of forwards within it, two per multiply-add."""
    aten = torch.ops.aten
    kernels = (
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_cudnn_attention,
        aten._scaled_dot_product_flash_attention_for_cpu,
    )
    mapping = {**dict.fromkeys(kernels, _attention), aten._flash_attention_forward: _windows}
    return FlopCounterMode(display=False, custom_mapping=mapping)


def forward_bytes(model: PreTrainedModel, plan: SkipPlan, held: int, batch: int) -> int:
    """Bytes of weights that a forward multiplies with, and of keys and values it reads.

    Args:
        model: its sublayers and the type of its weights.
        plan: what the forward skips.
        held: tokens in the cache that it reads; 0 for a prefill.
        batch: sequences.
    """
    layers: Any = model.base_model.layers
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    left_out = {s for s, replacement in plan.items() if not isinstance(replacement, Window)}
    running = [s for s in all_sublayers(len(layers)) if s not in left_out]
    weights = head.weight.numel() + sum(_matrices(layers[s.layer], s) for s in running)
    maps = [replacement for replacement in plan.values() if isinstance(replacement, Linear)]
    weights += sum(factor.numel() for linear in maps for factor in linear.factors)
    itemsize = model.dtype.itemsize
    return int(weights * itemsize) + kv_bytes(model.config, plan, held, batch, itemsize)


def _matrices(layer: Any, sublayer: Sublayer) -> int:
    """Numbers in the matrices of a sublayer."""
    spec = block_spec(layer.self_attn.config.model_type)
    body, _, _ = bound_parts(layer, spec.attn if sublayer.kind == "attn" else spec.ffn)
    return sum(p.numel() for p in body.parameters() if p.ndim == 2)


def kv_bytes(config: Any, plan: SkipPlan, tokens: int, batch: int, itemsize: int) -> int:
    """Bytes of keys and values after `tokens` tokens under a plan that is in force throughout.

    `2 * batch * KV heads * head_dim * tokens * itemsize` per attention that is not skipped; where
    the plan or the model has a window, the tokens it holds.
    """
    text = config.get_text_config(decoder=True)
    gone = {*plan.layers("attn"), *plan.windows}
    running = (layer for layer in range(text.num_hidden_layers) if layer not in gone)
    held: float = sum(kept_tokens(text, layer, tokens) for layer in running)
    held += sum(window.held(tokens) for window in plan.windows.values())
    return round(float(batch * numbers_per_token(text) * itemsize * held))
