"""The weights of a checkpoint: those that survive, with the gains folded in, in float64."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from adaskip.blocks import SublayerSpec, block_spec, bound_parts
from adaskip.export.surviving import Surviving, Survivor
from adaskip.replacements import Linear

# Families whose norms multiply by `1 + weight`.
_ONE_PLUS = ("gemma2", "gemma3_text")
# What a body reads the residual stream with, and what it writes to it with.
_READING = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_WRITING = ("o_proj", "down_proj")


def head_of(model: PreTrainedModel) -> Any:
    """The linear module behind the final norm."""
    return cast(Any, model).get_output_embeddings()


def is_tied(model: PreTrainedModel) -> bool:
    """Whether the head is the embedding."""
    embedding: Any = model.get_input_embeddings()
    return head_of(model).weight is embedding.weight


class Folded:
    """The tensors of a checkpoint, one sublayer at a time.

    Args:
        model: where they come from; it is not changed.
        surviving: what a plan leaves of it.
    """

    def __init__(self, model: PreTrainedModel, surviving: Surviving) -> None:
        self.model = model
        self.surviving = surviving
        self._family: str = model.config.model_type
        self._block = block_spec(self._family)
        decoder: Any = model.base_model
        self._decoder = decoder
        self._layers: list[nn.Module] = list(decoder.layers)

    def around(self) -> dict[str, Tensor]:
        """Embedding, final norm and head, by the names `embed`, `norm` and `head` (if untied).

        In float64 where they are scaled.
        """
        anchor = self.surviving.anchor
        tied = is_tied(self.model)
        # A tied head is scaled with the embedding, which the final norm takes back.
        norm = self._norm(self._decoder.norm.weight, 1 / anchor if tied else 1.0)
        found = {"embed": _times(self._decoder.embed_tokens.weight, anchor), "norm": norm}
        return found if tied else found | {"head": head_of(self.model).weight.detach()}

    def parts(self) -> Iterator[tuple[int, Survivor, dict[str, Tensor]]]:
        """Per survivor the number of its layer and its tensors, named as in the family's layer.

        In float64 where they are scaled.
        """
        for index, part in self.surviving.parts():
            yield index, part, self._part(part)

    def _part(self, part: Survivor) -> dict[str, Tensor]:
        spec: SublayerSpec = getattr(self._block, part.source.kind)
        layer = self._layers[part.source.layer]
        if part.linear is not None:
            return _linear_tensors(part.linear, spec.body, part.scale / self._multiplier(layer))
        found: dict[str, Tensor] = {}
        for name in filter(None, (spec.pre, spec.body, spec.post)):
            module: Any = getattr(layer, name)
            state = module.state_dict(keep_vars=False)
            found |= {f"{name}.{key}": tensor for key, tensor in state.items()}
        if part.scale == 1.0:
            return found
        _, _, post = bound_parts(layer, spec)
        writing = f"{spec.post}.weight" if hasattr(post, "weight") else ""
        return {
            name: self._scaled(name, tensor, part.scale, writing, reads_stream=spec.pre is None)
            for name, tensor in found.items()
        }

    def _scaled(
        self, name: str, tensor: Tensor, scale: float, writing: str, *, reads_stream: bool
    ) -> Tensor:
        """A tensor of a sublayer on a stream that is `scale` times the plan's.

        Args:
            name: in the layer.
            tensor: as it is in the model.
            scale: of the stream.
            writing: the norm's weight that scales what is added; empty if the body does.
            reads_stream: whether no norm stands between the stream and the body.
        """
        if name == writing:
            return self._norm(tensor, scale)
        *_, projection, kind = name.split(".")
        if projection in _WRITING and not writing:
            return _times(tensor, scale)
        if reads_stream and projection in _READING and kind == "weight":
            return _times(tensor, 1 / scale)
        return tensor

    def _norm(self, weight: Tensor, factor: float) -> Tensor:
        """A norm's weight by which it gives `factor` times as much."""
        if factor == 1.0 or self._family not in _ONE_PLUS:
            return _times(weight, factor)
        return (weight.detach().double() + 1) * factor - 1

    def _multiplier(self, layer: nn.Module) -> float:
        """What the family multiplies all that is added with."""
        name = self._block.multiplier
        return 1.0 if name is None else float(getattr(layer, name))


def _times(tensor: Tensor, factor: float) -> Tensor:
    """A tensor times a factor, in float64; as it is for 1."""
    return tensor.detach() if factor == 1.0 else tensor.detach().double() * factor


def _linear_tensors(linear: Linear, body: str, scale: float) -> dict[str, Tensor]:
    """A linear map as our `LinearMap` module names it; it reads the stream's direction only."""
    *left, right = linear.factors
    factors = [*left, _times(right, scale)]
    named = {f"{body}.factors.{i}": factor for i, factor in enumerate(factors)}
    return named | {f"{body}.bias": _times(linear.bias, scale)}
