"""What users put around a model: pipelines, streamers and chat templates, inside the block."""

from __future__ import annotations

from pathlib import Path
from threading import Thread
from typing import Any

import pytest
from oracle import zeroed
from run_fixtures import save_checkpoint
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextIteratorStreamer,
    TextStreamer,
    pipeline,
)

from adaskip import SkipPlan, Sublayer, load_model, load_tokenizer, skipping

SKIPPED = [Sublayer(0, "attn"), Sublayer(2, "ffn"), Sublayer(3, "attn")]
PLAN = SkipPlan(dict.fromkeys(SKIPPED))
TEMPLATE = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}\n{% endfor %}[assistant] "
CHAT = [{"role": "user", "content": "What is skipped?"}]
TEXTS = ["What is skipped?", "And?"]
GREEDY = {"do_sample": False, "max_new_tokens": 12, "min_new_tokens": 12}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("checkpoint"))


@pytest.fixture(scope="module")
def model(checkpoint: Path) -> PreTrainedModel:
    return load_model(checkpoint, device="cpu")


@pytest.fixture(scope="module")
def tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    made = load_tokenizer(checkpoint)
    made.chat_template = TEMPLATE
    return made


def answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Any) -> Any:
    return pipeline("text-generation", model=model, tokenizer=tokenizer)(asked, **GREEDY)


@pytest.mark.parametrize("asked", [TEXTS[0], TEXTS, CHAT], ids=["text", "texts", "chat"])
def test_a_pipeline_skips_inside_the_block(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, asked: Any
) -> None:
    dense = answers(model, tokenizer, asked)
    expected = answers(zeroed(model, SKIPPED), tokenizer, asked)
    with skipping(model, PLAN) as session:
        assert answers(model, tokenizer, asked) == expected
    assert dense != expected
    assert session.summary().phases["decode"].skipped == {"attn": 2, "ffn": 1}
    assert answers(model, tokenizer, asked) == dense


def test_a_pipeline_made_outside_skips_inside(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> None:
    made = pipeline("text-generation", model=model, tokenizer=tokenizer)
    expected = answers(zeroed(model, SKIPPED), tokenizer, CHAT)
    with skipping(model, PLAN):
        assert made(CHAT, **GREEDY) == expected
        # A batch is padded: to the left, as load_tokenizer sets it.
        batch = made(TEXTS, batch_size=2, **GREEDY)
        assert batch == [made(text, **GREEDY) for text in TEXTS]


@pytest.mark.parametrize("in_thread", [False, True])
def test_what_is_streamed_is_what_is_generated(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    in_thread: bool,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inputs = tokenizer.apply_chat_template(
        CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    made = zeroed(model, SKIPPED).generate(**inputs, **GREEDY)
    expected = tokenizer.decode(made[0, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    kind = TextIteratorStreamer if in_thread else TextStreamer
    streamer = kind(tokenizer, skip_prompt=True, skip_special_tokens=True)
    with skipping(model, PLAN):
        if in_thread:
            options = {**inputs, **GREEDY, "streamer": streamer}
            thread = Thread(target=model.generate, kwargs=options)
            thread.start()
            shown = "".join(streamer)
            thread.join()
        else:
            model.generate(**inputs, **GREEDY, streamer=streamer)
            shown = capsys.readouterr().out.removesuffix("\n")
    assert shown == expected
