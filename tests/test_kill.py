"""Nothing is lost: killed at random points, at every write, by a full disk, by Ctrl-C."""

from __future__ import annotations

import errno
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from run_fixtures import Named, Workplace, lasting, named, rows_of, save_checkpoint, save_data

from adaskip.cli.run import run_main
from adaskip.runs.ledger import task_rows
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.runner import resolve, run
from adaskip.runs.store import Store

ROOT = Path(__file__).resolve().parents[1]
N_ROWS = 12
SCRIPT = ROOT / "tests" / "kill_worker.py"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("kill")
    checkpoint = save_checkpoint(folder / "model")
    return Workplace(checkpoint, save_data(folder / "data", N_ROWS), folder / "results")


class Nursery:
    """Starts runs as processes that can be killed."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(SCRIPT), json.dumps(settings)],
            cwd=ROOT,
            env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, results: Path, kill_after: float | None = None) -> int:
        """The exit code of one run, killed after some seconds if it still runs."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([str(results), kill_after]) + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())


@pytest.fixture(scope="module")
def nursery(place: Workplace) -> Iterator[Nursery]:
    config = place.config("e2e", policy="ADA", skip_sub_layer_num=2, batch_size=2)
    started = Nursery({k: v for k, v in config.as_dict().items() if k != "results_dir"})
    yield started
    started.process.kill()
    started.process.wait()


def test_a_run_killed_at_random_points_ends_as_one_never_stopped(
    nursery: Nursery, tmp_path: Path
) -> None:
    n_kills = 10
    name = "llama-ADA-E2E-SKIP-2"
    assert nursery.run(tmp_path / "whole") == 0
    start = time.monotonic()
    assert nursery.run(tmp_path / "again") == 0
    length = time.monotonic() - start
    whole = lasting(rows_of(tmp_path / "whole" / name))
    assert lasting(rows_of(tmp_path / "again" / name)) == whole
    assert len(whole) == N_ROWS

    generator = random.Random(n_kills)
    kills, seen = 0, []
    # On a busy machine it may take more of them until one falls between two rows.
    while kills < n_kills or (kills < 5 * n_kills and len({0, N_ROWS, *seen}) <= 2):
        results = tmp_path / str(kills)
        code = None
        while code != 0 and kills < 5 * n_kills:
            code = nursery.run(results, kill_after=generator.uniform(0, length))
            assert code in (0, -signal.SIGKILL)
            kills += code != 0
            path = results / name / "multifieldqa_en.jsonl"
            seen.append(len(task_rows(path.parent, "multifieldqa_en").rows()))
        assert nursery.run(results) == 0
        assert lasting(rows_of(results / name)) == whole
        assert path.read_bytes().endswith(b"\n")
        left = {item.name for item in path.parent.iterdir()}
        assert left >= {"run.json", path.name}
        assert not [name for name in left if ".shard" in name]
    assert len({0, N_ROWS, *seen}) > 2  # some were killed between the first row and the last
    print(f"{kills} kills of runs of {length:.1f} s; rows kept after each: {seen}")


class Crash(BaseException):
    """The process ends here."""


def crashing(monkeypatch: pytest.MonkeyPatch, at: int) -> Callable[[], int]:
    """Ends the process at the `at`-th change of the disk; returns how many there were."""
    count = 0

    def wrap(owner: Any, name: str) -> None:
        real = getattr(owner, name)

        def changed(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == at:
                raise Crash
            return real(*args, **kwargs)

        monkeypatch.setattr(owner, name, changed)

    wrap(os, "fsync")
    wrap(os, "truncate")
    wrap(Path, "replace")
    wrap(Path, "unlink")
    return lambda: count


def test_a_merge_of_shards_survives_a_crash_at_every_change_of_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order = [str(n) for n in range(7)]
    at, crashed = 1, True
    while crashed:
        store = Store(tmp_path / str(at) / "a.jsonl", Named)
        store.append(named("2", "0"))
        for rank, share in enumerate((["1", "4"], ["3", "6"], ["5", "2"])):
            store.shard(rank).append(named(*share))
        with store.path.open("ab") as file:
            file.write(b'{"id": "4"')
        with monkeypatch.context() as patched:
            crashing(patched, at)
            try:
                store.merge(order)
                crashed = False
            except Crash:
                pass
        assert store.merge(order) == named(*order)
        assert store.rows() == named(*order)
        assert not list(store.path.parent.glob("*.shard*"))
        at += 1
    assert at > 7  # truncate, fsync, replace, three shards and the end


@pytest.mark.parametrize("failing", ["fsync", "truncate"])
def test_a_full_disk_is_one_sentence_and_the_run_goes_on_later(
    place: Workplace, tmp_path: Path, failing: str, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    options = ["--policy", "dense", *place.options, "--tasks", "trec", "--results_dir"]
    config = resolve(place.config(tasks=("trec",), results_dir=str(tmp_path)))
    assert run(config, LoadedModel.open(config)).is_dir()
    path = tmp_path / config.folder_name / "trec.jsonl"
    whole = lasting(rows_of(path.parent, "trec"))
    path.write_bytes(path.read_bytes()[:700])

    def full(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, failing, full)
        assert run_main("prefill", "llama", [*options, str(tmp_path)]) == 2
    errors = [x for x in capsys.readouterr().err.splitlines() if x.startswith("error: ")]
    assert len(errors) == 1
    assert "the disk is full; free some space and run the command again" in errors[0]
    assert run_main("prefill", "llama", [*options, str(tmp_path)]) == 0
    assert lasting(rows_of(path.parent, "trec")) == whole


def test_a_really_full_disk(place: Workplace, tmp_path: Path, capsys: Any) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("a small file system cannot be mounted here")
    options = ["--policy", "dense", *place.options, "--tasks", "trec", "--results_dir", str(small)]
    try:
        (small / "ballast").write_bytes(b"x" * 52_000)
        assert run_main("prefill", "llama", options) == 2
        assert "the disk is full" in capsys.readouterr().err
        (small / "ballast").unlink()
        assert run_main("prefill", "llama", options) == 0
        rows = rows_of(small / "llama-dense-PREFILL-SKIP-0", "trec")
        assert [row["id"] for row in rows] == [f"row{n}" for n in range(N_ROWS)]
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_folder_that_cannot_be_written_is_one_sentence(
    place: Workplace, tmp_path: Path, code: int, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    # Root may write everywhere, so the refusal is made up.
    def refuse(*_: Any, **__: Any) -> Any:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(Path, "mkdir", refuse)
    options = ["--policy", "dense", *place.options, "--results_dir", str(tmp_path / "new")]
    assert run_main("prefill", "llama", [*options, "--tasks", "trec"]) == 2
    message = capsys.readouterr().err
    assert "error: Cannot write" in message
    assert "choose another place and run" in message
    assert "Traceback" not in message
