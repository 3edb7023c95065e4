"""What a compiled graph reads of a window: always the same tensors, with the right numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adaskip import Window
from adaskip.window_track import DecodeStep, WindowTrack

CPU = torch.device("cpu")
# Tokens of the forwards of one request, prompts and chunks of them first.
REQUESTS = [[1] * 30, [5] + [1] * 30, [40] + [1] * 12, [3] + [1] * 3 + [9] + [1] * 20]


def numbers(step: DecodeStep) -> tuple[list[int], int, list[int] | None]:
    fill = None if step.fill is None else step.fill.flatten().int().tolist()
    assert step.mask is not None
    return step.mask.flatten().int().tolist(), int(step.place), fill


def tensors(step: DecodeStep) -> list[Tensor]:
    return [tensor for tensor in (step.mask, step.place, step.fill) if tensor is not None]


@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("size", [1, 3, 8, 64])
@pytest.mark.parametrize("request_", REQUESTS, ids=str)
@torch.no_grad()
def test_steps_in_place_say_what_new_steps_say(size: int, sinks: int, request_: list[int]) -> None:
    window, former = Window(size, sinks), None
    places = set()
    for _ in range(2):
        static = WindowTrack(window, CPU, static=True)
        if former is not None:
            static.take_over(former)
        # That every token is real makes the other one compute each step from what it holds.
        computed = WindowTrack(window, CPU, static=True)
        for tokens in request_:
            real = torch.ones(1, tokens, dtype=torch.bool)
            found, expected = static.advance(None, tokens), computed.advance(real, tokens)
            if isinstance(found, DecodeStep):
                assert isinstance(expected, DecodeStep)
                assert numbers(found) == numbers(expected)
                places.add(tuple(tensor.data_ptr() for tensor in tensors(found)))
            else:
                assert not isinstance(expected, DecodeStep)
                assert torch.equal(found.mask, expected.mask)
        former = static
    assert len(places) == 1


def test_a_step_that_failed_is_taken_again() -> None:
    with torch.no_grad():
        track = WindowTrack(Window(3, 1), CPU, static=True)
        for _ in range(6):
            held = dict(vars(track))
            step = track.advance(None, 1)
        assert isinstance(step, DecodeStep)
        expected = numbers(step)
        vars(track).update(held)
        again = track.advance(None, 1)
        assert isinstance(again, DecodeStep)
        assert numbers(again) == expected
        # Or another forward in its place: what was told in place only is caught up with.
        vars(track).update(held)
        several, fresh = track.advance(None, 4), WindowTrack(Window(3, 1), CPU, static=True)
        fresh.advance(None, 5)
        alike = fresh.advance(None, 4)
    assert not isinstance(several, DecodeStep)
    assert not isinstance(alike, DecodeStep)
    assert torch.equal(several.mask, alike.mask)


def test_with_gradients_every_step_has_its_own_tensors() -> None:
    track = WindowTrack(Window(3, 1), CPU, static=True)
    with torch.no_grad():
        first = track.advance(None, 1)
    second, third = track.advance(None, 1), track.advance(None, 1)
    assert isinstance(first, DecodeStep)
    assert isinstance(second, DecodeStep)
    assert isinstance(third, DecodeStep)
    assert len({step.place.data_ptr() for step in (first, second, third)}) == 3
    assert len({tensors(step)[0].data_ptr() for step in (first, second, third)}) == 3
    with torch.no_grad():
        fourth = track.advance(None, 1)
    assert isinstance(fourth, DecodeStep)
    assert fourth is first
    assert numbers(fourth) == ([1, 1, 1, 1], 1, [0])


@pytest.mark.parametrize("sinks", [0, 2])
def test_what_is_all_seen_has_no_mask(sinks: int) -> None:
    track = WindowTrack(Window(3, sinks), CPU)
    track.advance(None, 2 + sinks)
    # The next token fills the ring.
    for masked, place in ((True, 2 + sinks), (False, 3 + sinks), (False, 4 + sinks)):
        step = track.advance(None, 1)
        assert isinstance(step, DecodeStep)
        assert (step.mask is not None) == masked
        assert (int(step.place), step.fill) == (sinks + place % 3, None)
        assert step.room == 3 + sinks
    # Padding that comes later is not seen.
    padding = track.advance(torch.tensor([[False]]), 1)
    after = track.advance(None, 1)
    assert isinstance(padding, DecodeStep)
    assert isinstance(after, DecodeStep)
    assert after.mask is not None
    assert after.mask.flatten().tolist().count(False) == 1
    static = WindowTrack(Window(3, sinks), CPU, static=True)
    static.advance(None, 8)
    padded = WindowTrack(Window(3, sinks), CPU)
    padded.advance(torch.tensor([[False] + [True] * 7]), 8)
    for masked_track in (static, padded):
        step = masked_track.advance(None, 1)
        assert isinstance(step, DecodeStep)
        assert step.mask is not None
