"""Two processes of one command: the same files as from one, nothing twice, nothing missing."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from run_fixtures import (
    Named,
    Workplace,
    lasting,
    named,
    rows_of,
    save_checkpoint,
    save_data,
    save_plan,
)

from adaskip.cli.leaderboard import leaderboard_main
from adaskip.cli.observe import observation_main
from adaskip.cli.perplexity import perplexity_main
from adaskip.cli.plan import plan_main
from adaskip.cli.run import run_main
from adaskip.errors import RunError
from adaskip.export.command_line import EXPORT
from adaskip.models.devices import resolve_device
from adaskip.models.processes import Team, team
from adaskip.runs.store import Share, Store

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture
def place(checkpoint: Path, tmp_path: Path) -> Workplace:
    return Workplace(checkpoint, save_data(tmp_path / "data", 7), tmp_path / "results")


def accelerate() -> list[str]:
    """`accelerate launch`; without a GPU only `--multi_gpu` makes it start several processes."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    return [
        *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *("--main_process_port", str(port)),
    ]


def launch(launcher: list[str], command: list[str]) -> subprocess.CompletedProcess[str]:
    # A model that is split takes all devices there are.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *launcher, *command],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=100,
        env=environment,
    )


def test_two_processes_leave_the_files_of_one(place: Workplace) -> None:
    options = ["--policy", "ADA", "--skip_sub_layer_num", "2", "--batch_size", "2"]
    options += [*place.options, "--tasks", "multifieldqa_en", "gov_report"]
    done = launch(TORCHRUN, ["e2e/run_llama.py", *options])
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("is complete") == 1
    assert run_main("e2e", "llama", [*options, "--name", "single"]) == 0
    two, one = place.results / "llama-ADA-E2E-SKIP-2", place.results / "single-SKIP-2"
    for task in ("multifieldqa_en", "gov_report"):
        rows = rows_of(two, task)
        assert lasting(rows) == lasting(rows_of(one, task))
        # One command is one session, whichever process made the row.
        record = json.loads((two / "run.json").read_text())
        assert {row["session"] for row in rows} == {record["sessions"][0]["id"]}
        assert len(rows) == 7
    assert not list(two.glob("*.shard*"))
    assert len(list((place.results / "importance").iterdir())) == 1


def test_a_sweep_of_two_processes_goes_on_after_a_failure(place: Workplace) -> None:
    file = save_plan(place, policies={"EE": [1, 9]}, perplexity={"rows": 1, "max_tokens": 4})
    command = ["-m", "adaskip.sweep", str(file)]
    done = launch([*TORCHRUN, *command], [])
    assert done.returncode == 1
    report = json.loads((place.results / "report.json").read_text())
    assert len(report["failures"]) == 3
    assert all("EarlyExit cannot skip 9" in text for text in report["failures"].values())
    lines = [[line["policy"] for line in table["lines"]] for table in report["tables"]]
    assert lines == [["dense", "EE"]] * 3
    assert done.stdout.count("Took") == 1
    assert (place.results / "report.html").is_file()


def make_figures(checkpoint: str, data: str, results: str) -> int:
    """Commands whose figures several processes make together, one after the other."""
    options = ["--model", "llama", "--limit", "3", "--tasks", "multifieldqa_en", "--device", "cpu"]
    options += ["--model_path", checkpoint, "--data_dir", data, "--results_dir", results]
    options += ["--max_length", "96"]
    skipped = ["--policy", "ADA", "--skip_sub_layer_num", "2"]
    return max(
        observation_main("ob1", options),
        observation_main("ob0", [*options, "--scores"]),
        perplexity_main([*options, *skipped, "--warmup", "2", "--warmup_task", "qasper"]),
    )


def test_figures_of_two_processes_are_those_of_one(
    place: Workplace, capsys: pytest.CaptureFixture[str]
) -> None:
    given = [str(place.checkpoint), str(place.data)]
    done = launch([*TORCHRUN, __file__], [*given, str(place.results)])
    assert done.returncode == 0, done.stderr[-3000:]
    assert not list(place.results.rglob("*.part*"))
    single = place.results / "single"
    assert make_figures(*given, str(single)) == 0
    said = capsys.readouterr().out
    assert said.count("Written: ") == 3
    assert done.stdout == said.replace(str(single), str(place.results))


def test_split_models_answer_as_a_whole_one(place: Workplace) -> None:
    options = ["--policy", "ADA", "--skip_sub_layer_num", "3"]
    options += [*place.options, "--tasks", "gov_report"]
    done = launch(TORCHRUN, ["e2e/run_llama.py", *options, "--tp_plan", "auto"])
    assert done.returncode == 0, done.stderr[-3000:]
    # Accelerate loads it; tests/test_engines.py and test_cuda.py have models that it has split.
    one_device = ["--device_map", "auto", "--device", resolve_device().type, "--name", "mapped"]
    assert run_main("e2e", "llama", [*options, *one_device]) == 0
    assert run_main("e2e", "llama", [*options, "--name", "whole"]) == 0
    names = ("llama-ADA-E2E-SKIP-3", "mapped-SKIP-3", "whole-SKIP-3")
    split, mapped, whole = (lasting(rows_of(place.results / n, "gov_report")) for n in names)
    assert split == mapped == whole


# What a model split over the processes does: the group of all is held until the very end.
HOLDING = """
import atexit, contextlib, os, sys, time
from pathlib import Path

def gloo():
    found = 0
    for task in Path("/proc/self/task").iterdir():
        # One that has ended by now has no name any more.
        with contextlib.suppress(OSError):
            found += "gloo" in (task / "comm").read_text()
    return found

def told():
    # A thread that was joined stands in /proc a moment longer.
    until = time.monotonic() + 10
    while 2 * gloo() != before and time.monotonic() < until:
        time.sleep(0.01)
    os.write(1, f"{before} {gloo()}\\n".encode())

# Registered before the processes are connected, so called after they have left.
atexit.register(told)
from adaskip.errors import RunError
from adaskip.models.processes import Team, team
assert team().gather(team().rank) == [0, 1]
assert team().on_main(lambda: [team().rank]) == [0]

def refuse():
    raise RunError("another process works on it")

try:
    team().on_main(refuse)
except RunError as error:
    main = "" if team().rank == 0 else "The main process failed: "
    assert str(error) == main + "another process works on it", error
else:
    raise AssertionError("nobody was told")
held, before = sys.modules["torch"].distributed.group.WORLD, gloo()
"""


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads are counted by /proc")
@pytest.mark.parametrize(
    "launcher",
    [[*TORCHRUN, "--no-python"], [*accelerate(), "--no_python"]],
    ids=["torchrun", "accelerate"],
)
def test_processes_tell_each_other_and_their_threads_end_before_the_interpreter_does(
    launcher: list[str],
) -> None:
    # One that lets go of a message while the interpreter ends aborts the process.
    done = launch([*launcher, sys.executable, "-c", HOLDING], [])
    assert done.returncode == 0, done.stderr[-3000:]
    for line in done.stdout.splitlines():
        before, after = map(int, line.split())
        # Half of the threads serve messages, and half the group that is held.
        assert before == 2 * after > 0
    assert len(done.stdout.splitlines()) == 2


class Threads:
    """Two threads in the place of two processes, with what `Team` asks of torch.distributed."""

    def __init__(self) -> None:
        self.rank = threading.local()
        self.told: dict[int, list[Any]] = {}
        # A forward of a split model is waited for, as a message is.
        self.forward, self.messages = threading.Barrier(2), threading.Barrier(2)

    def broadcast_object_list(self, told: list[Any], src: int, group: object) -> None:
        self.told[self.rank.number] = told
        self.messages.wait(5)
        told[:] = self.told[src]
        self.messages.wait(5)

    def all_gather_object(self, told: list[Any], value: object, group: object) -> None:
        self.told[self.rank.number] = [value]
        self.messages.wait(5)
        told[:] = [self.told[rank][0] for rank in (0, 1)]
        self.messages.wait(5)


def test_no_part_of_a_split_model_waits_for_a_main_process_that_cannot_write(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads, failed = Threads(), {}
    monkeypatch.setattr("adaskip.models.processes._distributed", lambda: threads)
    monkeypatch.setattr("adaskip.models.processes._messages", lambda: None)
    monkeypatch.setattr("adaskip.runs.store.team", lambda: Team(threads.rank.number, 2))
    store = Store(tmp_path / "a.jsonl", Named)

    def full(self: object, rows: object) -> None:
        raise RunError("the disk is full")

    monkeypatch.setattr(Store, "append", full)

    def work(share: Share[Named]) -> None:
        for row in named("1", "2"):
            threads.forward.wait(5)
            share.append([row])

    def process(rank: int) -> None:
        threads.rank.number = rank
        try:
            store.make(["1", "2"], work, same=True)
        except Exception as error:
            failed[rank] = str(error)

    running = [threading.Thread(target=process, args=(rank,)) for rank in (0, 1)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    sentence = "the disk is full"
    assert failed == {0: sentence, 1: f"The main process failed: {sentence}"}


def test_shards_are_merged_once_and_in_order(tmp_path: Path) -> None:
    order = [str(n) for n in range(6)]
    store = Store(tmp_path / "a.jsonl", Named)
    store.append(named("0", "3"))
    store.shard(0).append(named("1", "4"))
    store.shard(1).append([*named("2"), Named.from_dict({"id": "3", "other": True})])
    with store.shard(1).path.open("ab") as file:
        file.write(b'{"id": "5"')  # torn by a kill
    assert store.merge(order) == store.rows() == named(*order[:5])
    assert [item.name for item in tmp_path.iterdir()] == ["a.jsonl"]
    before = store.path.stat().st_mtime_ns
    store.merge(order)
    assert store.path.stat().st_mtime_ns == before


def test_shards_of_earlier_versions_are_merged_too(tmp_path: Path) -> None:
    store = Store(tmp_path / "a.jsonl", Named)
    (tmp_path / "a.jsonl.part0").write_text('{"id": "1"}\n')
    assert store.merge() == named("1")
    assert [item.name for item in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    "main",
    [
        leaderboard_main,
        partial(plan_main, ["--model", "smollm2"]),
        partial(EXPORT.main, ["--model", "smollm2", "out"]),
    ],
)
def test_what_one_process_does_is_refused_in_several(
    main: Callable[..., int], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("adaskip.models.processes.team", lambda: Team(0, 2))
    monkeypatch.setattr(sys, "argv", ["leaderboard.py"])
    assert main() == 2
    assert "start it in one process, without torchrun" in capsys.readouterr().err


def test_a_launcher_with_half_an_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MASTER_ADDR", "MASTER_PORT", "RANK"):
        monkeypatch.delenv(name, raising=False)
    for world in ("two", "2"):
        monkeypatch.setenv("WORLD_SIZE", world)
        team.cache_clear()
        with pytest.raises(RunError, match="cannot be connected"):
            team()
    monkeypatch.undo()
    team.cache_clear()
    assert team().world == 1


if __name__ == "__main__":
    sys.exit(make_figures(*sys.argv[1:]))
