"""A name of a model that changes with its shape and training, not with its precision or device.

It is written with what was learned about the model, and compared before that is used again. As
weights of another precision are rounded otherwise, no hash of them is the same; a few weights of
every matrix are kept instead, and compared within that rounding.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaskip.blocks import execution_device

_FACTS = (
    "model_type",
    "num_hidden_layers",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
# What a configuration says besides what is computed.
_OF_NO_ACCOUNT = ("architectures", "transformers_version", "dtype", "use_cache")
CONFIGURATION = "configuration"
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


def model_identity(model: PreTrainedModel) -> dict[str, str]:
    """What the numbers that a model computes depend on, ready for the head of a record.

    The fingerprint knows weights of the decoder alone, and nothing of those that are quantized: the
    configuration beside it is a hash of settings, of head and biases, and of autocast.
    """
    device = execution_device(model.get_input_embeddings()).type
    settings: dict[str, Any] = model.config.get_text_config(decoder=True).to_diff_dict()
    head: Any = model.get_output_embeddings()  # type: ignore[no-untyped-call]
    biased = [m for m in model.modules() if isinstance(getattr(m, "bias", None), Tensor)]
    samples = [_samples(each, "bias") for each in biased]
    samples += [] if head is None else [_samples(head)]
    facts = [
        {key: value for key, value in settings.items() if key not in _OF_NO_ACCOUNT},
        str(getattr(model.config, "quantization_config", None)),
        [sample.tolist() for sample in samples],
        str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else None,
    ]
    text = json.dumps(facts, sort_keys=True, default=str)
    return {
        "model": fingerprint_name(model_fingerprint(model)),
        "dtype": str(model.dtype),
        "device": device,
        CONFIGURATION: hashlib.sha256(text.encode()).hexdigest()[:16],
    }


def first_difference(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """What tells a record's head from the one that is wanted; None if nothing does."""
    for key in {**found, **wanted}:
        # Records of earlier versions have none.
        untold = key == CONFIGURATION and key not in found
        if not untold and found.get(key) != wanted.get(key):
            return key
    return None


def _leaves(model: PreTrainedModel) -> Iterator[nn.Module]:
    """The modules that are sampled, in a fixed order, which quantizing them does not change."""
    decoder: Any = model.base_model
    yield decoder.embed_tokens
    yield decoder.norm
    for layer in decoder.layers:
        yield from (module for module in layer.modules() if not any(module.children()))


def _samples(module: Any, name: str = "weight") -> Tensor:
    """Eight numbers of a module's weight or bias, from all over it: bfloat16 [8], on the CPU."""
    with _fetched(module):
        weight = getattr(module, name, None)
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
