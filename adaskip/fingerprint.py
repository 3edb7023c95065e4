"""A name of a model that changes with its shape and training, not with its precision or device.

It is written with what was learned about the model, and compared before that is used again. As
weights of another precision are rounded otherwise, no hash of them is the same; a few weights of
every matrix are kept instead, and compared within that rounding.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

_FACTS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
_SAMPLES = 8
# bfloat16 keeps 8 bits: a rounding on either way is at most one unit of the last of them.
_RELATIVE = 2**-7
# float16 knows nothing below this.
_ABSOLUTE = 1e-7


def model_fingerprint(model: PreTrainedModel) -> str:
    """The model's fingerprint: its shape, a colon, and samples of its weights.

    Sampled are the embedding, the final norm and every module of every decoder layer, 8 numbers of
    each weight, in bfloat16 and base64. NaN stands for what is quantized or has no weight.
    """
    config = model.config.get_text_config(decoder=True)
    facts = [getattr(config, name, None) for name in _FACTS]
    digest = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:6]
    samples = torch.cat([_samples(module) for module in _leaves(model)])
    weights = base64.b64encode(samples.view(torch.int16).numpy().astype("<i2").tobytes()).decode()
    return f"{facts[0]}-{facts[1]}x{facts[2]}-{digest}:{weights}"


def fingerprint_name(fingerprint: str) -> str:
    """The readable part of a fingerprint: family, size, and a hash of the samples."""
    shape, _, weights = fingerprint.partition(":")
    return f"{shape}-{hashlib.sha256(weights.encode()).hexdigest()[:6]}" if weights else shape


def same_model(one: str, other: str) -> bool:
    """Whether two fingerprints are of one model, perhaps in two precisions.

    What is quantized in one of them is not compared.
    """
    shapes, weights = zip(*(text.partition(":")[::2] for text in (one, other)), strict=True)
    if one == other or shapes[0] != shapes[1]:
        return one == other
    try:
        a, b = (_decoded(text) for text in weights)
    except ValueError:
        return False
    if a.shape != b.shape:
        return False
    close = torch.isclose(a, b, rtol=_RELATIVE, atol=_ABSOLUTE)
    return bool((close | a.isnan() | b.isnan()).all())


def _leaves(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The modules that are sampled, in a fixed order, which quantizing them does not change."""
    decoder: Any = model.base_model
    yield decoder.embed_tokens
    yield decoder.norm
    for layer in decoder.layers:
        yield from (module for module in layer.modules() if not any(module.children()))


def _samples(module: Any) -> Tensor:
    """Eight numbers of a module's weight, from all over it: bfloat16 [8], on the CPU."""
    with _fetched(module):
        weight = getattr(module, "weight", None)
        if isinstance(weight, Tensor):
            weight = weight.detach()
            # Shared out over ranks, which all come by here.
            weight = weight.full_tensor() if hasattr(weight, "full_tensor") else weight
        # Other types and narrower dtypes are quantized.
        if type(weight) is not Tensor or not weight.is_floating_point() or weight.itemsize < 2:
            return torch.full((_SAMPLES,), float("nan"), dtype=torch.bfloat16)
        # No divisor of a row's length, so that the samples lie in different columns.
        stride = max(1, weight.numel() * 10 // 83)
        found = weight.flatten()[::stride][:_SAMPLES].to("cpu", torch.bfloat16)
    return nn.functional.pad(found, (0, _SAMPLES - len(found)))


def _fetched(module: Any) -> AbstractContextManager[None]:
    """The time in which a module has its weight, also where accelerate has offloaded it."""
    if getattr(getattr(module, "weight", None), "device", None) != torch.device("meta"):
        return nullcontext()
    from accelerate.utils import align_module_device

    fetched: AbstractContextManager[None] = align_module_device(module, torch.device("cpu"))
    return fetched


def _decoded(weights: str) -> Tensor:
    """The samples in a fingerprint: fp32 [weights * 8].

    Raises:
        ValueError: they are not samples.
    """
    content = bytearray(base64.b64decode(weights, validate=True))
    return torch.frombuffer(content, dtype=torch.int16).view(torch.bfloat16).float()
