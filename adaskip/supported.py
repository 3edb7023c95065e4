"""Which models can be skipped in: what is looked at before their layers are replaced.

A layer's forward is replaced by its family's formula. That is right only if the layer computes
that formula: its class is the family's own, and nobody else has replaced its forward.
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from operator import attrgetter
from typing import Any
from weakref import WeakSet

import transformers
from torch import nn
from transformers import PreTrainedModel
from transformers.models.auto.configuration_auto import model_type_to_module_name

from adaskip import patching
from adaskip.blocks import BlockSpec, block_spec, execution_device, lacks
from adaskip.cache_name import CACHE
from adaskip.errors import UnsupportedCallError, UnsupportedModelError
from adaskip.plan import KINDS, Sublayer

# Those whose models take the KV cache by the name that is looked for here; as in pyproject.toml.
TRANSFORMERS = "transformers>=5.4,<5.25"
# Where torch.compile, DistributedDataParallel, PEFT and a pipeline keep the model, in the order in
# which to look: they pass on what they do not have to what they wrap.
_WRAPPED = ("_orig_mod", "module", "base_model.model", "model")
# Base models and their layers inside a `skipping()` now; a second one would wrap the forwards of
# the first.
_ACTIVE: WeakSet[nn.Module] = WeakSet()
_ENTERING = threading.Lock()


@contextmanager
def alone(decoder: nn.Module) -> Iterator[None]:
    """Claims a base model and its layers for one `skipping()`.

    Raises:
        UnsupportedCallError: it or one of them is inside one already.
    """
    with _ENTERING:
        refuse_inside(decoder, "leave that block first, or use one policy")
        claimed = _with_layers(decoder)
        _ACTIVE.update(claimed)
    try:
        yield
    finally:
        _ACTIVE.difference_update(claimed)


def _with_layers(decoder: Any) -> tuple[nn.Module, ...]:
    return (decoder, *decoder.layers)


def refuse_inside(decoder: nn.Module, advice: str = "do this outside of the block") -> None:
    """Refuses what would compute, or time, a plan in place of the model.

    Raises:
        UnsupportedCallError: the base model, or another one that has a layer of it, is inside a
            `skipping()`.
    """
    if not _ACTIVE.isdisjoint(_with_layers(decoder)):
        raise UnsupportedCallError(
            f"The model, or one that shares layers with it, is inside skipping() already; {advice}."
        )


def refuse_several_devices(layers: Iterable[nn.Module]) -> None:
    """Refuses layers that compute on several devices, for what takes them apart.

    Between the parts of a layer nothing moves the residual stream to another device, and timestamps
    of two devices cannot be subtracted.

    Raises:
        UnsupportedModelError: they do.
    """
    devices = sorted({str(execution_device(layer)) for layer in layers})
    if len(devices) > 1:
        raise UnsupportedModelError(
            f"The model's layers are on {', '.join(devices)}; sublayers are timed, fitted and "
            "searched on one: load the model on a device that holds all of it (no device_map); a "
            "plan that was made there applies on any number."
        )


def check_model(model: object) -> BlockSpec:
    """The row of a model's family.

    Raises:
        UnsupportedModelError: it is no transformers model, wrapped by something, of a family
            without a row, or of a transformers that calls the KV cache otherwise.
    """
    for name, part in (("", model), (".base_model", getattr(model, "base_model", None))):
        if not isinstance(part, PreTrainedModel):
            raise UnsupportedModelError(
                f"model{name} is of type {type(part).__name__}, not a transformers "
                f"PreTrainedModel; {_advice(part, name)}."
            )
    base: Any = getattr(model, "base_model", None)
    if CACHE not in inspect.signature(base.forward).parameters:
        raise UnsupportedModelError(
            f"{type(base).__name__}.forward takes no {CACHE}: the installed transformers "
            f"{transformers.__version__} is newer than this adaskip, which would not see the KV "
            f"cache; install one it knows: pip install '{TRANSFORMERS}'."
        )
    config: Any = getattr(model, "config", None)
    return block_spec(config.model_type)


def _advice(part: object, name: str) -> str:
    """How to come by the model that `part` wraps."""
    for path in _WRAPPED:
        try:
            inner = attrgetter(path)(part)
        except AttributeError:
            continue
        if isinstance(inner, PreTrainedModel):
            return f"pass the model it wraps, model{name}.{path}"
    return "load one with adaskip.load_model or AutoModelForCausalLM.from_pretrained"


def check_layers(layers: Iterable[nn.Module], model_type: str, block: BlockSpec) -> None:
    """Refuses layers that do not compute the formula of their family's row.

    Raises:
        UnsupportedModelError: a layer's class is not the family's, its forward was replaced in
            the class or in the instance, or it is listed twice.
    """
    layers = list(layers)
    package = block.package or f"transformers.models.{model_type_to_module_name(model_type)}"
    for index, layer in enumerate(layers):
        # fully_shard() makes a subclass of each layer's class.
        kind = next(
            c for c in type(layer).__mro__ if not _within(c.__module__, "torch.distributed")
        )
        first = layers.index(layer)
        if first != index:
            raise UnsupportedModelError(
                f"Decoder layer {index} is the same module as layer {first}, so that both would do "
                "what the plan says of one of them; list copies of it (copy.deepcopy)."
            )
        label = f"Decoder layer {index} ({kind.__module__}.{kind.__qualname__})"
        if not _within(kind.__module__, package):
            raise UnsupportedModelError(
                f"{label} is not a class of {package}, which the row {model_type!r} of "
                "adaskip.blocks.BLOCKS describes; its forward would be replaced by another "
                "formula. If it computes the same, give the row package="
                f"{kind.__module__.split('.')[0]!r} and skipping() verify=True."
            )
        replaced = _replaced_forward(layer, package)
        if replaced is not None:
            raise UnsupportedModelError(
                f"{label} has a forward that another tool has put there ({_origin(replaced)}); "
                "skipping() would replace it by the stock formula. Take that patch off first."
            )


def absent_sublayers(layers: Iterable[nn.Module], block: BlockSpec) -> frozenset[Sublayer]:
    """The sublayers that a model was exported without."""
    return frozenset(
        Sublayer(index, kind)
        for index, layer in enumerate(layers)
        for kind in KINDS
        if lacks(layer, getattr(block, kind), block)
    )


def cache_indices(layers: Iterable[nn.Module], block: BlockSpec) -> dict[int, int]:
    """The cache layer of each layer's attention, in order; those without one are left out."""
    if not block.partial:
        return {index: index for index, _ in enumerate(layers)}
    # What is gone, or a linear map by now, has no keys and values.
    bodies: list[Any] = [getattr(layer, block.attn.body, None) for layer in layers]
    return {i: body.layer_idx for i, body in enumerate(bodies) if hasattr(body, "layer_idx")}


def _replaced_forward(layer: nn.Module, package: str) -> object | None:
    """The forward that is not the class's own, as its package defines it; None if it is."""
    kind, own = type(layer), vars(layer)
    if not _is_own(kind, package):
        return kind.forward
    forward = own.get("forward")
    if "_hf_hook" in own and "_old_forward" in own:
        # accelerate's hook, around what was the layer's forward.
        if not _within(_module_of(forward), "accelerate"):
            return forward
        forward = own["_old_forward"]
    function = getattr(forward, "__func__", None)
    # Ours, kept by a copy or put back after leaving, does what the class says.
    stock = function is kind.forward or _module_of(function) == patching.__name__
    bound = getattr(forward, "__self__", None) is layer
    return None if forward is None or (stock and bound) else forward


def _is_own(kind: type[nn.Module], package: str) -> bool:
    """Whether a class's forward is its own, wrapped by its package or transformers at most.

    functools.wraps copies the wrapped function's names, but not the globals of its code.
    """
    function: Any = kind.forward
    while hasattr(function, "__wrapped__"):
        if _module_of(function).split(".")[0] not in ("transformers", package.split(".")[0]):
            return False
        function = function.__wrapped__
    return _module_of(function) in {base.__module__ for base in kind.__mro__}


def _module_of(function: object) -> str:
    """The module that the code of a function, or of a partial one, comes from."""
    function = getattr(function, "func", function)
    return str(getattr(function, "__globals__", {}).get("__name__", type(function).__module__))


def _origin(function: object) -> str:
    inner = getattr(function, "func", function)
    code = getattr(inner, "__code__", None)
    return f"{_module_of(function)}.{getattr(code, 'co_qualname', type(inner).__qualname__)}"


def _within(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")
