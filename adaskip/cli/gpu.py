"""Everything that has to run on a GPU, part by part: the checks, then the paper's sizes timed.

Every part is a command of its own, stays under its time, and goes on where it was when it is called
again; so a machine that is lent for minutes is enough.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adaskip.command import FAILED, Command, say
from adaskip.errors import AdaskipError, unknown_name
from adaskip.plan import Phase
from adaskip.tables import markdown_table, number

_CASES = ("--policies", "EE", "ADA", "--budgets", "8", "12", "16", "--compiled", "--minutes", "6")
_SPEED = {
    "llama-8k": ("llama", "--contexts", "8192", "--batches", "1", "8"),
    "llama-32k": ("llama", "--contexts", "32768"),
    "llama-128k": ("llama", "--contexts", "131072"),
    "vicuna-8k": ("vicuna", "--contexts", "8192", "--batches", "1", "8"),
    "internlm-8k": ("internlm", "--contexts", "8192", "--batches", "1", "8"),
}
_CHECKS, _OVERHEAD = "checks", "overhead"
PARTS = (_CHECKS, *_SPEED, _OVERHEAD)
# What a part becomes on a machine without a GPU, to see that it runs.
_TRIED = ("--device", "cpu", "--layers", "2", "--contexts", "16", "--new_tokens", "2")


def gpu_main(argv: Sequence[str] | None = None) -> int:
    """What `speed/on_gpu.py` calls.

    Args:
        argv: the options, by default those of the command line.

    Returns:
        The exit code: 0, 1 if a part failed or ran out of time, 2 for bad input.
    """
    return GPU.main(argv)


def _act(given: argparse.Namespace) -> int:
    for part in given.parts:
        if part not in PARTS:
            raise unknown_name("part", part, PARTS)
    if not given.try_on_cpu:
        _refuse_without_gpu()
    folder = Path(given.results_dir)
    failed = {}
    for part in given.parts:
        say(f"== {part}")
        reason = _run(_command(part, folder, tried=given.try_on_cpu), 60 * given.minutes)
        if reason is not None:
            failed[part] = reason
    say(_table(folder, "try" if given.try_on_cpu else "cuda"))
    for part, reason in failed.items():
        say(f"{part}: {reason}. The same command goes on from there.")
    return FAILED if failed else 0


def _options(parser: argparse.ArgumentParser) -> None:
    names = f"which parts, in this order: {', '.join(PARTS)} (default: all)"
    parser.add_argument("--parts", nargs="+", default=[*PARTS], metavar="PART", help=names)
    parser.add_argument("--minutes", type=float, default=10.0, help="limit of a part (default: 10)")
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


def _command(part: str, folder: Path, *, tried: bool) -> list[str]:
    """The command line of a part."""
    root = Path(__file__).resolve().parents[2]
    if part == _CHECKS:
        return [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(root / "tests")]
    kept = ["--results_dir", str(folder)]
    small = [*_TRIED, "--rounds", "1"] if tried else []
    kind = "try" if tried else "cuda"
    if part == _OVERHEAD:
        options = ["--model", "llama", "--contexts", "8192", "--name", f"overhead-llama-{kind}"]
        return [sys.executable, str(root / "speed/overhead.py"), *options, *small, *kept]
    model, *options = _SPEED[part]
    script = str(root / f"speed/run_{model}_speed.py")
    cases = [option for option in _CASES if not (tried and option == "--compiled")]
    if tried:
        cases = [*cases[: cases.index("--budgets")], "--budgets", "2", "--minutes", "0.1"]
    name = ["--name", f"{model}-{kind}"]
    return [sys.executable, script, *options, *cases, *name, *small, *kept]


def _run(command: Sequence[str], seconds: float) -> str | None:
    """Runs a part; what was wrong with it, None if nothing was."""
    try:
        done = subprocess.run(command, timeout=seconds, check=False)  # noqa: S603 - our own scripts
    except subprocess.TimeoutExpired:
        return f"ran out of its {seconds / 60:g} minutes"
    # 5: no test was collected, 0: all that were collected passed or were skipped.
    return None if done.returncode in (0, 5) else f"ended with exit code {done.returncode}"


def _table(folder: Path, kind: str) -> str:
    """All speed records of this kind in short."""
    header = ["model", "tokens", "batch", "case", "TTFT ms", "speedup", "ms/token", "speedup"]
    rows = []
    for path in sorted(folder.glob(f"*-{kind}.json")):
        record = json.loads(path.read_text(encoding="utf-8"))
        for point in record["points"]:
            for case in point.get("cases", ()):
                place = [path.stem.rpartition("-")[0], str(point["context"]), str(point["batch"])]
                rows.append([*place, case["label"], *_numbers(case)])
    return markdown_table(header, rows)


def _numbers(case: dict[str, Any]) -> list[str]:
    """Milliseconds and speedup of both phases."""
    found = []
    for phase in Phase:
        timed = case.get(str(phase)) or {}
        median, speedup = timed.get("median"), (timed.get("speedup") or {}).get("median")
        found += [number(None if median is None else 1000 * median, 1), number(speedup)]
    return found
