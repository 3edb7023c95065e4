"""Windows by a kernel that knows them, the kernel itself imitated: there is none on a CPU."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import prompt, tiny_model
from test_windows import masked, plan_of
from torch import Tensor
from transformers import DynamicCache

from adaskip import Window, skipping, window_attention, window_flash
from adaskip.window_track import BlockStep


def imitation(
    query: Tensor, key: Tensor, value: Tensor, *_: Any, scale: float, **window: int
) -> tuple[Tensor, Tensor]:
    """Attention over windows, and the logarithms of its sums; all as flash attention has it."""
    assert window["window_size_right"] == 0
    tokens, n_keys, group = query.shape[1], key.shape[1], query.shape[2] // key.shape[2]
    key, value = (states.repeat_interleave(group, dim=2) for states in (key, value))
    scores = torch.einsum("bthd,bshd->bhts", query, key) * scale
    apart = torch.arange(n_keys - tokens, n_keys)[:, None] - torch.arange(n_keys)
    seen = (apart >= 0) & (apart <= window["window_size_left"])
    scores = scores.masked_fill(~seen, -torch.inf)
    found = torch.einsum("bhts,bshd->bthd", scores.softmax(-1), value)
    return found, scores.logsumexp(-1)


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> list[BlockStep]:
    """Lets the kernel's place be taken on this device; the steps that went there."""
    taken: list[BlockStep] = []

    def takes(query: Tensor, step: BlockStep) -> bool:
        if step.past is not None:
            taken.append(step)
        return step.past is not None

    monkeypatch.setattr(window_flash, "_kernel", imitation)
    monkeypatch.setattr(window_attention, "takes_flash", takes)
    return taken


@pytest.fixture
def ampere(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device that has the kernel."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
    monkeypatch.setattr(torch.version, "hip", None)
    window_flash._found.cache_clear()
    yield
    window_flash._found.cache_clear()


def takes(*, past: int | None = 0, **query: Any) -> bool:
    given = {"is_cuda": True, "device": torch.device("cuda", 0), "dtype": torch.float16}
    given |= {"shape": (1, 2, 30, 64), "requires_grad": False, **query}
    asked: Any = SimpleNamespace(**given)
    step: Any = SimpleNamespace(past=past)
    return window_flash.takes_flash(asked, step)


@pytest.mark.parametrize(
    ("capability", "built", "hip", "expected"),
    [
        ((9, 0), True, None, True),
        ((8, 0), True, None, True),
        ((7, 5), True, None, False),
        ((9, 0), False, None, False),
        ((9, 0), True, "6.2", False),
    ],
)
def test_the_kernel_is_taken_where_there_is_one(
    ampere: None,
    monkeypatch: pytest.MonkeyPatch,
    capability: tuple[int, int],
    built: bool,
    hip: str | None,
    expected: bool,
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: built)
    monkeypatch.setattr(torch.version, "hip", hip)
    assert takes() is expected


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({}, True),
        ({"past": 12}, True),
        ({"past": None}, False),  # rows have padding
        ({"is_cuda": False}, False),
        ({"dtype": torch.bfloat16}, True),
        ({"dtype": torch.float32}, False),
        ({"shape": (1, 2, 30, 256)}, True),
        ({"shape": (1, 2, 30, 264)}, False),
        ({"shape": (1, 2, 30, 20)}, False),
        ({"requires_grad": True}, False),
    ],
)
def test_the_kernel_is_taken_where_it_is_right(
    ampere: None, asked: dict[str, Any], expected: bool
) -> None:
    assert takes(**asked) is expected


@pytest.mark.parametrize("chunks", [[40], [1, 3, 36], [20, 20], [33, 7]])
@pytest.mark.parametrize("window", [Window(1), Window(3, sinks=0), Window(7, sinks=3), Window(100)])
def test_flash_windows_are_the_definition(
    steps: list[BlockStep], window: Window, chunks: list[int]
) -> None:
    model, ids = tiny_model("llama"), prompt(41, batch=2)
    windows = {0: window, 2: window}
    with torch.no_grad():
        expected = masked(model, windows)(ids).logits
        cache, found = DynamicCache(), []
        with skipping(model, plan_of(windows)) as session:
            with session.prefill():
                for part in ids[:, :40].split(chunks, dim=1):
                    found.append(model(part, past_key_values=cache).logits)
            found.append(model(ids[:, 40:], past_key_values=cache).logits)
    torch.testing.assert_close(torch.cat(found, dim=1), expected, rtol=0, atol=1e-4)
    assert len(steps) == 2 * sum(tokens > 1 for tokens in chunks)
    assert not any("mask" in vars(step) for step in steps)


def test_padded_rows_are_left_to_the_blocks(steps: list[BlockStep]) -> None:
    model, ids = tiny_model("llama"), prompt(40, batch=2)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    with torch.no_grad(), skipping(model, plan_of({0: Window(7)})):
        model(ids, attention_mask=mask)
    assert not steps


@pytest.mark.parametrize("family", ["llama", "qwen2", "granite"])
def test_grouped_decoding_is_that_of_transformers(family: str) -> None:
    from transformers import StaticCache

    from adaskip.grouped_attention import NAME, grouped_decoding
    from adaskip.profiling.timing import time_request

    model, ids = tiny_model(family), prompt(20, batch=2)
    made: list[StaticCache] = []

    def static(own: Any) -> StaticCache:
        made.append(StaticCache(config=own.config, max_cache_len=40))
        return made[-1]

    stock = time_request(model, ids, 8, make_cache=static)
    with grouped_decoding(model):
        assert model.config._attn_implementation == NAME
        grouped = time_request(model, ids, 8, make_cache=static)
    assert model.config._attn_implementation == "sdpa"
    assert torch.equal(stock.tokens, grouped.tokens)
    for a, b in zip(*(cache.layers for cache in made), strict=True):
        torch.testing.assert_close(a.keys, b.keys, rtol=0, atol=1e-5)
