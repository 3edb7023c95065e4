"""Official prompts by hash; truncation, template and stop rules with worked numbers."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
from conftest import SHARED
from test_longbench import OFFICIAL
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from adaskip.errors import AdaskipError, DataError
from adaskip.tasks import prompts
from adaskip.tasks.longbench import load_rows
from adaskip.tasks.prompts import build_prompt, postprocess, prompt_template, stop_token_ids
from adaskip.tasks.spec import Row, task_spec

REAL = SHARED / "data/longbench"
SPECIALS = ("<unk>", "<s>", "</s>", "<user>", "<bot>")
IDS = {name: number for number, name in enumerate(SPECIALS)}
NEWLINE = len(SPECIALS)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token per digit or newline, a BOS before everything, like Llama's."""
    vocabulary = [*SPECIALS, "\n", *"0123456789"]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    core.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", IDS["<s>"])]
    )
    core.add_special_tokens([AddedToken(name, normalized=False) for name in SPECIALS])
    names = dict(zip(("unk_token", "bos_token", "eos_token"), SPECIALS, strict=False))
    return PreTrainedTokenizerFast(
        tokenizer_object=core, clean_up_tokenization_spaces=False, **names
    )


def row(context: str, task: str = "qasper") -> Row:
    return Row("r", task, "", context, ("1",), 5000, "en")


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the prompt of every task its context alone, so that tokens can be counted by hand."""
    monkeypatch.setattr(prompts, "prompt_template", lambda task: "{context}{input}")


@pytest.mark.parametrize("task", OFFICIAL)
def test_prompts_are_the_official_ones(task: str) -> None:
    template = prompt_template(task)
    assert hashlib.sha256(template.encode()).hexdigest() == task_spec(task).prompt_sha256
    assert template.count("{context}") == 1
    assert "{{" not in template


def test_corrections_are_where_traps_13_says() -> None:
    assert prompt_template("passage_count").endswith(" ")
    assert prompt_template("passage_retrieval_en").endswith(" ")
    assert prompt_template("lcc").endswith("\n")
    assert prompt_template("repobench-p").endswith("\n")
    for task in ("triviaqa", "samsum"):
        assert "{context}\n\n{input}" in prompt_template(task)
    assert "{context}\n{input}" in prompt_template("trec")


def test_another_wording_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "trec.yaml"
    monkeypatch.setattr(prompts, "packaged_file", lambda requirement, name: path)
    read = prompt_template.__wrapped__
    path.write_text("doc_to_text: 'Guess: {{context}}'\nprocess_results: !function metrics.f\n")
    with pytest.raises(DataError, match=r"not LongBench's official one .*lm-eval==0\.4\.13"):
        read("trec")
    path.write_text("metric_list: [unclosed")
    with pytest.raises(DataError, match="holds no prompt"):
        read("trec")


def test_missing_lm_eval_says_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prompts, "LM_EVAL", "lm-eval-that-is-not-there==0.4.13")
    with pytest.raises(DataError, match="pip install --no-deps lm-eval-that-is-not-there"):
        prompt_template.__wrapped__("trec")


@pytest.mark.usefixtures("bare")
def test_a_prompt_at_the_limit_is_left_alone(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = build_prompt(
        row("123456789"), task_spec("qasper"), tokenizer, max_length=10, template=None
    )
    assert (prompt.text, prompt.truncated) == ("123456789", False)
    assert (prompt.tokens_before, prompt.tokens_after) == (10, 10)
    assert prompt.input_ids == [IDS["<s>"], *range(NEWLINE + 2, NEWLINE + 11)]


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize(
    ("max_length", "text"),
    # 10 tokens with BOS. Half of 8: BOS 1 2 3 and 6 7 8 9; BOS is skipped, then added again. Half
    # of 7 is 3, of 2 is 1: BOS alone and 9.
    [(8, "1236789"), (7, "12789"), (2, "9")],
)
def test_the_middle_is_cut_out(
    tokenizer: PreTrainedTokenizerFast, max_length: int, text: str
) -> None:
    prompt = build_prompt(
        row("123456789"), task_spec("qasper"), tokenizer, max_length=max_length, template=None
    )
    assert prompt.text == text
    assert prompt.input_ids == tokenizer(text)["input_ids"]
    assert (prompt.tokens_before, prompt.tokens_after) == (10, len(text) + 1)
    assert prompt.truncated


@pytest.mark.usefixtures("bare")
def test_the_template_comes_after_truncation_and_its_special_tokens_are_ids(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    prompt = build_prompt(
        row("123456789"),
        task_spec("qasper"),
        tokenizer,
        max_length=4,
        template="<user>{prompt}\n<bot>",
    )
    assert prompt.text == "<user>189\n<bot>"
    digits = [NEWLINE + 1 + digit for digit in (1, 8, 9)]
    assert prompt.input_ids == [IDS["<s>"], IDS["<user>"], *digits, NEWLINE, IDS["<bot>"]]
    assert (prompt.tokens_before, prompt.tokens_after) == (10, 7)


@pytest.mark.usefixtures("bare")
@pytest.mark.parametrize("task", ["trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"])
def test_few_shot_and_code_tasks_are_never_wrapped(
    tokenizer: PreTrainedTokenizerFast, task: str
) -> None:
    prompt = build_prompt(
        row("12", task), task_spec(task), tokenizer, max_length=9, template="<user>{prompt}"
    )
    assert prompt.text == "12"


@pytest.mark.usefixtures("bare")
def test_bos_is_there_once_even_if_the_template_spells_it(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    prompt = build_prompt(
        row("1"), task_spec("qasper"), tokenizer, max_length=9, template="<s><user>{prompt}"
    )
    assert prompt.input_ids == [IDS["<s>"], IDS["<user>"], NEWLINE + 2]


def test_braces_in_a_document_are_text(tokenizer: PreTrainedTokenizerFast) -> None:
    prompt = build_prompt(
        row("{input} {0} {prompt}"),
        task_spec("qasper"),
        tokenizer,
        max_length=10_000,
        template="<user>{prompt}<bot>",
    )
    assert "{input} {0} {prompt}" in prompt.text
    assert prompt.text.count("<bot>") == 1


def test_bad_arguments_are_named(tokenizer: PreTrainedTokenizerFast) -> None:
    spec = task_spec("qasper")
    with pytest.raises(AdaskipError, match="at least 2 tokens, not 1"):
        build_prompt(row("1"), spec, tokenizer, max_length=1, template=None)
    with pytest.raises(AdaskipError, match=r"has no \{prompt\} in it"):
        build_prompt(row("1"), spec, tokenizer, max_length=9, template="USER:")


def test_only_samsum_stops_at_a_newline(tokenizer: PreTrainedTokenizerFast) -> None:
    assert stop_token_ids(task_spec("samsum"), tokenizer) == (NEWLINE,)
    assert task_spec("samsum").min_new_tokens == 1
    assert stop_token_ids(task_spec("gov_report"), tokenizer) == ()


def test_the_answer_ends_at_the_models_mark() -> None:
    assert postprocess("Paris<eoa>\n<|User|>: x<eoa>", "<eoa>") == "Paris"
    assert postprocess("\nParis\nmore", None) == "\nParis\nmore"


@pytest.mark.parametrize("task", ["multi_news", "multifieldqa_zh"])
def test_real_rows_become_prompts(tokenizer: PreTrainedTokenizerFast, task: str) -> None:
    if not REAL.is_dir():
        pytest.skip("no ../shared/data/longbench here")
    spec = task_spec(task)
    for real in load_rows(task, data_dir=REAL, source="local", limit=3):
        full = build_prompt(real, spec, tokenizer, max_length=10**6, template=None)
        assert full.text == prompt_template(task).format(context=real.context, input=real.input)
        short = build_prompt(real, spec, tokenizer, max_length=2000, template=None)
        assert short.truncated
        assert short.tokens_before == full.tokens_after
        assert short.tokens_after <= 2000
