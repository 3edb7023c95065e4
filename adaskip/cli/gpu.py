"""Everything that has to run on a GPU, part by part: the checks, then the paper's sizes timed.

Every part is a command of its own and is measured once; none is begun that would not end in time.
So a machine that is lent for minutes is enough.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import Any

from adaskip.command import FAILED, Command, say
from adaskip.errors import AdaskipError, unknown_name
from adaskip.plan import Phase
from adaskip.runs.files import read_json, writing
from adaskip.tables import markdown_table, number

# Of 32 layers: attention and FFN of every fourth; or a window, or a map of rank 64, in the place of
# three attentions of four.
_SKIP, _WINDOW, _LINEAR = PLANS = ("skip-16", "window-1024-in-24", "linear-64-in-24")
_LAYERS, _HIDDEN, _WINDOW_SIZE, _RANK = 32, 4096, 1024, 64
_EAGER = ("--policies", "EE", "ADA", "--rounds", "5")
_ALL = (*_EAGER, "--minutes", "1", "--budgets", "8", "12", "16")
_ONE = (*_EAGER, "--minutes", "0.5", "--budgets", "16")


@dataclass(frozen=True)
class _Part:
    """What is called on its own.

    Attributes:
        seconds: about what it takes on an H200, its start included.
        script: what it runs.
        options: of the script.
        plans: what it measures besides.
    """

    seconds: int
    script: str
    options: tuple[str, ...] = ()
    plans: tuple[str, ...] = ()


_CHECKS = "checks"
# What pytest is given, where it has the package. The checks are small: their processes wait for
# Python, not for the GPU.
_PYTEST = {"xdist": ("-n", "10"), "pytest_timeout": ("--timeout", "120")}
# First what there are no results of yet.
PARTS = {
    _CHECKS: _Part(150, "tests/test_cuda.py"),
    "vicuna-8k": _Part(70, "speed/run_vicuna_speed.py", ("--contexts", "8192", *_ONE)),
    # Which refuses to go beyond 8,192 tokens, the new ones included.
    "internlm-8k": _Part(60, "speed/run_internlm_speed.py", ("--contexts", "8000", *_ONE)),
    "overhead-llama-8k": _Part(
        120, "speed/overhead.py", ("--model", "llama", "--contexts", "8192")
    ),
    "compiled-llama-8k": _Part(
        250,
        "speed/compiled.py",
        ("--model", "llama", "--contexts", "8192", "--rounds", "5"),
        (_SKIP, _WINDOW),
    ),
    "llama-8k-batch-8": _Part(
        150,
        "speed/run_llama_speed.py",
        ("--contexts", "8192", "--batches", "8", *_ONE),
        (_WINDOW,),
    ),
    "llama-128k": _Part(
        230,
        "speed/run_llama_speed.py",
        ("--contexts", "131072", "--policies", "ADA", "--rounds", "1", "--budgets", "16"),
        (_WINDOW,),
    ),
    # 34 GB of keys and values beside 16 GB of weights and as many of activations.
    "compiled-llama-32k-batch-8": _Part(
        300,
        "speed/compiled.py",
        (
            "--model",
            "llama",
            "--contexts",
            "32768",
            "--batches",
            "8",
            "--rounds",
            "3",
            "--no-ideal",
        ),
        (_WINDOW,),
    ),
    "llama-8k": _Part(
        150, "speed/run_llama_speed.py", ("--contexts", "8192", *_ALL), (_WINDOW, _LINEAR)
    ),
    "llama-32k": _Part(150, "speed/run_llama_speed.py", ("--contexts", "32768", *_ONE), (_WINDOW,)),
}
# What a part becomes on a machine without a GPU, to see that it runs.
_TRIED_LAYERS = 2
_TRIED = ("--device", "cpu", "--layers", "2", "--contexts", "16", "--new_tokens", "2")


def gpu_main(argv: Sequence[str] | None = None) -> int:
    """What `speed/on_gpu.py` calls.

    Args:
        argv: the options, by default those of the command line.

    Returns:
        The exit code: 0, 1 if a part failed, ran out of time or was not begun, 2 for bad input.
    """
    return GPU.main(argv)


def _act(given: argparse.Namespace) -> int:
    for part in given.parts:
        if part not in PARTS:
            raise unknown_name("part", part, PARTS)
    if not given.try_on_cpu:
        _refuse_without_gpu()
    folder = Path(given.results_dir)
    # A folder of its own: another user's, or another size's, plans may have the same names.
    with tempfile.TemporaryDirectory() as plans:
        failed = _run_all(given, folder, Path(plans))
    # Of others the folder may have what was measured of other code.
    measured = [part for part in given.parts if part not in failed]
    say(_table(folder, measured, "try" if given.try_on_cpu else "cuda"))
    for part, reason in failed.items():
        say(f"{part}: {reason}. The same command goes on from there.")
    return FAILED if failed else 0


def _run_all(given: argparse.Namespace, folder: Path, plans: Path) -> dict[str, str]:
    """Runs the parts; what was wrong with those that did not succeed."""
    end = time.monotonic() + given.seconds
    failed = {}
    for part in given.parts:
        left, needed = end - time.monotonic(), PARTS[part].seconds
        if needed > left:
            failed[part] = (
                f"not begun: it takes about {needed} seconds, {max(left, 0):.0f} are left"
            )
            continue
        say(f"== {part}")
        command = _command(part, folder, plans, tried=given.try_on_cpu)
        reason = _run(command, min(60 * given.minutes, left))
        if reason is not None:
            failed[part] = reason
    return failed


def _options(parser: argparse.ArgumentParser) -> None:
    names = f"which parts, in this order: {', '.join(PARTS)} (default: all)"
    parser.add_argument("--parts", nargs="+", default=[*PARTS], metavar="PART", help=names)
    parser.add_argument("--minutes", type=float, default=10.0, help="limit of a part (default: 10)")
    parser.add_argument(
        "--seconds",
        type=float,
        default=math.inf,
        help="limit of all parts together; one that would not end in time is not begun, as its "
        "records have nothing before its end (default: none)",
    )
    parser.add_argument("--results_dir", default="results/speed", help="folder of the records")
    parser.add_argument(
        "--try_on_cpu", action="store_true", help="run all parts in small, to see that they run"
    )


GPU = Command(
    "The checks and timings that need a GPU, part by part.", _options, _act, "--parts checks"
)


def _refuse_without_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise AdaskipError(
            "This machine has no CUDA device; run it on one, or give --try_on_cpu to see that the "
            "parts run."
        )


def _command(part: str, folder: Path, plans: Path, *, tried: bool) -> list[str]:
    """The command line of a part."""
    script = Path(__file__).resolve().parents[2] / PARTS[part].script
    if part == _CHECKS:
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(script)]
        known = [name for name in _PYTEST if not tried and find_spec(name) is not None]
        return [*command, *chain.from_iterable(_PYTEST[name] for name in known)]
    options = PARTS[part].options
    name = f"{part}-{'try' if tried else 'cuda'}"
    command = [sys.executable, str(script), *options]
    if own := PARTS[part].plans:
        command += ["--plans", *(str(_plan(name, plans, tried=tried)) for name in own)]
    if tried:
        command += [*_TRIED, *(["--budgets", "2"] if "--budgets" in options else [])]
    return [*command, "--name", name, "--results_dir", str(folder)]


def _plan(name: str, folder: Path, *, tried: bool) -> Path:
    """The file, made there, of a plan for the paper's sizes, or of two layers if tried."""
    import torch

    from adaskip.plan import SkipPlan, Sublayer
    from adaskip.replacements import Linear, Replacement, Window

    layers = _TRIED_LAYERS if tried else _LAYERS
    chosen: dict[Sublayer, Replacement] = {}
    for layer in range(layers):
        attention = Sublayer(layer, "attn")
        if name == _SKIP and layer % 4 == 0:
            chosen |= {attention: None, Sublayer(layer, "ffn"): None}
        elif name == _WINDOW and layer % 4:
            chosen[attention] = Window(8 if tried else _WINDOW_SIZE)
        elif name == _LINEAR and layer % 4:
            sizes = (_HIDDEN, _RANK), (_RANK, _HIDDEN)
            factors = [torch.full(size, 1e-6) for size in sizes]
            chosen[attention] = Linear.of(factors, torch.zeros(_HIDDEN))
    path = folder / f"{name}.safetensors"
    with writing(path):
        SkipPlan(chosen).save(path)
    return path


def _run(command: Sequence[str], seconds: float) -> str | None:
    """Runs a part; what was wrong with it, None if nothing was."""
    try:
        done = subprocess.run(command, timeout=seconds, check=False)  # noqa: S603 - our own scripts
    except subprocess.TimeoutExpired:
        return f"ran out of its {seconds / 60:g} minutes"
    return None if done.returncode == 0 else f"ended with exit code {done.returncode}"


def _table(folder: Path, parts: Sequence[str], kind: str) -> str:
    """The records of some parts in short."""
    header = ["part", "tokens", "batch", "case", "TTFT ms", "speedup", "ms/token", "speedup"]
    rows = []
    for part in parts:
        path = folder / f"{part}-{kind}.json"
        for point in read_json(path).get("points", ()) if path.exists() else ():
            for case in point.get("cases", point.get("rows", ())):
                place = [part, str(point["context"])]
                rows.append([*place, str(point.get("batch", 1)), case["label"], *_numbers(case)])
    return markdown_table(header, rows)


def _numbers(case: dict[str, Any]) -> list[str]:
    """Milliseconds and speedup of both phases."""
    found = []
    for phase in Phase:
        timed = case.get(str(phase)) or {}
        median = timed.get("median")
        # The ratios of studies are times over a baseline's.
        ratio = (timed.get("ratio") or {}).get("median")
        speedup = (timed.get("speedup") or {}).get("median", ratio and 1 / ratio)
        found += [number(None if median is None else 1000 * median, 1), number(speedup)]
    return found
