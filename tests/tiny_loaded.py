"""A model of four layers with a tokenizer of characters and rows made here, as a `LoadedModel`."""

from __future__ import annotations

import string

from conftest import tiny_model
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typing_extensions import override

from adaskip.models.spec import ModelSpec
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.runconfig import RunConfig
from adaskip.tasks.prompts import Prompt
from adaskip.tasks.spec import Row

CHARACTERS = string.ascii_letters + string.digits + " \n.,:?"


def character_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, ids 3 and up."""
    pad, unknown = "<pad>", "<unk>"
    vocabulary = {pad: 0, "<s>": 1, unknown: 2} | {c: 3 + i for i, c in enumerate(CHARACTERS)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=unknown))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=pad)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """One token per run of letters or digits and per punctuation mark."""
    unknown = "<unk>"
    core = Tokenizer(models.WordLevel({unknown: 0}, unknown))
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token=unknown)


def as_prompt(text: str, tokenizer: PreTrainedTokenizerFast) -> Prompt:
    ids = list(tokenizer(text)["input_ids"])
    return Prompt(text, ids, len(ids), len(ids), False)


def tiny_rows(task: str, n: int) -> list[Row]:
    answers = ("the second answer is longer.", "yes", "it is so: no")
    return [
        Row(
            id=f"{task}-{i}",
            task=task,
            input=f"What is {i}?",
            context=f"{i} is a number, and so is {7 * i + 3}.",
            answers=(answers[i % 3],),
            length=9,
            language="en",
            all_classes=("Yes", "No") if task == "sample_classification" else None,
        )
        for i in range(n)
    ]


class TinyLoaded(LoadedModel):
    """A loaded of a random model of four layers and rows made here."""

    @override
    def rows(self, config: RunConfig, task: str) -> list[Row]:
        return tiny_rows(task, config.limit or 4)

    @classmethod
    def make(cls) -> TinyLoaded:
        spec = ModelSpec("smollm2", None, 200)
        return cls(spec, tiny_model("llama"), character_tokenizer(), ())
