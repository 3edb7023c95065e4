"""The residual stream of prompts, taken through a model's sublayers one by one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from adaskip import supported, window_attention
from adaskip.blocks import execution_device
from adaskip.errors import AdaskipError
from adaskip.evaluating import evaluating
from adaskip.padding import real_tokens
from adaskip.patching import patch_forward
from adaskip.plan import KINDS, Sublayer
from adaskip.replacements import Linear, Replacement, Window, scaled
from adaskip.sublayers import sublayer_function
from adaskip.window_track import WindowTrack


@dataclass(frozen=True)
class Calls:
    """What a prompt gives the layers besides the residual stream.

    Attributes:
        given: by layer.
        real: False at padding: bool [batch, tokens]; None if there is none. A layer's own mask need
            not tell: it may be of any kind that the attention function takes.
    """

    given: list[dict[str, Any]]
    real: Tensor | None


class Sublayers:
    """Runs the sublayers of a model one at a time, outside of the model's own forward.

    Args:
        model: a causal language model of a supported family, outside of `skipping()`.

    Raises:
        UnsupportedModelError: the architecture is not supported, or the model is patched or on
            several devices.
        UnsupportedCallError: the model is inside `skipping()`.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        block = supported.check_model(model)
        self.model = model
        decoder: Any = model.base_model
        supported.refuse_inside(decoder)
        self.decoder = decoder
        self._attention = block.attn.body
        layers: list[nn.Module] = list(decoder.layers)
        supported.check_layers(layers, model.config.model_type, block)
        supported.refuse_several_devices(layers)
        self._functions = [
            sublayer_function(layer, getattr(block, kind), block.multiplier)
            for layer in layers
            for kind in KINDS
        ]

    def run(self, sublayer: Sublayer, x: Tensor, calls: Calls) -> Tensor:
        """The residual stream after a sublayer that is computed: [batch, tokens, hidden]."""
        given = calls.given[sublayer.layer] if sublayer.kind == "attn" else None
        return self._functions[sublayer.position](x, given)

    def through(
        self,
        sublayer: Sublayer,
        x: Tensor,
        calls: Calls,
        replacements: Mapping[Sublayer, Replacement],
    ) -> Tensor:
        """The residual stream after a sublayer, or after what takes its place."""
        if sublayer not in replacements:
            return self.run(sublayer, x, calls)
        replacement = replacements[sublayer]
        if isinstance(replacement, Window):
            return self._windowed(sublayer, replacement, x, calls)
        return replaced(x, replacement)

    def _windowed(self, sublayer: Sublayer, window: Window, x: Tensor, calls: Calls) -> Tensor:
        """The residual stream after an attention over a window."""
        given = calls.given[sublayer.layer]
        step = WindowTrack(window.whole, x.device).advance(calls.real, x.shape[1])
        attention: nn.Module = getattr(self.decoder.layers[sublayer.layer], self._attention)
        window_attention.switch(attention, window)
        try:
            given = window_attention.windowed(given, step, sublayer.layer)
            return self._functions[sublayer.position](x, given)
        finally:
            window_attention.switch(attention, None)

    def begin(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Calls]:
        """The stream before the first layer, and what each layer is given; no layer is run."""
        seen: list[tuple[Tensor, dict[str, Any]]] = []
        device = execution_device(self.model.get_input_embeddings())
        with self._layers_as(lambda layer, _: _noting(layer, seen)):
            self.decoder(**{k: v.to(device) for k, v in inputs.items()}, use_cache=False)
        x = seen[0][0]
        real = real_tokens(inputs.get("attention_mask"), 0, x.shape[1], len(x))
        if real is not None and real.all():
            real = None
        return x, Calls([call for _, call in seen], real)

    def logits(self, ids: Tensor, x: Tensor, n_last: int) -> Tensor:
        """Logits of the last positions of a stream behind the last layer: [batch, n, vocabulary].

        Args:
            ids: the stream's tokens: [batch, tokens].
            x: [batch, tokens, hidden].
            n_last: positions.
        """
        last = len(self.decoder.layers) - 1

        def passing(layer: nn.Module, index: int) -> Callable[..., Tensor]:
            return lambda hidden_states, *args, **kwargs: x if index == last else hidden_states

        with self._layers_as(passing):
            output = self.model(ids, use_cache=False, logits_to_keep=n_last)
        logits: Tensor = output.logits
        return logits

    @contextmanager
    def _layers_as(
        self, forward: Callable[[nn.Module, int], Callable[..., Tensor]]
    ) -> Iterator[None]:
        """Gives the layers another forward for a while."""
        with ExitStack() as undo:
            for index, layer in enumerate(self.decoder.layers):
                undo.callback(patch_forward(layer, forward(layer, index)).take_back)
            yield


@contextmanager
def measuring(model: PreTrainedModel) -> Iterator[None]:
    """No dropout and no gradients; not inference mode, for what is made may meet gradients."""
    with torch.no_grad(), evaluating(model):
        yield


def replaced(x: Tensor, replacement: Replacement) -> Tensor:
    """The residual stream after what takes a sublayer's place."""
    if replacement is None:
        return x
    if isinstance(replacement, Linear):
        return replacement.on(x.device, x.dtype)(x)
    if isinstance(replacement, Window):
        raise AdaskipError("A Window needs the attention it is of; use Sublayers.through.")
    return scaled(x, replacement)


def _noting(layer: nn.Module, seen: list[tuple[Tensor, dict[str, Any]]]) -> Callable[..., Tensor]:
    """A forward that notes what the layer is given, and passes the stream on."""
    names = list(inspect.signature(type(layer).forward).parameters)[2:]

    def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append((hidden_states, kwargs | dict(zip(names, args, strict=False))))
        return hidden_states

    return forward
