"""Readers of files meet anything: they read it, or refuse it with an `AdaskipError`."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from run_fixtures import Workplace, raw_row, save_checkpoint, save_data, save_plan

from adaskip.errors import AdaskipError
from adaskip.experiments.ledger import read_record
from adaskip.experiments.plans import read_plan
from adaskip.experiments.records import read_rows, repair_rows
from adaskip.experiments.runconfig import RunConfig
from adaskip.experiments.runner import run
from adaskip.experiments.scoring import score_run
from adaskip.importance import Importance
from adaskip.plan import all_sublayers
from adaskip.tasks.longbench import load_rows

ROOT = Path(__file__).resolve().parents[1]
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


@quick
@given(data=st.data())
def test_run_records(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = json.loads((folder / "run.json").read_text())
    text = json.dumps(data.draw(changed(whole)))
    (tmp_path / "run.json").write_text(text)
    (tmp_path / "multifieldqa_en.jsonl").write_bytes(
        (folder / "multifieldqa_en.jsonl").read_bytes()
    )
    with contextlib.suppress(AdaskipError):
        read_record(tmp_path)
        score_run(tmp_path)
    (tmp_path / "run.json").write_bytes(data.draw(damaged(text.encode())))
    with contextlib.suppress(AdaskipError):
        read_record(tmp_path)


@quick
@given(data=st.data())
def test_rows(folder: Path, tmp_path: Path, data: st.DataObject) -> None:
    whole = (folder / "multifieldqa_en.jsonl").read_bytes()
    path = tmp_path / "multifieldqa_en.jsonl"
    (tmp_path / "run.json").write_bytes((folder / "run.json").read_bytes())
    path.write_bytes(data.draw(damaged(whole)))
    with contextlib.suppress(AdaskipError):
        assert read_rows(path) == repair_rows(path) == read_rows(path)
    row = data.draw(changed(json.loads(whole.split(b"\n")[0])))
    path.write_text(json.dumps(row) + "\n")
    with contextlib.suppress(AdaskipError):
        score_run(tmp_path)


@quick
@given(data=st.data())
def test_profiles(tmp_path: Path, data: st.DataObject) -> None:
    values = dict.fromkeys(all_sublayers(2), 0.5)
    path = tmp_path / "profile.json"
    Importance(values, values, values, "f", 1, 1).save(path)
    whole = path.read_bytes()
    path.write_text(json.dumps(data.draw(changed(json.loads(whole)))))
    with contextlib.suppress(AdaskipError):
        Importance.load(path)
    path.write_bytes(data.draw(damaged(whole)))
    with contextlib.suppress(AdaskipError):
        Importance.load(path)


@quick
@given(data=st.data())
def test_data_files(tmp_path: Path, data: st.DataObject) -> None:
    rows = [raw_row(number) for number in range(2)]
    text = "".join(json.dumps(data.draw(changed(row))) + "\n" for row in rows)
    for content in (text.encode(), data.draw(damaged(text.encode()))):
        (tmp_path / "trec_e.jsonl").write_bytes(content)
        with contextlib.suppress(AdaskipError):
            load_rows("trec", data_dir=str(tmp_path), source="local")


@quick
@given(data=st.data())
def test_sweep_files(place: Workplace, tmp_path: Path, data: st.DataObject) -> None:
    whole = save_plan(place).read_bytes()
    path = tmp_path / "sweep.yaml"
    path.write_text(yaml.safe_dump(data.draw(changed(yaml.safe_load(whole)))))
    with contextlib.suppress(AdaskipError):
        read_plan(path)
    path.write_bytes(data.draw(damaged(whole)))
    with contextlib.suppress(AdaskipError):
        read_plan(path)


@quick
@given(st.dictionaries(st.sampled_from(["experiment", "model_name", "limit", "tasks", "x"]), JSON))
def test_configurations(content: dict[str, Any]) -> None:
    with contextlib.suppress(AdaskipError):
        RunConfig.from_dict(content).check()


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
        assert not re.search(r"trust_remote_code\s*=\s*(?!False)", text), path
