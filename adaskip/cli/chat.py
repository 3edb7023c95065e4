"""`adaskip chat`: talks to a model, dense or with sublayers skipped, or to both by turns."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from adaskip.cli.run import LOADING, WARM_UP, add_model, add_run_options
from adaskip.command import BEGINS_ANEW, Command, say
from adaskip.configuration import cache_root
from adaskip.errors import AdaskipError
from adaskip.importance import shipped_profiles
from adaskip.plan import SCOPES, SkipPlan
from adaskip.policies import POLICIES, FixedSkipping, SkipPolicy
from adaskip.policies.factory import BUDGETS, LEARNED, takes
from adaskip.runs.calibration import read_texts
from adaskip.runs.conversation import Answer, Conversation
from adaskip.runs.ledger import answer_length
from adaskip.runs.loaded import LoadedModel
from adaskip.runs.runconfig import DENSE, PLAN_FILE, POLICY_OPTIONS, RunConfig, refuse_unused
from adaskip.runs.runner import resolve
from adaskip.tables import MISSING, markdown_table, number

NEW, QUIT = "/new", "/quit"
# Said before a conversation, so that the first answer's times hold no first call's cost.
_HELLO = "Hello."


def _options(parser: argparse.ArgumentParser) -> None:
    names = ", ".join((DENSE, *POLICIES))
    add_model(parser)
    parser.add_argument("--plan", metavar="FILE", help="what is skipped: a plan's file, or name")
    parser.add_argument("--policy", default=DENSE, metavar="NAME", help=f"or one of: {names}")
    add_run_options(parser, {*BUDGETS.values(), *POLICY_OPTIONS} - {"plan"})
    parser.add_argument(
        "--scope", default="e2e", choices=SCOPES, help="where plans apply (default: e2e)"
    )
    parser.add_argument(
        "--compare", action="store_true", help="every answer dense as well, with times and memory"
    )
    parser.add_argument(
        "--document", type=Path, metavar="FILE", help="a text that the first question is about"
    )
    parser.add_argument("--prompt", metavar="TEXT", help="answer this and end")
    parser.add_argument(
        "--max_new_tokens", type=int, default=256, metavar="N", help="answer length (default: 256)"
    )
    add_run_options(parser, LOADING)


def _act(given: argparse.Namespace) -> int:
    options = vars(given)
    own = {key: options.pop(key) for key in ("plan", "compare", "prompt", "document")}
    document = "".join(read_texts([own["document"]] if own["document"] else []).values())
    config = _configured(options, own["plan"])
    # Whatever is wrong with a plan's file is found before a model is loaded.
    plan = SkipPlan.load(own["plan"]) if own["plan"] else None
    loaded = LoadedModel.open(config)
    policy = loaded.policy(config, WARM_UP) if plan is None else FixedSkipping(plan)
    talks = _conversations(loaded, config, policy, compare=own["compare"])
    for talk in talks.values():
        replace(talk, messages=[], max_new_tokens=2).ask(_HELLO, lambda text: None)
    first = next(iter(talks.values()))
    if own["prompt"] is not None:
        _turn(talks, about(document, first, own["prompt"]))
        return 0
    say(f"{config.model_name}: {policy or 'nothing skipped'}. {NEW} begins anew, {QUIT} ends.")
    if not first.remembers:
        say("The tokenizer has no chat template: every question stands alone.")
    _talk(talks, _questions(), document)
    return 0


def _configured(options: dict[str, Any], plan: str | None) -> RunConfig:
    """The resolved configuration; what is learned for it is kept in the cache folder.

    Raises:
        AdaskipError: an option is wrong, or both a plan and a policy are given.
    """
    policy, scope = options["policy"], options.pop("scope")
    if takes(policy, PLAN_FILE):
        # As `adaskip run` has it: the file says what is skipped, and how much.
        if plan is None:
            raise AdaskipError(f"Policy {policy} needs the file of a plan: --plan FILE.")
        policy = options["policy"] = DENSE
    if plan is not None and policy != DENSE:
        raise AdaskipError(f"--plan and --policy {policy} both say what is skipped: give one.")
    refuse_unused(options, [policy])
    shipped = options["model_path"] is None and options["model_name"] in shipped_profiles()
    if takes(policy, LEARNED) and shipped:
        options.setdefault(LEARNED, options["model_name"])
    if takes(policy, "online"):
        options.setdefault("online", False)
    rest = {"tasks": (WARM_UP,), "warmup_task": WARM_UP, "results_dir": str(cache_root())}
    return resolve(RunConfig.from_dict({"experiment": scope, **rest, **options}))


def _conversations(
    loaded: LoadedModel, config: RunConfig, policy: SkipPolicy | None, *, compare: bool
) -> dict[str, Conversation]:
    """By what they are called: under the policy, and before it dense if both are wanted."""
    # An answer goes on behind a line break, where those of most tasks end.
    dense = Conversation(
        loaded.model,
        loaded.tokenizer,
        loaded.spec,
        loaded.end_tokens(),
        max_new_tokens=answer_length(config, WARM_UP),
    )
    if policy is None:
        if compare:
            raise AdaskipError("--compare puts dense beside a plan: give --plan or --policy.")
        return {DENSE: dense}
    name = "plan" if config.policy == DENSE else f"{config.policy} {config.budget}"
    skipped = replace(dense, policy=policy, scope=config.experiment, messages=[])
    return {DENSE: dense, name: skipped} if compare else {name: skipped}


def _questions() -> Iterator[str]:
    """What the user types, until the end of the input."""
    while True:
        try:
            yield input("> ").strip()
        except EOFError:
            return


def about(document: str, talk: Conversation, question: str) -> str:
    """A question, behind the document unless the conversation has it already."""
    told = talk.remembers and talk.messages
    return question if told or not document else f"{document}\n\n{question}"


def _talk(talks: Mapping[str, Conversation], questions: Iterable[str], document: str = "") -> None:
    first = next(iter(talks.values()))
    for question in questions:
        if question == QUIT:
            return
        if question == NEW:
            for talk in talks.values():
                talk.messages = []
        elif question:
            try:
                _turn(talks, about(document, first, question))
            except AdaskipError as error:
                say(f"error: {error}")
            except KeyboardInterrupt:
                say(" (interrupted; the question is forgotten)")


def _turn(talks: Mapping[str, Conversation], question: str) -> None:
    """One question, answered by each, and what the answers took; by all of them or none."""
    answers, before = {}, {name: talk.messages for name, talk in talks.items()}
    try:
        for name, talk in talks.items():
            if len(talks) > 1:
                say(f"[{name}]")
            answers[name] = talk.ask(question, lambda text: say(text, end=""))
            say("")
    except BaseException:
        # Or their next answers would be to different conversations.
        for name, talk in talks.items():
            talk.messages = before[name]
        raise
    say(figures(answers))


def figures(answers: Mapping[str, Answer]) -> str:
    """What answers took, one line each."""
    header = ("", "prompt tokens", "TTFT s", "answer tokens", "tokens/s", "KV MB")
    rows = [
        (
            name,
            str(answer.n_prompt),
            number(answer.ttft, 3),
            str(answer.n_tokens),
            MISSING if answer.per_second is None else number(answer.per_second, 1),
            number(answer.kv_bytes / 1e6, 2),
        )
        for name, answer in answers.items()
    ]
    return markdown_table(header, rows)


CHAT = Command(
    "Talks to a model, dense or with sublayers skipped; with time to first token, speed and KV.",
    _options,
    _act,
    '--model smollm2 --policy ADA --skip_sub_layer_num 8 --compare --prompt "What is gravity?"',
    BEGINS_ANEW,
)
