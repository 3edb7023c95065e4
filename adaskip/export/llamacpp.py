"""A GGUF file in llama.cpp, in a process of its own: it may abort."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adaskip.errors import ExportError
from adaskip.export.comparing import Found, Sample

PACKAGE = "xllamacpp"
# Every log-probability of a vocabulary is asked for at so many tokens of a text; it takes a while.
N_POSITIONS = 6


def is_installed() -> bool:
    """Whether llama.cpp is to be had, as the package xllamacpp."""
    return importlib.util.find_spec(PACKAGE) is not None


def engine() -> str:
    """llama.cpp with the version of its package."""
    return f"llama.cpp ({PACKAGE} {version(PACKAGE)})"


@dataclass(frozen=True)
class Settings:
    """How llama.cpp runs.

    Attributes:
        context: tokens that prompt and answer may have.
        threads: of llama.cpp.
        flash_attention: whether it may be used; logits of the dense model differ with it, too.
        exact: keys and values in float32.
        python: of an environment that holds xllamacpp.
        verbosity: 4 has it tell the sizes of its buffers.
    """

    context: int
    threads: int = 1
    flash_attention: bool = False
    exact: bool = True
    python: str = sys.executable
    verbosity: int = 0


def ask(
    path: Path, requests: Sequence[dict[str, Any]], settings: Settings
) -> tuple[list[dict[str, Any]], str]:
    """What llama.cpp answers to requests, one after the other, and what it writes besides.

    Args:
        path: a GGUF file.
        requests: as `llamacpp_child` reads them.
        settings: how it runs.

    Raises:
        ExportError: llama.cpp does not load the file, or stops.
    """
    job = asdict(settings) | {"model": str(path), "requests": list(requests)}
    with tempfile.TemporaryDirectory() as work:
        answers = Path(work) / "answers.jsonl"
        child = Path(__file__).with_name("llamacpp_child.py")
        done = subprocess.run(  # noqa: S603 - our own program
            # -P: the folder of the program is no place to import from.
            [settings.python, "-P", str(child), str(answers)],
            input=json.dumps(job),
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            check=False,
        )
        if done.returncode:
            said = [line for line in done.stdout.splitlines() if line.strip()] or ["nothing"]
            raise ExportError(
                f"llama.cpp fails on {path.name} (exit status {done.returncode}): {said[-1]}"
            )
        with answers.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines], done.stdout


def kv_mebibytes(path: Path, context: int, python: str = sys.executable) -> float:
    """What llama.cpp's KV cache of so many tokens takes, in 16 bits, flash attention allowed.

    Raises:
        ExportError: llama.cpp does not load the file, or does not tell.
    """
    settings = Settings(context, flash_attention=True, exact=False, python=python, verbosity=4)
    _, log = ask(path, [{"ids": [0], "n_new": 1}], settings)
    found = re.search(r"llama_kv_cache: size = +([\d.]+) MiB", log)
    if found is None:
        raise ExportError(f"llama.cpp does not tell the size of its KV cache for {path.name}.")
    return float(found[1])


def run(path: Path, expected: Sequence[Sample], tokens: Sequence[str]) -> list[Found]:
    """What llama.cpp makes of the texts: flash attention off, keys and values in float32.

    Args:
        path: a GGUF file.
        expected: the texts.
        tokens: the vocabulary.
    """
    letter, vocab_size = tokens.index("a"), len(tokens)
    requests, places = [], []
    for sample in expected:
        length = len(sample.ids)
        positions = sorted({length * (i + 1) // N_POSITIONS - 1 for i in range(N_POSITIONS)})
        places.append(positions)
        ids = sample.ids.tolist()
        requests.append({"ids": ids[: sample.prompt], "n_new": len(sample.answer)})
        requests += [
            {
                "ids": ids[: at + 1],
                "n_new": 1,
                "n_probs": vocab_size,
                "cache_prompt": True,
                "forced": letter,
            }
            for at in positions
        ]
    longest = max(max(len(s.ids), s.prompt + len(s.answer)) for s in expected)
    answers = iter(ask(path, requests, Settings(longest + 8))[0])
    found = []
    for positions in places:
        answer = torch.tensor(next(answers)["tokens"], dtype=torch.long)
        rows = [_row(next(answers)["log_probs"][0], vocab_size) for _ in positions]
        found.append(Found(positions, torch.stack(rows), answer))
    return found


def _row(by_id: dict[str, float], vocab_size: int) -> Tensor:
    """Log-probabilities in the order of the vocabulary: [vocabulary], float64."""
    if len(by_id) != vocab_size:
        raise ExportError(f"llama.cpp tells {len(by_id)} log-probabilities of {vocab_size} tokens.")
    told = torch.tensor([by_id[str(i)] for i in range(vocab_size)], dtype=torch.float64)
    # Told in float32, they do not quite add up to one.
    return told.log_softmax(-1)
