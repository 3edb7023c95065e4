"""The entry for a GPU: its parts are commands that exist, and what it says without one."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from conftest import ROOT

from adaskip.cli import gpu
from adaskip.cli.gpu import PARTS, gpu_main
from adaskip.cli.speed import with_options
from adaskip.plan import SkipPlan
from adaskip.speedtest.benchmark import SpeedTest
from adaskip.speedtest.compiled import CompiledDecoding
from adaskip.speedtest.measurement import Measurement
from adaskip.speedtest.overhead import Overhead


@pytest.fixture
def commands(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[list[str]]:
    """The commands that would have run, and their plans stay; those of Vicuna fail."""
    plans = tmp_path / "plans"
    monkeypatch.setattr(gpu.tempfile, "TemporaryDirectory", lambda: nullcontext(plans))
    ran: list[list[str]] = []

    def run(command: Sequence[str], seconds: float) -> str | None:
        assert seconds == 600
        ran.append([*command])
        return "ended with exit code 1" if "run_vicuna" in command[1] else None

    monkeypatch.setattr(gpu, "_run", run)
    return ran


@pytest.mark.parametrize("tried", [False, True])
def test_every_part_is_a_command_with_options_it_knows(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tried: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: not tried)
    options = ["--results_dir", str(tmp_path), *(["--try_on_cpu"] if tried else [])]
    assert gpu_main(options) == 1
    assert len(commands) == len(PARTS)
    checks = ["-m", "pytest", "-q", "-m", "gpu", str(ROOT / "tests/test_cuda.py")]
    assert commands[0][1:] == [*checks, *([] if tried else ["-n", "10", "--timeout", "120"])]
    for _, script, *given in commands[1:]:
        assert Path(script).is_file()
        name = Path(script).stem
        study: dict[str, Measurement] = {"overhead": Overhead(), "compiled": CompiledDecoding()}
        made = with_options(study.get(name) or SpeedTest(model_name=name.split("_")[1]), given)
        made.check()
        for plan in getattr(made, "plans", ()):
            SkipPlan.load(plan).check(2 if tried else 32)
        assert made.results_dir == str(tmp_path)
        assert made.name.endswith("try" if tried else "cuda")
        assert (made.layers == 2) == tried


def test_checks_run_on_pytest_alone(
    commands: list[list[str]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(gpu, "find_spec", lambda name: None)
    assert gpu_main(["--results_dir", str(tmp_path), "--parts", "checks"]) == 0
    assert commands[0][-1] == str(ROOT / "tests/test_cuda.py")


def test_a_part_that_would_not_end_in_time_is_not_begun(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now, limits = [1000.0], []

    def run(command: Sequence[str], seconds: float) -> None:
        limits.append(seconds)
        now[0] += 75

    monkeypatch.setattr(gpu, "_run", run)
    monkeypatch.setattr(gpu.time, "monotonic", lambda: now[0])
    parts = ["vicuna-8k", "llama-8k", "internlm-8k", "overhead-llama-8k"]
    options = ["--try_on_cpu", "--results_dir", str(tmp_path), "--seconds", "190", "--parts"]
    assert gpu_main([*options, *parts]) == 1
    assert limits == [190, 115]
    printed = capsys.readouterr().out
    assert "llama-8k: not begun: it takes about 150 seconds, 115 are left. The same" in printed
    assert "overhead-llama-8k: not begun: it takes about 120 seconds, 40 are left." in printed


@pytest.mark.parametrize("code", [0, 1, 5])
def test_checks_of_which_none_is_found_are_no_success(code: int) -> None:
    reason = gpu._run([sys.executable, "-c", f"raise SystemExit({code})"], 60)
    assert reason == (f"ended with exit code {code}" if code else None)


def test_what_was_measured_is_printed_in_short(
    commands: list[list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    phase = {"median": 0.5, "speedup": {"median": 1.25}}
    case = {"label": "ADA 8", "prefill": phase, "decode": None}
    points = [
        {"context": 16, "batch": 1, "cases": [case]},
        {"context": 32, "batch": 8, "error": "out of memory", "cases": []},
    ]
    # What is there of parts that failed, or were not asked for, was not measured now.
    for part in ("vicuna-8k", "llama-8k", "llama-32k"):
        path = tmp_path / f"{part}-try.json"
        path.write_text(json.dumps({"schema": 1, "points": points}))
    options = ["--try_on_cpu", "--results_dir", str(tmp_path), "--parts", "vicuna-8k", "llama-8k"]
    assert gpu_main(options) == 1
    printed = capsys.readouterr().out
    assert (
        "| llama-8k |     16 |     1 | ADA 8 |   500.0 |    1.25 |        – |       – |" in printed
    )
    assert printed.count("ADA 8") == 1
    assert "vicuna-8k: ended with exit code 1. The same command goes on from there." in printed


def test_without_a_gpu_it_says_so(
    commands: list[list[str]], capsys: pytest.CaptureFixture[str]
) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    assert gpu_main([]) == 2
    assert "no CUDA device" in capsys.readouterr().err
    assert gpu_main(["--parts", "llama-9k"]) == 2
    assert "Did you mean 'llama-8k'" in capsys.readouterr().err
    assert commands == []
