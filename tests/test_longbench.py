"""Rows from every source in one format, and one clear sentence for each way it can fail."""

from __future__ import annotations

import json
import logging
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import SHARED

from adaskip.errors import AdaskipError, DataError
from adaskip.tasks.longbench import load_rows
from adaskip.tasks.spec import Row, task_names, task_spec

REAL = SHARED / "data/longbench"
PROTOCOL = REAL.parent / "longbench_protocol.json"
# Beside them the file may name tasks of somebody's own, which bring their prompts.
OFFICIAL = [name for name in task_names("longbench") if task_spec(name).prompt is None]


def raw(**changes: Any) -> dict[str, Any]:
    row = {
        "input": "Who?",
        "context": "Ann did.",
        "answers": ["Ann"],
        "length": 4001,
        "language": "en",
        "all_classes": None,
        "_id": "a1",
    }
    return {key: value for key, value in (row | changes).items() if value is not ...}


def write(path: Path, *rows: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_row_becomes_a_row(tmp_path: Path) -> None:
    write(tmp_path / "qasper_e.jsonl", raw())
    assert load_rows("qasper", data_dir=tmp_path, source="local") == [
        Row("a1", "qasper", "Who?", "Ann did.", ("Ann",), 4001, "en", None)
    ]


@pytest.mark.parametrize("folder", [".", "data", "LongBench", "LongBench/data"])
def test_files_are_found_in_the_usual_folders(tmp_path: Path, folder: str) -> None:
    write(tmp_path / folder / "musique.jsonl", raw())
    assert load_rows("musique", data_dir=str(tmp_path))[0].task == "musique"


def test_longbench_e_comes_first_where_the_task_has_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path / "data/qasper_e.jsonl", raw(_id="e"))
    write(tmp_path / "qasper.jsonl", raw(_id="plain"))
    assert load_rows("qasper", data_dir=tmp_path)[0].id == "e"
    assert load_rows("qasper", data_dir=tmp_path, long_bench_e=False)[0].id == "plain"
    (tmp_path / "data/qasper_e.jsonl").unlink()
    with caplog.at_level(logging.WARNING):
        assert load_rows("qasper", data_dir=tmp_path)[0].id == "plain"
    assert "not LongBench-E's" in caplog.text


def test_the_original_zip_is_read_in_place(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.writestr("data/trec_e.jsonl", json.dumps(raw(all_classes=["Food", "Date"])))
        archive.writestr("data/trec.jsonl", json.dumps(raw(_id="plain", all_classes=["Food"])))
        archive.writestr("data/lcc.jsonl", json.dumps(raw()) + "\n{")
    [row] = load_rows("trec", data_dir=tmp_path)
    assert (row.id, row.all_classes) == ("a1", ("Food", "Date"))
    with pytest.raises(DataError, match=r"data\.zip:data/lcc\.jsonl line 2 is not JSON"):
        load_rows("lcc", data_dir=tmp_path, long_bench_e=False)
    (tmp_path / "data.zip").write_bytes((tmp_path / "data.zip").read_bytes()[:200])
    with pytest.raises(DataError, match="not a readable zip file"):
        load_rows("trec", data_dir=tmp_path)


def test_hub_copy_has_question_instead_of_input(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def load_dataset(name: str, config: str, split: str) -> list[dict[str, Any]]:
        asked.append((name, config, split))
        return [raw(input=..., question="Which?", all_classes=[])]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    [row] = load_rows("hotpotqa", source="hub")
    assert (row.input, row.all_classes) == ("Which?", None)
    load_rows("narrativeqa", source="hub")
    assert asked == [
        ("Xnhyacinth/LongBench", "hotpotqa_e", "test"),
        ("Xnhyacinth/LongBench", "narrativeqa", "test"),
    ]


def test_no_file_and_no_hub_is_one_sentence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load_dataset(name: str, config: str, split: str) -> list[dict[str, Any]]:
        raise ConnectionError("no route\nand a long trace")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    with pytest.raises(DataError) as caught:
        load_rows("trec", data_dir=tmp_path)
    for part in ("trec_e.jsonl or trec.jsonl", str(tmp_path), "no route", "data/README.md"):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(DataError, match=r"No trec_e\.jsonl or trec\.jsonl in .*data/README\.md"):
        load_rows("trec", data_dir=tmp_path, source="local")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"input": "cut o', "line 2 is not JSON"),
        ("[1]", "line 2 is a JSON list"),
        (json.dumps(raw(context=...)), "line 2 has no field 'context'"),
        (json.dumps(raw(input=...)), "line 2 has no field 'input' or 'question'"),
        (json.dumps(raw(answers=[])), "line 2: field 'answers' must be a list of at least one"),
        (json.dumps(raw(answers="Ann")), "line 2: field 'answers' is a str, expected list"),
        (json.dumps(raw(length="long")), "line 2: field 'length' is a str, expected int"),
        ("\udcff", "line 2 is not JSON"),
    ],
)
def test_a_damaged_line_is_named_with_its_number(tmp_path: Path, line: str, message: str) -> None:
    path = write(tmp_path / "qasper_e.jsonl", raw())
    with path.open("a", encoding="utf-8", errors="surrogateescape") as file:
        file.write(line)
    with pytest.raises(DataError, match=message) as caught:
        load_rows("qasper", data_dir=tmp_path)
    assert "qasper_e.jsonl" in str(caught.value)


def test_a_classification_task_needs_its_classes(tmp_path: Path) -> None:
    write(tmp_path / "trec_e.jsonl", raw(all_classes=...))
    with pytest.raises(DataError, match="line 1 has no field 'all_classes'"):
        load_rows("trec", data_dir=tmp_path)


def test_the_filter_drops_4000_and_the_limit_counts_after_it(tmp_path: Path) -> None:
    lengths = (4000, 4001, 90, 4002, 4003)
    rows = [raw(_id=f"r{length}", length=length) for length in lengths]
    path = write(tmp_path / "qasper_e.jsonl", *rows)
    assert [r.id for r in load_rows("qasper", data_dir=tmp_path, limit=2)] == ["r4001", "r4002"]
    assert len(load_rows("qasper", data_dir=tmp_path, min_length=-1)) == 5
    write(path, raw(length=4000), raw(length=12))
    with pytest.raises(DataError, match="qasper has 2 rows, and none longer than 4000 words"):
        load_rows("qasper", data_dir=tmp_path)


def test_ids_are_unique_and_stable(tmp_path: Path) -> None:
    write(tmp_path / "qasper_e.jsonl", raw(), raw(), raw(_id=...))
    first = [row.id for row in load_rows("qasper", data_dir=tmp_path)]
    assert first == ["a1", "a1#2", "qasper-2"]
    assert first == [row.id for row in load_rows("qasper", data_dir=tmp_path)]


def test_bad_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(AdaskipError, match="Did you mean 'multi_news'"):
        load_rows("multinews", data_dir=tmp_path)
    with pytest.raises(AdaskipError, match="sample_rows"):
        load_rows("sample_qa", data_dir=tmp_path)
    with pytest.raises(AdaskipError, match="at least 1 row"):
        load_rows("trec", data_dir=tmp_path, limit=0)
    with pytest.raises(AdaskipError, match="auto, hub or local"):
        load_rows("trec", data_dir=tmp_path, source="web")  # type: ignore[arg-type]


def test_real_rows() -> None:
    if not REAL.is_dir():
        pytest.skip("no ../shared/data/longbench here")
    news = load_rows("multi_news", data_dir=REAL, source="local")
    chinese = load_rows("multifieldqa_zh", data_dir=REAL, source="local", min_length=-1)
    assert (len(news), len(chinese)) == (13, 60)
    assert all(row.length > 4000 and row.answers and not row.input for row in news)
    assert {row.language for row in chinese} == {"zh"}


def test_task_facts() -> None:
    assert len(OFFICIAL) == 21
    assert sum(task_spec(name).long_bench_e for name in OFFICIAL) == 13
    unwrapped = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    longbench = [task_spec(name) for name in OFFICIAL]
    assert {spec.name for spec in longbench if not spec.chat} == unwrapped
    assert {s.name for s in longbench if s.first_line_only} == {
        "trec",
        "triviaqa",
        "samsum",
        "lsht",
    }
    assert [(s.name, s.min_new_tokens) for s in longbench if s.stop_at_newline] == [("samsum", 1)]


def test_answer_lengths_and_hashes_are_the_protocols() -> None:
    if not PROTOCOL.is_file():
        pytest.skip("no ../shared/data/longbench_protocol.json here")
    protocol = json.loads(PROTOCOL.read_text(encoding="utf-8"))
    assert set(protocol) == set(OFFICIAL)
    for name, facts in protocol.items():
        spec = task_spec(name)
        assert spec.max_new_tokens == facts["max_new_tokens"]
        assert spec.prompt_sha256 == facts["prompt_sha256"]
