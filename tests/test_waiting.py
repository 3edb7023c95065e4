"""Commands let OpenMP's threads spin only briefly; the library leaves the environment alone."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from adaskip.errors import RunError
from adaskip.speedtest.waiting_check import SETTINGS, neighbours, request, serving

FOLDERS = ("prefill", "decode", "e2e", "speed", "observations", "eval")
SCRIPTS = sorted(str(p.relative_to(ROOT)) for f in FOLDERS for p in (ROOT / f).glob("*.py"))
# The scripts of models are one text but for their names (tests/test_cli.py); those of one start.
EXPERIMENTS = ("prefill", "decode", "e2e")
STARTED = [p for p in SCRIPTS if p.split("/")[0] not in EXPERIMENTS or p.endswith("_llama.py")]
SWEEP = "-m adaskip.sweep configs/demo.yaml"
EXPORT = "-m adaskip.export model"
COMMANDS = [*STARTED, SWEEP, EXPORT, "-m adaskip chat --model smollm2"]
OPTIONS = {folder: ["--model", "smollm2"] for folder in ("observations", "eval")}
# Stands in for torch: tells how threads were to wait when it was loaded, and ends the process.
FAKE_TORCH = """
import os
print(os.environ.get("OMP_WAIT_POLICY"), os.environ.get("GOMP_SPINCOUNT"), flush=True)
os._exit(0)
"""
SLOW = ("transformers", "pandas")


def start(
    *command: str, path: Path | None = None, **settings: str
) -> subprocess.CompletedProcess[str]:
    """Runs Python with nothing but `settings` said about waiting."""
    own = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    own |= {"PYTHONPATH": str(path or ROOT), **settings}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=own, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    # What else takes seconds to load stands aside, too: torch is the first thing that it loads.
    for name, text in {"torch": FAKE_TORCH, **dict.fromkeys(SLOW, "import torch")}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(text)
    return tmp_path


def test_every_command_of_the_package_is_looked_at() -> None:
    started = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in ROOT.glob("adaskip/**/*.py")
        if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
    ]
    # The engine's child program never loads torch: it is all that a GGUF file needs.
    expected = ["__main__", "export.__main__", "export.engine_child", "sweep"]
    assert sorted(started) == [f"adaskip.{name}" for name in expected]
    assert {path.split("/")[0] for path in SCRIPTS} == set(FOLDERS)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_says_it_before_torch_is_loaded(fake: Path, command: str) -> None:
    options = OPTIONS.get(command.split("/")[0], [])
    done = start(*command.split(), *options, path=fake)
    assert (done.stdout, done.stderr) == ("None 1000\n", "")


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE None"),
        ({"GOMP_SPINCOUNT": "77"}, "None 77"),
        ({"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "77"}, "ACTIVE 77"),
    ],
)
def test_the_users_own_setting_wins(fake: Path, settings: dict[str, str], expected: str) -> None:
    for command in ("prefill/run_llama.py", SWEEP):
        assert start(*command.split(), path=fake, **settings).stdout == f"{expected}\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="GNU's OpenMP")
def test_the_real_torch_takes_it() -> None:
    code = "from adaskip.waiting import wait_briefly; wait_briefly(); import torch"
    told = start("-c", code, OMP_DISPLAY_ENV="VERBOSE").stderr
    if "GOMP_SPINCOUNT" not in told:
        pytest.skip("this torch brings another OpenMP")
    assert "GOMP_SPINCOUNT = '1000'" in told


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("default", "None None"),
        ("passive", "PASSIVE None"),
        ("1,000 spins", "None 1000"),
        ("30,000 spins", "None 30000"),
    ],
)
def test_what_is_compared_waits_as_it_says(
    fake: Path, monkeypatch: pytest.MonkeyPatch, name: str, expected: str
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    monkeypatch.setenv("PYTHONPATH", str(fake))
    with serving(SETTINGS[name], "{}") as process:
        assert process.stdout is not None
        assert process.stdout.readline() == f"{expected}\n"
        process.wait(timeout=60)
        with pytest.raises(RunError, match="has ended"):
            request(process)


# Names come when they are asked for, one by one, and then all at once.
LAZY = """
import os, pickle, sys
before = dict(os.environ)
import adaskip
assert "torch" not in sys.modules
assert set(adaskip.__all__) <= set(dir(adaskip))
from adaskip import errors, AdaskipError
assert AdaskipError is adaskip.AdaskipError is errors.AdaskipError
assert "torch" not in sys.modules
assert pickle.loads(pickle.dumps(adaskip.SkipPlan)) is adaskip.SkipPlan
assert "AdaSkip" not in vars(adaskip)
from adaskip import *
assert AdaSkip is adaskip.AdaSkip is vars(adaskip)["AdaSkip"]
for name in adaskip.__all__:
    assert globals()[name] is getattr(adaskip, name), name
from pathlib import Path
folder = Path(adaskip.__file__).parent
assert not {path.stem for path in folder.iterdir()} & set(adaskip.__all__)
assert dict(os.environ) == before
assert adaskip.metrics is sys.modules["adaskip.metrics"]
try:
    adaskip.AdaSkipp
except AttributeError as error:
    print(error)
"""


def test_the_library_loads_what_is_asked_for_and_sets_nothing() -> None:
    done = start("-c", LAZY)
    assert done.stderr == ""
    assert done.stdout == "module 'adaskip' has no attribute 'AdaSkipp'\n"


# What loads long is loaded once; each module is the first of the package in its own process.
FIRST = """
import importlib, os, sys
import torch, transformers.modeling_utils
for name in sys.argv[1:]:
    if os.fork() == 0:
        importlib.import_module(name)
        os._exit(0)
    if os.wait()[1]:
        print(name)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked")
def test_any_module_can_be_the_first_to_be_imported() -> None:
    modules = ["adaskip.session", "adaskip.policies.ada_skip", "adaskip.speedtest.overhead"]
    done = start("-c", FIRST, *modules)
    assert (done.stdout, done.stderr) == ("", "")


# Says which process its neighbour is, and ends without a chance to end that.
_KILLED = """
import os, signal, subprocess
from adaskip.speedtest import waiting_check
stock = subprocess.Popen
def told(*given, **options):
    process = stock(*given, **options)
    print(process.pid, flush=True)
    return process
subprocess.Popen = told
with waiting_check.neighbours(1):
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_neighbours_do_not_outlive_a_command_that_is_killed() -> None:
    with neighbours(1):
        pass
    number = int(start("-c", _KILLED).stdout)
    end = time.monotonic() + 20
    while _lives(number) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _lives(number)


def _lives(number: int) -> bool:
    """Whether a process computes; one that has ended may still be listed."""
    try:
        return Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False
