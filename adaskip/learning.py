"""Learns the offline importance of a model's sublayers from warm-up prompts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaskip.blocks import execution_device
from adaskip.entering import skipping
from adaskip.errors import ProfileError
from adaskip.evaluating import evaluating
from adaskip.fingerprint import model_fingerprint
from adaskip.importance import Importance
from adaskip.plan import EMPTY_PLAN, Phase, Step, all_sublayers
from adaskip.recorders import Span, StepStats, median
from adaskip.supported import check_model
from adaskip.warmup import checked_prompts, tokenized


class ImportanceRecorder:
    """Per request, over its prefill: similarity and both gains of every sublayer, and of layers.

    A recorder for `skipping`; requests of several chunks and padded batches are understood, each
    sequence of a batch being a request of its own. Prompts are to be prefilled one after the other.
    """

    def __init__(self) -> None:
        self._request = -1
        self._chunks: list[StepStats] = []
        self._means: list[Tensor] = []
        self._layers: list[Tensor] = []
        self._tokens: list[Tensor] = []

    def watch(self, step: Step) -> frozenset[Span]:
        """Attention, FFN and the whole of every layer, in prefill; nothing in decode steps."""
        wanted: frozenset[Span] = frozenset({"attn", "ffn", "layer"})
        return wanted if step.phase is Phase.PREFILL else frozenset()

    def observe(self, step: Step, stats: StepStats) -> None:
        """Keeps the chunk; a new request closes the last one.

        Raises:
            ProfileError: the prompt goes on after another one has begun.
        """
        if step.index == 0:
            self._close()
            self._request = step.request
        elif step.request != self._request:
            raise ProfileError(
                "A prompt went on after another one had begun, and each would count as several: "
                "prefill the prompts that importance is learned from one after the other."
            )
        self._chunks.append(stats.select("attn", "ffn", "layer"))

    def _close(self) -> None:
        """Reduces a finished request on the device: [3, sublayers, batch]."""
        if not self._chunks:
            return
        whole = StepStats.concatenated(self._chunks)
        self._chunks = []
        weights = whole.weights()
        count = weights.sum(dim=-1)
        self._layers.append((whole.select("layer").similarity() * weights).sum(dim=-1) / count)
        stats = whole.select("attn", "ffn")
        similarity = (stats.similarity() * weights).sum(dim=-1) / count
        squared_out = (stats.squared_out * weights).sum(dim=-1)
        squared_in = (stats.squared_in * weights).sum(dim=-1)
        token = median(stats.gain(), weights)
        self._means.append(torch.stack([similarity, (squared_out / squared_in).sqrt(), token]))
        self._tokens.append(count)

    def per_request(self) -> Tensor:
        """Similarity, norm gain and token gain of each request: [3, 2L, requests]; reads nothing.

        Raises:
            ProfileError: no request has been recorded.
        """
        self._close()
        if not self._means:
            raise ProfileError("No warm-up prompt was given; importance needs at least one.")
        return torch.cat(self._means, dim=-1)

    def layers_per_request(self) -> Tensor:
        """Similarity of whole layers in each request: [L, requests]; reads nothing.

        Raises:
            ProfileError: no request has been recorded.
        """
        self.per_request()
        return torch.cat(self._layers, dim=-1)

    def n_tokens(self) -> int:
        """Real tokens recorded; reads the device."""
        return int(torch.cat(self._tokens).sum())


def importance_from(recorder: ImportanceRecorder, fingerprint: str, source: str) -> Importance:
    """The profile that is the mean over the requests of a recorder."""
    means, layers = recorder.per_request(), recorder.layers_per_request()
    sublayers = all_sublayers(means.shape[1] // 2)
    # One read from the device.
    values = torch.cat([means.flatten(0, 1), layers]).double().mean(dim=-1).tolist()
    n = len(sublayers)
    columns = [dict(zip(sublayers, values[i * n : (i + 1) * n], strict=True)) for i in range(3)]
    return Importance(
        columns[0],
        columns[1],
        columns[2],
        fingerprint=fingerprint,
        n_requests=means.shape[-1],
        n_tokens=recorder.n_tokens(),
        source=source,
        layer_similarity=tuple(values[3 * n :]),
    )


def record_prompts(
    model: PreTrainedModel,
    prompts: Iterable[Tensor | Mapping[str, Tensor]],
    *,
    progress: bool = False,
) -> ImportanceRecorder:
    """Prefills each prompt once, nothing skipped, and returns what was recorded.

    Args:
        model: a causal language model of a supported family.
        prompts: input ids [batch, tokens], or mappings with `input_ids` and `attention_mask`.
        progress: whether to show a progress bar.

    Raises:
        ProfileError: a prompt is not of ids the model knows. All are looked at before the first
            one runs.
    """
    recorder = ImportanceRecorder()
    with (
        torch.inference_mode(),
        skipping(model, EMPTY_PLAN, recorders=[recorder]),
        evaluating(model),
    ):
        device = execution_device(model.get_input_embeddings())
        checked = checked_prompts(prompts, model.config.get_text_config(decoder=True).vocab_size)
        for prompt in tqdm(checked, desc="learning importance", disable=not progress):
            inputs = {name: tensor.to(device) for name, tensor in prompt.items()}
            # The base model: no logits are needed, and without a cache no KV memory either.
            model.base_model(**inputs, use_cache=False)
    return recorder


def learn_importance(
    model: PreTrainedModel,
    prompts: Iterable[Tensor | Mapping[str, Tensor] | str],
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    source: str = "",
    progress: bool = False,
) -> Importance:
    """Learns the offline importance of every sublayer from warm-up prompts.

    Args:
        model: a causal language model of a supported family.
        prompts: texts; or input ids [batch, tokens], or mappings with `input_ids` and
            `attention_mask`. METHOD, "Policies" takes 20 of more than 4,000 words.
        tokenizer: the model's own, with which texts become prompts; a text longer than the model
            has positions is cut at its end, which is logged.
        source: what the prompts are, kept in the profile.
        progress: whether to show a progress bar.

    Returns:
        The profile: mean over requests of each request's similarity and gains.

    Raises:
        ProfileError: there is no prompt, or one is not of ids the model knows; or what the model
            computes is not finite.
        UnsupportedModelError: the architecture is not supported.

    Source: AdaSkip (arXiv 2501.02336), offline importance learning; METHOD, "Policies".
    """
    check_model(model)
    given: Any = prompts
    if tokenizer is not None:
        given = tokenized(given, tokenizer, model.config.get_text_config(decoder=True))
    recorder = record_prompts(model, given, progress=progress)
    return importance_from(recorder, model_fingerprint(model), source)
