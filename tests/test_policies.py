"""Each policy against worked numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from conftest import N_LAYERS, VOCAB, prompt, tiny_model

from adaskip import (
    POLICIES,
    AdaSkip,
    AdaskipError,
    EarlyExit,
    FixedSkipping,
    Importance,
    Phase,
    SkipDecode,
    SkipPlan,
    SkipPolicy,
    Step,
    Sublayer,
    UnifiedSkipping,
    UnsupportedCallError,
    learn_importance,
    skipping,
)
from adaskip.importance import Gain
from adaskip.plan import Scope, all_sublayers
from adaskip.policies import policy_class, register
from adaskip.recorders import StepStats

PREFILL = Step(Phase.PREFILL, request=0, index=0, tokens=30)


def decode(t: int) -> Step:
    """The decode step before which `t` have been taken."""
    return Step(Phase.DECODE, request=0, index=t + 1, tokens=1)


def layers(policy: SkipPolicy, n_layers: int, step: Step, scope: Scope = "e2e") -> list[int]:
    policy.scope = scope
    policy.bind(n_layers)
    plan = policy.plan(step)
    assert plan.layers("attn") == plan.layers("ffn")
    assert all(gain is None for gain in plan.gains.values())
    return list(plan.layers("attn"))


@pytest.mark.parametrize(
    ("n_layers", "n_skip", "expected"),
    [(8, 1, [7]), (8, 3, [5, 6, 7]), (32, 4, [28, 29, 30, 31]), (8, 0, []), (4, 4, [0, 1, 2, 3])],
)
def test_early_exit(n_layers: int, n_skip: int, expected: list[int]) -> None:
    assert layers(EarlyExit(n_skip), n_layers, PREFILL) == expected
    assert layers(EarlyExit(n_skip), n_layers, decode(9)) == expected


@pytest.mark.parametrize(
    ("n_layers", "n_skip", "expected"),
    [
        (8, 2, [1, 5]),
        (8, 3, [1, 3, 5]),
        (32, 4, [1, 9, 17, 25]),
        (32, 6, [1, 6, 11, 16, 21, 26]),
        (30, 4, [1, 8, 15, 22]),
        (8, 7, [1, 2, 3, 4, 5, 6, 7]),
        (8, 0, []),
    ],
)
def test_unified_skipping(n_layers: int, n_skip: int, expected: list[int]) -> None:
    assert layers(UnifiedSkipping(n_skip), n_layers, PREFILL) == expected


@pytest.mark.parametrize("n_layers", range(2, 34))
def test_unified_skipping_skips_exactly_its_budget(n_layers: int) -> None:
    for n_skip in range(n_layers):
        found = layers(UnifiedSkipping(n_skip), n_layers, PREFILL)
        assert len(set(found)) == n_skip
        assert all(1 <= layer < n_layers for layer in found)


def test_skip_decode_grows_over_the_horizon() -> None:
    # n(t) = min(3, ceil(t / 512 * 2) + 1): 1 at t = 0, 2 up to 256, 3 from 257 on.
    policy = SkipDecode(3, horizon=512)
    assert layers(policy, 8, PREFILL) == [1]
    assert layers(policy, 8, decode(0)) == [1]
    assert layers(policy, 8, decode(1)) == [1, 2]
    assert layers(policy, 8, decode(256)) == [1, 2]
    assert layers(policy, 8, decode(257)) == [1, 2, 3]
    assert layers(policy, 8, decode(5000)) == [1, 2, 3]
    assert layers(SkipDecode(3, horizon=40), 8, decode(20)) == [1, 2]
    assert layers(SkipDecode(3, horizon=40), 8, decode(21)) == [1, 2, 3]


def test_skip_decode_in_the_prefill_experiment_is_fixed() -> None:
    assert layers(SkipDecode(3), 8, PREFILL, "prefill") == [1, 2, 3]


def test_skip_decode_counts_decode_steps_after_chunked_prefill() -> None:
    step = Step(Phase.DECODE, request=0, index=5, tokens=1, decoded=0)
    assert layers(SkipDecode(3, horizon=4), 8, step) == [1]


def profile(n_layers: int, similarity: list[float]) -> Importance:
    sublayers = all_sublayers(n_layers)
    return Importance(
        similarity=dict(zip(sublayers, similarity, strict=True)),
        gain_norm={s: 2.0 + s.position for s in sublayers},
        gain_token={s: 1.0 + s.position / 100 for s in sublayers},
        fingerprint="a-model",
        n_requests=1,
        n_tokens=1,
    )


def test_ada_skip_takes_the_most_similar_from_one_pool() -> None:
    importance = profile(3, [0.9, 0.5, 0.9, 0.95, 0.9, 0.1])
    # Ties go to the lower layer, attention before FFN.
    assert [str(s) for s in importance.ranking()] == [
        "ffn1",
        "attn0",
        "attn1",
        "attn2",
        "ffn0",
        "ffn2",
    ]
    policy = AdaSkip(importance, 3, gain="token")
    policy.bind(3)
    assert policy.plan(PREFILL) == SkipPlan(
        {Sublayer(1, "ffn"): 1.03, Sublayer(0, "attn"): 1.0, Sublayer(1, "attn"): 1.02}
    )
    assert policy.threshold == 0.9
    norm = AdaSkip(importance, 1, gain="norm")
    norm.bind(3)
    assert norm.plan(PREFILL) == SkipPlan({Sublayer(1, "ffn"): 5.0})
    plain = AdaSkip(importance, 1, gain=None)
    plain.bind(3)
    assert plain.plan(PREFILL) == SkipPlan({Sublayer(1, "ffn"): None})


def ffn_stats(similarity: list[float], gain: list[float], rows: list[int]) -> StepStats:
    """Statistics of one decode step with these similarities and gains."""
    squared_out = torch.tensor(gain).square()[:, None, None]
    inner = (torch.tensor(similarity) * torch.tensor(gain))[:, None, None]
    return StepStats(
        tuple((layer, "ffn") for layer in rows), inner, torch.ones_like(inner), squared_out, None
    )


def test_an_answer_does_not_depend_on_its_neighbours_by_default() -> None:
    model, ids = tiny_model("llama"), prompt(12, batch=3)
    importance = learn_importance(model, [prompt(40)])
    greedy: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}
    with skipping(model, AdaSkip(importance, 3)) as session:
        together = model.generate(ids, **greedy)
        alone = [model.generate(row[None], **greedy)[0] for row in ids]
        assert torch.equal(together, torch.stack(alone))
        # And drafts are verified by the same plan; transformers 5.4 wants some end token.
        greedy["eos_token_id"] = min(set(range(3, VOCAB)) - set(alone[0].tolist()))
        drafted = model.generate(ids[:1], **greedy, prompt_lookup_num_tokens=3)
        assert torch.equal(drafted[0], alone[0])
    assert session.summary().phases["decode"].skipped == session.summary().phases["prefill"].skipped
    with (
        skipping(model, AdaSkip(importance, 3, online=True)),
        pytest.raises(UnsupportedCallError, match="Assisted decoding"),
    ):
        model.generate(ids[:1], **greedy, prompt_lookup_num_tokens=3)


# Of FFN 2 the window sees 1, 1.2 and 5: their mean, their median, or none.
@pytest.mark.parametrize(("gain", "expected"), [("norm", 2.4), ("token", 1.2), (None, None)])
def test_ada_skip_extends_after_the_window(gain: Gain | None, expected: float | None) -> None:
    policy = AdaSkip(
        profile(3, [0.9, 0.5, 0.2, 0.95, 0.3, 0.1]), 2, online=True, window=3, gain=gain
    )
    policy.bind(3)
    fixed = policy.plan(PREFILL)
    assert fixed.layers("attn") == (0,)
    assert fixed.layers("ffn") == (1,)
    for t, (similarity, own) in enumerate([(0.8, 1.0), (0.9, 1.2), (0.85, 5.0)]):
        assert policy.watch(decode(t)) == {"ffn"}
        assert policy.plan(decode(t)) == fixed
        policy.observe(decode(t), ffn_stats([similarity, 0.95], [1.0, own], [0, 2]))
    # Means: 0.85 and 0.95 against a threshold of 0.9.
    assert policy.watch(decode(3)) == frozenset()
    extended = policy.plan(decode(3))
    assert policy.extension.layers("ffn") == (2,)
    assert extended.gains[Sublayer(2, "ffn")] == (expected and pytest.approx(expected))
    assert extended.layers("attn") == (0,)
    # The next request begins without it, and a prefill never has it.
    assert policy.plan(PREFILL) == fixed
    assert policy.plan(Step(Phase.PREFILL, 1, 0, 9)) == fixed
    assert policy.plan(Step(Phase.DECODE, 1, 1, 1)) == fixed
    assert len(policy.extension) == 0


def test_ada_skip_offline_never_watches() -> None:
    for policy in (
        AdaSkip(profile(1, [0.5, 0.6]), 1, online=False),
        AdaSkip(profile(1, [1, 1]), 0),
    ):
        policy.bind(1)
        assert policy.watch(decode(0)) == frozenset()
        assert not policy.stepwise


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        (EarlyExit(5), "0 to 4"),
        (EarlyExit(-1), "cannot skip -1 full layers"),
        (UnifiedSkipping(4), "0 to 3"),
        (SkipDecode(4), "0 to 3"),
        (SkipDecode(2, horizon=0), "horizon is 0; it takes a whole number"),
        (SkipDecode(2, horizon=2.5), "horizon is 2.5"),  # type: ignore[arg-type]
        (SkipDecode(2, horizon="512"), "horizon is '512'"),  # type: ignore[arg-type]
        (EarlyExit(True), "cannot skip True full layers"),
        (EarlyExit(2.0), "cannot skip 2.0 full layers"),  # type: ignore[arg-type]
        (UnifiedSkipping("2"), "cannot skip '2' full layers"),  # type: ignore[arg-type]
        (AdaSkip(profile(4, [0.5] * 8), 9), "0 to 8"),
        (AdaSkip(profile(3, [0.5] * 6), 2), "3 layers, the model has 4"),
        (FixedSkipping(SkipPlan({Sublayer(4, "ffn"): None})), "ffn4"),
    ],
)
def test_budgets_that_do_not_fit(policy: SkipPolicy, message: str) -> None:
    with pytest.raises(AdaskipError, match=message):
        policy.bind(4)


def test_wrong_hyper_parameters() -> None:
    with pytest.raises(AdaskipError, match="'norm', 'token' or None"):
        AdaSkip(profile(1, [1, 1]), 1, gain="mean")  # type: ignore[arg-type]
    with pytest.raises(AdaskipError, match="window of 0"):
        AdaSkip(profile(1, [1, 1]), 1, window=0)

    for window in (2.5, "20", True):
        with pytest.raises(AdaskipError, match=f"window of {window!r}"):
            AdaSkip(profile(1, [1, 1]), 1, window=window)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["ADA", "LLMDROP", "LLMDROP_ATTN", "SHORTGPT"])
def test_an_importance_that_is_none_is_one_sentence(name: str) -> None:
    given: Any = policy_class(name)
    with (
        pytest.raises(AdaskipError, match=r"importance is a str; give what .* Importance\.load"),
        skipping(tiny_model("llama"), given("profile.json", 1)),
    ):
        pass


@pytest.mark.parametrize("ratio", ["1.2", float("nan"), float("inf"), 0.5, True, torch.tensor(1.2)])
def test_an_acceleration_that_is_none_is_refused_before_anything_is_measured(ratio: object) -> None:
    with pytest.raises(AdaskipError, match="is none; give a ratio of times, a number from 1 up"):
        AdaSkip(profile(1, [1, 1]), acceleration=ratio)  # type: ignore[arg-type]


def test_budgets_may_be_numpys() -> None:
    four, two = np.int64(4), np.int32(2)
    assert layers(EarlyExit(two), 8, PREFILL) == [6, 7]
    assert layers(UnifiedSkipping(four), 8, PREFILL) == [1, 3, 5, 7]
    decode_policy = SkipDecode(four, horizon=np.int64(512))
    assert layers(decode_policy, 8, decode(512)) == [1, 2, 3, 4]
    policy = AdaSkip(profile(4, [0.5] * 8), two, online=True, window=np.int64(3))
    policy.bind(4)
    assert len(policy.plan(PREFILL)) == 2
    assert AdaSkip(profile(1, [1, 1]), acceleration=np.float32(1.5)).acceleration == 1.5


def test_registry() -> None:
    assert {"EE", "SD", "US", "ADA", "SHORTGPT", "LLMDROP"} <= set(POLICIES)
    with pytest.raises(AdaskipError, match="Did you mean 'ADA'"):
        policy_class("AD")
    with pytest.raises(TypeError, match="already belongs to EarlyExit"):
        register("EE")(SkipDecode)
    with pytest.raises(TypeError, match="not a SkipPolicy"):
        register("X")(int)  # type: ignore[type-var]
    with pytest.raises(TypeError, match=r"Scripted has no fields to be set.*Write @"):
        register("X")(Scripted)
    with pytest.raises(TypeError, match="Fieldless has no budget"):
        register("X")(Fieldless)
    assert "X" not in POLICIES


class Scripted(SkipPolicy):
    """Skips FFN 1 in prefill and attention 2 in decode; notes the steps it is asked about."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def plan(self, step: Step) -> SkipPlan:
        self.steps.append(step)
        if step.phase is Phase.PREFILL:
            return SkipPlan({Sublayer(1, "ffn"): None})
        return SkipPlan({Sublayer(2, "attn"): None})


@dataclass
class Fieldless(SkipPolicy):
    """Has no budget that a script could give."""

    def plan(self, step: Step) -> SkipPlan:
        return SkipPlan()


class Observing(Scripted):
    """Takes what it is given, without saying what it wants."""

    def observe(self, step: Step, stats: StepStats) -> None:
        self.seen = [(step.phase, len(stats.rows)), *getattr(self, "seen", [])]


@pytest.mark.parametrize("scope", ["prefill", "decode", "e2e"])
def test_a_policy_that_observes_sees_all_that_runs_in_its_scope(scope: Scope) -> None:
    policy, model = Observing(), tiny_model("llama")
    with skipping(model, policy, scope=scope):
        model.generate(prompt(6), max_new_tokens=3, min_new_tokens=3, do_sample=False)
    one_less = 2 * N_LAYERS - 1
    seen = [(Phase.DECODE, one_less)] * 2 + [(Phase.PREFILL, one_less)]
    assert policy.seen == [each for each in seen if scope in ("e2e", each[0])]


@pytest.mark.parametrize(
    ("scope", "in_prefill", "in_decode"),
    [("prefill", ["ffn1"], ["ffn1"]), ("decode", [], ["attn2"]), ("e2e", ["ffn1"], ["attn2"])],
)
def test_scopes(scope: Scope, in_prefill: list[str], in_decode: list[str]) -> None:
    model = tiny_model("llama")
    plans: dict[Phase, list[list[str]]] = {Phase.PREFILL: [], Phase.DECODE: []}
    with skipping(model, Scripted(), scope=scope) as session:
        hook = model.register_forward_hook(
            lambda *_: plans[session.step.phase].append([str(s) for s in session.plan.gains])
        )
        for _ in range(2):
            model.generate(prompt(6), max_new_tokens=4, min_new_tokens=4, do_sample=False)
        hook.remove()
    assert plans == {Phase.PREFILL: [in_prefill] * 2, Phase.DECODE: [in_decode] * 6}


def test_unknown_scope() -> None:
    with (
        pytest.raises(AdaskipError, match="Did you mean 'decode'"),
        skipping(tiny_model("llama"), EarlyExit(1), scope="decoding"),  # type: ignore[arg-type]
    ):
        pass


@pytest.mark.parametrize("kind", ["norm", "token"])
def test_sequences_that_have_ended_do_not_decide(kind: Gain) -> None:
    policy = AdaSkip(profile(1, [0.9, 0.1]), 1, online=True, window=1, gain=kind)
    policy.bind(1)
    # Two sequences, the second one ended: similarity 0.95 and gain 1.5 against 0.1 and 9.
    gain = torch.tensor([[[1.5], [9.0]]])
    stats = StepStats(
        ((0, "ffn"),),
        torch.tensor([[[0.95], [0.1]]]) * gain,
        torch.ones(1, 2, 1),
        gain.square(),
        torch.tensor([[True], [False]]),
    )
    policy.plan(decode(0))
    policy.observe(decode(0), stats)
    assert policy.extension.gains == {Sublayer(0, "ffn"): pytest.approx(1.5)}
