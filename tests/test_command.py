"""The command `adaskip`: what it lists, how fast it helps, and what each word of it does."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from run_fixtures import rows_of, save_checkpoint, save_data

from adaskip import (
    AdaskipError,
    FixedSkipping,
    Importance,
    SkipPlan,
    Sublayer,
    load_model,
    load_tokenizer,
    skipping,
)
from adaskip.cli import main
from adaskip.cli.chat import _configured, _conversations, _talk
from adaskip.cli.main import COMMANDS, command, overview, run
from adaskip.command import BAD_INPUT, INTERRUPTED, UNREAD, guarded
from adaskip.models.spec import model_spec
from adaskip.runs.conversation import Answer, Conversation
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.runconfig import RunConfig
from adaskip.runs.runner import resolve

# Runs a program that prints its help, then tells whether that has loaded torch.
HELP = """
import runpy, sys
run, name, sys.argv[1:] = getattr(runpy, sys.argv[1]), sys.argv[2], sys.argv[3:]
sys.argv[0] = name
try:
    run(name, run_name="__main__")
except SystemExit as end:
    print("ended with", end.code, "torch" if "torch._C" in sys.modules else "light")
"""
MAIN = "run_path", "adaskip_command.py"
PROGRAMS = {
    **{f"adaskip {name}": (*MAIN, name) for name in COMMANDS},
    "sweep": ("run_module", "adaskip.sweep"),
    **{
        script: ("run_path", script)
        for script in (
            *("prefill/run_llama.py", "eval/eval.py", "eval/perplexity.py", "eval/leaderboard.py"),
            "observations/ob0.py",
            *("speed/run_llama_speed.py", "speed/overhead.py", "speed/budget.py"),
            *("speed/waiting.py", "speed/on_gpu.py"),
        )
    },
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of its own, for what is written where the command is called, and for the cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ADASKIP_CACHE", str(tmp_path / "cache"))
    return tmp_path


def said(capsys: pytest.CaptureFixture[str], *argv: str, code: int = 0) -> str:
    """What a command prints; of one that fails, its error."""
    capsys.readouterr()
    assert guarded(lambda: run(argv)) == code
    shown = capsys.readouterr()
    return shown.err if code else shown.out


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_loads_no_torch_and_has_an_example(program: str, tmp_path: Path) -> None:
    starter = "import sys\nfrom adaskip.cli.main import main\nsys.exit(main())\n"
    (tmp_path / MAIN[1]).write_text(starter)
    how, name, *options = PROGRAMS[program]
    path = tmp_path / name if name == MAIN[1] else ROOT / name if how == "run_path" else name
    done = subprocess.run(
        [sys.executable, "-c", HELP, how, str(path), *options, "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "ended with 0 light"
    assert "usage: " in done.stdout
    assert re.search(r"^example: \S", done.stdout, flags=re.M)


def test_help_that_cannot_be_had_lightly_is_slow_and_right(tmp_path: Path) -> None:
    """A module that compares what torch computes, while it is loaded."""
    script = tmp_path / "script.py"
    script.write_text(
        "import sys\nfrom adaskip.cli.starting import begin\nbegin()\nimport torch\n"
        "assert torch.ones(2).sum() > 1\nprint(sys.argv[1:], torch.__version__)\n"
    )
    done = subprocess.run(
        [sys.executable, str(script), "--help"],
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == f"['--help'] {torch.__version__}"


@pytest.mark.parametrize("options", [(), ("run", "--help")])
def test_output_that_nobody_reads_to_its_end_is_no_error(options: tuple[str, ...]) -> None:
    """As in `python -m adaskip --help | head -1`."""
    unread, pipe = os.pipe()
    os.close(unread)
    program = [sys.executable, "-m", "adaskip", *options]
    done = subprocess.run(program, cwd=ROOT, stdout=pipe, stderr=subprocess.PIPE)
    os.close(pipe)
    # argparse takes no notice where it writes much.
    assert (done.stderr, done.returncode) in [(b"", UNREAD), (b"", 0 if options else UNREAD)]


@pytest.mark.parametrize("name", COMMANDS)
def test_the_example_of_a_command_is_understood(name: str) -> None:
    found = command(name)
    parser = found.parser(f"adaskip {name}")
    parser.parse_args(shlex.split(found.example))
    assert f"example: adaskip {name} {found.example}".strip() in parser.format_help()


def test_what_is_there_is_listed(capsys: pytest.CaptureFixture[str]) -> None:
    for argv in ((), ("--help",)):
        assert said(capsys, *argv) == overview() + "\n"
    assert re.findall(r"^  (\w+)  ", overview(), flags=re.M) == list(COMMANDS)
    assert said(capsys, "--version").startswith("adaskip 0.")


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("rnu",), "Unknown command 'rnu'. Did you mean 'run'?"),
        (("score", "--nmae", "x", "--name", "y"), "--nmae x. Did you mean '--name'?"),
        (("run", "--model", "smolm2"), "Policy ADA needs its budget"),
        (
            ("run", "--model", "smolm2", "--policy", "EE", "--skip_full_layer_num", "1"),
            "Unknown model 'smolm2'. Did you mean 'smollm2'?",
        ),
        (("sweep", "dmeo"), "Unknown sweep 'dmeo'. Did you mean 'demo'?"),
        (("sweep", "elsewhere/demo.yaml"), "elsewhere/demo.yaml cannot be read"),
        (("sweep", "demo", "--only", "model=smolm2"), "all of them. Did you mean 'smollm2'?"),
        (("observe", "ob9", "--model", "smollm2"), "'ob9'. Did you mean 'ob3'? Choose one of: ob0"),
        (("completion", "bsh"), "invalid choice: 'bsh'. Did you mean 'bash'?"),
        (("speed", "--model", "smollm2", "--weights", "defualt"), "Did you mean 'default'?"),
        (("export", "--model", "smolm2", "--policy", "ADA", "new"), "Did you mean 'smollm2'?"),
        (("learn", "--model", "smolm2", "--out", "x"), "Did you mean 'smollm2'?"),
        (("plan", "--show", "no.safetensors"), "no plan at no.safetensors"),
        (("plan",), "Give either a --model to make plans for, or plans to --show"),
        (("chat", "--model", "smollm2", "--policy", "PLAN"), "needs the file of a plan: --plan"),
        (("observe", "ob1", "--model", "smollm2", "--scores"), "--scores belongs to ob0, not to"),
        (("chat", "--model", "smollm2", "--plan", "no.safetensors"), "no plan at no.safetensors"),
        (
            ("chat", "--model", "smollm2", "--plan", "a", "--policy", "EE"),
            "--plan and --policy EE both say what is skipped",
        ),
        (("chat", "--model", "smollm2", "--policy", "ADA"), "ADA needs its budget"),
        (("chat", "--model", "smollm2", "--gain", "norm"), "'gain' does not apply to dense"),
        (("learn", "--model", "smollm2", "--out", "x", "--texts", "no.txt"), "cannot be read"),
    ],
)
def test_what_is_wrong_is_said_in_one_sentence(
    capsys: pytest.CaptureFixture[str], argv: tuple[str, ...], message: str
) -> None:
    error = said(capsys, *argv, code=BAD_INPUT)
    assert message in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize("name", [name for name, entry in COMMANDS.items() if entry.extra])
def test_a_missing_extra_is_named_before_anything_is_done(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(main, "find_spec", lambda module: None if module == "matplotlib" else 1)
    error = said(capsys, name, "--model", "smollm2", code=BAD_INPUT)
    assert f"adaskip {name} needs the package matplotlib" in error
    assert "pip install 'adaskip[experiments]'" in error


@pytest.mark.parametrize("given", ["demo", "demo.yaml", "configs/demo.yaml"])
def test_a_shipped_sweep_is_found_from_anywhere(
    capsys: pytest.CaptureFixture[str], given: str
) -> None:
    assert "23 cells" in said(capsys, "sweep", given, "--dry_run", "--results_dir", "nowhere")


def test_a_run_of_any_model_and_its_score(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    data = save_data(tmp_path / "data", 2)
    named = f"{checkpoint.name}-EE-PREFILL"
    options = ["--experiment", "prefill", "--policy", "EE", "--skip_full_layer_num", "1"]
    options += ["--tasks", "trec", "--data_dir", str(data), "--max_length", "200"]
    shown = said(capsys, "run", "--model", str(checkpoint), *options, "--max_new_tokens", "4")
    assert f"score it: adaskip score --name {named}" in shown
    assert len(rows_of(tmp_path / "results" / f"{named}-SKIP-1", "trec")) == 2
    assert "trec" in said(capsys, "score", "--name", named)


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("run", "what is finished is kept; the same command goes on from there."),
        ("plan", "what is finished is kept; the same command goes on from there."),
        ("perplexity", "what is finished is kept; the same command goes on from there."),
        ("learn", "nothing is kept before its end; the same command begins anew."),
        ("export", "nothing is kept before its end; the same command begins anew."),
    ],
)
def test_an_interrupted_command_says_what_it_keeps(
    capsys: pytest.CaptureFixture[str], name: str, kept: str
) -> None:
    def interrupted(given: object) -> int:
        raise KeyboardInterrupt

    stopped = replace(command(name), options=lambda parser: None, action=interrupted)
    assert stopped.main([], prog=name) == INTERRUPTED
    assert capsys.readouterr().err.startswith(f"interrupted: {kept}")


def test_completion_knows_commands_options_and_names(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("shtab")
    script = said(capsys, "completion", "bash")
    for word in (*COMMANDS, "--skip_sub_layer_num", "smollm2", "ADA"):
        assert word in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)


def test_the_environment_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    shown = said(capsys, "env", "--device", "cpu")
    assert re.search(r"^torch +\d", shown, flags=re.M)
    assert re.search(r"^attention +sdpa, eager", shown, flags=re.M)


def test_importance_is_learned_from_texts(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, tmp_path: Path
) -> None:
    for name in ("a.txt", "b.txt"):
        (tmp_path / name).write_text(f"the text of {name}")
    options = ["--model", str(checkpoint), "--out", "profile.json"]
    shown = said(capsys, "learn", *options, "--texts", "a.txt", "b.txt", "--device", "cpu")
    assert "2 prompts, 34 tokens. Least important: " in shown
    profile = Importance.load("profile.json")
    assert profile.source == "2 texts: a.txt, b.txt"
    assert shlex.split(shown.partition("use it: ")[2])[-2:] == ["--importance", "profile.json"]
    error = said(capsys, "learn", *options, "--texts", "a.txt", code=BAD_INPUT)
    assert "profile.json exists" in error
    own = ["--model", "smollm2", "--model_path", str(checkpoint), "--device", "cpu"]
    shown = said(capsys, "learn", *own, "--out", "my profile.json", "--texts", "a.txt")
    use = shlex.split(shown.partition("use it: ")[2])[2:]
    given = command("chat").parser("adaskip chat").parse_args(use)
    assert (given.model_name, given.model_path) == ("smollm2", str(checkpoint))
    assert given.importance == "my profile.json"
    unused = ["--model", "nowhere/none", "--out", "new.json", "--texts", "a.txt", "--warmup", "1"]
    error = said(capsys, "learn", *unused, code=BAD_INPUT)
    assert "--texts are learned from whole, each as one prompt; leave --warmup out" in error
    # Before the model is loaded: there is no such one.
    elsewhere = ["--model", "nowhere/none", "--out", "a.txt/profile.json", "--texts", "b.txt"]
    assert "Cannot write a.txt/profile.json" in said(capsys, "learn", *elsewhere, code=BAD_INPUT)


def figures(shown: str) -> dict[str, list[str]]:
    """The lines of the table that follows an answer, by their names."""
    rows = re.findall(r"^\| (\w[\w ]*?) *\|(.+)\|$", shown, flags=re.M)
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in rows}


def test_a_plan_answers_beside_the_dense_model(
    capsys: pytest.CaptureFixture[str], checkpoint: Path
) -> None:
    SkipPlan({Sublayer(1, "attn"): None, Sublayer(3, "ffn"): 0.9}).save("plan.safetensors")
    options = ["--model", str(checkpoint), "--device", "cpu", "--max_new_tokens", "6"]
    shown = said(
        capsys, "chat", *options, "--plan", "plan.safetensors", "--compare", "--prompt", "Why?"
    )
    assert shown.index("[dense]") < shown.index("[plan]")
    found = figures(shown)
    assert list(found) == ["dense", "plan"]
    assert [row[0] for row in found.values()] == ["4", "4"]
    assert all(float(row[1]) >= 0 for row in found.values())


def test_a_shipped_profile_is_of_the_model_by_name_alone() -> None:
    asked = ["--model", "smollm2", "--policy", "ADA", "--skip_sub_layer_num", "8"]
    for path, profile in (([], "smollm2"), (["--model_path", "mine"], None)):
        options = vars(command("chat").parser("adaskip chat").parse_args([*asked, *path]))
        for own in ("plan", "compare", "prompt", "document"):
            del options[own]
        assert _configured(options, None).importance == profile


def test_an_answer_goes_on_behind_a_line_break(checkpoint: Path) -> None:
    options = {"model_path": str(checkpoint), "device": "cpu", "tasks": ("sample_qa",)}
    config = resolve(RunConfig(experiment="e2e", model_name="llama", policy="dense", **options))
    loaded = LoadedModel.open(config)
    (talk,) = _conversations(loaded, config, None, compare=False).values()
    (line_break,) = loaded.tokenizer("\n").input_ids
    # The short answers of the task end there.
    assert line_break in loaded.stop_rule(config, "sample_qa").token_ids
    assert set(talk.ends) == {loaded.tokenizer.eos_token_id}


def test_a_question_that_one_of_two_has_answered_is_forgotten_by_both(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options: dict[str, Any] = {"model_path": str(checkpoint), "device": "cpu"}
    options |= {"tasks": ("sample_qa",), "max_new_tokens": 2}
    config = resolve(RunConfig(experiment="e2e", model_name="llama", policy="dense", **options))
    policy = FixedSkipping(SkipPlan({Sublayer(1, "attn"): None}))
    talks = _conversations(LoadedModel.open(config), config, policy, compare=True)
    ask = Conversation.ask

    def failing(self: Conversation, question: str, write: Callable[[str], None]) -> Answer:
        if self.policy is not None and question != "One":
            raise KeyboardInterrupt if question == "Two" else AdaskipError("too long")
        return ask(self, question, write)

    monkeypatch.setattr(Conversation, "ask", failing)
    _talk(talks, ["One", "Two", "Three"])
    for talk in talks.values():
        assert [turn["content"] for turn in talk.messages if turn["role"] == "user"] == ["One"]
    shown = capsys.readouterr().out
    assert "(interrupted; the question is forgotten)" in shown
    assert "error: too long" in shown


def test_what_an_answer_is_and_took(checkpoint: Path) -> None:
    model, tokenizer = load_model(checkpoint, device="cpu"), load_tokenizer(checkpoint)
    tokenizer.chat_template = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}"
    plan = SkipPlan({Sublayer(1, "attn"): None, Sublayer(3, "ffn"): 0.9})
    talk = Conversation(
        model, tokenizer, model_spec(checkpoint), {2}, FixedSkipping(plan), max_new_tokens=6
    )
    pieces: list[str] = []
    answer = talk.ask("Why?", pieces.append)
    ids = tokenizer("<Why?>", return_tensors="pt").input_ids
    with skipping(model, plan):
        expected = model.generate(ids, max_new_tokens=6, do_sample=False, eos_token_id=2)
    assert answer.text == tokenizer.decode(expected[0, 6:], skip_special_tokens=True)
    assert "".join(pieces) == answer.text
    assert (answer.n_prompt, answer.n_tokens) == (6, expected.shape[1] - 6)
    # The last token is never an input; 3 of 4 layers hold 2 x 16 numbers of 4 bytes of each other.
    assert answer.kv_bytes == (expected.shape[1] - 1) * 3 * 128
    assert talk.remembers
    assert talk.ask("And?", pieces.append).n_prompt == len(f"<Why?><{answer.text}><And?>".encode())


def test_a_document_stands_before_the_first_question(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("mine.txt").write_text("A text.")
    options = ["--model", str(checkpoint), "--device", "cpu", "--max_new_tokens", "2"]
    options += ["--document", "mine.txt"]
    asked: list[str] = []

    def ask(talk: Conversation, question: str, write: Any) -> Answer:
        asked.append(question)
        talk.messages = [*talk.messages, {"role": "user", "content": question}]
        return Answer("", 1, 1, 0.1, None, 1)

    monkeypatch.setattr(Conversation, "ask", ask)
    typed: Iterator[str] = iter(())
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    for remembers, second in ((True, "Two?"), (False, "A text.\n\nTwo?")):
        asked.clear()
        monkeypatch.setattr(Conversation, "remembers", remembers)
        typed = iter(["One?", "Two?", "/new", "Three?", "/quit"])
        said(capsys, "chat", *options)
        assert asked == ["Hello.", "A text.\n\nOne?", second, "A text.\n\nThree?"]
    asked.clear()
    said(capsys, "chat", *options, "--prompt", "What?")
    assert asked[1:] == ["A text.\n\nWhat?"]


def test_a_conversation_goes_on_begins_anew_and_ends(
    capsys: pytest.CaptureFixture[str], checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed: Iterator[str] = iter(["One", "", "x" * 1100, "/new", "Two", "/quit", "never asked"])
    monkeypatch.setattr("builtins.input", lambda prompt: next(typed))
    policy = ["--policy", "EE", "--skip_full_layer_num", "1"]
    options = ["--model", str(checkpoint), "--device", "cpu", "--max_new_tokens", "3"]
    shown = said(capsys, "chat", *options, *policy)
    assert "EarlyExit(n_skip=1)" in shown
    assert "no chat template: every question stands alone" in shown
    assert "error: The conversation has 1100 tokens" in shown
    assert len(re.findall(r"^\| EE 1 ", shown, flags=re.M)) == 2
    assert next(typed) == "never asked"
