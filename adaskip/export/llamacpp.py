"""A GGUF file in llama.cpp, in a process of its own: it may abort."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
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


def ask(
    path: Path,
    requests: Sequence[dict[str, Any]],
    *,
    context: int,
    threads: int = 1,
    flash_attention: bool = False,
    exact: bool = True,
    python: str = sys.executable,
) -> list[dict[str, Any]]:
    """What llama.cpp answers to requests, one after the other.

    Args:
        path: a GGUF file.
        requests: as `llamacpp_child` reads them.
        context: tokens that prompt and answer may have.
        threads: of llama.cpp.
        flash_attention: whether it may be used; logits of the dense model differ with it, too.
        exact: keys and values in float32.
        python: of an environment that holds xllamacpp.

    Raises:
        ExportError: llama.cpp does not load the file, or stops.
    """
    job = {
        "model": str(path),
        "context": context,
        "threads": threads,
        "flash_attention": flash_attention,
        "exact": exact,
        "requests": list(requests),
    }
    with tempfile.TemporaryDirectory() as work:
        answers = Path(work) / "answers.jsonl"
        child = Path(__file__).with_name("llamacpp_child.py")
        done = subprocess.run(  # noqa: S603 - our own program
            # -P: the folder of the program is no place to import from.
            [python, "-P", str(child), str(answers)],
            input=json.dumps(job),
            text=True,
            capture_output=True,
            check=False,
        )
        if done.returncode:
            said = [line for line in done.stderr.splitlines() if line.strip()] or ["nothing"]
            raise ExportError(
                f"llama.cpp fails on {path.name} (exit status {done.returncode}): {said[-1]}"
            )
        with answers.open(encoding="utf-8") as lines:
            return [json.loads(line) for line in lines]


def run(path: Path, expected: Sequence[Sample], vocab_size: int) -> list[Found]:
    """What llama.cpp makes of the texts: flash attention off, keys and values in float32."""
    requests, places = [], []
    for sample in expected:
        length = len(sample.ids)
        positions = sorted({length * (i + 1) // N_POSITIONS - 1 for i in range(N_POSITIONS)})
        places.append(positions)
        ids = sample.ids.tolist()
        requests.append({"ids": ids[: sample.prompt], "n_new": len(sample.answer), "n_probs": 0})
        requests += [
            {"ids": ids[: at + 1], "n_new": 1, "n_probs": vocab_size, "cache_prompt": True}
            for at in positions
        ]
    longest = max(max(len(s.ids), s.prompt + len(s.answer)) for s in expected)
    answers = iter(ask(path, requests, context=longest + 8))
    found = []
    for positions in places:
        tokens = torch.tensor(next(answers)["tokens"], dtype=torch.long)
        rows = [_row(next(answers)["log_probs"][0], vocab_size) for _ in positions]
        found.append(Found(positions, torch.stack(rows), tokens))
    return found


def _row(by_id: dict[str, float], vocab_size: int) -> Tensor:
    """Log-probabilities in the order of the vocabulary: [vocabulary], float64."""
    if len(by_id) != vocab_size:
        raise ExportError(f"llama.cpp tells {len(by_id)} log-probabilities of {vocab_size} tokens.")
    told = torch.tensor([by_id[str(i)] for i in range(vocab_size)], dtype=torch.float64)
    # Told in float32, they do not quite add up to one.
    return told.log_softmax(-1)
