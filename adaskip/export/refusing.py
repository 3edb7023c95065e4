"""What cannot be exported, each refused in one sentence before anything is computed or written."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers import PreTrainedModel

from adaskip import entering, supported
from adaskip.blocks import EXPORTED
from adaskip.errors import AdaskipError, PlanError, UnsupportedModelError, unknown_name
from adaskip.plan import Phase, Scope, SkipPlan, Step
from adaskip.policy import SkipPolicy

Format = Literal["hf", "gguf"]
FORMATS: tuple[Format, ...] = get_args(Format)

# The others' layers differ by their number, or have no one matrix that a gain could fold into.
FAMILIES = (
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3_text",
    "olmo2",
    "granite",
)
# Of these, GGUF can hold those without norms that only transformers knows.
GGUF_FAMILIES = ("llama", "mistral", "qwen2", "phi3", "granite")
# All their layers have the one window, whatever `layer_types` says: their code does not read it.
ONE_WINDOW = ("mistral", "phi3")
DTYPES: dict[str, tuple[str, ...]] = {
    "hf": ("f32", "f16", "bf16"),
    "gguf": ("f32", "f16", "bf16", "q8_0"),
}
# Lengths of prompts, and decode steps taken, at which a policy is asked for its plan.
_PROMPTS = (2, 1, 64, 4096, 1_000_000)
_DECODED = (0, 1, 4096)
_SHORT = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}


def plan_of(policy: SkipPlan | SkipPolicy, n_layers: int, scope: Scope = "e2e") -> SkipPlan:
    """The one plan that a policy applies in prefill and in every decode step.

    Args:
        policy: a policy, or the plan itself.
        n_layers: decoder layers of the model.
        scope: where the plan applies.

    Raises:
        PlanError: there is no such plan: the policy's changes, or the scope is one phase.
        AdaskipError: it is neither, or does not fit the model.
    """
    if scope != "e2e":
        raise PlanError(
            f"Scope {scope!r} skips in one phase only, and a checkpoint has the same sublayers in "
            "both; export with scope 'e2e'."
        )
    # A copy: the policy may be in use in a block.
    policy = copy.copy(entering.as_policy(policy))
    policy.scope = scope
    policy.bind(n_layers)
    plans = (policy.plan(step) for step in _steps())
    first = next(plans)
    if policy.stepwise or any(plan != first for plan in plans):
        raise PlanError(
            f"{type(policy).__name__} skips other sublayers in prefill and decode, from step to "
            "step or from prompt to prompt, and a checkpoint has the same ones throughout; take a "
            "fixed plan (AdaSkip: online=False)."
        )
    return first


def _steps() -> Iterator[Step]:
    """Steps of several requests, by any of which a policy may decide."""
    for request, tokens in enumerate(_PROMPTS):
        yield Step(Phase.PREFILL, request, index=0, tokens=tokens)
        for decoded in _DECODED:
            yield Step(Phase.DECODE, request, index=1 + decoded, tokens=1, decoded=decoded)


def given_dtype(dtype: torch.dtype | str | None, file_format: str) -> str | None:
    """The name of a precision: "f32", "f16", "bf16" or "q8_0"; None if none is given.

    Raises:
        AdaskipError: there is no such format, or it has no such precision.
    """
    if file_format not in FORMATS:
        raise unknown_name("format", str(file_format), FORMATS)
    if dtype is None:
        return None
    given = str(dtype).removeprefix("torch.").lower()
    name = _SHORT.get(given, given)
    if name not in DTYPES[file_format]:
        raise unknown_name(f"dtype of format {file_format!r}", given, DTYPES[file_format])
    return name


def model_dtype(model: PreTrainedModel) -> str:
    """The name of a model's precision, which every format has.

    Raises:
        UnsupportedModelError: none has it.
    """
    own = str(model.dtype).removeprefix("torch.")
    if own not in _SHORT:
        raise UnsupportedModelError(
            f"The model is in {own}; load it in float32, float16 or bfloat16."
        )
    return _SHORT[own]


def check_tokenizer(file_format: str, tokenizer_gguf: str | os.PathLike[str] | None) -> None:
    """Refuses a GGUF file as the source of a tokenizer where no GGUF file is written.

    Raises:
        AdaskipError: it is given.
    """
    if file_format != "gguf" and tokenizer_gguf is not None:
        raise AdaskipError(
            f"Format {file_format!r} takes no tokenizer from a GGUF file; give it its own."
        )


def check_folder(folder: Path) -> None:
    """Refuses a place that holds something.

    Raises:
        AdaskipError: it is a file, or a folder that is not empty.
    """
    if not folder.exists():
        return
    # Named, for what a killed export has left is hidden.
    found = next(folder.iterdir(), None) if folder.is_dir() else folder
    if found is not None:
        raise AdaskipError(
            f"{folder} is there already{'' if found == folder else f' and holds {found.name}'}; "
            "give a folder that is empty or new."
        )


def check_model(model: PreTrainedModel, file_format: str) -> None:
    """Refuses models that a format cannot hold.

    Raises:
        UnsupportedModelError: its family, its windows, or the form of its weights.
    """
    block = supported.check_model(model)
    config: Any = model.config
    family = config.model_type
    # Of whole layers alone, it is of the family's own class.
    if family in EXPORTED or hasattr(config, "adaskip"):
        raise UnsupportedModelError(
            "The model is an exported one; export a longer plan from the model it was made from."
        )
    if family not in FAMILIES:
        raise UnsupportedModelError(
            f"Models of family {family} are not exported; those of {', '.join(FAMILIES)} are."
        )
    if file_format == "gguf" and family not in GGUF_FAMILIES:
        raise UnsupportedModelError(
            f"GGUF has no architecture in which {family} layers may lack sublayers; it holds "
            f"{', '.join(GGUF_FAMILIES)}. Export with format 'hf'."
        )
    if not hasattr(model, "lm_head"):
        raise UnsupportedModelError(
            f"{type(model).__name__} is no causal language model: give the one with the head."
        )
    decoder: Any = model.base_model
    supported.check_layers(decoder.layers, family, block)
    _refuse_windows(config)
    _refuse_weights(model)
    _refuse_names(model)
    model_dtype(model)
    if file_format == "hf" and model.generation_config is not None:
        _refuse_generation(model.generation_config)


def _refuse_windows(config: Any) -> None:
    types = None if config.model_type in ONE_WINDOW else getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    sliding = window is not None if types is None else set(types) != {"full_attention"}
    if sliding:
        raise UnsupportedModelError(
            f"The attention of this {config.model_type} slides over a window of {window} tokens, "
            "which is counted by layers that would no longer be the same; models without a sliding "
            "window can be exported."
        )


def _refuse_weights(model: PreTrainedModel) -> None:
    """Refuses weights that are elsewhere, shared out, or no plain numbers."""
    for name, tensor in model.state_dict().items():
        plain = type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_floating_point()
        if not plain or tensor.itemsize < 2 or tensor.is_meta:
            raise UnsupportedModelError(
                f"The weight {name} is quantized, offloaded or shared out; load the model whole, "
                "in float32, float16 or bfloat16."
            )


def _refuse_names(model: PreTrainedModel) -> None:
    """Refuses weights that the model's class does not have, or lacks: adapters and the like."""
    try:
        with torch.device("meta"):
            plain_names = type(model)(model.config).state_dict().keys()
    except TypeError as error:
        raise UnsupportedModelError(
            f"A {type(model).__name__} is not made of its configuration alone ({error}); give a "
            "model of transformers' own class."
        ) from error
    if odd := sorted(model.state_dict().keys() ^ plain_names):
        raise UnsupportedModelError(
            f"The model's weights are not those of a {type(model).__name__} as it is loaded "
            f"({odd[0]}); remove adapters and parametrizations first, or merge them."
        )


def _refuse_generation(config: Any) -> None:
    """Refuses a generation configuration that transformers would not save."""
    try:
        config.validate(strict=True)
    except ValueError as error:
        raise UnsupportedModelError(
            "The model's generation configuration cannot be saved; mend model.generation_config: "
            f"{' '.join(str(error).split())}"
        ) from error
