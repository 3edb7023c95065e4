"""A tiny Llama checkpoint with a byte tokenizer, and LongBench files made for it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from adaskip.plan import Scope
from adaskip.runs.rows import Stored
from adaskip.runs.runconfig import RunConfig

N_LAYERS = 4
SPECIAL = ("<pad>", "<s>", "</s>")
TASKS = ("multifieldqa_en", "trec", "gov_report", "qasper")


def save_checkpoint(folder: Path) -> Path:
    """Saves the model, of `N_LAYERS` layers; its tokens are bytes."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {letter: index for index, letter in enumerate([*SPECIAL, *letters])}
    raw = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw,
        **dict(zip(("pad_token", "bos_token", "eos_token"), SPECIAL, strict=True)),
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=len(vocabulary),
        max_position_embeddings=1024,
        initializer_range=0.25,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def raw_row(number: int, **changes: Any) -> dict[str, Any]:
    """A row of a LongBench file, long by its own account."""
    row = {
        "_id": f"row{number}",
        "input": f"What is {number}?",
        "context": f"Number {number} is a number. " * (number + 2),
        "answers": [f"number {number}", "a number"],
        "length": 4001 + number,
        "language": "en",
        "all_classes": ["a number", "a letter"],
    }
    return row | changes


def save_data(folder: Path, n: int = 3) -> Path:
    """Saves `n` rows of each of `TASKS`."""
    folder.mkdir(exist_ok=True)
    for task in TASKS:
        lines = (json.dumps(raw_row(number)) + "\n" for number in range(n))
        (folder / f"{task}_e.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


class Workplace:
    """A checkpoint, data and a results folder, and the options that point to them."""

    def __init__(self, checkpoint: Path, data: Path, results: Path) -> None:
        self.checkpoint, self.data, self.results = checkpoint, data, results

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "model_path": str(self.checkpoint),
            "data_dir": str(self.data),
            "results_dir": str(self.results),
            "max_length": 96,
            "max_new_tokens": 6,
            "warmup": 2,
            "device": "cpu",
        }

    @property
    def options(self) -> list[str]:
        return [part for key, value in self.settings.items() for part in (f"--{key}", str(value))]

    def config(self, experiment: Scope = "prefill", **changes: Any) -> RunConfig:
        given: dict[str, Any] = {"policy": "dense", "tasks": ("multifieldqa_en",), **changes}
        return RunConfig(experiment=experiment, model_name="llama", **{**self.settings, **given})


def rows_of(folder: Path, task: str = "multifieldqa_en") -> list[dict[str, Any]]:
    """The rows a run has written."""
    lines = (folder / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def lasting(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows without what differs between two runs of the same: times and process."""
    return [{k: v for k, v in row.items() if k not in ("seconds", "session")} for row in rows]


def save_plan(place: Workplace, **changes: Any) -> Path:
    """Saves a small sweep of all three experiments, to be kept in the workplace's results."""
    settings = {
        k: v for k, v in place.settings.items() if k not in ("results_dir", "max_new_tokens")
    }
    content: dict[str, Any] = {
        "name": "small",
        "results_dir": str(place.results),
        "models": ["llama"],
        "settings": settings,
        "tasks": {
            "multifieldqa_en": {"limit": 2, "max_new_tokens": 3},
            "gov_report": {"limit": 1, "max_new_tokens": 5},
        },
        "policies": {"EE": [1, 2], "ADA": [2]},
        "experiments": {
            "prefill": ["multifieldqa_en"],
            "decode": ["gov_report"],
            "e2e": ["gov_report"],
        },
        **changes,
    }
    if "tasks" not in changes and isinstance(content["experiments"], dict):
        named = [task for tasks in content["experiments"].values() for task in tasks]
        content["tasks"] = {k: v for k, v in content["tasks"].items() if k in named}
    path = place.data / "small.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


class Named(Stored):
    """A row that holds its id alone."""

    id: str


def named(*ids: str) -> list[Named]:
    """Rows of these ids."""
    return [Named(id=name) for name in ids]
