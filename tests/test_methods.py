"""The field's methods, each against a few lines written by hand on a tiny model."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from conftest import N_LAYERS, VOCAB, prompt, tiny_model
from test_learning import must_not_run
from test_search import loss_of, times
from torch.nn.functional import cosine_similarity, cross_entropy
from transformers import PreTrainedModel

from adaskip import (
    AdaskipError,
    Importance,
    Linear,
    ProfileError,
    RunError,
    SkipPlan,
    Sublayer,
    learn_importance,
    search_plan,
    skipping,
)
from adaskip.cli.kept_plans import may_hold
from adaskip.fitting import fit_linears
from adaskip.methods import METHODS, make_plan, method, method_names
from adaskip.plan import Phase, Step, all_sublayers, whole_layers
from adaskip.policies import POLICIES, SkipPolicy
from adaskip.search.cross_fitting import for_all
from adaskip.search.journal import Journal
from adaskip.search.losses import Losses
from adaskip.search.menu import Option
from adaskip.search.trials import Trials
from adaskip.streams import Sublayers, measuring
from adaskip.sublayer_times import PlanTimes, SublayerTimes

PREFILL = Step(Phase.PREFILL, request=0, index=0, tokens=9)
PROMPTS = [prompt(21, seed=5), prompt(14, seed=6)]


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


@pytest.fixture
def unused() -> PreTrainedModel:
    """A model that must not run, with positions for the usual windows."""
    return must_not_run(tiny_model("llama", max_position_embeddings=1024))


@pytest.fixture
def importance(model: PreTrainedModel) -> Importance:
    return learn_importance(model, PROMPTS)


def planned(policy: SkipPolicy) -> SkipPlan:
    policy.bind(N_LAYERS)
    return policy.plan(PREFILL)


@torch.no_grad()
def streams(model: PreTrainedModel, ids: torch.Tensor) -> list[torch.Tensor]:
    """The stream before every layer and behind the last one, by hooks: [tokens, hidden]."""
    found: list[torch.Tensor] = []
    layers: Any = model.model.layers
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: found.append(args[0][0]))
        for layer in layers
    ]
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, a: found.append(a[0][0])))
    model(ids)
    for hook in hooks:
        hook.remove()
    return found


def test_short_gpt_skips_the_layers_of_least_block_influence(
    model: PreTrainedModel, importance: Importance
) -> None:
    influence = torch.zeros(N_LAYERS)
    for ids in PROMPTS:
        h = streams(model, ids)
        for layer in range(N_LAYERS):
            cosine = cosine_similarity(h[layer], h[layer + 1], dim=-1)
            influence[layer] += (1 - cosine).mean() / len(PROMPTS)
    assert [1 - s for s in importance.layer_similarity] == pytest.approx(
        influence.tolist(), abs=1e-6
    )
    order = influence.argsort().tolist()
    for n_skip in range(N_LAYERS + 1):
        expected = whole_layers(order[:n_skip])
        assert planned(POLICIES["SHORTGPT"](importance=importance, n_skip=n_skip)) == expected


def test_a_profile_without_whole_layers_is_refused(importance: Importance) -> None:
    policy = POLICIES["SHORTGPT"](importance=replace(importance, layer_similarity=()), n_skip=1)
    with pytest.raises(ProfileError, match="tells nothing of whole layers"):
        policy.bind(N_LAYERS)


@pytest.mark.parametrize(
    ("name", "kinds"),
    [("LLMDROP", ("attn", "ffn")), ("LLMDROP_ATTN", ("attn",)), ("LLMDROP_FFN", ("ffn",))],
)
def test_llm_drop_skips_the_most_similar_of_its_kinds(
    importance: Importance, name: str, kinds: tuple[str, ...]
) -> None:
    kept = [s for s in all_sublayers(N_LAYERS) if s.kind in kinds]
    order = sorted(kept, key=lambda s: 1 - importance.similarity[s])
    for n_skip in (0, 1, 3, len(kept)):
        policy = POLICIES[name](importance=importance, n_skip=n_skip)
        assert planned(policy) == SkipPlan(dict.fromkeys(order[:n_skip]))
    with pytest.raises(AdaskipError, match=f"from 0 to {len(kept)}"):
        POLICIES[name](importance=importance, n_skip=len(kept) + 1).bind(N_LAYERS)


@pytest.mark.parametrize("name", ["SHORTGPT", "LLMDROP", "LLMDROP_ATTN", "LLMDROP_FFN"])
def test_what_was_learned_has_to_be_of_the_model(importance: Importance, name: str) -> None:
    policy = POLICIES[name](importance=importance, n_skip=1)
    with pytest.raises(AdaskipError, match="of a model of 4 layers, the model has 5"):
        policy.bind(5)
    other = tiny_model("llama", seed=1)
    with (
        pytest.raises(ProfileError, match="learn a profile of this model"),
        skipping(other, policy),
    ):
        pass


ROWS = [(prompt(60, seed=7), prompt(9, seed=8)), (prompt(41, seed=9), prompt(6, seed=10))]
TIMES = PlanTimes(times(attn=2.0, ffn=1.0, other=3.0), {"linear": 0.5})


def plans(model: PreTrainedModel, name: str, n: int, **options: Any) -> list[dict[Sublayer, Any]]:
    """The first plans of a method, smallest first."""
    with measuring(model):
        losses = Losses(Sublayers(model), ROWS, METHODS[name].measure)
        growth = METHODS[name].grow(Trials(losses, None, Journal(None, {})), **options)
        return [for_all(plan) for plan in islice(growth, n)]


@torch.no_grad()
def answer_nll(model: PreTrainedModel, skipped: Iterable[Sublayer]) -> float:
    """Negative log-likelihood of the answers, by whole forwards."""
    total = 0.0
    for question, answer in ROWS:
        ids = torch.cat([question, answer], dim=1)
        with skipping(model, SkipPlan(dict.fromkeys(skipped))):
            logits = model(ids).logits[0, question.shape[1] - 1 : -1]
        total += float(cross_entropy(logits, answer[0], reduction="sum"))
    return total


@pytest.mark.parametrize("name", ["SLEB", "BLOCKPRUNER"])
def test_what_is_taken_away_leaves_the_answers_most_likely(
    model: PreTrainedModel, name: str
) -> None:
    sublayers = all_sublayers(N_LAYERS)
    layers = [(Sublayer(i, "attn"), Sublayer(i, "ffn")) for i in range(N_LAYERS)]
    parts = layers if name == "SLEB" else [(sublayer,) for sublayer in sublayers]
    gone: list[Sublayer] = []
    made = plans(model, name, 3, exact=True)
    assert len(made) == 3
    for plan in made:
        losses = {part: answer_nll(model, [*gone, *part]) for part in parts}
        best = min(losses, key=losses.__getitem__)
        gone += best
        parts = [part for part in parts if part != best]
        assert plan == dict.fromkeys(sorted(gone))


@pytest.mark.parametrize("name", ["SLEB", "BLOCKPRUNER"])
def test_lazily_the_first_is_the_same_and_the_others_are_near(
    model: PreTrainedModel, name: str
) -> None:
    exact, lazy = plans(model, name, 4, exact=True), plans(model, name, 4)
    assert lazy[0] == exact[0]
    for one, other in zip(exact, lazy, strict=True):
        assert answer_nll(model, other) <= 1.2 * answer_nll(model, one)


class Interacting:
    """Calibration rows under which B makes up for A, and D is needed by nothing but A.

    Attributes:
        looked: parts that were looked at, under which plan.
    """

    names: ClassVar = dict(zip(all_sublayers(2), "ABCD", strict=True))

    def __init__(self) -> None:
        self.losses = SimpleNamespace(order=[*self.names], plan={})
        self.alone: dict[Sublayer, tuple[str, float]] = {}
        self.looked: list[str] = []

    def gone(self, options: Iterable[Option] = ()) -> str:
        return "".join(self.names[s] for s in [*self.losses.plan, *(o.sublayer for o in options)])

    def loss(self, options: Iterable[Option] = ()) -> float:
        gone = self.gone(options)
        self.looked += [gone] if options else []
        lost = sum({"A": 1.0, "B": 2.0, "C": 3.0, "D": 4.0}[name] for name in gone)
        return lost + 8.0 * ({*"AB"} <= {*gone}) - 3.5 * ({*"AD"} <= {*gone})

    def accept(self, options: Iterable[Option]) -> None:
        self.losses.plan |= {option.sublayer: None for option in options}

    def say(self, text: str) -> None:
        pass


@pytest.mark.parametrize(
    ("exact", "order", "looked"),
    [
        # By what each loses alone, B would be second. That D loses little without A, nobody saw.
        (False, "ACDB", ["A", "B", "C", "D", "AB", "AC", "ACD", "ACDB"]),
        (True, "ADCB", ["A", "B", "C", "D", "AB", "AC", "AD", "ADB", "ADC", "ADCB"]),
    ],
)
def test_what_comes_to_the_top_is_looked_at_anew(
    order: str, looked: list[str], *, exact: bool
) -> None:
    rows = Interacting()
    taken = [*METHODS["BLOCKPRUNER"].grow(rows, exact=exact)]
    assert [len(plan) for plan in taken] == [1, 2, 3, 4]
    assert rows.gone() == order
    assert rows.looked == looked
    assert [lost for _, lost in rows.alone.values()] == [1.0, 2.0, 3.0, 4.0]


def test_prune_and_comp_looks_again_at_what_is_left(model: PreTrainedModel) -> None:
    gains: dict[int, float] = {}
    made = plans(model, "PRUNECOMP", 3)
    assert len(made) == 3
    for plan in made:
        # The same model by hand: a layer that is gone scales the stream.
        similarity, ratio = torch.zeros(N_LAYERS), {}
        inputs = [torch.cat(row, dim=1)[:, :-1] for row in ROWS]
        whole = SkipPlan(
            {Sublayer(i, "attn"): gain for i, gain in gains.items()}
            | {Sublayer(i, "ffn"): None for i in gains}
        )
        with skipping(model, whole):
            streams_of = [streams(model, ids) for ids in inputs]
        for layer in range(N_LAYERS):
            pairs = [(h[layer], h[layer + 1]) for h in streams_of]
            similarity[layer] = sum(cosine_similarity(x, y, dim=-1).mean() for x, y in pairs)
            ratios = torch.cat([y.norm(dim=-1) / x.norm(dim=-1) for x, y in pairs])
            ratio[layer] = float(ratios.median())
        similarity[list(gains)] = -float("inf")
        chosen = int(similarity.argmax())
        gains[chosen] = ratio[chosen]
        assert {s.layer for s in plan} == set(gains)
        for layer, gain in gains.items():
            # The median of an even number of tokens is a matter of taste.
            assert plan[Sublayer(layer, "attn")] == pytest.approx(gain, rel=2e-2)
            assert plan[Sublayer(layer, "ffn")] is None


def test_an_acceleration_that_is_reached_exactly_is_reached(model: PreTrainedModel) -> None:
    seconds = dict.fromkeys(all_sublayers(N_LAYERS), 0.1)
    given = SublayerTimes(1.0, seconds, Phase.PREFILL, 40, 1)
    # Eight times 0.1 add up to less than 0.8.
    assert given.speedup(seconds) < 5
    plan = make_plan(model, ROWS, "EE", acceleration=5, times=given)
    assert set(plan) == set(seconds)


def test_nbl_takes_the_attentions_of_highest_canonical_correlations(
    model: PreTrainedModel,
) -> None:
    inputs = [torch.cat(row, dim=1)[:, :-1] for row in ROWS]
    bounds: dict[Sublayer, float] = {}
    with measuring(model):
        runs = Sublayers(model)
        begun = [runs.begin({"input_ids": ids}) for ids in inputs]
        xs, calls = [x for x, _ in begun], [given for _, given in begun]
        for sublayer in all_sublayers(N_LAYERS):
            ys = [runs.run(sublayer, x, given) for x, given in zip(xs, calls, strict=True)]
            if sublayer.kind == "attn":
                x, y = (torch.cat([t[0] for t in s]).double().numpy() for s in (xs, ys))
                n, d = x.shape
                x, y = x - x.mean(0), y - y.mean(0)
                cxx, cyy, cyx = x.T @ x / (n - 1), y.T @ y / (n - 1), y.T @ x / (n - 1)
                for c in (cxx, cyy):
                    c += 1e-3 * np.trace(c) / d * np.eye(d)
                half = [np.linalg.inv(sqrtm(c)) for c in (cyy, cxx)]
                rho = np.linalg.svd(half[0] @ cyx @ half[1])[1]
                bounds[sublayer] = float((1 - rho**2).sum())
            xs = ys
    order = sorted(bounds, key=bounds.__getitem__)
    made = plans(model, "NBL", 4)
    assert [set(plan) for plan in made] == [set(order[: n + 1]) for n in range(4)]
    fitted = fit_linears(model, inputs, [order[0]])
    first, alone = made[0][order[0]], fitted[order[0]]
    assert isinstance(first, Linear)
    assert isinstance(alone, Linear)
    torch.testing.assert_close(first.weight, alone.weight, rtol=1e-3, atol=1e-4)


def sqrtm(matrix: Any) -> Any:
    """The square root of a symmetric positive matrix."""
    values, vectors = np.linalg.eigh(matrix)
    return vectors @ np.diag(np.sqrt(values)) @ vectors.T


def test_every_method_is_in_these_tests() -> None:
    tested = {"SEARCH", "SLEB", "BLOCKPRUNER", "PRUNECOMP", "NBL"}
    tested |= {"SHORTGPT", "LLMDROP", "LLMDROP_ATTN", "LLMDROP_FFN", "EE", "SD", "US", "ADA"}
    assert set(method_names()) == tested
    with pytest.raises(TypeError, match="already belongs"):
        method("SLEB")(METHODS["NBL"].grow)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"phase": "nonsense"}, "Unknown phase 'nonsense'"),
        ({"phase": "decode"}, r"of prefill at 40 tokens, batch 1; asked for is decode at 40"),
        ({"context": 9000}, r"asked for is prefill at 9000 tokens, batch 1\. Give times"),
        ({"batch": 2}, "batch 2"),
        (
            {
                "times": PlanTimes(
                    SublayerTimes(9.0, dict.fromkeys(all_sublayers(3), 1.0), Phase.PREFILL, 40)
                )
            },
            "of 3 layers, this model has 4",
        ),
        ({"times": 7}, "The times are a int"),
    ],
)
@pytest.mark.parametrize("name", ["EE", "SEARCH"])
def test_times_of_something_else_are_refused(
    model: PreTrainedModel, name: str, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(AdaskipError, match=said):
        make_plan(model, ROWS, name, acceleration=1.2, **{"times": TIMES, **changes})


@pytest.mark.parametrize("name", method_names())
def test_every_method_makes_the_least_plan_that_is_fast_enough(
    model: PreTrainedModel, name: str
) -> None:
    options: Any = {"importance": learn_importance(model, [row[0] for row in ROWS])}
    if name == "SEARCH":
        menu = PlanTimes(
            TIMES.dense, {"linear": 0.1} | {f"window {size}": 1.5 for size in (64, 128, 256)}
        )
        # With positions for the usual windows.
        model = tiny_model("llama", max_position_embeddings=1024)
        found = make_plan(model, ROWS, name, acceleration=1.3, times=menu)
        assert found == search_plan(model, ROWS, acceleration=1.3, times=menu)
        assert found.about["method"] == "SEARCH"
        return
    plan = make_plan(model, ROWS, name, acceleration=1.3, times=TIMES, **options)
    about: Any = plan.about
    assert about["method"] == name
    assert about["predicted acceleration"] == pytest.approx(TIMES.speedup(plan))
    assert about["predicted acceleration"] >= 1.3
    in_sample = pytest.approx(loss_of(model, plan, ROWS), rel=1e-3)
    if name == "NBL":
        # Each row is judged by maps that were fitted on the others, as in a search.
        assert about["loss"] > in_sample.expected
    else:
        assert about["loss"] == in_sample
    plan.check_model(model)
    kinds = {"gain": float, "linear": Linear}
    found = {k: any(isinstance(r, kind) for r in plan.values()) for k, kind in kinds.items()}
    assert may_hold(Namespace(), name) == found
    # One step less is too slow.
    step = 2 if name in {"EE", "SD", "US", "SHORTGPT", "SLEB", "PRUNECOMP"} else 1
    assert len(plan) % step == 0
    smaller = make_plan(model, ROWS, name, acceleration=1.01, times=TIMES, **options)
    assert len(smaller) == step
    assert make_plan(model, ROWS, name, acceleration=1, times=TIMES, **options) == SkipPlan()
    with pytest.raises(AdaskipError, match=r"acceleration of 50 .* its best is"):
        make_plan(model, ROWS, name, acceleration=50, times=TIMES, **options)


def test_a_method_goes_on_from_its_record_towards_any_acceleration(
    model: PreTrainedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    record, options = tmp_path / "sleb.jsonl", {"times": TIMES}
    less = make_plan(model, ROWS, "SLEB", acceleration=1.2, record=record, **options)
    whole = make_plan(model, ROWS, "SLEB", acceleration=1.8, **options)
    looked, compute = [0], Losses.loss

    def counted(self: Losses, *args: Any, **kwargs: Any) -> float:
        looked[0] += 1
        return compute(self, *args, **kwargs)

    monkeypatch.setattr(Losses, "loss", counted)
    assert make_plan(model, ROWS, "SLEB", acceleration=1.2, record=record, **options) == less
    # Only the losses that it tells: of its one layer on the way, and at the end.
    assert looked[0] == 2
    more = make_plan(model, ROWS, "SLEB", acceleration=1.8, record=record, **options)
    assert more == whole
    assert more.about == whole.about
    # Other methods keep theirs there, too.
    other = make_plan(model, ROWS, "BLOCKPRUNER", acceleration=1.2, record=record, **options)
    looked[0] = 0
    assert (
        make_plan(model, ROWS, "BLOCKPRUNER", acceleration=1.2, record=record, **options) == other
    )
    # Of two sublayers on the way, and at the end.
    assert looked[0] == 1 + len(other) == 3
    with pytest.raises(RunError, match=r"calibration: .* then, .* now"):
        make_plan(model, ROWS[:1], "SLEB", acceleration=1.2, record=record, **options)


@pytest.mark.parametrize("method", ["SEARCH", "NBL", "ADA"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calibration": [("a", "b")]}, "A calibration row is of texts"),
        ({"calibration": [*ROWS, (prompt(5), [])]}, "no prompt or no answer tokens"),
        ({"calibration": [(prompt(5)[:, :0], [3])]}, "no prompt or no answer tokens"),
        ({"calibration": [(prompt(5, batch=2), [3, 4])]}, r"torch.int64 of shape \[2, 5\]"),
        ({"calibration": [(prompt(5), [5.7, 2.0])]}, r"torch.float32 of shape \[2\]"),
        ({"calibration": [(prompt(5), [True, False])]}, r"torch.bool of shape \[2\]"),
        ({"calibration": [(prompt(5)[None], [3])]}, r"of shape \[1, 1, 5\]; give whole ids"),
        ({"calibration": [*ROWS, (prompt(5), [VOCAB])]}, f"but the model knows 0 to {VOCAB - 1}"),
        ({"calibration": 0 * ROWS}, "No calibration row"),
        ({"batch": 0}, "batch is 0; give a whole number"),
        ({"context": 0}, "context is 0; give a whole number"),
        ({"context": 9.5}, r"context is 9\.5"),
        ({"phase": "both"}, "Unknown phase 'both'"),
        ({"times": PlanTimes(TIMES.dense)}, "No time of '.*' was measured; there is one of gain"),
    ],
)
def test_what_no_method_takes_is_refused_before_the_model_runs(
    unused: PreTrainedModel, tmp_path: Path, method: str, options: dict[str, Any], message: str
) -> None:
    if method == "ADA" and "times" in options:
        pytest.skip("It needs times of nothing but sublayers.")
    record = tmp_path / "record.jsonl"
    given: dict[str, Any] = {"calibration": ROWS, "record": record} | options
    with pytest.raises(AdaskipError, match=message):
        make_plan(unused, given.pop("calibration"), method, **given)
    assert not record.exists()


@pytest.mark.parametrize("method", ["SEARCH", "SLEB", "ADA"])
def test_a_record_of_something_else_is_refused_before_the_model_runs(
    unused: PreTrainedModel, tmp_path: Path, method: str
) -> None:
    record = tmp_path / "record.jsonl"
    Journal(record, {"model": "another"})
    with pytest.raises(RunError, match="is of another search"):
        make_plan(unused, ROWS, method, record=record)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "SLEP"}, "Unknown method 'SLEP'. Did you mean 'SLEB'"),
        ({"method": "PLAN"}, "Unknown method 'PLAN'"),
        ({"acceleration": 0}, "give a ratio of times"),
        ({"calibration": []}, "No calibration row"),
        ({"method": "NBL", "exact": True}, "exact=True is for BLOCKPRUNER, SLEB; NBL is always"),
        ({"method": "NBL", "calibration": [(prompt(20), [3, 4])]}, "at least 33 tokens"),
    ],
)
def test_what_no_method_can_make(
    model: PreTrainedModel, options: dict[str, Any], message: str
) -> None:
    given: dict[str, Any] = {"calibration": ROWS, "method": "SLEB", "times": TIMES} | options
    with pytest.raises(AdaskipError, match=message):
        make_plan(model, given.pop("calibration"), given.pop("method"), **given)
