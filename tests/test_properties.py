"""Properties of plans, policies, phases, truncation and merging that hold for any input."""

from __future__ import annotations

import json
import tempfile
from math import ceil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings, strategies as st
from run_fixtures import Named, named, save_checkpoint
from transformers import AutoTokenizer, DynamicCache, PreTrainedTokenizerBase

from adaskip import AdaSkip, EarlyExit, SkipDecode, SkipPlan, Step, Sublayer, UnifiedSkipping
from adaskip.errors import AdaskipError
from adaskip.importance import Importance
from adaskip.plan import Phase, all_sublayers, whole_layers
from adaskip.requests import Requests
from adaskip.runs.store import Store
from adaskip.tasks.prompts import build_prompt
from adaskip.tasks.spec import Row, task_spec

quick = settings(max_examples=60, deadline=None)
SUBLAYERS = st.builds(Sublayer, st.integers(0, 9), st.sampled_from(["attn", "ffn"]))
PLANS = st.builds(SkipPlan, st.dictionaries(SUBLAYERS, st.none() | st.floats(0, 2)))


@quick
@given(PLANS, PLANS, PLANS)
def test_plans_join_like_mappings(one: SkipPlan, two: SkipPlan, three: SkipPlan) -> None:
    both = one | two
    assert set(both.gains) == set(one.gains) | set(two.gains)
    assert all(both.gains[s] == two.gains[s] for s in two.gains)
    assert (one | two) | three == one | (two | three)
    assert one | SkipPlan() == one
    assert hash(one | one) == hash(one)
    assert list(both.gains) == sorted(both.gains)
    assert len(both) == len(both.layers("attn")) + len(both.layers("ffn"))


@quick
@given(st.integers(1, 40), st.data(), st.integers(0, 1000), st.integers(1, 600))
def test_layer_policies_keep_their_budget(
    n_layers: int, data: st.DataObject, decoded: int, horizon: int
) -> None:
    n_skip = data.draw(st.integers(0, n_layers - 1))
    step = Step(Phase.DECODE, 0, decoded + 1, 1, decoded)
    for policy in (EarlyExit(n_skip), UnifiedSkipping(n_skip), SkipDecode(n_skip, horizon)):
        policy.bind(n_layers)
        plan = policy.plan(step)
        layers = plan.layers("attn")
        assert plan == whole_layers(layers)
        assert all(0 <= layer < n_layers for layer in layers)
        if isinstance(policy, SkipDecode):
            wanted = min(n_skip, ceil(decoded / horizon * (n_skip - 1)) + 1)
            assert layers == tuple(range(1, wanted + 1))
        else:
            assert len(layers) == n_skip
    over = data.draw(st.integers(n_layers + 1, 2 * n_layers + 2))
    for policy in (EarlyExit(over), UnifiedSkipping(over), SkipDecode(over)):
        with pytest.raises(AdaskipError, match=f"cannot skip {over} full layers"):
            policy.bind(n_layers)


@quick
@given(st.lists(st.sampled_from([0.1, 0.5, 0.9]), min_size=2, max_size=24), st.data())
def test_adaskip_takes_the_most_similar_sublayers(values: list[float], data: st.DataObject) -> None:
    values = values[: len(values) // 2 * 2]
    sublayers = all_sublayers(len(values) // 2)
    similarity = dict(zip(sublayers, values, strict=True))
    ones = dict.fromkeys(sublayers, 1.0)
    importance = Importance(similarity, ones, ones, "f", 1, 1)
    n_skip = data.draw(st.integers(0, len(values)))
    policy = AdaSkip(importance, n_skip, online=False)
    policy.bind(importance.n_layers)
    skipped = set(policy.plan(Step(Phase.PREFILL, 0, 0, 5)).gains)
    # Worked out without sorting: so many others come before it.
    for index, own in enumerate(sublayers):
        before = sum(
            v > values[index] or (v == values[index] and i < index) for i, v in enumerate(values)
        )
        assert (own in skipped) == (before < n_skip)


@quick
@given(st.lists(st.tuples(st.integers(0, 2), st.integers(1, 5)), max_size=30))
def test_phases_of_requests_that_take_turns(forwards: list[tuple[int, int]]) -> None:
    requests = Requests(lambda *_: None, lambda _: None)
    caches = [DynamicCache() for _ in range(3)]
    past, decoding, index = [0] * 3, [False] * 3, [0] * 3
    for number, tokens in forwards:
        request, step = requests.look(caches[number], past[number], tokens)
        requests.advance(caches[number], request, step, past[number])
        decoding[number] |= past[number] > 0 and tokens == 1
        assert (step.phase is Phase.DECODE) == decoding[number]
        assert (step.index, step.tokens) == (index[number], tokens)
        past[number] += tokens
        index[number] += 1
        assert requests.of(caches[number]) is request
        assert request.tokens == past[number]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    loaded: Any = AutoTokenizer
    made: PreTrainedTokenizerBase = loaded.from_pretrained(
        save_checkpoint(tmp_path_factory.mktemp("tokenizer"))
    )
    return made


@quick
@given(context=st.text(max_size=300), max_length=st.integers(2, 400))
def test_truncation_keeps_both_ends(
    tokenizer: PreTrainedTokenizerBase, context: str, max_length: int
) -> None:
    spec = task_spec("sample_qa")
    row = Row("1", "sample_qa", "what?", context, ("a",), 1, "en")
    made = build_prompt(row, spec, tokenizer, max_length=max_length, template=None)
    whole = f"{context}\n\nwhat?".encode()
    assert made.tokens_before == len(whole)  # one token per byte
    assert made.truncated == (len(whole) > max_length)
    assert made.tokens_after == len(made.input_ids)
    if not made.truncated:
        assert made.text.encode() == whole
        return
    half = max_length // 2
    ends = [part.decode(errors="replace") for part in (whole[:half], whole[len(whole) - half :])]
    assert made.text == "".join(ends)


@quick
@given(st.data())
def test_rows_from_anywhere_are_merged_once_and_in_order(data: st.DataObject) -> None:
    order = [str(n) for n in range(data.draw(st.integers(0, 8)))]
    some = st.lists(st.sampled_from(order), unique=True) if order else st.just([])
    main, shares = data.draw(some), data.draw(st.lists(some, max_size=3))
    torn = data.draw(st.sampled_from([b"", b'{"id": "0"', b"\xff"]))
    with tempfile.TemporaryDirectory() as name:
        store = Store(Path(name) / "a.jsonl", Named)
        store.append(named(*main))
        for rank, share in enumerate(shares):
            store.shard(rank).append(named(*share))
            with store.shard(rank).path.open("ab") as file:
                file.write(torn)
        with store.path.open("ab") as file:
            file.write(torn)
        there = set(main).union(*shares)
        expected = named(*(row for row in order if row in there))
        assert store.merge(order) == expected == store.rows()
        assert store.merge(order) == expected
        lines = [json.loads(line) for line in store.path.read_text().splitlines()]
        assert lines == [row.as_dict() for row in expected]
