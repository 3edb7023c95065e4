"""What is on disk survives: torn lines, full disks, two writers, old files."""

from __future__ import annotations

import errno
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from adaskip.errors import AdaskipError, RunError
from adaskip.runs import environment as where
from adaskip.runs.environment import environment, git_commit
from adaskip.runs.files import (
    SCHEMA,
    check_file_name,
    lock,
    read_json,
    write_json,
    write_text,
)
from adaskip.runs.rows import Stored
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.store import Share, Store

ROOT = Path(__file__).resolve().parents[1]


class Kept(Stored):
    id: str
    prediction: str = ""


def kept(tmp_path: Path, name: str = "a.jsonl", **settings: object) -> Store[Kept]:
    return Store(tmp_path / name, Kept, settings or None)


def test_infinities_beyond_the_fields_stay(tmp_path: Path) -> None:
    content = {"id": "1", "share": float("inf"), "deeper": {"least": [float("-inf")]}}
    store = kept(tmp_path)
    store.append([Kept.from_dict(content)])
    assert [row.as_dict() for row in store.rows()] == [content]
    store.merge()
    assert [row.as_dict() for row in store.rows()] == [content]


def test_rows_come_back_in_order_and_any_language(tmp_path: Path) -> None:
    store = kept(tmp_path)
    store.append([Kept(id="1", prediction="数\n\u2028"), Kept(id="2")])
    store.append([Kept(id="3")])
    assert [row.id for row in store.rows()] == ["1", "2", "3"]
    assert store.rows()[0].prediction == "数\n\u2028"
    assert store.missing(["2", "4"]) == ["4"]


def test_what_a_row_says_beyond_its_fields_stays_in_its_file(tmp_path: Path) -> None:
    store = kept(tmp_path)
    lines = '{"id": "2", "more": [1]}\n{"id": "1"}\n'
    store.path.write_text(lines)
    store.merge(["2", "1"])
    assert store.path.read_text() == lines
    store.merge(["1", "2"])
    assert store.path.read_text() == '{"id": "1"}\n{"id": "2", "more": [1]}\n'


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_rows_are_made_once_and_with_the_same_settings(tmp_path: Path, name: str) -> None:
    store, calls = kept(tmp_path, name, seed=1, tasks=("a",)), []

    def work(share: Share[Kept]) -> None:
        for item in share.of([name for name in ("1", "2", "3") if name not in share.done]):
            calls.append(item)
            share.append([Kept(id=item)])
            if len(calls) == 2:
                raise KeyError

    with pytest.raises(KeyError):
        store.make(["1", "2", "3"], work)
    store.note(limit=3)
    for _ in range(2):
        assert [row.id for row in store.make(["1", "2", "3"], work)] == ["1", "2", "3"]
    assert calls == ["1", "2", "3"]
    assert store.record()["limit"] == 3
    with pytest.raises(RunError, match=r"made with other settings \(seed: 1 then, 2 now\)"):
        kept(tmp_path, name, seed=2, tasks=("a",)).record()
    with pytest.raises(RunError, match="rows that are not among those asked for"):
        store.make(["1", "2", "4"], work)


def test_a_record_keeps_its_facts_and_one_row_of_an_id(tmp_path: Path) -> None:
    store = kept(tmp_path, "a.json", seed=1)
    store.note(limit=3)
    store.append([Kept(id="1")])
    store.append([Kept(id="1", prediction="x"), Kept(id="2")])
    assert [row.prediction for row in store.rows()] == ["x", ""]
    assert store.record()["limit"] == 3


def test_rows_that_earlier_versions_kept_by_id_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"schema": SCHEMA, "settings": {}, "sums": {"1": {"prediction": "x"}}})
    store = Store(path, Kept, {}, key="sums")
    assert store.rows() == [Kept(id="1", prediction="x")]
    store.append([Kept(id="2")])
    assert [row.id for row in store.rows()] == ["1", "2"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rows": [{"id": 1}]}, r"a\.json, row 1 is damaged \('id' is 1"),
        ({"rows": 3}, "'rows' is no list"),
        ({"settings": 3}, "no settings"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path: Path, content: dict, message: str) -> None:
    write_json(tmp_path / "a.json", {"schema": SCHEMA, "settings": {}, **content})
    with pytest.raises(RunError, match=message):
        Store(tmp_path / "a.json", Kept, {}).rows()


def test_a_run_killed_at_any_byte_of_a_line_is_repaired(tmp_path: Path) -> None:
    store = kept(tmp_path)
    path, last = store.path, Kept(id="2", prediction="数")
    store.append([Kept(id="1"), last])
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        assert store.merge() == [Kept(id="1")]
        assert path.read_bytes() == whole[:first]
        store.append([last])
        assert path.read_bytes() == whole


def test_reading_does_not_repair(tmp_path: Path) -> None:
    store = kept(tmp_path)
    store.path.write_bytes(b'{"id": "1"}\n{"id"')
    assert len(store.rows()) == 1
    assert store.path.read_bytes() == b'{"id": "1"}\n{"id"'


@pytest.mark.parametrize("line", [b"{", b"[]", b'{"no": "id"}', b'{"id": 1}', b"\xff", b""])
def test_a_damaged_line_is_named_by_its_number(tmp_path: Path, line: bytes) -> None:
    store = kept(tmp_path)
    store.path.write_bytes(b'{"id": "1"}\n' + line + b'\n{"id": "3"}\n')
    with pytest.raises(RunError, match=r"a\.jsonl, line 2 is damaged"):
        store.merge()
    assert store.path.read_bytes().endswith(b'{"id": "3"}\n')


def test_a_file_is_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"schema": SCHEMA, "n": 1})

    def no_space(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("adaskip.whole_files.os.fsync", no_space)
    with pytest.raises(RunError, match="the disk is full; free some space"):
        write_json(path, {"schema": SCHEMA, "n": 2})
    assert read_json(path)["n"] == 1
    assert [item.name for item in tmp_path.iterdir()] == ["a.json"]


def test_a_file_size_limit_ends_in_one_sentence_and_is_repaired(tmp_path: Path) -> None:
    store = kept(tmp_path)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from adaskip.runs.rows import Stored\n"
        "from adaskip.runs.store import Store\n"
        "class Named(Stored):\n id: str\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20, 20))\n"
        "rows = [Named(id='1'), Named.from_dict({'id': '2', 'text': 'x' * 99})]\n"
        "try:\n Store(Path(sys.argv[1]), Named).append(rows)\n"
        "except Exception as error:\n print(type(error).__name__, error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(store.path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.startswith("RunError Cannot write"), done.stderr
    assert store.path.stat().st_size == 20
    assert store.merge() == [Kept(id="1")]


def test_a_results_folder_that_is_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "results").write_text("")
    with pytest.raises(RunError, match="choose another place and run"):
        write_text(tmp_path / "results" / "a.md", "text")
    with pytest.raises(RunError, match="choose another place and run"), lock(tmp_path / "results"):
        pass


def test_the_second_of_two_processes_is_refused(tmp_path: Path) -> None:
    refused = "Another process is working on .*; wait for it, or choose another --results_dir"
    with lock(tmp_path), pytest.raises(RunError, match=refused), lock(tmp_path):
        pass
    with lock(tmp_path):
        pass


def test_the_lock_of_a_killed_process_is_free(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from adaskip.runs.files import lock\n"
        "with lock(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT)
    assert done.returncode == -9
    with lock(tmp_path):
        pass


@pytest.mark.parametrize("content", ['{"schema": 0}', "[]", '{"schema": 99}'])
def test_a_record_of_another_schema_is_refused_by_name(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(RunError, match=r"run\.json has record schema .*, or move it away"):
        read_json(tmp_path / "run.json")


@pytest.mark.parametrize(
    "name", ["../x", "a/b", "a\\b", ".hidden", "", "a\n", "..", "a b", "x" * 200]
)
def test_no_name_leaves_its_folder(name: str) -> None:
    with pytest.raises(RunError, match="cannot name a file"):
        check_file_name("run name", name)


def test_a_name_that_nobody_gave_is_said_to_be_the_models() -> None:
    config = RunConfig(experiment="e2e", model_name="a/my model", policy="dense")
    with pytest.raises(RunError, match=r"the model's where no --name is given.* 'my model-dense"):
        config.check()


def test_settings_leave_out_what_does_not_change_the_rows() -> None:
    def settings(**changes: object) -> dict[str, object]:
        given = {"experiment": "e2e", "model_name": "llama", "policy": "EE", **changes}
        return RunConfig.from_dict({**given, "skip_full_layer_num": 4}).settings()

    assert settings() == settings(limit=3, tasks=["trec"], results_dir="x", gain="norm")
    assert settings() != settings(seed=1)
    assert settings() != settings(experiment="decode")
    assert settings() == settings(warmup=3, warmup_task="trec", importance="x")
    assert settings(policy="ADA") != settings(policy="ADA", warmup=3)


def test_a_policy_is_told_by_its_fields() -> None:
    def told(policy: str, **changes: object) -> dict[str, object]:
        given = {"experiment": "e2e", "model_name": "llama", "policy": policy, **changes}
        return RunConfig.from_dict(given).policy_settings()

    assert told("dense") == {}
    # SkipDecode's horizon is the answer length, which is kept per task.
    assert told("SD", skip_full_layer_num=4, gain="norm") == {"n_skip": 4}
    ada = {"n_skip": 8, "online": True, "window": 20, "gain": "token", "select": "rank"}
    ada |= {"acceleration": None, "times": None}
    assert told("ADA", skip_sub_layer_num=8) == ada
    changed = told("ADA", skip_sub_layer_num=8, gain="none", online=False)
    assert changed == ada | {"gain": None, "online": False}


def test_a_dense_run_is_the_same_in_every_experiment() -> None:
    one, two = (
        RunConfig(experiment=scope, model_name="llama", policy="dense")
        for scope in ("decode", "e2e")
    )
    assert one.settings() == two.settings()
    assert one.folder_name == "llama-dense-DECODE-SKIP-0"


def test_a_record_reads_back_as_its_configuration() -> None:
    config = RunConfig(experiment="e2e", model_name="llama", policy="ADA", tasks=("trec",))
    assert RunConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config
    with pytest.raises(AdaskipError, match="Did you mean 'policy'"):
        RunConfig.from_dict({"experiment": "e2e", "model_name": "llama", "polcy": "EE"})


def test_the_environment_names_what_a_result_depends_on() -> None:
    known = environment("cpu")
    assert {"adaskip", "torch", "transformers", "python", "device", "commit"} <= set(known)
    assert {"cuda", "attention", "metrics"} <= set(known)
    assert known["attention"][:2] == ["sdpa", "eager"]
    assert known["metrics"]["rouge-score"]
    assert environment("cpu", "eager")["attention"] == "eager"
    assert json.loads(json.dumps(known)) == known


def test_results_do_not_make_a_checkout_dirty(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(where, "CHECKOUT", tmp_path)
    assert git_commit() is None
    code, result = tmp_path / "code.py", tmp_path / "results" / "table.md"
    result.parent.mkdir()
    for path in (code, result):
        path.write_text("1")
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], [*identity, "commit", "-qm", "first"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    commit = git_commit()
    assert commit is not None
    assert re.fullmatch("[0-9a-f]{40}", commit)
    result.write_text("2")
    assert git_commit() == commit
    dirty = []
    for content in (b"2", b"\xff", b"2"):
        code.write_bytes(content)
        dirty.append(git_commit())
    # Other edits are other code.
    assert dirty[0] == dirty[2] != dirty[1]
    assert all(re.fullmatch(f"{commit}-dirty-[0-9a-f]{{8}}", str(name)) for name in dirty)
