"""What a phase needs at least on a CUDA device: decode its bytes, prefill its operations.

The device's rates are measured, not taken from a data sheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from adaskip.blocks import block_spec, bound_parts
from adaskip.plan import SkipPlan, Sublayer, all_sublayers

_COPY_BYTES = 2 << 30
_MATRIX = 8192


@dataclass(frozen=True)
class Rates:
    """Measured rates of a device.

    Attributes:
        bytes_per_second: read and written by a large copy.
        operations_per_second: of a large bf16 matrix product, two per multiply-add.
    """

    bytes_per_second: float
    operations_per_second: float


@dataclass(frozen=True)
class Work:
    """What one forward has to do.

    Attributes:
        operations: of its matrix products and attention, two per multiply-add.
        bytes: weights and keys and values it reads.
    """

    operations: float
    bytes: float

    def floor(self, rates: Rates) -> float:
        """Seconds below which it cannot be done: the slower of the two."""
        return max(
            self.operations / rates.operations_per_second, self.bytes / rates.bytes_per_second
        )


def measured_rates(device: torch.device, *, repeats: int = 20) -> Rates | None:
    """Measures a CUDA device; None for any other, whose caches make such a floor meaningless."""
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
        action()
        torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    return best


def prefill_work(model: PreTrainedModel, plan: SkipPlan, tokens: int, batch: int) -> Work:
    """One prefill forward with the logits of the last position, causal attention."""
    weights = _weights(model, plan)
    pairs = tokens * (tokens + 1) / 2
    operations = (
        2 * batch * tokens * (weights - _head(model))
        + 2 * batch * _head(model)
        + 4 * batch * pairs * _query_width(model) * _n_attention(model, plan)
    )
    return Work(operations, weights * _itemsize(model))


def decode_work(model: PreTrainedModel, plan: SkipPlan, past: int, batch: int) -> Work:
    """One decode step on a cache of `past` tokens."""
    weights = _weights(model, plan)
    running = _n_attention(model, plan)
    operations = 2 * batch * weights + 4 * batch * (past + 1) * _query_width(model) * running
    kv = 2 * batch * (past + 1) * _kv_width(model) * running
    return Work(operations, (weights + kv) * _itemsize(model))


def _weights(model: PreTrainedModel, plan: SkipPlan) -> int:
    """Numbers in the matrices that a forward multiplies with, the head's included."""
    layers: Any = model.base_model.layers
    total = _head(model)
    for sublayer in all_sublayers(len(layers)):
        if sublayer not in plan:
            total += _matrices(layers[sublayer.layer], sublayer)
    return total


def _matrices(layer: Any, sublayer: Sublayer) -> int:
    spec = block_spec(layer.self_attn.config.model_type)
    body, _, _ = bound_parts(layer, spec.attn if sublayer.kind == "attn" else spec.ffn)
    return sum(p.numel() for p in body.parameters() if p.ndim == 2)


def _head(model: PreTrainedModel) -> int:
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    return int(head.weight.numel())


def _n_attention(model: PreTrainedModel, plan: SkipPlan) -> int:
    layers: Any = model.base_model.layers
    return len(layers) - len(plan.layers("attn"))


def _text(model: PreTrainedModel) -> Any:
    return model.config.get_text_config(decoder=True)


def _head_dim(model: PreTrainedModel) -> int:
    config = _text(model)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(width)


def _query_width(model: PreTrainedModel) -> int:
    return int(_text(model).num_attention_heads) * _head_dim(model)


def _kv_width(model: PreTrainedModel) -> int:
    config = _text(model)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(heads) * _head_dim(model)


def _itemsize(model: PreTrainedModel) -> int:
    return int(model.dtype.itemsize)
