"""What a session tells of itself: its summary, and its lines in the log."""

from __future__ import annotations

import logging

import pytest
import torch
from conftest import prompt, tiny_model
from transformers import DynamicCache

from adaskip import (
    EarlyExit,
    Linear,
    SkipDecode,
    SkipPlan,
    SkipPolicy,
    Step,
    Sublayer,
    Summary,
    Window,
    skipping,
)
from adaskip.growing_cache import GrowingCache, kv_tensors

PLAN = SkipPlan({Sublayer(0, "attn"): 0.5, Sublayer(1, "ffn"): None, Sublayer(2, "attn"): None})


def generated(family: str, plan: SkipPlan, *, scope: str = "e2e") -> tuple[Summary, int]:
    """The summary of two sequences of 40 and 9 more tokens, and the bytes their cache holds."""
    model = tiny_model(family)
    cache = GrowingCache(model.config)
    with skipping(model, plan, scope=scope) as session:
        model.generate(prompt(40, batch=2), max_new_tokens=10, past_key_values=cache)
    return session.summary(), sum(tensor.nbytes for tensor in kv_tensors(cache))


@pytest.mark.parametrize("scope", ["e2e", "decode"])
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "phi3"])
def test_kv_bytes_are_those_of_the_cache(family: str, scope: str) -> None:
    _, dense = generated(family, SkipPlan())
    summary, held = generated(family, PLAN, scope=scope)
    assert summary.dense_kv_bytes == dense
    assert summary.kv_bytes == held
    # A layer that slides has no room for more than its prompt's last tokens.
    assert held < dense or (scope == "decode" and held == dense)
    assert summary.kv_tokens == 2 * 49


@pytest.mark.parametrize("tokens", [3, 20])
def test_a_window_holds_its_tokens(tokens: int) -> None:
    model, cache = tiny_model("llama"), DynamicCache()
    window = SkipPlan({Sublayer(1, "attn"): Window(8, 2), Sublayer(2, "attn"): None})
    with skipping(model, window) as session:
        model(prompt(tokens), past_key_values=cache)
        model(prompt(1), past_key_values=cache)
    # 2 x 16 numbers of 4 bytes per token and layer.
    held = 2 * (tokens + 1) + min(tokens + 1, 10)
    assert session.summary().kv_bytes == 128 * held
    assert session.summary().phases["decode"].replaced == {"identity": 1, "window": 1}


def test_phases_are_counted_apart() -> None:
    linear = Linear(torch.zeros(32, 32), torch.zeros(32))
    plan = SkipPlan({**PLAN, Sublayer(3, "ffn"): linear})
    summary, _ = generated("llama", plan, scope="decode")
    prefill, decode = summary.phases["prefill"], summary.phases["decode"]
    assert (prefill.forwards, prefill.tokens, prefill.latest) == (1, 80, SkipPlan())
    assert (decode.forwards, decode.tokens, decode.latest) == (9, 18, plan)
    assert prefill.skipped == {"attn": 0, "ffn": 0}
    assert decode.skipped == {"attn": 2, "ffn": 2}
    assert decode.replaced == {"gain": 1, "identity": 2, "linear": 1}
    assert str(summary).splitlines() == [
        "prefill: 1 forward, 80 tokens; not computed: 0 of 8 sublayers (attn 0, ffn 0)",
        "decode: 9 forwards, 18 tokens; not computed: 4 of 8 sublayers (attn 2, ffn 2); in their "
        "place: gain 1, identity 2, linear 1",
        "KV of the largest of 1 request: 0.05 of 0.05 MB, 98 tokens",
    ]


def test_a_plan_that_changes_is_averaged() -> None:
    model, cache = tiny_model("llama"), DynamicCache()
    with skipping(model, SkipDecode(n_skip=3, horizon=4)) as session:
        model(prompt(5), past_key_values=cache)
        for _ in range(4):
            model(prompt(1), past_key_values=cache)
    # 1, 2, 2 and 3 layers, by ceil(t / 4 * 2) + 1.
    assert session.summary().phases["decode"].skipped == {"attn": 2, "ffn": 2}
    held = sum(tensor.nbytes for tensor in kv_tensors(cache))
    # What a layer holds of tokens before it was skipped is held to the end.
    assert session.summary().kv_bytes == held


def test_the_largest_request_counts_and_copies_go_on() -> None:
    model = tiny_model("llama")
    with skipping(model, PLAN) as session:
        assert str(session.summary()) == "no forward yet"
        for tokens in (5, 11, 7):
            model(prompt(tokens), past_key_values=DynamicCache())
        assert (session.summary().requests, session.summary().kv_tokens) == (3, 11)
        model(prompt(30), use_cache=False)
        assert session.summary().kv_tokens == 11
        cache = DynamicCache()
        model(prompt(20), past_key_values=cache)
        cache.crop(-15)
        model(prompt(1), past_key_values=cache)
        model(prompt(10), past_key_values=DynamicCache())
        assert session.summary().kv_tokens == 10


def test_what_a_cache_holds_after_turns_and_cuts() -> None:
    model = tiny_model("llama")

    class From(SkipPolicy):
        """Skips attention 1 once it is told to."""

        on = False

        def plan(self, step: Step) -> SkipPlan:
            return SkipPlan({Sublayer(1, "attn"): None}) if self.on else SkipPlan()

    def held(cache: DynamicCache) -> int:
        return sum(tensor.nbytes for tensor in kv_tensors(cache))

    policy, cache = From(), DynamicCache()
    with skipping(model, policy) as session, torch.no_grad():
        for tokens in (20, 1):
            model(prompt(tokens), past_key_values=cache)
        policy.on = True
        with session.prefill():
            model(prompt(6), past_key_values=cache)
        summary = session.summary()
        assert (summary.requests, summary.kv_tokens, summary.kv_bytes) == (2, 27, held(cache))
        assert summary.kv_bytes < summary.dense_kv_bytes
    with skipping(model, PLAN, scope="decode") as session, torch.no_grad():
        cache = DynamicCache()
        for tokens in (10, 1, 1, 1):
            model(prompt(tokens), past_key_values=cache)
        cache.crop(-8)
        model(prompt(1), past_key_values=cache)
        summary = session.summary()
        assert (summary.kv_tokens, summary.kv_bytes) == (6, held(cache))


def test_a_failed_forward_is_not_counted() -> None:
    model = tiny_model("llama")

    def fail(*_: object) -> None:
        raise RuntimeError("on purpose")

    with skipping(model, PLAN) as session:
        handle = model.model.norm.register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="on purpose"):
            model(prompt(5))
        handle.remove()
        assert session.summary().phases == {}
        assert session.summary().kv_bytes == 0


def test_entering_and_changes_are_logged(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_model("llama")
    # A command that ran before in this process has set levels of its own.
    for name in ("adaskip", "adaskip.entering", "adaskip.session"):
        caplog.set_level(logging.DEBUG, name)
    with skipping(model, EarlyExit(1)):
        model.generate(prompt(5), max_new_tokens=4)
    lines = [(record.levelname, record.getMessage()) for record in caplog.records]
    assert lines == [
        ("INFO", "Inside skipping(): LlamaForCausalLM of 4 layers, scope e2e, EarlyExit(n_skip=1)"),
        ("DEBUG", "request 0, prefill, forward 0: attn3, ffn3"),
    ]
