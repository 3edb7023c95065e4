"""The command lines of runs and of their scores: options built from `RunConfig`."""

from __future__ import annotations

import argparse
import dataclasses
import logging
import shlex
import types
import typing
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from adaskip.command import BEGINS_ANEW, Command, say
from adaskip.models.spec import model_names
from adaskip.plan import SCOPES, Scope
from adaskip.policies import POLICIES
from adaskip.policies.factory import takers
from adaskip.runs.runconfig import DENSE, POLICY_OPTIONS, RunConfig, refuse_unused, unused_options
from adaskip.tasks.spec import task_names, task_spec

logger = logging.getLogger(__name__)

# Options that say how a model is loaded.
LOADING = ("model_path", "dtype", "device", "device_map", "allow_pickle")
# Whose warm-up documents teach importance where no experiment says it: they need no download.
WARM_UP = "sample_qa"


def add_model(parser: argparse.ArgumentParser) -> None:
    """Adds the option that says which model."""
    text = f"{', '.join(model_names())}, a folder or a hub id"
    parser.add_argument("--model", dest="model_name", required=True, metavar="NAME", help=text)


def add_run_options(
    parser: argparse.ArgumentParser, names: Collection[str] | None = None, **defaults: Any
) -> None:
    """Adds one option per field of `RunConfig` that has a help text.

    Args:
        parser: gets them.
        names: of the fields; None for all.
        defaults: in place of a field's own, in the help text, too.
    """
    hints = typing.get_type_hints(RunConfig)
    for item in dataclasses.fields(RunConfig):
        if "help" not in item.metadata or (names is not None and item.name not in names):
            continue
        default = item.default
        if item.default_factory is not dataclasses.MISSING:
            default = item.default_factory()
        text = item.metadata["help"]
        if item.name in defaults:
            default = defaults[item.name]
            text = text.partition(" (default: ")[0]
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
        text = text.format(**_names()).replace("%", "%%")
        if default not in (None, "", ()) and kind is not bool:
            text += f" (default: {default})"
        parser.add_argument(f"--{item.name}", help=text, **settings)


def as_words(given: Mapping[str, Any], **defaults: Any) -> list[str]:
    """The options that were given otherwise than by default, as words of a command.

    Args:
        given: values by the names of `RunConfig`'s fields; others are passed over.
        defaults: in place of a field's own, as for `add_run_options`.
    """
    words: list[str] = []
    for item in dataclasses.fields(RunConfig):
        value = given.get(item.name)
        if value in (None, defaults.get(item.name, item.default)):
            continue
        if isinstance(value, bool):
            words.append(f"--{'' if value else 'no-'}{item.name}")
        else:
            words += [f"--{item.name}", *map(str, value if isinstance(value, list) else [value])]
    return words


def _names() -> dict[str, str]:
    """What help texts may list."""
    budgets = {name: policy.budget for name, policy in POLICIES.items()}
    listed = {
        "policies": [DENSE, *POLICIES],
        "tasks": task_names(),
        "by_layers": [name for name, unit in budgets.items() if unit == "layers"],
        "by_sublayers": [name for name, unit in budgets.items() if unit == "sublayers"],
        "by_plan": takers("plan_file"),
        "by_depth": [name for name in task_names() if task_spec(name).takes_depth],
    }
    return {key: ", ".join(names) for key, names in listed.items()}


def run_command(experiment: Scope, model_name: str) -> Command:
    """What a script does: one experiment on one model."""
    return Command(
        f"The {experiment} experiment on {model_name}: generates answers with sublayers skipped.",
        _options,
        lambda given: _run(vars(given) | {"experiment": experiment, "model_name": model_name}),
        "--policy EE --skip_full_layer_num 4",
    )


def run_main(experiment: Scope, model_name: str, argv: Sequence[str] | None = None) -> int:
    """What `prefill/run_llama.py` and its like call.

    Args:
        experiment: the folder of the script.
        model_name: the model in its name.
        argv: the options, by default those of the command line.

    Returns:
        The exit code.
    """
    return run_command(experiment, model_name).main(argv)


def _options(parser: argparse.ArgumentParser) -> None:
    add_run_options(parser)
    users = ", ".join(takers("acceleration"))
    text = f"budget as the ratio of dense to skipped time, of {users}"
    parser.add_argument("--acceleration", type=float, metavar="RATIO", help=text)


def _any_options(parser: argparse.ArgumentParser) -> None:
    """Those of `adaskip run`, which also takes what a script has in its name."""
    parser.add_argument(
        "--experiment", choices=SCOPES, default="e2e", help="where plans apply (default: e2e)"
    )
    add_model(parser)
    _options(parser)


def _run(given: dict[str, Any], scorer: str = "python eval/eval.py") -> int:
    """Makes a run and says what scores it."""
    refuse_unused(given, [given["policy"]])
    acceleration, loaded = given.pop("acceleration"), None
    config = RunConfig.from_dict(given)
    from adaskip.runs.runner import accelerated, resolve, run

    if acceleration is not None:
        config, loaded = accelerated(config, acceleration)
    resolved = resolve(config)
    for sentence in unused_options(config, resolved.tasks, str(resolved.warmup_task)):
        logger.warning(sentence)
    folder = run(config, loaded)
    say(f"{folder} is complete; score it: {scoring_command(config, scorer)}")
    return 0


def scoring_command(config: RunConfig, scorer: str = "python eval/eval.py") -> str:
    """What scores a run, to be pasted into a shell."""
    words = [*scorer.split(), "--name", config.run_name]
    if config.results_dir != RunConfig.results_dir:
        words += ["--results_dir", config.results_dir]
    if config.min_length != RunConfig.min_length:
        words += ["--min_length", str(config.min_length)]
    return shlex.join(words)


RUN = Command(
    "Runs one experiment on a model: generates answers with sublayers skipped.",
    _any_options,
    lambda given: _run(vars(given), scorer="adaskip score"),
    "--model smollm2 --policy ADA --skip_sub_layer_num 8 --limit 2",
)


def _score_options(parser: argparse.ArgumentParser) -> None:
    from adaskip.runs.scoring import MIN_LENGTH

    # The paper's README calls it --model.
    parser.add_argument(
        "--name", "--model", required=True, help="the run's name, e.g. llama-EE-PREFILL"
    )
    parser.add_argument(
        "--results_dir", default="results", help="folder that holds the runs, or a sweep's"
    )
    parser.add_argument(
        "--min_length",
        type=int,
        default=MIN_LENGTH,
        metavar="N",
        help=f"LongBench rows must be longer to count (default: {MIN_LENGTH})",
    )


def _score(given: argparse.Namespace) -> int:
    from adaskip.runs.evaluation import evaluate

    say(evaluate(Path(given.results_dir), given.name, min_length=given.min_length))
    return 0


SCORE = Command(
    "Scores every budget of a run and shows the dense run beside it.",
    _score_options,
    _score,
    "--name smollm2-ADA-E2E",
    BEGINS_ANEW,
)


def eval_main(argv: Sequence[str] | None = None) -> int:
    """What `eval/eval.py` calls."""
    return SCORE.main(argv)


def _plain_type(hint: Any) -> type:
    """`int` for `int | None`, `tuple` for `tuple[str, ...]`, and any other type as it is."""
    if isinstance(hint, types.UnionType):
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    origin = typing.get_origin(hint) or hint
    return origin if isinstance(origin, type) else str
