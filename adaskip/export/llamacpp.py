"""A GGUF file in llama.cpp, beside what the plan in the process makes of the same texts."""

from __future__ import annotations

import importlib.util
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import torch
from torch import Tensor

from adaskip.errors import ExportError
from adaskip.export.comparing import Found, Sample
from adaskip.export.engines import Engine, Settings

PACKAGE = "xllamacpp"
# Every log-probability of a vocabulary is asked for at so many tokens of a text; it takes a while.
N_POSITIONS = 6


def is_installed() -> bool:
    """Whether llama.cpp is to be had, as the package xllamacpp."""
    return importlib.util.find_spec(PACKAGE) is not None


def name() -> str:
    """llama.cpp with the version of its package."""
    return f"llama.cpp ({PACKAGE} {version(PACKAGE)})"


def run(path: Path, expected: Sequence[Sample], tokens: Sequence[str]) -> list[Found]:
    """What llama.cpp makes of the texts: flash attention off, keys and values in float32.

    Args:
        path: a GGUF file.
        expected: the texts.
        tokens: the vocabulary.

    Raises:
        ExportError: llama.cpp does not load the file, or stops.
    """
    longest = max(max(len(s.ids), s.prompt + len(s.answer)) for s in expected)
    with Engine(Settings("llama.cpp", path, longest + 8)) as engine:
        return [_found(engine, sample, tokens) for sample in expected]


def _found(engine: Engine, sample: Sample, tokens: Sequence[str]) -> Found:
    ids, length = sample.ids.tolist(), len(sample.ids)
    answer = engine.ask({"ids": ids[: sample.prompt], "n_new": len(sample.answer)})
    positions = sorted({length * (i + 1) // N_POSITIONS - 1 for i in range(N_POSITIONS)})
    asked = {"n_new": 1, "n_probs": len(tokens), "cache_prompt": True, "forced": tokens.index("a")}
    told = [engine.ask({"ids": ids[: at + 1], **asked})["log_probs"][0] for at in positions]
    return Found(
        positions,
        torch.stack([_row(by_id, len(tokens)) for by_id in told]),
        torch.tensor(answer["tokens"], dtype=torch.long),
    )


def _row(by_id: dict[str, float], vocab_size: int) -> Tensor:
    """Log-probabilities in the order of the vocabulary: [vocabulary], float64."""
    if len(by_id) != vocab_size:
        raise ExportError(f"llama.cpp tells {len(by_id)} log-probabilities of {vocab_size} tokens.")
    told = torch.tensor([by_id[str(i)] for i in range(vocab_size)], dtype=torch.float64)
    # Told in float32, they do not quite add up to one.
    return told.log_softmax(-1)


def kv_mebibytes(path: Path, context: int, python: str = sys.executable) -> float:
    """What llama.cpp's KV cache of so many tokens takes, in 16 bits, flash attention allowed.

    Raises:
        ExportError: llama.cpp does not load the file, or does not tell.
    """
    settings = Settings(
        "llama.cpp", path, context, python, flash_attention=True, exact=False, verbosity=4
    )
    with Engine(settings) as engine:
        engine.ask({"ids": [0], "n_new": 1})
        found = re.search(r"llama_kv_cache: size = +([\d.]+) MiB", engine.log())
    if found is None:
        raise ExportError(f"llama.cpp does not tell the size of its KV cache for {path.name}.")
    return float(found[1])
