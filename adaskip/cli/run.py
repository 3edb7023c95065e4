"""The command lines: options built from `RunConfig`, and errors turned into exit codes."""

from __future__ import annotations

import argparse
import dataclasses
import io
import logging
import math
import shlex
import sys
import types
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from adaskip.errors import AdaskipError
from adaskip.models.processes import launched_as_main
from adaskip.plan import Scope
from adaskip.policies import POLICIES
from adaskip.policies.factory import takers
from adaskip.runs.runconfig import DENSE, POLICY_OPTIONS, RunConfig, refuse_unused
from adaskip.tasks.spec import task_names

FAILED, BAD_INPUT, INTERRUPTED = 1, 2, 130


class Parser(argparse.ArgumentParser):
    """argparse that reports a bad option as every other bad input: in one sentence."""

    def error(self, message: str) -> NoReturn:
        """Raises an `AdaskipError` in place of printing the usage."""
        raise AdaskipError(f"{message} (see {self.prog} --help)")


def say(text: str) -> None:
    """Prints a result: the command lines' one outlet."""
    if launched_as_main():
        print(text, flush=True)  # noqa: T201 - what the user asked for goes to stdout


def guarded(action: Callable[[], int]) -> int:
    """Runs a command; returns its exit code, 2 for bad input, 130 for Ctrl-C."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A terminal that lacks a character shows a question mark in its place.
        sys.stdout.reconfigure(errors="replace")
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    logging.getLogger("adaskip").setLevel(logging.INFO if launched_as_main() else logging.ERROR)
    try:
        return action()
    except AdaskipError as error:
        sentence = " ".join(str(error).split())
        print(f"error: {sentence}", file=sys.stderr)  # noqa: T201 - see say()
        return BAD_INPUT
    except KeyboardInterrupt:
        message = "interrupted: finished rows are kept; the same command continues."
        print(message, file=sys.stderr)  # noqa: T201 - see say()
        return INTERRUPTED


def add_run_options(parser: argparse.ArgumentParser) -> None:
    """Adds one option per field of `RunConfig` that has a help text."""
    hints = typing.get_type_hints(RunConfig)
    for item in dataclasses.fields(RunConfig):
        if "help" not in item.metadata:
            continue
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        # What was not given cannot be refused.
        absent = argparse.SUPPRESS if item.name in POLICY_OPTIONS else default
        settings: dict[str, Any] = {"dest": item.name, "default": absent}
        kind = _plain_type(hints[item.name])
        if kind is bool:
            settings["action"] = argparse.BooleanOptionalAction
        elif kind is tuple:
            settings.update(nargs="+", metavar="NAME")
        else:
            settings.update(type=kind, metavar="N" if kind is int else "TEXT")
        text = item.metadata["help"].format(**_names()).replace("%", "%%")
        if default not in (None, "", ()) and kind is not bool:
            text += f" (default: {default})"
        parser.add_argument(f"--{item.metadata['flag'] or item.name}", help=text, **settings)


def _names() -> dict[str, str]:
    """What help texts may list."""
    budgets = {name: policy.budget for name, policy in POLICIES.items()}
    listed = {
        "policies": [DENSE, *POLICIES],
        "tasks": task_names(),
        "by_layers": [name for name, unit in budgets.items() if unit == "layers"],
        "by_sublayers": [name for name, unit in budgets.items() if unit == "sublayers"],
    }
    return {key: ", ".join(names) for key, names in listed.items()}


def ratio(text: str) -> float:
    """An acceleration given on a command line.

    Raises:
        argparse.ArgumentTypeError: it is no finite number from 1 up.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise argparse.ArgumentTypeError(
            f"{text} is no acceleration; give dense time / skipped time, 1 or more, such as 1.2"
        )
    return value


def run_main(experiment: Scope, model_name: str, argv: Sequence[str] | None = None) -> int:
    """What `prefill/run_llama.py` and its like call.

    Args:
        experiment: the folder of the script.
        model_name: the model in its name.
        argv: the options, by default those of the command line.

    Returns:
        The exit code.
    """

    def action() -> int:
        parser = Parser(
            description=f"The {experiment} experiment on {model_name}: generates answers with "
            "sublayers skipped; eval/eval.py scores them.",
            allow_abbrev=False,
        )
        add_run_options(parser)
        users = takers("acceleration")
        parser.add_argument(
            "--acceleration",
            type=ratio,
            metavar="RATIO",
            help=f"budget as the ratio of dense to skipped time, of {', '.join(users)}",
        )
        given = vars(parser.parse_args(argv))
        refuse_unused(given, [given["policy"]])
        given["tasks"] = tuple(given["tasks"])
        acceleration, loaded = given.pop("acceleration"), None
        config = RunConfig(experiment=experiment, model_name=model_name, **given)
        from adaskip.runs.acceleration import accelerated
        from adaskip.runs.runner import run

        if acceleration is not None:
            config, loaded = accelerated(config, acceleration)
        config.check()
        folder = run(config, loaded)
        say(f"{folder} is complete; score it: {scoring_command(config)}")
        return 0

    return guarded(action)


def scoring_command(config: RunConfig) -> str:
    """What scores a run, to be pasted into a shell."""
    words = ["python", "eval/eval.py", "--model", config.run_name]
    if config.results_dir != RunConfig.results_dir:
        words += ["--results_dir", config.results_dir]
    return shlex.join(words)


def eval_main(argv: Sequence[str] | None = None) -> int:
    """What `eval/eval.py` calls: scores every budget of a run and prints the table."""

    def action() -> int:
        from adaskip.runs.scoring import MIN_LENGTH

        parser = Parser(description="Scores every budget of a run.", allow_abbrev=False)
        parser.add_argument("--model", required=True, metavar="NAME", help="the run's name")
        parser.add_argument("--results_dir", default="results", help="folder that holds the runs")
        parser.add_argument(
            "--min_length",
            type=int,
            default=MIN_LENGTH,
            metavar="N",
            help=f"LongBench rows must be longer to count (default: {MIN_LENGTH})",
        )
        given = parser.parse_args(argv)
        from adaskip.runs.evaluation import evaluate

        say(evaluate(Path(given.results_dir), given.model, min_length=given.min_length))
        return 0

    return guarded(action)


def _plain_type(hint: Any) -> type:
    """`int` for `int | None`, `tuple` for `tuple[str, ...]`, and any other type as it is."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    origin = typing.get_origin(hint) or hint
    return origin if isinstance(origin, type) else str
