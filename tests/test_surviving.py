"""What a plan leaves: chunked into layers again, with the scale of the stream at each survivor."""

from __future__ import annotations

import pytest
from export_fixtures import A0, A1, A2, A3, F0, F1, F2, F3, random_plans
from hypothesis import given
from test_replacements import random_linear

from adaskip import PlanError, SkipPlan
from adaskip.export.surviving import Surviving, surviving
from adaskip.plan import all_sublayers
from adaskip.replacements import Window


def chunks(left: Surviving) -> list[tuple[str, ...]]:
    """The names of each layer's sublayers."""
    return [
        tuple(str(part.source) for part in (layer.attn, layer.ffn) if part is not None)
        for layer in left.layers
    ]


@pytest.mark.parametrize(
    ("skipped", "expected"),
    [
        ((), [("attn0", "ffn0"), ("attn1", "ffn1")]),
        # An attention takes the FFN right behind it, which is another layer's.
        ((F0, A1), [("attn0", "ffn1")]),
        ((F0,), [("attn0",), ("attn1", "ffn1")]),
        ((A0,), [("ffn0",), ("attn1", "ffn1")]),
        ((A1,), [("attn0", "ffn0"), ("ffn1",)]),
        ((A0, F0), [("attn1", "ffn1")]),
        ((F0, F1), [("attn0",), ("attn1",)]),
        ((A0, F0, F1), [("attn1",)]),
    ],
)
def test_chunks_of_two_layers(skipped: tuple, expected: list[tuple[str, ...]]) -> None:
    assert chunks(surviving(SkipPlan(dict.fromkeys(skipped)), 2)) == expected


@given(random_plans(gains=True, linears=True))
def test_every_survivor_keeps_its_place(plan: SkipPlan) -> None:
    left = surviving(plan, 4)
    sources = [part.source for _, part in left.parts()]
    gains = [s for s, r in plan.items() if isinstance(r, float)]
    assert sources == [s for s in all_sublayers(4) if s not in gains]
    assert all(layer.attn or layer.ffn for layer in left.layers)
    assert left.count("attn") == 4 - len(plan.layers("attn"))
    assert left.count("ffn") == 4 - len(plan.layers("ffn"))
    # As few layers as there can be: no FFN alone stands behind an attention alone.
    pairs = zip(left.layers, left.layers[1:], strict=False)
    assert not any(a.ffn is None and b.attn is None for a, b in pairs)


def test_scales_by_hand() -> None:
    """Gains 2 before the first sublayer that runs, 5 and 4 behind it."""
    left = surviving(SkipPlan({A0: 2.0, F1: 5.0, A2: None, A3: 4.0}), 4)
    assert left.anchor == 2.0
    scales = {str(part.source): part.scale for _, part in left.parts()}
    # 2 / 2 until F1, then 2 / (2 * 5), then 2 / (2 * 5 * 4).
    assert scales == pytest.approx(
        {"ffn0": 1.0, "attn1": 1.0, "ffn2": 1 / 5, "ffn3": 1 / 20}, rel=1e-12
    )
    assert left.final_scale == pytest.approx(1 / 20, rel=1e-12)


def test_the_anchor_is_before_what_has_a_norm() -> None:
    """A linear map reads the stream's direction, however small it is."""
    left = surviving(SkipPlan({A0: 2.0, F0: random_linear(0), A1: 3.0}), 3)
    assert left.anchor == 6.0
    assert [part.scale for _, part in left.parts()] == [3.0, 1.0, 1.0, 1.0]


def test_whole_layers_are_seen() -> None:
    assert surviving(SkipPlan({F1: None, A2: None}), 4).is_whole
    assert surviving(SkipPlan(), 4).is_whole
    assert not surviving(SkipPlan({F1: None}), 4).is_whole
    linear = surviving(SkipPlan({F1: random_linear(0)}), 4)
    assert linear.has_linears
    assert not linear.is_whole


@pytest.mark.parametrize(
    ("plan", "said"),
    [
        (SkipPlan(dict.fromkeys((A0, A1, A2, A3))), "leaves no attention"),
        (SkipPlan(dict.fromkeys((A0, A1, A2, A3, F0, F1, F2, F3))), "leaves no attention"),
        (SkipPlan({A1: Window(8)}), "puts a Window in the place of attn1; a checkpoint"),
        (SkipPlan({A1: 0.0}), "gain of attn1 is 0; only positive"),
        (SkipPlan({F1: -1.5}), "gain of ffn1 is -1.5; only positive"),
    ],
)
def test_refusals(plan: SkipPlan, said: str) -> None:
    with pytest.raises(PlanError, match=said):
        surviving(plan, 4)
