"""Times of replacements and of plans: what they are made of, kept, and told of a plan."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import N_LAYERS, prompt, tiny_model
from test_search import ROWS, times
from transformers import DynamicCache

from adaskip import AdaskipError, Linear, Sublayer, Window, search_plan, skipping
from adaskip.budget import kv_share
from adaskip.growing_cache import kv_tensors
from adaskip.plan import SkipPlan
from adaskip.profiling import plan_times
from adaskip.profiling.plan_times import (
    linear_like,
    measure_replacements,
    measured_acceleration,
    measured_plan_times,
    windowable,
)
from adaskip.profiling.timing import RequestTimes
from adaskip.sublayer_times import PlanTimes, SublayerTimes, replacement_name, timed_as


@pytest.fixture
def cost(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Lets every attention take 2 ms, windows 1, linear maps 0.25; the rest takes 4 ms."""
    requests: Counter[str] = Counter()
    taken = {"window 8": 1, "linear": 0.25}

    def request(model: Any, plan: SkipPlan, *_: Any) -> RequestTimes:
        names = [replacement_name(r) for r in plan.values()]
        requests.update([names[0] if names else "dense"])
        spent = 4 + 2 * (N_LAYERS - len(plan)) + sum(taken.get(name, 0) for name in names)
        return RequestTimes(spent / 1e3, spent / 1e3, 0, torch.zeros(1))

    monkeypatch.setattr(plan_times, "_request", request)
    return requests


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_a_replacement_costs_what_lies_between_it_and_nothing(
    cost: Counter[str], phase: Any
) -> None:
    model = tiny_model("llama")
    dense = SublayerTimes(10.0, times().seconds, phase, 40, 1)
    replacements = [Window(8), linear_like(model, None)]
    (shares,) = measure_replacements(model, [dense], replacements, repeats=3).values()
    # Of a dense forward of 12 ms.
    assert shares == {"window 8": pytest.approx(1 / 12), "linear": pytest.approx(0.25 / 12)}
    # One of each warms up.
    assert cost == {"dense": 4, "window 8": 4, "linear": 4, "gain": 4}


def test_times_of_replacements_are_kept(cost: Counter[str], tmp_path: Path) -> None:
    model = tiny_model("llama")
    options: dict[str, Any] = {"folder": tmp_path}
    first = measured_plan_times(model, "prefill", 40, [Window(8)], **options)
    total = first.dense.total
    assert first.replaced == {"window 8": pytest.approx(total / 12)}
    assert measured_plan_times(model, "prefill", 40, [Window(8)], **options) == first
    assert cost["window 8"] == 6
    # Only what is not known yet is measured.
    both = measured_plan_times(
        model, "prefill", 40, [Window(8), linear_like(model, None)], **options
    )
    assert set(both.replaced) == {"window 8", "linear"}
    assert (cost["window 8"], cost["linear"]) == (6, 6)
    next(tmp_path.glob("*-replacements-*")).write_text("{")
    again = measured_plan_times(model, "prefill", 40, [Window(8)], **options)
    assert again == first


def test_windows_of_other_sinks_are_others(tmp_path: Path) -> None:
    few, many = Window(9, sinks=0), Window(9, sinks=7)
    assert [replacement_name(w) for w in (few, many, Window(9), Window(9, 0, (1,), 2))] == [
        *("window 9 and 0 sinks", "window 9 and 7 sinks", "window 9"),
        "window 9 and 0 sinks of heads 1",
    ]
    some = Window(9, 0, (1,), 2)
    assert (
        timed_as(some) == timed_as(Window(9, 0, (0,), 2)) == "window 9 and 0 sinks in 1 of 2 heads"
    )
    model = tiny_model("llama")
    found = measured_plan_times(model, "prefill", 40, [few, many, some], folder=tmp_path)
    assert set(found.replaced) == {timed_as(window) for window in (few, many, some)}


def test_windows_of_some_heads_save_what_was_measured_else_their_share() -> None:
    attention = Sublayer(1, "attn")
    whole, some = {"window 8": 0.5}, Window(8, heads=(1,), of_heads=3)
    assert PlanTimes(times(), whole).saved(attention, some) == pytest.approx(1.5 / 3)
    measured = PlanTimes(times(), whole | {"window 8 in 1 of 3 heads": 1.9})
    assert measured.saved(attention, some) == pytest.approx(0.1)
    assert measured.speedup({attention: some}) == pytest.approx(15 / 14.9)


@pytest.mark.parametrize(
    ("phase", "changes", "said"),
    [
        ("prefil", {}, "Did you mean 'prefill'"),
        ("prefill", {"rounds": 0}, "must be 1 or more"),
        ("prefill", {"context": 0}, "must be 1 or more"),
    ],
)
def test_a_measurement_that_cannot_be(phase: str, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(AdaskipError, match=said):
        measured_acceleration(tiny_model("llama"), SkipPlan(), phase, **{"context": 9, **changes})


def test_no_clock_runs_while_linear_maps_are_taken_to_the_device(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, taken, in_requests = tiny_model("llama"), Counter[str](), []
    placed, timed = Linear.to, plan_times.time_request

    def to(linear: Linear, *where: Any) -> Linear:
        taken["maps"] += 1
        return placed(linear, *where)

    def request(*args: Any, **kwargs: Any) -> RequestTimes:
        before = taken["maps"]
        found = timed(*args, **kwargs)
        in_requests.append(taken["maps"] - before)
        return found

    monkeypatch.setattr(Linear, "to", to)
    monkeypatch.setattr(plan_times, "time_request", request)
    plan = SkipPlan({Sublayer(layer, "attn"): linear_like(model, 4) for layer in (1, 2)})
    measured_acceleration(model, plan, "prefill", 8, rounds=1)
    assert set(in_requests) == {0}
    # Once for the plan, however often it is timed.
    assert taken["maps"] == 2


def test_replacements_are_timed_where_they_run(tmp_path: Path) -> None:
    model = tiny_model("llama")
    sorts = [Window(8), linear_like(model, None), linear_like(model, 4)]
    for phase in ("prefill", "decode"):
        found = measured_plan_times(model, phase, 24, sorts, folder=tmp_path)
        assert set(found.replaced) == {"window 8", "linear", "linear 4"}
        assert all(0 <= seconds < found.dense.total for seconds in found.replaced.values())


def test_a_plan_is_as_fast_as_what_is_in_it() -> None:
    linear = Linear((torch.zeros(32, 4), torch.zeros(4, 32)), torch.zeros(32))
    plan = {
        Sublayer(0, "attn"): Window(8),
        Sublayer(1, "attn"): None,
        Sublayer(1, "ffn"): 1.1,
        Sublayer(2, "ffn"): linear,
    }
    found = PlanTimes(times(), {"window 8": 1.5, "linear 4": 0.25})
    assert found.speedup(plan) == pytest.approx(15 / (15 - 0.5 - 2 - 1 - 0.75))
    assert PlanTimes.from_dict(found.as_dict()) == found
    with pytest.raises(AdaskipError, match="No time of 'window 8'"):
        PlanTimes(times()).speedup(plan)
    with pytest.raises(AdaskipError, match="measure them anew"):
        PlanTimes.from_dict({"dense": {}, "replaced": {}})
    # A window holds 8 + 4 of 40 tokens, the others nothing.
    config = tiny_model("llama").config
    assert kv_share(SkipPlan(plan), config, 40) == pytest.approx((2 + 0.3) / 4)
    assert kv_share(SkipPlan(plan), config, 10) == pytest.approx(3 / 4)


def test_sliding_layers_hold_what_they_see() -> None:
    model = tiny_model("gemma2", "eager")
    types = model.config.layer_types
    assert set(types) == {"full_attention", "sliding_attention"}
    ids, seconds = prompt(40), PlanTimes(times(1, 1))
    assert model.config.sliding_window < 40

    def held(plan: SkipPlan) -> int:
        cache = DynamicCache(config=model.config)
        with skipping(model, plan), torch.no_grad():
            model(ids, past_key_values=cache)
        return sum(tensor.nbytes for tensor in kv_tensors(cache))

    for kind in ("full_attention", "sliding_attention"):
        layer = types.index(kind)
        for replaced in (None, Window(8)) if kind == "full_attention" else (None,):
            plan = SkipPlan({Sublayer(layer, "attn"): replaced})
            share = kv_share(plan, model.config, 40)
            assert share == pytest.approx(held(plan) / held(SkipPlan()))
    plan = search_plan(
        model, ROWS, acceleration=1, kv_share=0.5, times=seconds, replacements=["gain"]
    )
    assert held(plan) <= 0.5 * held(SkipPlan())
    assert plan.about["predicted kv share"] == pytest.approx(held(plan) / held(SkipPlan()))


def test_windows_go_where_all_tokens_are_seen() -> None:
    assert windowable(tiny_model("llama"), Window(8)) == tuple(range(N_LAYERS))
    gemma = tiny_model("gemma2", "eager")
    full = [i for i, t in enumerate(gemma.config.layer_types) if t == "full_attention"]
    assert 0 < len(full) < N_LAYERS
    assert windowable(gemma, Window(8)) == tuple(full)
    plan = search_plan(
        gemma,
        ROWS,
        acceleration=1,
        kv_share=0.8,
        times=PlanTimes(times(), {"window 8": 1.0}),
        windows=(8,),
        replacements=["window"],
    )
    assert set(plan.windows) <= set(full)


def test_what_a_plan_reaches_is_measured_beside_what_was_predicted(
    cost: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    dense = RequestTimes(12e-3, 12e-3, 0, torch.zeros(1))
    monkeypatch.setattr(plan_times, "time_request", lambda *args, **kwargs: dense)
    plan = SkipPlan({Sublayer(0, "attn"): Window(8), Sublayer(1, "attn"): None})
    found = measured_acceleration(model, plan, "prefill", 40, rounds=6)
    assert found.median == found.low == found.high == pytest.approx(12 / 9)
    told = search_plan(
        model, ROWS, acceleration=1.05, times=times(), replacements=["gain"], measure=True
    ).about
    assert told["measured acceleration"] >= told["measured from"] > 1  # type: ignore[operator]
    assert cost["gain"] > 0
