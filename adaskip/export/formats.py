"""The two formats: each writes a checkpoint and has it run by the engines that read it."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from adaskip.errors import AdaskipError
from adaskip.export import comparing, gguf_file, gguf_reading, gguf_tokenizer, hf, llamacpp
from adaskip.export.comparing import Found, Sample
from adaskip.export.llama_form import LlamaForm
from adaskip.export.refusing import check_tokenizer
from adaskip.export.report import Written
from adaskip.export.surviving import Surviving
from adaskip.models.internlm import position_limit
from adaskip.models.loading import load_model

TORCH_DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


class Kind(ABC):
    """One format. Making it refuses what it cannot hold.

    Args:
        model: where the weights come from.
        tokenizer: written with them; None writes none.
        left: what the plan leaves.
        dtype: of the weights, by its short name.
        tokenizer_gguf: a GGUF file whose tokenizer is copied.

    Raises:
        AdaskipError: the format cannot hold it.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None,
        left: Surviving,
        dtype: str,
        tokenizer_gguf: str | os.PathLike[str] | None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.left = left
        self.dtype = dtype
        self.tokenizer_gguf = tokenizer_gguf
        self.check()

    @abstractmethod
    def check(self) -> None:
        """Refuses what the format cannot hold."""

    @abstractmethod
    def write(self, folder: Path, about: Mapping[str, Any]) -> Written:
        """Writes into an existing folder."""

    @abstractmethod
    def run(self, folder: Path, expected: Sequence[Sample]) -> Iterator[tuple[str, list[Found]]]:
        """What each engine at hand makes of the texts."""


class HfKind(Kind):
    """A folder for transformers."""

    def check(self) -> None:
        """Refuses a GGUF file as the source of a tokenizer."""
        check_tokenizer("hf", self.tokenizer_gguf)

    def write(self, folder: Path, about: Mapping[str, Any]) -> Written:
        """Weights, configuration, modelling file, tokenizer."""
        written = hf.write(self.model, self.left, folder, TORCH_DTYPES[self.dtype], about)
        if self.tokenizer is not None:
            self.tokenizer.save_pretrained(folder)
        return replace(written, engines=self._engines(written.engines))

    def _engines(self, engines: Mapping[str, str]) -> dict[str, str]:
        """What loads the folder, and how far it goes there: InternLM's lengths and tokenizer."""
        only = ""
        if (limit := position_limit(self.model.config)) is not None:
            # Only the model that adaskip loads refuses more.
            only += f"; exact up to {limit} tokens"
        kind = type(self.tokenizer)
        if kind.__module__.startswith("adaskip."):
            # Of the same files, transformers makes another tokenizer, or none.
            only += f"; with token ids only, for its {kind.__name__} is adaskip.load_tokenizer's"
        return {
            name: said if said.startswith("no: ") else f"{said}{only}"
            for name, said in engines.items()
        }

    def run(self, folder: Path, expected: Sequence[Sample]) -> Iterator[tuple[str, list[Found]]]:
        """Loaded back in the model's own precision, as transformers would run its code."""
        loaded = load_model(folder, dtype=self.model.dtype, device=self.model.device)
        yield _transformers(), comparing.run(loaded, self.model, expected)


class GgufKind(Kind):
    """A file for llama.cpp."""

    def check(self) -> None:
        """Refuses what GGUF or llama.cpp cannot hold, the tokenizer included."""
        gguf_file.gguf_package()
        gguf_file.check_rows(LlamaForm(self.model, self.left), self.dtype)
        vocab_size: int = self.model.config.vocab_size
        if self.tokenizer_gguf is not None:
            self.fields = gguf_tokenizer.from_gguf(
                Path(self.tokenizer_gguf), vocab_size, self.tokenizer
            )
        elif self.tokenizer is not None:
            self.fields = gguf_tokenizer.from_tokenizer(self.tokenizer, vocab_size)
        else:
            raise AdaskipError("Format 'gguf' needs a tokenizer: give the model's own.")

    def write(self, folder: Path, about: Mapping[str, Any]) -> Written:
        """One file, the tokenizer in it."""
        return gguf_file.write(self.model, self.left, folder, self.dtype, about, self.fields)

    def run(self, folder: Path, expected: Sequence[Sample]) -> Iterator[tuple[str, list[Found]]]:
        """Its numbers read back into a model of ours; and llama.cpp, if it is installed."""
        path = folder / gguf_file.NAME
        loaded = gguf_reading.read(path, self.model)
        yield f"{_transformers()}, read back", comparing.run(loaded, self.model, expected)
        if llamacpp.is_installed():
            tokens = self.fields["tokenizer.ggml.tokens"][0]
            yield llamacpp.name(), llamacpp.run(path, expected, tokens)


KINDS: dict[str, type[Kind]] = {"hf": HfKind, "gguf": GgufKind}


def _transformers() -> str:
    return f"transformers {transformers.__version__}"
