"""A decoder some of whose sublayers are gone, for transformers; its folder also serves vLLM.

adaskip writes this file beside the checkpoint, and imports the same classes itself. A layer keeps
what `config.block_configs` says it has, in its family's own modules and order. What is gone has no
weights, no keys and values, and takes no time: attentions are numbered among themselves in a cache.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, rms_norm
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Olmo2Config,
    Olmo2ForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

# Keeps a row of zeros from being divided by zero.
TINY = 1e-12
# What has a bias in Qwen2, where attention's output has none.
QKV = ("q_proj", "k_proj", "v_proj")


class Fields(dict):  # type: ignore[type-arg]  # whatever JSON holds
    """A JSON object whose fields are attributes too, as vLLM reads them."""

    def __getattr__(self, name: str) -> Any:
        try:
            value = self[name]
        except KeyError:
            raise AttributeError(name) from None
        return Fields(value) if isinstance(value, dict) else value


class LinearMap(nn.Module):
    """`n @ weight + bias` in the place of attention or MLP, with `n = x / rms(x)`.

    Args:
        hidden: width of the residual stream.
        rank: of two factors, [hidden, rank] and [rank, hidden]; None for one, [hidden, hidden].
    """

    def __init__(self, hidden: int, rank: int | None) -> None:
        super().__init__()
        shapes = [(hidden, hidden)] if rank is None else [(hidden, rank), (rank, hidden)]
        self.factors = nn.ParameterList(nn.Parameter(torch.empty(shape)) for shape in shapes)
        self.bias = nn.Parameter(torch.empty(hidden))

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        """What is added to the residual stream: [..., hidden]; in a pair, as attention has it."""
        *left, right = self.factors
        n = rms_norm(hidden_states, (self.bias.shape[0],), eps=TINY)
        for factor in left:
            n = n @ factor
        added = linear(n, right.T, self.bias)
        return (added, None) if kwargs else added


class PartialLayer(nn.Module):
    """Goes before a family's decoder layer: a sublayer that is gone is passed by."""

    sublayers: tuple[Any, Any]
    multiplier: str | None

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """The residual stream behind the layer: [batch, tokens, hidden]."""
        for names, given in zip(self.sublayers, (kwargs, {}), strict=True):
            if names is not None:
                hidden_states = hidden_states + self._added(hidden_states, names, given)
        return hidden_states

    def _added(self, x: Tensor, names: Any, kwargs: dict[str, Any]) -> Tensor:
        """`post(body(pre(x))) * multiplier`, what a family does not have left out."""
        pre, body, post = names
        h = x if pre is None else getattr(self, pre)(x)
        # Attention returns its weights too.
        h = getattr(self, body)(hidden_states=h, **kwargs)[0] if kwargs else getattr(self, body)(h)
        added: Tensor = h if post is None else getattr(self, post)(h)
        return added if self.multiplier is None else added * getattr(self, self.multiplier)


@lru_cache
def partial_class(stock: Any) -> type[nn.Module]:
    """The layer class of a family, with sublayers that may be gone; it keeps its name."""
    return type(stock.__name__, (PartialLayer, stock), {"__module__": __name__})


class PartialConfig:
    """Goes before a family's configuration: what each layer has, and where the checkpoint is from.

    Attributes:
        block_configs: per layer `attention` and `ffn`, each with `no_op` (it is gone) and, where a
            linear map stands in its place, `linear` with its `rank`.
        adaskip: the model it was made from, the plan, and the names of a layer's modules.
    """

    _auto_class = "AutoConfig"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "block_configs":
            value = [Fields(block) for block in value or ()]
        super().__setattr__(name, value)


class PartialModel:
    """Goes before a family's causal language model: takes out of it what is gone."""

    _auto_class = "AutoModelForCausalLM"

    def __init__(self, config: Any) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        numbers, modules = count(), config.adaskip["modules"]
        model: Any = self
        for layer, block in zip(model.model.layers, config.block_configs, strict=True):
            stock: Any = type(layer)
            layer.__class__ = partial_class(stock)
            layer.multiplier = modules["multiplier"]
            layer.sublayers = tuple(
                _fitted(layer, modules[kind], block[name], config.hidden_size)
                for kind, name in (("attn", "attention"), ("ffn", "ffn"))
            )
            attention: Any = getattr(layer, modules["attn"][1], None)
            if hasattr(attention, "layer_idx"):
                attention.layer_idx = next(numbers)
                for name in QKV if getattr(config, "qkv_bias", False) else ():
                    plain = getattr(attention, name)
                    setattr(attention, name, nn.Linear(plain.in_features, plain.out_features))


def _fitted(layer: nn.Module, names: list[str | None], block: Any, hidden: int) -> Any:
    """Takes a sublayer out of a layer, or puts a linear map there; its modules' names if any."""
    pre, body, post = names
    if block["no_op"]:
        for name in filter(None, names):
            delattr(layer, name)
        return None
    if block.get("linear"):
        for name in filter(None, (pre, post)):
            setattr(layer, name, nn.Identity())
        setattr(layer, str(body), LinearMap(hidden, block["linear"]["rank"]))
    return tuple(names)


def classes(config: type[Any], model: type[Any]) -> tuple[Any, Any]:
    """A family's configuration and causal language model, with sublayers that may be gone."""
    own: dict[str, Any] = {"__module__": __name__}
    own["model_type"] = f"adaskip_{config.model_type}"
    partial = type(f"AdaSkip{config.__name__}", (PartialConfig, config), own)
    own = {"__module__": __name__, "config_class": partial}
    return partial, type(f"AdaSkip{model.__name__}", (PartialModel, model), own)


# Llama, Mistral without a window, Qwen2.
AdaSkipLlamaConfig, AdaSkipLlamaForCausalLM = classes(LlamaConfig, LlamaForCausalLM)
AdaSkipQwen3Config, AdaSkipQwen3ForCausalLM = classes(Qwen3Config, Qwen3ForCausalLM)
AdaSkipPhi3Config, AdaSkipPhi3ForCausalLM = classes(Phi3Config, Phi3ForCausalLM)
AdaSkipGemma2Config, AdaSkipGemma2ForCausalLM = classes(Gemma2Config, Gemma2ForCausalLM)
AdaSkipGemma3TextConfig, AdaSkipGemma3ForCausalLM = classes(Gemma3TextConfig, Gemma3ForCausalLM)
AdaSkipOlmo2Config, AdaSkipOlmo2ForCausalLM = classes(Olmo2Config, Olmo2ForCausalLM)
AdaSkipGraniteConfig, AdaSkipGraniteForCausalLM = classes(GraniteConfig, GraniteForCausalLM)


class DeciLMConfig(AdaSkipLlamaConfig):  # type: ignore[misc, valid-type]  # made above
    """A Llama under the name by which vLLM counts KV heads layer by layer."""

    model_type = "nemotron-nas"


class DeciLMForCausalLM(AdaSkipLlamaForCausalLM):  # type: ignore[misc, valid-type]  # made above
    """A Llama under the name of vLLM's class."""

    config_class = DeciLMConfig
