"""Compiled decoding on a static cache, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import CompileConfig, PreTrainedModel

# Sets of skipped sublayers that one process may compile; torch's own limit is 8.
_MAX_GRAPHS = 128


def compile_config(device: torch.device | str) -> CompileConfig:
    """What `generate(cache_implementation="static", compile_config=...)` takes on a device.

    CUDA graphs on a GPU; on a CPU, where `generate()` compiles only when told to, inductor.
    """
    mode: Any = "reduce-overhead" if torch.device(device).type == "cuda" else None
    config = CompileConfig(fullgraph=False, mode=mode)
    config._compile_all_devices = True  # type: ignore[assignment]
    return config


def compiled_call(model: PreTrainedModel) -> Callable[..., Any]:
    """The model compiled for decode steps, with room for a graph per set of skipped sublayers."""
    import torch._dynamo.config as settings

    settings.recompile_limit = max(settings.recompile_limit, _MAX_GRAPHS)
    call: Callable[..., Any] = model.get_compiled_call(compile_config(model.device))
    return call
