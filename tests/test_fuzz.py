"""Readers of files meet anything: they read it, or refuse it with an `AdaskipError`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import pytest
import yaml
from hypothesis import HealthCheck, given, settings, strategies as st
from run_fixtures import Named, Workplace, raw_row, save_checkpoint, save_data, save_plan

from adaskip.errors import AdaskipError
from adaskip.importance import Importance
from adaskip.plan import SCOPES, Sublayer, all_sublayers
from adaskip.runs.ledger import read_record
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.runner import run
from adaskip.runs.scoring import score_run
from adaskip.runs.store import Store
from adaskip.runs.sweepfile import read_sweep
from adaskip.tasks.longbench import load_rows

T = TypeVar("T")
ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("similarity", "gain_norm", "gain_token")
quick = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**6),
    st.floats(),
    st.text(max_size=8),
)
JSON = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner),
    max_leaves=6,
)


def places(content: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The way to every value of parsed JSON."""
    inner = content.items() if isinstance(content, dict) else ()
    inner = enumerate(content) if isinstance(content, list) else inner
    return [at, *(place for key, value in inner for place in places(value, (*at, key)))]


@st.composite
def changed(draw: st.DrawFn, content: Any) -> Any:
    """The content with a few values replaced or removed."""
    content = json.loads(json.dumps(content))
    for _ in range(draw(st.integers(1, 2))):
        way = draw(st.sampled_from(places(content)))
        if not way:
            continue
        holder = content
        for key in way[:-1]:
            holder = holder[key]
        if draw(st.booleans()) and isinstance(holder, dict):
            del holder[way[-1]]
        else:
            holder[way[-1]] = draw(JSON)
    return content


@st.composite
def damaged(draw: st.DrawFn, text: bytes) -> bytes:
    """The bytes cut off, with a hole, or with others in between."""
    start = draw(st.integers(0, len(text)))
    end = draw(st.integers(start, len(text)))
    return text[:start] + draw(st.binary(max_size=6)) + text[end:]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    folder = tmp_path_factory.mktemp("fuzz")
    checkpoint = save_checkpoint(folder / "model")
    return Workplace(checkpoint, save_data(folder / "data", 2), folder / "results")


@pytest.fixture(scope="module")
def folder(place: Workplace) -> Path:
    return run(place.config(policy="ADA", skip_sub_layer_num=1))


def read_or_refused(read: Callable[[], T]) -> T | None:
    """What a reader makes of it; None if it refuses, which is the only other thing it may do."""
    try:
        return read()
    except AdaskipError:
        return None


def has_types(content: dict[str, Any], kinds: dict[str, Any]) -> bool:
    """Whether every value is of its kind, true being no number."""
    return all(
        isinstance(value, kinds[key]) and (type(value) is not bool or kinds[key] is bool)
        for key, value in content.items()
    )


def is_config(content: dict[str, Any]) -> bool:
    """Whether parsed JSON holds the fields of a `RunConfig`, judged without its own check."""
    kinds = get_type_hints(RunConfig) | {"experiment": str, "tasks": list}
    if not has_types(content, kinds) or content.get("experiment", "e2e") not in SCOPES:
        return False
    return all(isinstance(text, str) for text in content.get("tasks", []))


@quick
@given(data=st.data())
def test_run_records(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = json.loads((folder / "run.json").read_text())
    assert read_record(folder).as_dict() == whole
    rows = (folder / "multifieldqa_en.jsonl").read_bytes()
    (tmp_path / "multifieldqa_en.jsonl").write_bytes(rows)
    text = json.dumps(data.draw(changed(whole))).encode()
    for content in (text, data.draw(damaged(text))):
        (tmp_path / "run.json").write_bytes(content)
        found = read_or_refused(lambda: read_record(tmp_path))
        if found is None:
            continue
        record = found.as_dict()
        assert record == json.loads(content)
        assert is_config(record["config"])
        assert isinstance(record["importance"], str | None)
        assert isinstance(record["n_layers"], int)
        assert record["n_layers"] > 0
        scored = read_or_refused(lambda: score_run(tmp_path))
        if scored is not None:
            assert scored.n_layers == record["n_layers"]
            planned = {task: score.n_planned for task, score in scored.tasks.items()}
            assert planned == {task: facts["rows"] for task, facts in record["tasks"].items()}


def rows_in(content: bytes) -> list[Any] | None:
    """The rows of a file, its torn end left out; None if a line is no row."""
    rows = []
    for line in content.split(b"\n")[:-1]:
        try:
            rows.append(json.loads(line))
        except ValueError:
            return None
    return (
        rows
        if all(isinstance(row, dict) and isinstance(row.get("id"), str) for row in rows)
        else None
    )


@quick
@given(data=st.data())
def test_rows(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = (folder / "multifieldqa_en.jsonl").read_bytes()
    path = tmp_path / "multifieldqa_en.jsonl"
    (tmp_path / "run.json").write_bytes((folder / "run.json").read_bytes())
    content = data.draw(damaged(whole))
    path.write_bytes(content)
    expected = rows_in(content)
    store = Store(path, Named)
    found = read_or_refused(store.rows)
    assert (None if found is None else [row.as_dict() for row in found]) == expected
    merged = read_or_refused(store.merge)
    assert (merged is None) == (found is None)
    if expected is not None:
        assert path.read_bytes() == content[: content.rfind(b"\n") + 1]
    row = data.draw(changed(json.loads(whole.split(b"\n")[0])))
    path.write_text(json.dumps(row) + "\n")
    scored = read_or_refused(lambda: score_run(tmp_path))
    if scored is not None:
        score = scored.tasks["multifieldqa_en"]
        assert score.n_rows + score.n_short == 1
        assert list(score.row_scores) == [row["id"]] * score.n_rows
        assert all(0 <= value <= 1 for value in score.row_scores.values())
        assert isinstance(row["prediction"], str) or score.n_rows == 0


def is_profile(content: Any) -> bool:
    """Whether every value of a profile's parsed JSON is of the type that is written."""
    number = int | float
    kinds = {"layer": int, "kind": str} | dict.fromkeys(COLUMNS, number)
    rows, layers = content.pop("sublayers"), content.pop("layers", [])
    if any(type(value) not in (int, float) for value in layers):
        return False
    whole = {"version": int, "fingerprint": str, "source": str, "n_requests": int, "n_tokens": int}
    return has_types(content, whole) and all(
        kinds.keys() <= row.keys() and has_types({k: row[k] for k in kinds}, kinds) for row in rows
    )


@quick
@given(data=st.data())
def test_profiles(tmp_path: Path, data: st.DataObject) -> None:
    values = dict.fromkeys(all_sublayers(2), 0.5)
    path = tmp_path / "profile.json"
    written = Importance(values, values, values, "f", 1, 1, "", (0.5, 0.25))
    written.save(path)
    assert Importance.load(path) == written
    whole = path.read_bytes()
    text = json.dumps(data.draw(changed(json.loads(whole)))).encode()
    for content in (text, data.draw(damaged(whole))):
        path.write_bytes(content)
        found = read_or_refused(lambda: Importance.load(path))
        if found is None:
            continue
        parsed = json.loads(content)
        for name in COLUMNS:
            column = {Sublayer(r["layer"], r["kind"]): r[name] for r in parsed["sublayers"]}
            assert getattr(found, name) == column
        for name in ("fingerprint", "n_requests", "n_tokens", "source"):
            assert getattr(found, name) == parsed[name]
        assert list(found.layer_similarity) == parsed.get("layers", [])
        assert is_profile(parsed)


@quick
@given(data=st.data())
def test_data_files(tmp_path: Path, data: st.DataObject) -> None:
    rows = [raw_row(number) for number in range(2)]
    text = "".join(json.dumps(data.draw(changed(row))) + "\n" for row in rows).encode()
    whole = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for content in (text, data.draw(damaged(text)), whole):
        (tmp_path / "trec_e.jsonl").write_bytes(content)
        found = read_or_refused(lambda: load_rows("trec", data_dir=str(tmp_path), source="local"))
        if found is None:
            continue
        parsed = [json.loads(line) for line in content.splitlines() if line.strip()]
        kinds = {"input": str, "context": str, "answers": list, "length": int, "all_classes": list}
        assert all(has_types({k: raw[k] for k in kinds}, kinds) for raw in parsed)
        long = [raw for raw in parsed if raw["length"] > 4000]
        for name in ("input", "context", "length"):
            assert [getattr(row, name) for row in found] == [raw[name] for raw in long]
        for name in ("answers", "all_classes"):
            texts = [getattr(row, name) for row in found]
            assert texts == [tuple(raw[name]) for raw in long]
            assert all(isinstance(text, str) for each in texts for text in each)
    assert found is not None  # the last one is whole
    assert [row.id for row in found] == ["row0", "row1"]


def cells_in(content: dict[str, Any]) -> int:
    """How many cells a sweep's parsed file asks for."""
    tasks = [task for each in content["experiments"].values() for task in each]
    n_policies = sum(map(len, content["policies"].values()))
    return len(content["models"]) * (len(set(tasks)) + len(tasks) * n_policies)


@quick
@given(data=st.data())
def test_sweep_files(place: Workplace, tmp_path: Path, data: st.DataObject) -> None:
    whole = save_plan(place).read_bytes()
    assert len(read_sweep(save_plan(place)).cells) == cells_in(yaml.safe_load(whole)) == 11
    path = tmp_path / "sweep.yaml"
    text = yaml.safe_dump(data.draw(changed(yaml.safe_load(whole)))).encode()
    for file in (text, data.draw(damaged(whole))):
        path.write_bytes(file)
        plan = read_or_refused(lambda: read_sweep(path))
        if plan is None:
            continue
        content = yaml.safe_load(file)
        assert (plan.name, list(plan.models)) == (content["name"], content["models"])
        assert plan.experiments == {k: tuple(v) for k, v in content["experiments"].items()}
        assert len(plan.cells) == cells_in(content)
        for cell in plan.cells:
            config = cell.config.as_dict()
            assert is_config(config)
            own = (content.get("tasks") or {}).get(cell.task, {})
            asked = (content.get("settings") or {}) | own
            assert {key: config[key] for key in asked} == asked
            budgets = content["policies"].get(config["policy"], [0])
            assert cell.config.budget in budgets


@quick
@given(st.dictionaries(st.sampled_from(["experiment", "model_name", "limit", "tasks", "x"]), JSON))
def test_configurations(content: dict[str, Any]) -> None:
    config = read_or_refused(lambda: RunConfig.from_dict(content))
    # `x` is no setting, and the first two have no default.
    right = {"experiment", "model_name"} <= content.keys() and "x" not in content
    assert (config is not None) == (right and is_config(content))
    if config is not None:
        assert {key: config.as_dict()[key] for key in content} == content


def test_an_old_record_and_an_old_profile_are_refused_by_name(folder: Path, tmp_path: Path) -> None:
    record = json.loads((folder / "run.json").read_text())
    (tmp_path / "run.json").write_text(json.dumps(record | {"schema": 0}))
    with pytest.raises(AdaskipError, match="has record schema 0; this version reads 1"):
        read_record(tmp_path)
    (tmp_path / "p.json").write_text('{"version": 0}')
    with pytest.raises(AdaskipError, match="has version 0; this adaskip reads version 2"):
        Importance.load(tmp_path / "p.json")


def test_loading_never_runs_code() -> None:
    sources = {path: path.read_text(encoding="utf-8") for path in ROOT.glob("adaskip/**/*.py")}
    assert len(sources) > 50
    for path, text in sources.items():
        assert not re.search(
            r"^\s*(import|from) (pickle|dill|joblib|shelve|marshal)", text, re.M
        ), path
        assert not re.search(
            r"\b(torch\.load|np\.load|yaml\.unsafe_load|yaml\.full_load)\(", text
        ), path
        assert not re.search(r"(?<![\w.])(eval|exec)\(", text), path
        # vLLM reads the class of a folder's configuration: of one that was just written here.
        if path.name != "engine_child.py":
            assert not re.search(r"trust_remote_code\s*=\s*(?!False)", text), path
