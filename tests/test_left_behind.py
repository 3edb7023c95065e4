"""What fails, goes on too long, or is done in the wrong place leaves nothing wrong behind."""

from __future__ import annotations

import contextlib
import threading
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from accelerate import dispatch_model
from conftest import N_LAYERS, prompt, reset_empties, tiny_model
from export_fixtures import byte_tokenizer
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel, StaticCache

from adaskip import (
    AdaSkip,
    AdaskipError,
    EarlyExit,
    FixedSkipping,
    GrowingCache,
    Linear,
    PlanError,
    ProfileError,
    SkipPlan,
    SkipPolicy,
    Step,
    Sublayer,
    UnsupportedCallError,
    UnsupportedModelError,
    Window,
    distill_plan,
    export_checkpoint,
    fit_linears,
    learn_importance,
    make_plan,
    measured_times,
    search_plan,
    skipping,
    turnstile,
)
from adaskip.cache_name import CACHE
from adaskip.plan import EMPTY_PLAN, Phase, all_sublayers
from adaskip.recorders import Recorder, Span
from adaskip.session import Session
from adaskip.sublayer_times import SublayerTimes

ATTENTION = SkipPlan({Sublayer(1, "attn"): None})
FFN = SkipPlan({Sublayer(2, "ffn"): None})
WINDOW = SkipPlan({Sublayer(2, "attn"): Window(8, 2)})
ROWS = [([5, 6, 7, 8], [9, 10])]


@pytest.fixture
def model() -> PreTrainedModel:
    return tiny_model("llama")


def logits(model: PreTrainedModel, ids: Tensor, cache: Any = None) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(input_ids=ids, past_key_values=cache).logits
    return found


def test_a_profile_of_another_model_makes_no_plan_and_no_checkpoint(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    foreign = learn_importance(tiny_model("llama", seed=1), [prompt(12)])
    with pytest.raises(ProfileError):
        export_checkpoint(model, None, AdaSkip(foreign, n_skip=1), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    with pytest.raises(ProfileError):
        make_plan(model, ROWS, "ADA", importance=foreign, acceleration=1.01)


def test_what_measures_the_model_is_refused_inside_of_the_block(
    model: PreTrainedModel, tmp_path: Path
) -> None:
    with skipping(model, ATTENTION):
        for act in (
            lambda: measured_times(model, "prefill", 8, folder=tmp_path),
            lambda: fit_linears(model, [prompt(12)], [Sublayer(1, "ffn")]),
            lambda: search_plan(model, ROWS, replacements=("gain",)),
        ):
            with pytest.raises(UnsupportedCallError, match=r"inside skipping\(\) already; do this"):
                act()
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("plan", [WINDOW, ATTENTION], ids=["window", "attention"])
def test_a_forward_that_failed_is_no_part_of_the_request(
    model: PreTrainedModel, plan: SkipPlan, static: bool
) -> None:
    def cache() -> Any:
        return StaticCache(model.config, max_cache_len=40) if static else DynamicCache()

    ids, wrong = prompt(26), torch.full((1, 1), 10**6)
    found = {}
    for fails in (False, True):
        with skipping(model, plan):
            held = cache()
            logits(model, ids[:, :20], held)
            steps = []
            for at in range(20, 26):
                if fails:
                    with pytest.raises(IndexError):
                        logits(model, wrong, held)
                steps.append(logits(model, ids[:, at : at + 1], held))
        found[fails] = torch.cat(steps, dim=1)
    assert torch.equal(found[True], found[False])


MIXED_WINDOW = SkipPlan(
    {Sublayer(0, "attn"): Window(8, 2), Sublayer(2, "attn"): Window(8, 2, heads=(1,), of_heads=2)}
)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("tokens", [0, 6])
@pytest.mark.parametrize(
    "plan",
    [
        SkipPlan({Sublayer(0, "attn"): None}),
        SkipPlan({Sublayer(3, "attn"): None}),
        SkipPlan({Sublayer(0, "attn"): None, Sublayer(3, "attn"): None}),
        MIXED_WINDOW,
    ],
    ids=["first", "last", "both", "windows"],
)
def test_nothing_goes_on_behind_a_forward_that_failed_midway(
    model: PreTrainedModel, plan: SkipPlan, tokens: int, static: bool
) -> None:
    ids = prompt(26)
    held: Any = StaticCache(model.config, max_cache_len=40) if static else DynamicCache()
    layer = model.model.layers[2].mlp
    with skipping(model, plan):
        expected = logits(model, ids, DynamicCache())
        if tokens:
            logits(model, ids[:, :tokens], held)
        broken = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            logits(model, ids[:, tokens:20], held)
        broken.remove()
        for again in (ids[:, tokens:20], ids[:, 20:21]):
            with pytest.raises(UnsupportedCallError, match="failed midway"):
                logits(model, again, held)
        if reset_empties() or static:
            held.reset()
            torch.testing.assert_close(logits(model, ids, held), expected, rtol=1e-4, atol=1e-4)


def test_a_device_that_does_not_tell_what_failed_holds_nobody_up(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a CUDA device after a kernel that failed."""
    ids, cache = prompt(9), DynamicCache()
    with skipping(model, SkipPlan({Sublayer(0, "attn"): None})):
        expected = logits(model, ids, DynamicCache())
        broken = model.model.layers[2].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
        with monkeypatch.context() as patch:
            patch.setattr("adaskip.kvcache.is_torn", Mock(side_effect=OSError("sticky")))
            with pytest.raises(OSError, match="sticky"):
                logits(model, ids, cache)
        broken.remove()
        with pytest.raises(UnsupportedCallError, match="failed midway"):
            logits(model, ids, cache)
        found: list[Tensor] = []
        thread = threading.Thread(target=lambda: found.append(logits(model, ids, DynamicCache())))
        thread.start()
        thread.join(timeout=30)
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("change", [{"dtype": torch.bfloat16}, {"device": "meta"}], ids=str)
def test_a_model_that_was_cast_or_moved_inside_is_refused(
    model: PreTrainedModel, change: dict[str, Any]
) -> None:
    with skipping(model, SkipPlan({Sublayer(0, "attn"): 1.5})) as session:
        model.to(**change)
        with pytest.raises(
            UnsupportedCallError, match=r"but entered skipping\(\) in torch.float32"
        ):
            model(prompt(5))
        assert session.step is None


def test_a_recorder_that_raises_takes_nothing_back(model: PreTrainedModel) -> None:
    class Raising(Recorder):
        def watch(self, step: Step) -> frozenset[Span]:
            return frozenset({"ffn"})

        def observe(self, step: Step, stats: Any) -> None:
            if step.index == 3:
                raise ZeroDivisionError

    ids = prompt(26)
    found = {}
    for raises in (False, True):
        recorders = [Raising()] if raises else []
        with skipping(model, MIXED_WINDOW, recorders=recorders):
            held, steps = DynamicCache(), []
            logits(model, ids[:, :20], held)
            for at in range(20, 26):
                try:
                    steps.append(logits(model, ids[:, at : at + 1], held))
                except ZeroDivisionError:
                    assert (raises, at) == (True, 22)
        found[raises] = steps
    assert len(found[True]) == 5
    assert all(map(torch.equal, found[True], [*found[False][:2], *found[False][3:]]))


def test_of_two_threads_one_enters(model: PreTrainedModel) -> None:
    meeting, refusals, plans = threading.Barrier(2), [], []

    class Waiting(FixedSkipping):
        def check_model(self, model: PreTrainedModel) -> None:
            """The other thread looks while this one is on its way in."""
            waited.set()
            done.wait(10)

    waited, done = threading.Event(), threading.Event()

    def first() -> None:
        meeting.wait()
        with skipping(model, Waiting(FFN)) as session:
            logits(model, prompt(6))
            plans.append(session.plan)

    def second() -> None:
        meeting.wait()
        waited.wait(10)
        try:
            with skipping(model, ATTENTION):
                pass
        except UnsupportedCallError as error:
            refusals.append(str(error))
        finally:
            done.set()

    threads = [threading.Thread(target=each) for each in (first, second)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert plans == [FFN]
    assert "leave that block first" in refusals[0]
    assert "forward" not in vars(model.base_model)


def test_leaving_while_an_answer_is_generated_is_refused(model: PreTrainedModel) -> None:
    began, leave = threading.Event(), threading.Event()

    class Slow(FixedSkipping):
        def plan(self, step: Step) -> SkipPlan:
            if step.decoded == 2:
                began.set()
                leave.wait(10)
            return super().plan(step)

    threads = []

    def left_early() -> None:
        with skipping(model, Slow(FFN)):
            threads.append(threading.Thread(target=model.generate, kwargs={"inputs": prompt(6)}))
            threads[0].start()
            began.wait(10)

    with pytest.raises(UnsupportedCallError, match="join the thread inside the block"):
        left_early()
    leave.set()
    threads[0].join(30)
    # One that has ended is no matter.
    with skipping(model, FFN):
        thread = threading.Thread(target=model.generate, kwargs={"inputs": prompt(6)})
        thread.start()
        thread.join(30)


class Forgetful(SkipPolicy):
    """Notes which requests it is told to forget."""

    def __init__(self) -> None:
        self.forgotten: list[int] = []

    def bind(self, n_layers: int) -> None:
        """Any model will do."""

    def plan(self, step: Step) -> SkipPlan:
        return EMPTY_PLAN

    def forget(self, request: int) -> None:
        self.forgotten.append(request)


def test_a_cache_of_an_earlier_block_is_forgotten_there(model: PreTrainedModel) -> None:
    policy = Forgetful()
    with skipping(model, policy):
        earlier, kept = DynamicCache(), DynamicCache()
        logits(model, prompt(6), earlier)
        logits(model, prompt(6), kept)
        del kept
        assert policy.forgotten == [1]
    with skipping(model, policy):
        logits(model, prompt(6), DynamicCache())
        now = DynamicCache()
        logits(model, prompt(6), now)
        policy.forgotten.clear()
        del earlier
        assert policy.forgotten == []
        # Nor does a request that was refused, and is still held by its error, count as one.
        with pytest.raises(IndexError) as error:
            logits(model, torch.full((1, 2), 10**6), DynamicCache())
        logits(model, prompt(6), now)
        del error
    assert 1 not in policy.forgotten


@pytest.mark.parametrize("said", [False, True], ids=["generate", "loop"])
def test_a_second_turn_on_a_cache_with_windows(model: PreTrainedModel, said: bool) -> None:
    ids = prompt(28)
    whole = FixedSkipping(WINDOW)
    with skipping(model, whole):
        expected = logits(model, ids)[:, -1]
    with skipping(model, whole) as session:
        cache = DynamicCache()
        if said:
            logits(model, ids[:, :20], cache)
            for at in range(20, 23):
                logits(model, ids[:, at : at + 1], cache)
            with session.prefill():
                found = logits(model, ids[:, 23:], cache)[:, -1]
            assert torch.allclose(found, expected, atol=1e-5)
        else:
            first = model.generate(ids[:, :20], past_key_values=cache, max_new_tokens=4)
            longer = torch.cat([first, ids[:, 20:]], dim=1)
            found = model.generate(longer, past_key_values=cache, max_new_tokens=3)
            assert torch.equal(found, model.generate(longer, max_new_tokens=3))
    assert session.step is not None
    assert session.step.request >= 1


def test_a_refused_compiled_forward_lets_other_threads_in(model: PreTrainedModel) -> None:
    with skipping(model, ATTENTION) as session:

        def refused() -> None:
            call = {"input_ids": prompt(4), "output_attentions": True}
            with pytest.raises(UnsupportedCallError):
                Session._begin_compiled(session, call)

        thread = threading.Thread(target=refused)
        thread.start()
        thread.join(10)
        answers: list[Tensor] = []
        other = threading.Thread(
            target=lambda: answers.append(logits(model, prompt(4))), daemon=True
        )
        other.start()
        other.join(10)
        assert answers


@pytest.mark.parametrize("left", ["its phase", "the thread", "the forward"])
def test_a_compiled_forward_that_failed_lets_other_threads_in(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch, left: str
) -> None:
    monkeypatch.setattr(turnstile, "_LOOK_EVERY", 0.01)
    cache, failed, done = DynamicCache(), threading.Event(), threading.Event()
    with skipping(model, ATTENTION) as session:

        def forward() -> None:
            Session._begin_compiled(session, {"input_ids": prompt(4), CACHE: cache})
            raise ZeroDivisionError

        def failing() -> None:
            says = session.prefill() if left == "its phase" else contextlib.nullcontext()
            with contextlib.suppress(ZeroDivisionError), says:
                forward()
            failed.set()
            # As a thread of a pool, which waits for what comes next.
            if left == "the forward":
                done.wait(20)

        thread = threading.Thread(target=failing)
        thread.start()
        failed.wait(10)
        if left != "the forward":
            thread.join(10)
        answers: list[Tensor] = []
        other = threading.Thread(
            target=lambda: answers.append(logits(model, prompt(4), cache)), daemon=True
        )
        other.start()
        other.join(10)
        done.set()
        thread.join(10)
        # Nor is the forward a part of the request.
        assert torch.equal(answers[0], logits(model, prompt(4)))


def test_a_compiled_forward_that_takes_its_time_is_waited_for(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(turnstile, "_LOOK_EVERY", 0.01)
    begun, goes_on = threading.Event(), threading.Event()
    order: list[str] = []
    with skipping(model, ATTENTION) as session:

        def slow() -> None:
            Session._begin_compiled(session, {"input_ids": prompt(4)})
            begun.set()
            goes_on.wait(20)
            order.append("slow")
            Session._end_compiled(session, None)

        def fast() -> None:
            logits(model, prompt(4))
            order.append("fast")

        threads = [threading.Thread(target=target, daemon=True) for target in (slow, fast)]
        threads[0].start()
        begun.wait(10)
        threads[1].start()
        threads[1].join(0.3)
        goes_on.set()
        for thread in threads:
            thread.join(10)
    assert order == ["slow", "fast"]


def test_hooks_that_are_added_inside_the_block_leave_the_model_usable(
    model: PreTrainedModel,
) -> None:
    dense = logits(model, prompt(8))
    with skipping(model, FFN):
        expected = logits(model, prompt(8))
        dispatch_model(model, device_map={"": "cpu"}, force_hooks=True)
        assert torch.equal(logits(model, prompt(8)), expected)
    assert torch.equal(logits(model, prompt(8)), dense)
    with skipping(model, FFN):
        assert torch.equal(logits(model, prompt(8)), expected)
    assert torch.equal(logits(model, prompt(8)), dense)


def test_switches_that_could_not_be_set_are_set_anew(
    model: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    width = model.config.hidden_size
    linear = Linear(torch.zeros(width, width), torch.ones(width))
    plan = SkipPlan({Sublayer(0, "ffn"): None, Sublayer(2, "attn"): linear})
    dense = logits(model, prompt(8))

    def full(*_: Any) -> Linear:
        raise torch.OutOfMemoryError

    class Unforeseen(FixedSkipping):
        constant_plan = None

    with monkeypatch.context() as patched:
        patched.setattr(Linear, "to", full)
        with pytest.raises(torch.OutOfMemoryError), skipping(model, plan):
            pass
    with skipping(model, Unforeseen(plan), scope="decode"):
        cache = DynamicCache()
        logits(model, prompt(8), cache)
        with monkeypatch.context() as patched:
            patched.setattr(Linear, "to", full)
            with pytest.raises(torch.OutOfMemoryError):
                logits(model, prompt(1), cache)
        assert torch.equal(logits(model, prompt(8)), dense)


def test_gains_do_not_follow_the_default_device(model: PreTrainedModel) -> None:
    with skipping(model, SkipPlan({Sublayer(1, "ffn"): 1.5})) as session:
        expected = logits(model, prompt(6))
        session._board.set(EMPTY_PLAN)
        with torch.device("meta"):
            session._board.set(SkipPlan({Sublayer(1, "ffn"): 1.5}))
        assert torch.equal(logits(model, prompt(6)), expected)


def test_a_growing_cache_goes_on_outside_of_inference_mode(model: PreTrainedModel) -> None:
    ids = prompt(12)
    found = []
    for cache in (DynamicCache(config=model.config), GrowingCache(model.config)):
        with torch.inference_mode():
            model(input_ids=ids[:, :8], past_key_values=cache)
        found.append(model.generate(ids, past_key_values=cache, max_new_tokens=4))
    assert torch.equal(*found)


def test_joined_plans_stay_plans_of_their_model() -> None:
    one = SkipPlan({Sublayer(0, "ffn"): None}, fingerprint="llama-4x32-aa:AAAA")
    other = SkipPlan({Sublayer(1, "ffn"): None}, fingerprint="llama-8x32-bb:AAAA")
    assert (one | SkipPlan()).fingerprint == one.fingerprint
    assert (EMPTY_PLAN | one).fingerprint == one.fingerprint
    with pytest.raises(PlanError, match="two models cannot be joined"):
        one | other


def test_what_is_no_argument(model: PreTrainedModel) -> None:
    texts: Any = [("a prompt", "an answer")]
    short = SublayerTimes(4.0, dict.fromkeys(all_sublayers(N_LAYERS - 1), 0.1), Phase.PREFILL, 8)
    one: Any = 64
    ffn = Sublayer(1, "ffn")
    for act, message in (
        (
            lambda: search_plan(model, texts, replacements=("gain",)),
            "row is of texts; give the ids of prompt and answer",
        ),
        (
            lambda: search_plan(model, ROWS, times=short, replacements=("gain",)),
            "times are of 3 layers, this model has 4",
        ),
        (lambda: search_plan(model, ROWS, windows=one), r"windows is 64; give sizes, e.g. \(64,\)"),
        (
            lambda: search_plan(model, ["a text"], windows=(64,)),
            "row is of texts; give the ids of prompt",
        ),
        (lambda: make_plan(model, ["a text"], "SLEB"), "row is of texts; give the ids of prompt"),
        (
            lambda: search_plan(model, [prompt(9)[0]], windows=(64,)),
            "a Tensor that is no pair of ids",
        ),
        (
            lambda: search_plan(model, [({"a": 1}, [3])], windows=(64,)),
            "a tuple that is no pair of ids",
        ),
        (lambda: search_plan(model, [3], windows=(64,)), "a int that is no pair of ids"),
        (
            lambda: search_plan(model, ROWS, exchanges=None, windows=(64,)),
            "exchanges is None; give a whole",
        ),
        (lambda: fit_linears(model, [prompt(60)], ffn), r"sublayers is ffn1; give a list of them"),
        (
            lambda: fit_linears(model, [prompt(60)], [ffn], plan=EarlyExit(1)),
            "plan is of type EarlyExit; give a SkipPlan",
        ),
        (
            lambda: distill_plan(model, EarlyExit(1), [prompt(60), prompt(60)]),
            "plan is of type EarlyExit; give a SkipPlan",
        ),
        (lambda: measured_times(model, "decode", 8.5), "context is 8.5; give a whole number"),
        (lambda: measured_times(model, "decode", 8, batch=0), "batch is 0; give a whole number"),
    ):
        with pytest.raises(AdaskipError, match=message):
            act()
    wrapped: Any = nn.DataParallel(model)
    for use in (
        lambda: learn_importance(wrapped, ["a text"], tokenizer=byte_tokenizer()),
        lambda: search_plan(wrapped, ROWS),
        lambda: measured_times(wrapped, "decode", 8),
        lambda: export_checkpoint(wrapped, byte_tokenizer(), SkipPlan(), "nowhere"),
    ):
        with pytest.raises(UnsupportedModelError, match=r"of type DataParallel.*model\.module"):
            use()
    nothing: Any = 3
    with (
        pytest.raises(AdaskipError, match="recorders is a int"),
        skipping(model, FFN, recorders=nothing),
    ):
        pass
    with skipping(model, FFN), pytest.raises(UnsupportedCallError, match="neither input_ids nor"):
        model()
