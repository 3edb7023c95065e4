"""The forward of one decoder layer with a switch for each of its two sublayers.

A skipped sublayer costs nothing but what takes its place: no norm, no projection, no residual add.
The layer only looks at its switches; it counts nothing, looks nothing up and reads nothing from
the device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

from torch import Tensor, nn

from adaskip.blocks import BlockSpec, SublayerSpec, bound_parts, first_tensor, lacks
from adaskip.recorders import StepRecording
from adaskip.replacements import Linear, scaled
from adaskip.window_attention import windowed
from adaskip.window_track import WindowStep


@dataclass(slots=True)
class Switches:
    """What one layer does in the coming forward; all its forward looks at.

    Attributes:
        run_attn, run_ffn: whether the sublayer is computed.
        attn_replacement, ffn_replacement: what takes the place of a sublayer that is not: a scalar
            on the device, a linear map, or None for the residual stream as it is.
        window: what the forward needs of attention that sees a window; None if it sees all.
        recording: where statistics go, None if nobody wants them.
    """

    run_attn: bool = True
    run_ffn: bool = True
    attn_replacement: Tensor | Linear | None = None
    ffn_replacement: Tensor | Linear | None = None
    window: WindowStep | None = None
    recording: StepRecording | None = None


def layer_forward(
    layer: nn.Module, index: int, block: BlockSpec, switches: Switches
) -> Callable[..., Tensor]:
    """The forward of one decoder layer, with a switch for each sublayer."""
    attn, ffn = (
        _absent if lacks(layer, spec, block) else sublayer_function(layer, spec, block.multiplier)
        for spec in (block.attn, block.ffn)
    )
    names = list(inspect.signature(type(layer).forward).parameters)[2:]

    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        kwargs.update(zip(names, args, strict=False))
        recording = switches.recording
        start = hidden_states
        if switches.run_attn:
            window = switches.window
            given = kwargs if window is None else windowed(kwargs, window, index)
            hidden_states = attn(start, given)
            if recording is not None and "attn" in recording.spans:
                recording.write(index, "attn", start, _seen(attn, hidden_states))
        elif switches.attn_replacement is not None:
            hidden_states = _replaced(start, switches.attn_replacement)
        middle = hidden_states
        if switches.run_ffn:
            hidden_states = ffn(middle, None)
            if recording is not None and "ffn" in recording.spans:
                recording.write(index, "ffn", middle, _seen(ffn, hidden_states))
        elif switches.ffn_replacement is not None:
            hidden_states = _replaced(middle, switches.ffn_replacement)
        if recording is not None and "layer" in recording.spans:
            recording.write(index, "layer", start, hidden_states)
        return hidden_states

    return MethodType(forward, layer)


def _absent(x: Tensor, kwargs: dict[str, Any] | None) -> Tensor:
    """The residual stream after a sublayer that the layer was made without."""
    return x


def _seen(run: Callable[..., Tensor], after: Tensor) -> Tensor:
    """What statistics are told of a sublayer: of one that is not there, the least similar output.

    Nothing is saved by skipping what is not there, so its importance is the highest.
    """
    return -after if run is _absent else after


def _replaced(x: Tensor, replacement: Tensor | Linear) -> Tensor:
    """The residual stream after a sublayer that something takes the place of."""
    return replacement(x) if isinstance(replacement, Linear) else scaled(x, replacement)


def sublayer_function(
    layer: nn.Module, spec: SublayerSpec, multiplier: str | None
) -> Callable[[Tensor, dict[str, Any] | None], Tensor]:
    """`x + post(body(pre(x))) * multiplier` of one sublayer, as a function of x."""
    bound_parts(layer, spec)
    scale = None if multiplier is None else getattr(layer, multiplier)
    # Looked up at every call: a module may be replaced in between. The layer's attributes would be
    # the same modules, at twenty times the cost.
    modules: dict[str, Any] = layer._modules

    def run(x: Tensor, kwargs: dict[str, Any] | None) -> Tensor:
        h = x if spec.pre is None else modules[spec.pre](x)
        body = modules[spec.body]
        # Attention is given everything the layer was given; an MLP takes the tensor alone.
        h = body(h) if kwargs is None else first_tensor(body(hidden_states=h, **kwargs))
        if spec.post is not None:
            h = modules[spec.post](h)
        if scale is not None:
            h = h * scale
        return x + h

    return run
